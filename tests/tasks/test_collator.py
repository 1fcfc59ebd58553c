import torch

from llmrec.tasks.collator import SampleCollator

SAMPLES = [{"input_ids": [5, 7, 8], "labels": [-100, 7, 8]}, {"input_ids": [5, 9], "labels": [-100, 9]}]


def test_the_tensors_of_the_docstring():
    batch = SampleCollator(pad_token_id=0)(SAMPLES)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 7, 8], [5, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 7, 8], [-100, 9, -100]],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_padding_with_a_token_that_samples_hold():
    batch = SampleCollator(pad_token_id=9)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 7, 8], [5, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 7, 8], [-100, 9, -100]]


def test_length_rounded_up():
    batch = SampleCollator(pad_token_id=0, pad_to_multiple_of=4)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 7, 8, 0], [5, 9, 0, 0]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 2]
    assert batch["labels"].tolist() == [[-100, 7, 8, -100], [-100, 9, -100, -100]]
    exact = [{"input_ids": [1, 2, 3, 4], "labels": [-100] * 4}]
    assert SampleCollator(0, pad_to_multiple_of=4)(exact)["input_ids"].shape == (1, 4)
