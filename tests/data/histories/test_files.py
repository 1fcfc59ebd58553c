import gzip
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data.histories.files import HistoryReader, plan_histories
from llmrec.data.histories.plan import find_history_files
from llmrec.errors import DataError, MissingPartError


def users(count, seed=0):
    """Users with histories of 0 to 6 items."""
    generator = np.random.default_rng(seed)
    histories = [[f"i{item}" for item in generator.integers(0, 99, generator.integers(0, 7))] for _ in range(count)]
    return pa.table({"user_id": [f"u{row}" for row in range(count)], "age": range(count), "history": histories})


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_all(plan, runs=None):
    """Histories and kept rows of the runs, in their order."""
    reader = HistoryReader(plan)
    histories, rows = [], []
    for run in plan.runs if runs is None else runs:
        found, kept = reader.read(run)
        assert len(found) == run.num_rows
        histories += found
        rows += kept.to_pylist()
    reader.close()
    return histories, rows


def test_runs_lie_within_row_groups_and_cover_all_rows_in_order(tmp_path):
    table = users(23)
    pq.write_table(table.slice(0, 17), tmp_path / "a.parquet", row_group_size=7)
    pq.write_table(table.slice(17), tmp_path / "b.parquet", row_group_size=100)
    plan = plan_histories(tmp_path, history_column="history", rows_per_run=5)
    found = [(run.file, run.row_group, run.start, run.num_rows, run.first_row) for run in plan.runs]
    assert found == [
        *[(0, 0, 0, 5, 0), (0, 0, 5, 2, 5), (0, 1, 0, 5, 7), (0, 1, 5, 2, 12), (0, 2, 0, 3, 14)],
        *[(1, 0, 0, 5, 0), (1, 0, 5, 1, 5)],
    ]
    assert plan.num_rows == 23
    assert [(file.num_rows, file.num_row_groups) for file in plan.files] == [(17, 3), (6, 1)]
    assert plan.files[0].sha256 == hashlib.sha256((tmp_path / "a.parquet").read_bytes()).hexdigest()
    assert plan.kept.names == ["user_id", "age"]

    histories, rows = read_all(plan)
    assert histories == table["history"].to_pylist()
    assert rows == table.select(["user_id", "age"]).to_pylist()
    # Whichever runs a process has, and also backwards.
    assert read_all(plan, plan.runs[1::3])[1] == [rows[row] for row in (5, 6, 14, 15, 16)]
    assert read_all(plan, plan.runs[1::-1])[0] == [*histories[5:7], *histories[:5]]
    assert read_all(plan, plan.runs[4:0:-3])[0] == [*histories[14:17], *histories[5:7]]


@pytest.mark.parametrize("name", ["users.jsonl", "users.jsonl.gz"])
def test_json_lines_are_read_from_the_byte_where_a_run_starts(tmp_path, name):
    table = users(12).to_pylist()
    table[3]["user_id"] = "ü ☃"  # more bytes than characters
    lines = [json.dumps(record, ensure_ascii=False) for record in table]
    lines[5:5] = ["", "  "]
    content = ("\ufeff" + "\r\n".join(lines)).encode()  # a byte order mark, Windows line ends, none at the end
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    plan = plan_histories(tmp_path / name, history_column="history", rows_per_run=5)
    assert [(run.num_rows, run.first_row) for run in plan.runs] == [(5, 1), (5, 8), (2, 13)]
    assert plan.files[0].sha256 == hashlib.sha256(content).hexdigest()
    histories, rows = read_all(plan)
    assert histories == [record["history"] for record in table]
    assert rows == [{"user_id": record["user_id"], "age": record["age"]} for record in table]
    assert read_all(plan, [plan.runs[2], plan.runs[0]])[0] == histories[10:] + histories[:5]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
        pa.list_(pa.string(), 2),
        pa.list_(pa.int64()),
    ],
    ids=str,
)
def test_lists_of_all_kinds(tmp_path, kind):
    values = [["7", "8"], ["9", "7"], ["8", "8"]]
    given = [[int(item) for item in row] for row in values] if kind.value_type == pa.int64() else values
    pq.write_table(pa.table({"history": pa.array(given, kind)}), tmp_path / "a.parquet", row_group_size=2)
    plan = plan_histories(tmp_path / "a.parquet", history_column="history", rows_per_run=2)
    assert read_all(plan)[0] == values


def test_a_column_of_json_values_has_one_type(tmp_path):
    first = {"history": [], "int": 1, "mixed": 1, "float": 1, "list": [1], "none": None, "bool": True, "big": 2**70}
    second = {"history": [5, "a"], "int": 2, "mixed": "x", "float": 0.5, "list": ["ü"], "bool": None, "late": "y"}
    paths = [write_lines(tmp_path / "a.jsonl", [first]), write_lines(tmp_path / "b.jsonl", [second])]
    plan = plan_histories(paths, history_column="history", rows_per_run=9)
    types = {field.name: str(field.type) for field in plan.kept}
    strings = dict.fromkeys(("mixed", "list", "none", "big", "late"), "string")
    assert types == {"int": "int64", "float": "double", "bool": "bool", **strings}
    histories, rows = read_all(plan)
    assert histories == [[], ["5", "a"]]
    assert [row["int"] for row in rows] == [1, 2]
    assert [row["float"] for row in rows] == [1.0, 0.5]
    assert [row["mixed"] for row in rows] == ["1", "x"]
    assert [row["list"] for row in rows] == ["[1]", '["ü"]']
    assert [row["late"] for row in rows] == [None, "y"]
    assert rows[0]["big"] == str(2**70)


def test_columns_can_be_chosen(tmp_path):
    pq.write_table(users(4), tmp_path / "a.parquet")
    write_lines(tmp_path / "b.jsonl", users(4).to_pylist())
    for name in ("a.parquet", "b.jsonl"):
        plan = plan_histories(tmp_path / name, history_column="history", keep_columns=["user_id"], rows_per_run=3)
        assert read_all(plan)[1] == [{"user_id": f"u{row}"} for row in range(4)]
        plan = plan_histories(tmp_path / name, history_column="history", keep_columns=["history"], rows_per_run=3)
        assert plan.kept.names == ["history"]
        if name == "a.parquet":
            assert read_all(plan)[1] == users(4).select(["history"]).to_pylist()
        else:  # a list is text to a column of JSON values
            assert [json.loads(row["history"]) for row in read_all(plan)[1]] == users(4)["history"].to_pylist()
        plan = plan_histories(tmp_path / name, history_column="history", keep_columns=[], rows_per_run=3)
        assert read_all(plan) == (users(4)["history"].to_pylist(), [])
        for wrong in ({"history_column": "items"}, {"history_column": "history", "keep_columns": ["items"]}):
            with pytest.raises(DataError, match=r"'items' is not there; the columns are 'user_id', 'age', 'history'"):
                plan_histories(tmp_path / name, rows_per_run=3, **wrong)


def test_no_rows(tmp_path):
    pq.write_table(users(3).slice(3), tmp_path / "a.parquet")
    pq.write_table(users(0), tmp_path / "c.parquet")  # columns of type null
    (tmp_path / "b.jsonl").write_text("\n")
    for name in ("a.parquet", "b.jsonl", "c.parquet"):
        plan = plan_histories(tmp_path / name, history_column="history", rows_per_run=3)
        assert [run.num_rows for run in plan.runs] == [0]
        assert read_all(plan) == ([], [])


def test_a_null_is_named_with_its_place(tmp_path):
    histories = [["a"], [], ["b", "c"], ["d", None], ["e"], None]
    table = pa.table({"history": pa.array(histories, pa.list_(pa.string()))})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=2)
    with pytest.raises(DataError, match=r"a\.parquet, row group 1, row 3: an item of the history is null"):
        plan_histories(path, history_column="history", rows_per_run=1)
    pq.write_table(table.slice(4), path)
    with pytest.raises(DataError, match=r"a\.parquet, row group 0, row 1: the history is null"):
        plan_histories(path, history_column="history", rows_per_run=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"history": null}', "line 3: the history is null; write a list"),
        ('{"history": "a"}', 'line 3: the history is "a"; write a list'),
        ('{"history": ["a", null]}', "line 3: an item of the history is null"),
        ('{"history": [true]}', "line 3: an item of the history is true"),
        ('{"history": [1.5]}', "line 3: an item of the history is 1.5"),
        ('{"user": 1}', "line 3: the column 'history' is not there; the columns are 'user'"),
        ('{"history": [', "line 3, is not valid JSON"),
        ('["a"]', "line 3: JSON Lines needs one JSON object a line"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"history": []}\n\n' + line + "\n")
    with pytest.raises(DataError, match=message.replace("[", r"\[")):
        plan_histories(tmp_path / "a.jsonl", history_column="history", rows_per_run=1)


def test_wrong_columns(tmp_path):
    pq.write_table(users(2), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'user_id' is of type string; histories must be lists"):
        plan_histories(tmp_path, history_column="user_id", rows_per_run=1)
    pq.write_table(users(2).drop_columns("age"), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"different columns: user_id \(string\), age \(int64\); and user_id"):
        plan_histories(tmp_path, history_column="history", rows_per_run=1)
    assert plan_histories(tmp_path, history_column="history", keep_columns=["user_id"], rows_per_run=1).num_rows == 4
    pq.write_table(users(2).select(["history"]), tmp_path / "0.parquet")  # nothing to keep, unlike in the others
    with pytest.raises(DataError, match="different columns: none; and"):
        plan_histories(tmp_path, history_column="history", rows_per_run=1)


def test_sources(tmp_path):
    for name in ("b.parquet", "a.parquet", "_old.parquet", ".hidden.parquet", "notes.txt"):
        (tmp_path / name).touch()
    names = [path.name for path in find_history_files(tmp_path)]
    assert names == ["a.parquet", "b.parquet"]
    assert [path.name for path in find_history_files(str(tmp_path / "[ab].par*"))] == names
    listed = find_history_files([tmp_path / "b.parquet", str(tmp_path / "a.parquet")])
    assert [path.name for path in listed] == names[::-1]
    with pytest.raises(DataError, match="given twice"):
        find_history_files([tmp_path, tmp_path / "a.parquet"])
    with pytest.raises(DataError, match=r"notes\.txt is no file of histories"):
        find_history_files(tmp_path / "notes.txt")
    with pytest.raises(MissingPartError, match="there is no file"):
        find_history_files(tmp_path / "c.parquet")
    with pytest.raises(MissingPartError, match="no file matches"):
        find_history_files(str(tmp_path / "c*.parquet"))
    with pytest.raises(MissingPartError, match="name at least one"):
        find_history_files([])
    (tmp_path / "c.jsonl").touch()
    with pytest.raises(DataError, match="of two kinds"):
        find_history_files(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(MissingPartError, match="holds no file that ends in"):
        find_history_files(tmp_path / "folder")
    with pytest.raises(DataError, match="can't be read as Parquet"):
        plan_histories(tmp_path / "a.parquet", history_column="history", rows_per_run=1)


def test_a_file_that_changes_meanwhile_is_found_out(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"history": ["a"]}] * 4)
    plan = plan_histories(path, history_column="history", rows_per_run=4)
    write_lines(path, [{"history": ["a"]}] * 3)
    with pytest.raises(DataError, match="has changed while it was read"):
        HistoryReader(plan).read(plan.runs[0])
    path = tmp_path / "a.parquet"
    pq.write_table(users(4), path)
    plan = plan_histories(path, history_column="history", rows_per_run=4)
    pq.write_table(users(3), path)
    with pytest.raises(DataError, match="has changed while it was read"):
        HistoryReader(plan).read(plan.runs[0])


@pytest.mark.parametrize("row_group_size", [500, 100_000])
def test_memory_doesnt_grow_with_the_rows(tmp_path, row_group_size):
    """In many row groups and in one: never more than a few runs of 100 rows, of 20 items of 12 bytes each."""
    peaks = []
    for count in (10_000, 60_000):
        ids = pa.array([f"item-{row:07d}" for row in range(count)])
        history = pa.ListArray.from_arrays(
            pa.array(range(0, 20 * count + 1, 20), pa.int32()),
            ids.take(pa.array(np.random.default_rng(0).integers(0, count, 20 * count))),
        )
        pq.write_table(
            pa.table({"user_id": ids, "history": history}),
            tmp_path / f"{count}.parquet",
            row_group_size=row_group_size,
            use_dictionary=False,
            data_page_size=1 << 16,
        )
        del ids, history
        before = pa.total_allocated_bytes()
        peak = 0
        plan = plan_histories(tmp_path / f"{count}.parquet", history_column="history", rows_per_run=100)
        reader = HistoryReader(plan)
        for run in plan.runs[1::2]:
            reader.read(run)
            peak = max(peak, pa.total_allocated_bytes() - before)
        reader.close()
        peaks.append(peak)
    size = (tmp_path / "60000.parquet").stat().st_size
    assert peaks[1] < 1.5 * peaks[0]  # six times as many rows
    assert peaks[1] < size / 4, (peaks, size)
