import pytest
import torch

from llmrec.tasks.collator import RowCollator

SAMPLES = [{"input_ids": [5, 7, 8], "labels": [-100, 7, 8]}, {"input_ids": [5, 9], "labels": [-100, 9]}]


def lists(batch):
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    return {name: tensor.tolist() for name, tensor in batch.items()}


@pytest.mark.parametrize("rows", [SAMPLES, [[sample] for sample in SAMPLES]])
def test_padded_as_in_the_docstring(rows):
    assert lists(RowCollator(pad_token_id=0)(rows)) == {
        "input_ids": [[5, 7, 8], [5, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 7, 8], [-100, 9, -100]],
    }


def test_padding_with_a_token_that_samples_hold():
    batch = RowCollator(pad_token_id=9)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 7, 8], [5, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 7, 8], [-100, 9, -100]]


def test_length_rounded_up():
    batch = RowCollator(pad_token_id=0, pad_to_multiple_of=4)(SAMPLES)
    assert batch["input_ids"].tolist() == [[5, 7, 8, 0], [5, 9, 0, 0]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 2]
    assert batch["labels"].tolist() == [[-100, 7, 8, -100], [-100, 9, -100, -100]]
    exact = [{"input_ids": [1, 2, 3, 4], "labels": [-100] * 4}]
    assert RowCollator(0, pad_to_multiple_of=4)(exact)["input_ids"].shape == (1, 4)


def test_packed_as_in_the_docstring():
    batch = RowCollator(pad_token_id=0, packing=True)([SAMPLES[::-1] + SAMPLES[:0], [SAMPLES[0]]])
    assert lists(batch) == {
        "input_ids": [[5, 9, 5, 7, 8], [5, 7, 8, 0, 0]],
        "position_ids": [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]],
        "labels": [[-100, 9, -100, 7, 8], [-100, 7, 8, -100, -100]],
    }


def test_an_empty_row_is_padding_without_a_target():
    packed = RowCollator(pad_token_id=3, packing=True)([SAMPLES, []])
    assert packed["input_ids"][1].tolist() == [3] * 5
    assert packed["position_ids"][1].tolist() == [0, 1, 2, 3, 4]
    assert (packed["labels"][1] == -100).all()
    padded = RowCollator(pad_token_id=3)([[SAMPLES[0]], []])
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]  # not all 0: attention to nothing is NaN
    assert RowCollator(pad_token_id=3, packing=True)([[], []])["labels"].shape == (2, 1)


def test_single_samples_are_padded_even_where_rows_are_packed():
    """Those of an evaluation, which adds up losses by sample."""
    assert "attention_mask" in RowCollator(pad_token_id=0, packing=True)(SAMPLES)


def test_encoder_decoder_rows_have_lengths_of_their_own():
    samples = [{"input_ids": [5, 7, 8], "labels": [20, 21]}, {"input_ids": [5], "labels": [22, 23, 24]}]
    assert lists(RowCollator(0, encoder_decoder=True)([[sample] for sample in samples])) == {
        "input_ids": [[5, 7, 8], [5, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[20, 21, -100], [22, 23, 24]],
    }


def test_several_samples_need_packing():
    with pytest.raises(ValueError, match="2 samples needs packing"):
        RowCollator(0)([SAMPLES])
