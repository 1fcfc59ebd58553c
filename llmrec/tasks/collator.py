"""Samples of token IDs into padded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleCollator:
    """Pads a batch on the right, as training wants it.

    With a padding ID of 0, the samples `{"input_ids": [5, 7, 8], "labels": [-100, 7, 8]}` and
    `{"input_ids": [5, 9], "labels": [-100, 9]}` become

        input_ids       [[5, 7, 8], [5, 9, 0]]            int64 [B, T]
        attention_mask  [[1, 1, 1], [1, 1, 0]]            int64 [B, T]
        labels          [[-100, 7, 8], [-100, 9, -100]]   int64 [B, T]

    Args:
        pad_token_id: Written into `input_ids` where a sample has ended. What is padding is said by `attention_mask`
            and by label -100 alone, so it may be a token that samples also hold (pad = eos).
        pad_to_multiple_of: Rounds T up, for kernels that want it.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 1

    def __call__(self, samples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Tensors of the batch; see the class."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(samples), longest), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, -100)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            input_ids[row, :length] = torch.tensor(sample["input_ids"])
            attention_mask[row, :length] = 1
            labels[row, :length] = torch.tensor(sample["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
