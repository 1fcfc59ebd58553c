"""Rows of samples into tensors: padded, packed, or for an encoder-decoder model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from llmrec.tasks.base import IGNORED

Sample: TypeAlias = dict[str, list[int]]


@dataclass(frozen=True)
class RowCollator:
    """Makes a batch of rows; a row is a list of samples, or one sample.

    Padded, `packing=False` (a row of several samples is refused; one without any is a single padding token):

        input_ids       [[5, 7, 8], [5, 9, 0]]            int64 [B, T]
        attention_mask  [[1, 1, 1], [1, 1, 0]]            int64 [B, T]
        labels          [[-100, 7, 8], [-100, 9, -100]]   int64 [B, T]

    Packed: the samples of a row one after the other, positions starting anew with each, and with the padding. There is
    no attention mask: transformers finds the samples by their positions, and only where it gets no mask and keeps no
    cache, so the forward must pass `use_cache=False`.

        input_ids       [[5, 7, 5, 9, 8], [6, 9, 9, 0, 0]]                   int64 [B, T]
        position_ids    [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]                   int64 [B, T]
        labels          [[-100, 7, -100, 9, 8], [-100, 9, 9, -100, -100]]    int64 [B, T]

    Encoder-decoder: `input_ids` and `attention_mask` [B, S] for the encoder, `labels` [B, T] for the decoder.

    Args:
        pad_token_id: Written into `input_ids` where a row has ended. What is padding is said by `attention_mask` and
            by label -100 alone, so it may be a token that samples also hold (pad = eos).
        packing: Whether rows are packed. Single samples (those of an evaluation) are padded either way.
        encoder_decoder: Whether the samples are of an encoder-decoder model; these aren't packed.
        pad_to_multiple_of: Rounds T up, for kernels that want it.
    """

    pad_token_id: int
    packing: bool = False
    encoder_decoder: bool = False
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Sequence[Sample] | Sample]) -> dict[str, Tensor]:
        """Tensors of the batch; see the class."""
        if self.packing and not self.encoder_decoder and not isinstance(rows[0], dict):
            return self._packed([_samples(row) for row in rows])
        samples = [self._only(_samples(row)) for row in rows]
        inputs = [sample["input_ids"] for sample in samples]
        return {
            "input_ids": self._padded(inputs, self.pad_token_id),
            "attention_mask": self._padded([[1] * len(tokens) for tokens in inputs], 0),
            "labels": self._padded([sample["labels"] for sample in samples], IGNORED),
        }

    def _only(self, row: Sequence[Sample]) -> Sample:
        if len(row) > 1:
            raise ValueError(f"a row of {len(row)} samples needs packing=True")
        # A row without a sample attends to one padding token, for attention to nothing is not a number.
        return row[0] if row else {"input_ids": [self.pad_token_id], "labels": [IGNORED]}

    def _packed(self, rows: Sequence[Sequence[Sample]]) -> dict[str, Tensor]:
        tokens = [[token for sample in row for token in sample["input_ids"]] for row in rows]
        labels = [[label for sample in row for label in sample["labels"]] for row in rows]
        input_ids = self._padded(tokens, self.pad_token_id)
        position_ids = torch.zeros_like(input_ids)
        for row, (samples, of_row) in enumerate(zip(rows, position_ids, strict=True)):
            lengths = [len(sample["input_ids"]) for sample in samples]
            lengths.append(len(of_row) - len(tokens[row]))  # the padding
            of_row.copy_(torch.cat([torch.arange(length) for length in lengths]))
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": self._padded(labels, IGNORED)}

    def _padded(self, rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        """int64 [B, T]."""
        longest = max([1, *map(len, rows)])
        longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = torch.full((len(rows), longest), fill)
        for row, values in zip(padded, rows, strict=True):
            row[: len(values)] = torch.tensor(values, dtype=torch.int64)
        return padded


def _samples(row: Sequence[Sample] | Sample) -> Sequence[Sample]:
    return [row] if isinstance(row, dict) else row
