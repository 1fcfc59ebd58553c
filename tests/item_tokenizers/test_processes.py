"""One fit by two processes is the fit of one: same batches, same losses, same codes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrec.processes import Processes

NAMES = (
    "LetterTokenizer",
    "RQKMeansPlusTokenizer",
    "RQKMeansTokenizer",
    "RQVAETokenizer",
    "SimCITTokenizer",
)


def fit(output, repository, *launch):
    """Judged by files: a run may abort at exit, after all work is done."""
    script = Path(__file__).with_name("fit_in_processes.py")
    command = [sys.executable, *launch, str(script), str(output), *NAMES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=280)
    files = sorted(output.parent.glob(f"{output.name}-*.json"))
    assert files, done.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def results(tmp_path_factory, repository):
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp.yaml"]
    return [
        *fit(folder / "one", repository),
        *fit(folder / "two", repository, *launch, "--main_process_port", str(port)),
    ]


def test_the_engine_is_the_one_asked_for(results):
    assert [(found["count"], found["distributed_type"]) for found in results] == [
        (1, "NO"),
        (2, "MULTI_CPU"),
        (2, "MULTI_CPU"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_losses_and_codes_of_one(results, name):
    one, *two = (found[name] for found in results)
    assert len(one["history"]) > 1
    for other in two:
        for left, right in zip(one["history"], other["history"], strict=True):
            assert left.keys() == right.keys()
            for key in left:
                assert right[key] == pytest.approx(left[key], rel=1e-5, abs=1e-6), (left["epoch"], key)
        assert np.mean(np.array(one["codes"]) == np.array(other["codes"])) > 0.99
        for key, value in one["state"].items():
            assert other["state"][key] == pytest.approx(value, rel=1e-3, abs=1e-3), key
    assert two[0] == two[1]  # to the bit: or they would drift apart


def test_parts_cover_all_rows_in_order():
    for size in (0, 1, 2, 7, 64):
        rows = [row for index in range(3) for row in range(size)[Processes(index, 3, "cpu").part(size)]]
        assert rows == list(range(size))


def test_alone_everything_is_as_it_was():
    processes = Processes.alone("cpu")
    tensor = torch.arange(6.0).view(3, 2)
    assert processes.gather_rows(tensor) is tensor
    assert torch.equal(processes.sum(tensor), tensor)
    assert processes.is_main
    assert processes.broadcast("x") == "x"
