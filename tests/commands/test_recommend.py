"""`llmrec recommend` for files of users, and the options that both of its forms have."""

import json
import os
import socket
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from llmrec import cli
from llmrec.recommender import Recommender

HISTORIES = tiny.histories(0, (3, 0, 7, 1, 4, 2, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("recommender")
    tiny.recommender(path).save_pretrained(path / "saved")
    return path / "saved"


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    path = tmp_path_factory.mktemp("users") / "users.parquet"
    columns = {"user_id": [f"u{row}" for row in range(7)], "seen": HISTORIES, "age": [20] * 7}
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


@pytest.fixture
def run(capsys):
    """Runs `llmrec recommend`; returns what it printed."""

    def run(*words):
        assert cli.main(["recommend", *map(str, words)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys):
    """Runs `llmrec recommend`, which must fail; returns its one line on standard error."""

    def fails(*words):
        try:
            status = cli.main(["recommend", *map(str, words)])
        except SystemExit as error:
            status = error.code
        lines = capsys.readouterr().err.splitlines()
        assert (status, len(lines)) == (2, 1), lines
        return lines[0]

    return fails


def found_in(output):
    return [row["item_ids"] for row in pq.read_table(output).to_pylist()]


def ids(answers):
    return [[item.item_id for item in answer] for answer in answers]


def test_a_file_gets_what_its_histories_get(run, folder, users, tmp_path):
    words = [folder, "--input", users, "--output", tmp_path / "out", "--history_column", "seen", "-k", "4"]
    out = run(*words, "--keep", "user_id", "--rows_per_part", "2", "--batch_size", "3", "--num_beams", "9")
    assert out.startswith(f"7 users in 5 parts in {tmp_path / 'out'}: 0 were there, 7 answered in ")
    table = pq.read_table(tmp_path / "out")
    assert table.column_names == ["user_id", "item_ids", "scores"]
    assert table["user_id"].to_pylist() == [f"u{row}" for row in range(7)]
    recommender = Recommender.from_pretrained(folder)
    assert found_in(tmp_path / "out") == ids(recommender.recommend(HISTORIES, 4, num_beams=9))
    again = run(*words, "--keep", "user_id", "--rows_per_part", "2", "--num_beams", "9")
    assert "7 were there, 0 answered" in again

    run(*words[:3], "--output", tmp_path / "all", "--history_column", "seen", "-k", "30", "--include_seen")
    assert pq.read_table(tmp_path / "all").column_names == ["user_id", "age", "item_ids", "scores"]
    assert found_in(tmp_path / "all") == ids(recommender.recommend(HISTORIES, 30, exclude_seen=False))


def test_only_some_items(run, fails, folder, users, tmp_path):
    (tmp_path / "allow.txt").write_text("item-1\nitem-2\r\n\n item-3 \nitem-4\n")
    (tmp_path / "deny.txt").write_text("item-3\n")
    both = ["--allow", tmp_path / "allow.txt", "--deny", tmp_path / "deny.txt", "-k", "4", "--include_seen"]
    content = json.loads(run(folder, "--history", "item-9", *both, "--json"))
    assert {entry["item_id"] for entry in content} == {"item-1", "item-2", "item-4"}
    run(folder, "--input", users, "--history_column", "seen", "--output", tmp_path / "out", *both)
    assert [set(answer) for answer in found_in(tmp_path / "out")] == [{"item-1", "item-2", "item-4"}] * 7
    assert "there is no file" in fails(folder, "--history", "item-9", "--deny", tmp_path / "none.txt")
    (tmp_path / "allow.txt").write_bytes(b"\xff\xfe")
    assert "no UTF-8 text" in fails(folder, "--history", "item-9", "--allow", tmp_path / "allow.txt")


def test_draws_are_repeated_by_their_seed(run, folder):
    words = [folder, "--history", "item-9", "-k", "8", "--temperature", "5", "--seed"]
    first = run(*words, "1")
    assert run(*words, "1") == first
    assert run(*words, "2") != first


def test_unknown_items_are_skipped_where_that_is_asked_for(run, fails, folder, tmp_path):
    path = tmp_path / "users.jsonl"
    histories = [["item-1"], ["item-1", "nothing"], ["item-3"]]
    path.write_text("".join(json.dumps({"history": history}) + "\n" for history in histories))
    words = [folder, "--input", path, "--output", tmp_path / "out", "-k", "3", "--rows_per_part", "1"]
    assert "'nothing'" in fails(*words)
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 1
    assert "1 were there, 2 answered" in run(*words, "--on_unknown", "skip")
    expected = Recommender.from_pretrained(folder).recommend([["item-1"], ["item-1"], ["item-3"]], 3)
    assert found_in(tmp_path / "out") == ids(expected)


def test_the_two_forms_cannot_be_mixed(fails, folder, users, tmp_path):
    assert "--history --input is required" in fails(folder)
    assert "not allowed with argument --history" in fails(folder, "--history", "a", "--input", users)
    assert "--input needs an --output" in fails(folder, "--input", users)
    assert "--json is of use only with --history" in fails(folder, "--input", users, "--output", "x", "--json")
    assert "--keep is of use only with --input" in fails(folder, "--history", "a", "--keep")
    assert "--batch_size is of use only with --input" in fails(folder, "--history", "a", "--batch_size", "3")
    assert "there is no file" in fails("no-model", "--input", tmp_path / "none.parquet", "--output", "x")
    assert "'history' is not there" in fails(folder, "--input", users, "--output", tmp_path / "out")


def test_under_accelerate_launch(folder, users, tmp_path, repository):
    """Two processes write what one writes. Judged by files: a run may abort at exit, after all work is done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [str(folder), "--input", str(users), "--history_column", "seen", "-k", "4", "--rows_per_part", "2"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp.yaml"]
    command = [sys.executable, *launch, "--main_process_port", port, "-m", "llmrec.cli", "recommend", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "two")],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert (tmp_path / "two" / "_SUCCESS").is_file(), done.stderr[-3000:]
    assert done.stdout.count("7 users in 5 parts") == 1  # one of them prints
    assert cli.main(["recommend", *words, "--output", str(tmp_path / "one")]) == 0
    one, two = (pq.read_table(tmp_path / name) for name in ("one", "two"))
    assert two.drop_columns("scores").equals(one.drop_columns("scores"))
    for left, right in zip(one["scores"].to_pylist(), two["scores"].to_pylist(), strict=True):
        assert left == pytest.approx(right, abs=1e-5)
