"""Every file format through `InteractionDataset.from_files`, well-formed and malformed."""

import gzip
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmrec.data.interactions import InteractionDataset
from llmrec.errors import DataError, MissingPartError

ROWS = [("u", "a", 20), ("u", "b", 10), ("v", "a", 5)]


def read(tmp_path, name, content, **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return InteractionDataset.from_files(path, **options)


def histories(dataset):
    return {user: [dataset.item_ids[row] for row in dataset.history(n)] for n, user in enumerate(dataset.user_ids)}


def csv_text(separator=","):
    return "\n".join(separator.join(map(str, row)) for row in [("user_id", "item_id", "timestamp"), *ROWS]) + "\n"


def json_lines():
    return "".join(json.dumps({"user_id": u, "item_id": i, "timestamp": t}) + "\n" for u, i, t in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", csv_text()),
        ("x.tsv", csv_text("\t")),
        ("x.txt", csv_text("\t")),
        ("x.csv.gz", gzip.compress(csv_text().encode())),
        ("x.csv", csv_text().replace("\n", "\r\n")),
        ("x.csv", b"\xef\xbb\xbf" + csv_text().encode()),
        ("x.jsonl", json_lines()),
        ("x.jsonl.gz", gzip.compress(json_lines().encode())),
        ("x.jsonl", b"\xef\xbb\xbf" + json_lines().encode()),
    ],
)
def test_the_same_data_in_every_text_format(tmp_path, name, content):
    dataset = read(tmp_path, name, content)
    assert histories(dataset) == {"u": ["b", "a"], "v": ["a"]}
    assert dataset.flat_timestamps.tolist() == [10, 20, 5]
    assert dataset.name == "x"
    assert dataset.drops == {}


def test_parquet_file_and_folder_of_shards(tmp_path):
    table = pa.table(
        {"user_id": ["u", "u", "v"], "item_id": ["a", "b", "a"], "timestamp": [20, 10, 5], "extra": [1, 2, 3]}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "shard-0.parquet")
    expected = {"u": ["b", "a"], "v": ["a"]}
    assert histories(InteractionDataset.from_files(tmp_path / "x.parquet")) == expected
    folder = tmp_path / "shards"
    folder.mkdir()
    pq.write_table(table.slice(0, 2), folder / "0.parquet")
    pq.write_table(table.slice(2), folder / "1.parquet")
    assert histories(InteractionDataset.from_files(folder)) == expected


def test_other_column_names_and_delimiter(tmp_path):
    dataset = read(
        tmp_path,
        "x.csv",
        "when;who;what\n20;u;a\n10;u;b\n",
        user_column="who",
        item_column="what",
        timestamp_column="when",
        delimiter=";",
    )
    assert histories(dataset) == {"u": ["b", "a"]}


def test_items_with_titles_in_another_column_and_line_breaks(tmp_path):
    items = tmp_path / "items.csv"
    items.write_text('item_id,name,price\nb,"two\nlines",2.5\na,"comma, quoted",\nz,never taken,1\n')
    dataset = read(tmp_path, "x.csv", csv_text(), items=items, title_column="name")
    assert dataset.item_ids == ("b", "a", "z")
    assert dataset.titles == ("two\nlines", "comma, quoted", "never taken")
    assert dataset.items["price"][:] == [2.5, None, 1.0]
    assert histories(dataset) == {"u": ["b", "a"], "v": ["a"]}
    with pytest.raises(DataError, match="no column 'headline'; its columns are 'item_id', 'name', 'price'"):
        read(tmp_path, "x.csv", csv_text(), items=items, title_column="headline")


def test_without_timestamps_the_rows_give_the_order(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "llmrec"):
        dataset = read(tmp_path, "x.csv", "user_id,item_id\nu,b\nv,c\nu,a\n")
    assert histories(dataset) == {"u": ["b", "a"], "v": ["c"]}
    assert dataset.flat_timestamps is None
    assert "no timestamps: the order of its rows" in caplog.text
    ignored = read(tmp_path, "x.csv", csv_text(), timestamp_column=None)
    assert histories(ignored) == {"u": ["a", "b"], "v": ["a"]}


def test_leading_zeros_stay_and_floats_of_missing_values_go(tmp_path):
    assert read(tmp_path, "x.csv", "user_id,item_id\nu,007\nu,7\n").item_ids == ("007", "7")
    dataset = read(tmp_path, "x.csv", "user_id,item_id\nu,1.0\nu,\n,2.0\nu,2.0\n")
    assert dataset.item_ids == ("1", "2")
    assert dataset.drops == {"missing user ID": 1, "missing item ID": 1}


def test_json_lines_that_mix_types(tmp_path):
    lines = [(1, 1), ("1", "1"), (1.0, 1.0), (None, 2), (float("nan"), 2)]
    content = "".join(json.dumps({"user_id": user, "item_id": item}) + "\n" for user, item in lines)
    dataset = read(tmp_path, "x.jsonl", content)
    assert histories(dataset) == {"1": ["1", "1", "1"]}
    assert dataset.drops == {"missing user ID": 2}
    dates = read(tmp_path, "x.jsonl", '{"user_id": "2020-01-01", "item_id": "x"}\n')
    assert dates.user_ids == ("2020-01-01",)


def test_bad_timestamps_are_dropped_and_counted(tmp_path, caplog):
    content = "user_id,item_id,timestamp\nu,a,2020-01-02\nu,b,2020-01-01\nu,c,banana\nu,d,\n"
    dataset = read(tmp_path, "x.csv", content)
    assert histories(dataset) == {"u": ["b", "a"]}
    assert dataset.drops == {"missing timestamp": 1, "timestamp that doesn't parse": 1}
    assert "dropped 1 of 4 interactions: timestamp that doesn't parse" in caplog.text


LATIN = "user_id,item_id\nu,café\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "user,item_id\nu,a\n", r"no column 'user_id'; its columns are 'user', 'item_id'"),
        ("x.csv", "", r"x.csv is empty"),
        ("x.csv", "user_id,item_id\n", "x.csv is empty: it has no rows"),
        ("x.csv", "user_id,item_id\nu,a,b\n", "Expected 2 columns, got 3.*delimiter"),
        ("x.csv", "user_id,item_id,timestamp\nu,a,soon\n", "1 of 1 timestamps don't parse, such as 'soon'"),
        ("x.csv", "user_id,item_id,timestamp\nu,a,\n", "without a single timestamp"),
        ("x.csv", "user_id,item_id\n,a\nu,\n", "no usable row is left of the 2"),
        ("x.csv", LATIN.encode("latin-1"), "x.csv is not utf-8: byte 0xe9 at offset 21.*encoding="),
        ("x.csv", LATIN.encode("utf-16"), "byte 0xff at offset 0.*'utf-16'"),
        ("x.csv", "user_id,item_id\nu,cafe\n".encode("utf-16-le"), "NUL bytes.*encoding='utf-16'"),
        ("x.csv", b"user_id,item_id\nu,a\0b\n", r"'a\\x00b' holds a NUL character"),
        ("x.jsonl", "", "x.jsonl is empty"),
        ("x.jsonl", "\n\n", "x.jsonl is empty"),
        ("x.jsonl", '{"user_id": "u", "item_id": "a"}\n{oops\n', "line 2, is not valid JSON"),
        ("x.jsonl", "[1, 2]\n", "line 1, holds a list"),
        ("x.jsonl", '{"user": "u", "item_id": "a"}\n', r"no column 'user_id'; its columns are 'user', 'item_id'"),
        ("x.jsonl", '{"user_id": "é", "item_id": 1}\n'.encode("latin-1"), "not utf-8: byte 0xe9 at offset 13"),
        ("x.parquet", b"", "x.parquet is empty"),
        ("x.parquet", b"nonsense", "can't be read as Parquet"),
        ("x.xlsx", b"nonsense", r"suffix '.xlsx', which no reader knows: use one of .csv"),
    ],
)
def test_malformed_files_are_refused(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, name, content)


def test_parquet_without_the_column(tmp_path):
    pq.write_table(pa.table({"user": ["u"], "item_id": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column 'user_id'; its columns are 'user', 'item_id'"):
        InteractionDataset.from_files(tmp_path / "x.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"holds no .parquet file"):
        InteractionDataset.from_files(tmp_path / "folder")


def test_a_byte_that_is_no_utf8_is_found_past_the_first_block(tmp_path):
    from llmrec.data.formats import delimited

    path = tmp_path / "x.csv"
    # the two bytes of "é" lie on both sides of the end of a block: they are no fault, the byte after them is
    head = b"x" * (delimited._BLOCK - 1)
    path.write_bytes(head + "é".encode() + b"ab\xff")
    with pytest.raises(DataError, match=f"byte 0xff at offset {len(head) + 4}"):
        delimited.check_encoding(path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize(("name", "content"), [("x.csv", LATIN), ("x.jsonl", '{"user_id": "u", "item_id": "café"}\n')])
def test_a_named_encoding_is_used(tmp_path, name, content, encoding):
    assert read(tmp_path, name, content.encode(encoding), encoding=encoding).item_ids == ("café",)


def test_unknown_encoding_missing_file_and_named_timestamp_column(tmp_path):
    with pytest.raises(DataError, match="Python knows no such encoding"):
        read(tmp_path, "x.csv", LATIN, encoding="klingon")
    with pytest.raises(MissingPartError, match=r"none.csv does not exist"):
        InteractionDataset.from_files(tmp_path / "none.csv")
    with pytest.raises(DataError, match="no column 'time'"):
        read(tmp_path, "x.csv", LATIN, timestamp_column="time")
