"""Answers for files of users: every user once, in order, whatever is stopped and whoever shares the work."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from recommendation.recommend_in_processes import Echo
from torch import nn

from llmrec.errors import DataError, MissingPartError, SettingsError, UnknownItemError
from llmrec.files import read_json, write_json
from llmrec.recommendation.batch import recommend_file
from llmrec.recommendation.batch_job import MANIFEST_NAME, SUCCESS_NAME, fingerprint_of

SCRIPT = Path(__file__).with_name("recommend_in_processes.py")


def write_users(path, count, *, row_group_size=12):
    """Users whose history starts with an item of their own, so that what was asked says who."""
    histories = [[f"of-{row}", *(f"i{item}" for item in range(row % 4))] for row in range(count)]
    table = pa.table({"user_id": [f"u{row}" for row in range(count)], "history": histories})
    pq.write_table(table, path, row_group_size=row_group_size)
    return table


def answers(folder):
    """All rows in the order of the names of the parts."""
    return pq.read_table(folder).to_pylist()


def expected(table, k):
    return [
        {
            "user_id": row["user_id"],
            "item_ids": row["history"][::-1][:k],
            "scores": [-float(rank) for rank in range(min(k, len(row["history"])))],
        }
        for row in table.to_pylist()
    ]


def parts(folder):
    return sorted(path.name for path in folder.glob("*.parquet"))


def identity(folder):
    """What changes when a file is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.parquet")}


# What is in the folder


def test_answers_stand_beside_the_kept_columns_in_the_order_of_the_input(tmp_path):
    table = write_users(tmp_path / "users.parquet", 29)
    summary = recommend_file(Echo(), tmp_path / "users.parquet", tmp_path / "out", 3, rows_per_part=5)
    assert answers(tmp_path / "out") == expected(table, 3)
    # Row groups of 12, 12 and 5 rows, in runs of 5.
    assert parts(tmp_path / "out") == [f"part-{part:05d}-of-00007.parquet" for part in range(7)]
    sizes = [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert sizes == [5, 5, 2, 5, 5, 2, 5]
    assert pq.read_schema(tmp_path / "out" / parts(tmp_path / "out")[0]).equals(
        pa.schema({"user_id": pa.string(), "item_ids": pa.list_(pa.string()), "scores": pa.list_(pa.float32())})
    )
    assert (summary.num_rows, summary.num_parts, summary.num_new_rows) == (29, 7, 29)
    assert summary.rows_per_second == pytest.approx(29 / summary.seconds)
    assert "29 users in 7 parts" in str(summary)
    assert read_json(tmp_path / "out" / SUCCESS_NAME) == {"format_version": 1, "num_rows": 29, "num_parts": 7}
    # Other readers take the folder as one table too.
    assert datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out" / "*.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
    ).to_list() == expected(table, 3)


def test_json_lines_give_what_parquet_gives(tmp_path):
    table = write_users(tmp_path / "users.parquet", 9)
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    recommend_file(Echo(), tmp_path / "users.jsonl", tmp_path / "out", 3, rows_per_part=4)
    assert answers(tmp_path / "out") == expected(table, 3)
    assert len(parts(tmp_path / "out")) == 3


def test_the_columns_are_chosen(tmp_path):
    table = write_users(tmp_path / "users.parquet", 3).rename_columns(["user_id", "items"])
    table = table.append_column("scores", pa.array([1, 2, 3]))
    pq.write_table(table, tmp_path / "users.parquet")
    source, columns = tmp_path / "users.parquet", {"history_column": "items"}
    with pytest.raises(SettingsError, match="a column 'scores', and so has the answer"):
        recommend_file(Echo(), source, tmp_path / "out", **columns)
    recommend_file(Echo(), source, tmp_path / "out", keep_columns=["items", "user_id"], **columns)
    assert pq.read_table(tmp_path / "out").column_names == ["items", "user_id", "item_ids", "scores"]
    recommend_file(Echo(), source, tmp_path / "bare", keep_columns=[], **columns)
    assert pq.read_table(tmp_path / "bare").column_names == ["item_ids", "scores"]
    assert [row["item_ids"] for row in answers(tmp_path / "bare")] == [row[::-1] for row in table["items"].to_pylist()]


def test_no_users(tmp_path):
    write_users(tmp_path / "users.parquet", 3)
    pq.write_table(pq.read_table(tmp_path / "users.parquet").slice(3), tmp_path / "users.parquet")
    summary = recommend_file(Echo(), tmp_path / "users.parquet", tmp_path / "out")
    assert summary.num_rows == 0
    assert pq.read_table(tmp_path / "out").schema.names == ["user_id", "item_ids", "scores"]
    assert (tmp_path / "out" / SUCCESS_NAME).is_file()


def test_the_recommender_answers_as_it_does_by_itself(tmp_path):
    recommender = tiny.recommender(tmp_path)
    histories = tiny.histories(0, (3, 0, 7, 1, 4, 2, 5))
    pq.write_table(pa.table({"history": histories}), tmp_path / "users.parquet", row_group_size=4)
    options = {"exclude_seen": False, "num_beams": 12, "batch_size": 3}
    recommend_file(recommender, tmp_path / "users.parquet", tmp_path / "out", 4, rows_per_part=3, **options)
    found = answers(tmp_path / "out")
    alone = recommender.recommend(histories, 4, **options)
    assert [row["item_ids"] for row in found] == [[item.item_id for item in answer] for answer in alone]
    scores = [row["scores"] for row in found]
    np.testing.assert_allclose(scores, [[item.score for item in answer] for answer in alone], atol=1e-4)
    # Fewer than k where fewer are left: 30 items less the seen ones.
    recommend_file(recommender, tmp_path / "users.parquet", tmp_path / "all", 30, num_beams=30)
    lengths = [len(row["item_ids"]) for row in answers(tmp_path / "all")]
    assert lengths == [30 - len(set(history)) for history in histories]


def test_memory_doesnt_grow_with_the_users(tmp_path):
    """Peaks of Python's and of Arrow's memory, and how many users are asked for at once."""

    class Looking:
        def recommend(self, histories, k=10):
            self.arrow = max(self.arrow, pa.total_allocated_bytes())
            self.most = max(self.most, len(histories))
            return [[] for _ in histories]

    peaks = []
    for count in (2_000, 16_000):
        history = pa.array([[f"item-{item}" for item in range(row, row + 10)] for row in range(count)])
        pq.write_table(pa.table({"history": history}), tmp_path / "users.parquet", row_group_size=250)
        del history
        looking = Looking()
        looking.arrow, looking.most = 0, 0
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        recommend_file(looking, tmp_path / "users.parquet", tmp_path / f"out{count}", rows_per_part=100)
        peaks.append((tracemalloc.get_traced_memory()[1], looking.arrow - before))
        tracemalloc.stop()
        assert looking.most == 100
        assert pq.read_table(tmp_path / f"out{count}").num_rows == count
    (python_few, arrow_few), (python_many, arrow_many) = peaks
    assert arrow_many < 1.2 * arrow_few
    assert python_many - python_few < 14_000 * 20, peaks  # the parts' places and names; a history takes 700 bytes


# Going on


class Stopping(Echo):
    """Fails at the n-th call."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def recommend(self, histories, k=10, *, exclude_seen=True, boost=0.0, batch_size=16):
        self.calls -= 1
        if self.calls < 0:
            raise UnknownItemError("stopped")
        return super().recommend(histories, k, exclude_seen=exclude_seen, boost=boost)


Stopping.__name__ = "Echo"  # to the manifest it is the same recommender


def stopped(tmp_path, calls=3, count=29, **options):
    """A job of which `calls` parts are done."""
    table = write_users(tmp_path / "users.parquet", count)
    with pytest.raises(UnknownItemError):
        recommend_file(Stopping(calls), tmp_path / "users.parquet", tmp_path / "out", 3, rows_per_part=5, **options)
    assert len(parts(tmp_path / "out")) == calls
    assert not (tmp_path / "out" / SUCCESS_NAME).exists()
    return table


def test_parts_that_are_there_stay(tmp_path):
    table = stopped(tmp_path)
    before = identity(tmp_path / "out")
    again = Echo()
    # Batch size changes no answer; nor do time, name and place of the input.
    source = tmp_path / "moved" / "renamed.parquet"
    source.parent.mkdir()
    os.replace(tmp_path / "users.parquet", source)
    summary = recommend_file(again, source, tmp_path / "out", 3, rows_per_part=5, batch_size=99)
    assert again.asked == [f"of-{row}" for row in range(12, 29)]
    assert (summary.num_rows, summary.num_new_rows) == (29, 17)
    assert answers(tmp_path / "out") == expected(table, 3)
    after = identity(tmp_path / "out")
    assert {name: after[name] for name in before} == before

    done = Echo()
    assert recommend_file(done, source, tmp_path / "out", 3, rows_per_part=5).num_new_rows == 0
    assert done.asked == []
    assert identity(tmp_path / "out") == after


def test_a_killed_process_leaves_no_doubt(tmp_path):
    """SIGKILL in the middle; the next run answers everyone that had no answer, once."""
    table = write_users(tmp_path / "users.parquet", 60)
    plan = {"source": str(tmp_path / "users.parquet"), "output": str(tmp_path / "out"), "seconds": 0.3}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    child = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tmp_path / "plan.json")], env=environment, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("part-*.parquet"))) < 3:
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    child.stderr.close()
    before = identity(tmp_path / "out")
    assert 3 <= len(before) < 15
    assert not (tmp_path / "out" / SUCCESS_NAME).exists()
    (tmp_path / "out" / ".part-00009-of-00015.parquet.abc").write_bytes(
        b"PAR1half"
    )  # what a kill while writing leaves

    again = Echo()
    recommend_file(again, plan["source"], plan["output"], 2, rows_per_part=5)
    assert answers(tmp_path / "out") == expected(table, 2)
    after = identity(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    answered = sum(pq.read_metadata(tmp_path / "out" / name).num_rows for name in before)
    assert len(again.asked) == 60 - answered
    assert not list((tmp_path / "out").glob(".part*"))


def test_torn_and_foreign_parts_are_made_again(tmp_path, caplog):
    table = write_users(tmp_path / "users.parquet", 29)
    arguments = (tmp_path / "users.parquet", tmp_path / "out", 3)
    recommend_file(Echo(), *arguments, rows_per_part=5)
    write_users(tmp_path / "others.parquet", 31, row_group_size=5)
    recommend_file(Echo(), tmp_path / "others.parquet", tmp_path / "other", 3, rows_per_part=5)
    paths = sorted((tmp_path / "out").glob("*.parquet"))
    paths[0].write_bytes(paths[0].read_bytes()[:-20])
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[0].read_bytes())
    os.replace(sorted((tmp_path / "other").glob("*.parquet"))[0], paths[3])  # five rows, of another job
    os.replace(paths[5], paths[4])  # two rows of this job in the place of five
    again = Echo()
    recommend_file(again, *arguments, rows_per_part=5)
    assert answers(tmp_path / "out") == expected(table, 3)
    assert again.asked == [f"of-{row}" for row in range(24)]
    assert caplog.text.count("is damaged and is made again") == 3
    assert caplog.text.count("is no part of this job and is made again") == 2


def test_the_mark_of_success_goes_with_a_part(tmp_path):
    write_users(tmp_path / "users.parquet", 29)
    arguments = (tmp_path / "users.parquet", tmp_path / "out", 3)
    recommend_file(Echo(), *arguments, rows_per_part=5)
    (tmp_path / "out" / "part-00003-of-00007.parquet").unlink()
    with pytest.raises(UnknownItemError):
        recommend_file(Stopping(0), *arguments, rows_per_part=5)
    assert not (tmp_path / "out" / SUCCESS_NAME).exists()
    recommend_file(Echo(), *arguments, rows_per_part=5)
    assert (tmp_path / "out" / SUCCESS_NAME).is_file()


def test_a_folder_of_another_job_is_refused(tmp_path):
    stopped(tmp_path)
    source, out = tmp_path / "users.parquet", tmp_path / "out"
    before = identity(out), (out / MANIFEST_NAME).read_text()

    def refused(*arguments, recommender=None, **options):
        with pytest.raises(SettingsError, match="3 parts of another job; what differs: ") as error:
            recommend_file(recommender or Echo(), *arguments, **{"rows_per_part": 5, **options})
        return str(error.value)

    assert "k: 3 there, 2 now." in refused(source, out, 2)
    assert "exclude_seen: True there, False now." in refused(source, out, 3, exclude_seen=False)
    assert "rows_per_part: 5 there, 6 now" in refused(source, out, 3, rows_per_part=6)
    assert "keep_columns: {'user_id': 'string'} there, {} now." in refused(source, out, 3, keep_columns=[])
    other = Echo()
    other.fingerprint = "other weights"
    assert "what differs: recommender. Call" in refused(source, out, 3, recommender=other)
    table = pq.read_table(source)
    swapped = pa.table({"user_id": table["user_id"], "history": table["history"].to_pylist()[::-1]})
    pq.write_table(swapped, source, row_group_size=12)
    assert "what differs: input 0. Call" in refused(source, out, 3)
    assert (identity(out), (out / MANIFEST_NAME).read_text()) == before


def test_a_job_without_any_part_is_no_obstacle(tmp_path):
    stopped(tmp_path, calls=0)
    assert read_json(tmp_path / "out" / MANIFEST_NAME)["k"] == 3
    recommend_file(Echo(), tmp_path / "users.parquet", tmp_path / "out", 2)
    assert read_json(tmp_path / "out" / MANIFEST_NAME)["k"] == 2
    assert len(answers(tmp_path / "out")) == 29


def test_other_files_in_the_folder(tmp_path):
    write_users(tmp_path / "users.parquet", 9)
    (tmp_path / "out").mkdir()
    write_users(tmp_path / "out" / "mine.parquet", 3)
    with pytest.raises(DataError, match=r"mine\.parquet, which is no part of this job"):
        recommend_file(Echo(), tmp_path / "users.parquet", tmp_path / "out")
    os.replace(tmp_path / "out" / "mine.parquet", tmp_path / "out" / "part-00000-of-00001.parquet")
    with pytest.raises(DataError, match="is no part of this job"):  # the right name, and no manifest
        recommend_file(Echo(), tmp_path / "users.parquet", tmp_path / "out")
    os.remove(tmp_path / "out" / "part-00000-of-00001.parquet")
    (tmp_path / "out" / "notes.txt").write_text("kept")
    recommend_file(Echo(), tmp_path / "users.parquet", tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "kept"
    os.replace(tmp_path / "out" / "part-00000-of-00001.parquet", tmp_path / "out" / "part-00000-of-00002.parquet")
    with pytest.raises(DataError, match=r"part-00000-of-00002\.parquet, which is no part of this job"):
        recommend_file(Echo(), tmp_path / "users.parquet", tmp_path / "out")
    write_json(tmp_path / "out" / MANIFEST_NAME, {"format_version": 99})
    with pytest.raises(DataError, match="upgrade llmrec"):
        recommend_file(Echo(), tmp_path / "users.parquet", tmp_path / "out")
    with pytest.raises(DataError, match="a file of that name exists"):
        recommend_file(Echo(), tmp_path / "users.parquet", tmp_path / "users.parquet")


# What is refused before any work


def test_mistakes_cost_no_work(tmp_path):
    table = write_users(tmp_path / "users.parquet", 29)
    source, out, echo = tmp_path / "users.parquet", tmp_path / "out", Echo()
    with pytest.raises(DataError, match="the column 'items' is not there"):
        recommend_file(echo, source, out, history_column="items")
    with pytest.raises(MissingPartError, match="there is no file"):
        recommend_file(echo, tmp_path / "no.parquet", out)
    with pytest.raises(SettingsError, match="k is 0"):
        recommend_file(echo, source, out, 0)
    with pytest.raises(SettingsError, match="rows_per_part is 0"):
        recommend_file(echo, source, out, rows_per_part=0)
    with pytest.raises(SettingsError, match=r"Echo\.recommend can't be called with these options: .*'colour'"):
        recommend_file(echo, source, out, colour="red")
    with pytest.raises(SettingsError, match="one set of items for all users"):
        recommend_file(echo, source, out, boost=[["a"], ["b"]])
    histories = table["history"].to_pylist()
    histories[28] = [None]
    pq.write_table(pa.table({"history": histories}), source, row_group_size=12)
    with pytest.raises(DataError, match=r"users\.parquet, row group 2, row 28: an item of the history is null"):
        recommend_file(echo, source, out)
    assert echo.asked == []
    assert not out.exists()


def test_answers_that_are_none(tmp_path):
    write_users(tmp_path / "users.parquet", 3)

    class Short(Echo):
        def recommend(self, histories, k=10):
            return super().recommend(histories[1:], k)

    class Long(Echo):
        def recommend(self, histories, k=10):
            return super().recommend(histories, k + 1)

    with pytest.raises(DataError, match="2 answers to 3 histories"):
        recommend_file(Short(), tmp_path / "users.parquet", tmp_path / "out", 1)
    with pytest.raises(DataError, match="2 items where 1 were asked for"):
        recommend_file(Long(), tmp_path / "users.parquet", tmp_path / "out", 1)


def test_a_sharded_model_is_refused(tmp_path):
    write_users(tmp_path / "users.parquet", 3)
    echo = Echo()
    echo.model = nn.Linear(2, 2)
    echo.model.weight.ds_id = 0  # what DeepSpeed marks the parameters of ZeRO-3 with
    with pytest.raises(SettingsError, match="sharded over processes"):
        recommend_file(echo, tmp_path / "users.parquet", tmp_path / "out")
    del echo.model.weight.ds_id
    assert recommend_file(echo, tmp_path / "users.parquet", tmp_path / "out").num_rows == 3


# The manifest


def test_sets_of_items_are_part_of_the_job(tmp_path):
    class Filtered(Echo):
        def recommend(self, histories, k=10, *, allow=None):
            self.allowed = allow
            return super().recommend(histories, k)

    write_users(tmp_path / "users.parquet", 3)
    filtered, hashes = Filtered(), []
    sets = [["a", "b"], {"b", "a"}, iter(["b", "a", "b"]), np.array(["a", "b"]), ["a"], np.array([True, False])]
    sets += [[True, False], np.array([False, True]), None]
    for number, allow in enumerate(sets):
        recommend_file(filtered, tmp_path / "users.parquet", tmp_path / f"out{number}", allow=allow)
        hashes.append(read_json(tmp_path / f"out{number}" / MANIFEST_NAME)["options"]["allow"])
    assert len(set(hashes[:4])) == 1
    assert hashes[5] == hashes[6]
    assert len(set(hashes)) == 5
    assert hashes[0].startswith("2 items")
    assert hashes[5].startswith("1 of 2 items")
    assert hashes[-1] is None


def test_the_fingerprint_of_a_recommender(tmp_path):
    first, second = tiny.recommender(tmp_path), tiny.recommender(tmp_path)
    assert fingerprint_of(first) == fingerprint_of(second)
    with torch.no_grad():
        next(parameter for name, parameter in second.model.named_parameters() if "lora_B" in name)[0, 0] += 1e-6
    assert fingerprint_of(first) != fingerprint_of(second)
    other_scope = tiny.recommender(tmp_path, scope="trie")
    assert fingerprint_of(first) != fingerprint_of(other_scope)
    codes = first.semantic_ids.codes[::-1].copy()
    assert fingerprint_of(first) != fingerprint_of(tiny.recommender(tmp_path, codes=codes))


# Several processes


def launch(tmp_path, repository, **plan):
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp.yaml"]
    command = [sys.executable, *launcher, "--main_process_port", port, str(SCRIPT), str(tmp_path / "plan.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=200)
    files = [tmp_path / f"result-2-{index}.json" for index in range(2)]
    return [json.loads(file.read_text()) if file.is_file() else done.stderr[-3000:] for file in files], done


def test_two_processes_share_the_parts(tmp_path, repository):
    """Judged by files: a run may abort at exit, after all work is done. It goes on where one process stopped."""
    table = stopped(tmp_path, calls=1)
    before = identity(tmp_path / "out")
    source = str(tmp_path / "users.parquet")
    # The job that was stopped had k = 3: the script's 2 is another one, and both processes say so.
    refused, _ = launch(tmp_path, repository, source=source, output=str(tmp_path / "out"))
    for result in refused:
        assert "another job" in result["error"], refused
    assert identity(tmp_path / "out") == before

    results, _ = launch(tmp_path, repository, source=source, output=str(tmp_path / "two"))
    for result in results:
        assert (result["rows"], result["parts"], result["new"]) == (29, 7, 29), results
    # Parts of 5, 5, 2, 5, 5, 2, 5 rows in turn.
    first = [*range(5), *range(10, 12), *range(17, 22), *range(24, 29)]
    assert results[0]["asked"] == [f"of-{row}" for row in first]
    assert results[1]["asked"] == [f"of-{row}" for row in range(29) if row not in first]
    assert answers(tmp_path / "two") == expected(table, 2)
    recommend_file(Echo(), source, tmp_path / "one", 2, rows_per_part=5)
    for name in parts(tmp_path / "one"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_process_that_fails_ends_the_run(tmp_path, repository):
    write_users(tmp_path / "users.parquet", 29)
    _, done = launch(
        tmp_path, repository, source=str(tmp_path / "users.parquet"), output=str(tmp_path / "out"), fails_at="of-5"
    )
    assert done.returncode != 0
    assert "asked for of-5" in json.loads((tmp_path / "result-2-1.json").read_text())["error"]
    assert not (tmp_path / "out" / SUCCESS_NAME).exists()
    recommend_file(Echo(), tmp_path / "users.parquet", tmp_path / "out", 2, rows_per_part=5)
    assert len(answers(tmp_path / "out")) == 29
