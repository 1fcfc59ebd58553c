import logging

import numpy as np
import pytest
import torch

from llmrec.errors import SettingsError
from llmrec.recommendation import request_batches
from llmrec.recommendation.request_batches import in_batches


class Machine:
    """Answers a request with its number, as long as there are at most `most` at once."""

    def __init__(self, most, error=None):
        self.most, self.sizes = most, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def answer(self, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.most:
            raise self.error
        return [f"answer {request}" for request in batch]


def run(machine, lengths, batch_size=16):
    return in_batches(machine.answer, lengths, batch_size=batch_size, description="test", progress=False)


def test_answers_come_in_the_order_of_the_requests():
    machine = Machine(most=4)
    assert run(machine, [3, 9, 1, 4, 4, 7], batch_size=4) == [f"answer {request}" for request in range(6)]
    assert machine.sizes == [4, 2]
    assert run(machine, []) == []


def test_like_lengths_are_batched_together_longest_first():
    batches = []
    in_batches(
        lambda batch: batches.append(batch) or batch, [3, 9, 1, 4], batch_size=2, description="", progress=False
    )
    assert batches == [[1, 3], [0, 2]]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("HIP out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_out_of_memory_splits_the_batch_and_goes_on_with_the_smaller_size(error, caplog):
    machine = Machine(most=3, error=error)
    with caplog.at_level(logging.WARNING, logger="llmrec.recommendation.request_batches"):
        answers = run(machine, list(range(20, 0, -1)), batch_size=13)
    assert answers == [f"answer {request}" for request in range(20)]
    assert machine.sizes == [13, 6, *[3] * 6, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 13 requests at once (up to 20 tokens each): going on with 6 at once; the answers are the"
        " same, num_beams stays",
        "out of memory with 6 requests at once (up to 20 tokens each): going on with 3 at once; the answers are the"
        " same, num_beams stays",
    ]


def test_one_request_that_does_not_fit_is_a_clear_error():
    with pytest.raises(SettingsError, match=r"out of memory with a single request, of 50 tokens: .* fewer num_beams"):
        run(Machine(most=0), [50, 20, 30])


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(Machine(most=0, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied")), [1, 2])
    with pytest.raises(SettingsError, match="batch_size is 0"):
        run(Machine(most=1), [1], batch_size=0)


class OtherProcess:
    """Stands for all processes; another one makes so many batches."""

    def __init__(self, num_batches):
        self.num_batches = num_batches

    def launched(self):
        return self

    def gather_array(self, array):
        return np.concatenate([array, [self.num_batches]])


@pytest.mark.parametrize(("of_another", "fillers"), [(5, 3), (2, 0), (1, 0)])
def test_processes_that_share_a_model_make_equally_many_batches(monkeypatch, of_another, fillers):
    monkeypatch.setattr(request_batches, "Processes", OtherProcess(of_another))
    machine = Machine(most=2)
    options = {"batch_size": 2, "description": "test", "progress": False}
    assert in_batches(machine.answer, [4, 5, 6], **options, together=True) == ["answer 0", "answer 1", "answer 2"]
    assert machine.sizes == [2, 1, *[1] * fillers]


def test_no_process_makes_a_smaller_batch_on_its_own(monkeypatch):
    monkeypatch.setattr(request_batches, "Processes", OtherProcess(1))
    machine = Machine(most=2)
    with pytest.raises(SettingsError, match=r"3 requests at once \(up to 6 tokens.*shared out.*smaller batch_size"):
        in_batches(machine.answer, [4, 5, 6], batch_size=3, description="", progress=False, together=True)
    assert machine.sizes == [3]
