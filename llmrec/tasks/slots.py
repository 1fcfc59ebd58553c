"""What stands in the slots of templates: for each sample a run of token IDs whose length is known beforehand.

Each kind gives the lengths of all samples as one array, which is what batches are planned by, and makes the token IDs
of one sample when it is read.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from llmrec.tasks.texts import RowTexts


class Slot(Protocol):
    """The token IDs that fill one slot, of S samples."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S]: number of token IDs of each sample."""

    def tokens(self, index: int) -> list[int]:
        """Token IDs of one sample."""


@dataclass(frozen=True, eq=False)
class TextSlot:
    """A text of each sample.

    Attributes:
        texts: Tokenised texts.
        numbers: int64 [S], which of them; -1 for none, where no template of the sample shows it.
    """

    texts: RowTexts
    numbers: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """See `Slot`."""
        return np.append(self.texts.lengths, 0)[self.numbers]

    def tokens(self, index: int) -> list[int]:
        """See `Slot`."""
        return self.texts.text(int(self.numbers[index]))


@dataclass(frozen=True, eq=False)
class ItemSlot:
    """The L code tokens of an item of each sample.

    Attributes:
        item_tokens: int64 [N, L].
        items: Catalogue rows [S].
    """

    item_tokens: np.ndarray
    items: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """See `Slot`."""
        return np.full(len(self.items), self.item_tokens.shape[1], dtype=np.int64)

    def tokens(self, index: int) -> list[int]:
        """See `Slot`."""
        return self.item_tokens[self.items[index]].tolist()


@dataclass(frozen=True, eq=False)
class CodeHistorySlot:
    """The code tokens of a run of items of each sample, oldest first.

    Attributes:
        item_tokens: int64 [N, L].
        flat_items: Catalogue rows of all histories one after the other.
        starts: int64 [S], where in it each run begins.
        ends: int64 [S], where it ends.
    """

    item_tokens: np.ndarray
    flat_items: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """See `Slot`."""
        return (self.ends - self.starts) * self.item_tokens.shape[1]

    def tokens(self, index: int) -> list[int]:
        """See `Slot`."""
        return self.item_tokens[self.flat_items[self.starts[index] : self.ends[index]]].ravel().tolist()


@dataclass(frozen=True, eq=False)
class TitleHistorySlot:
    """The titles of a run of items of each sample, oldest first, each after a mark; items without one are left out.

    Attributes:
        titles: One title an item, or none.
        mark: Token IDs before each title.
        flat_items: Catalogue rows of all histories one after the other.
        starts: int64 [S], where in it each run begins.
        ends: int64 [S], where it ends.
    """

    titles: RowTexts
    mark: list[int]
    flat_items: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        """See `Slot`."""
        of_items = np.zeros(len(self.titles), dtype=np.int64)
        of_items[self.titles.counts > 0] = self.titles.lengths + len(self.mark)
        sums = np.concatenate([[0], np.cumsum(of_items[self.flat_items])])
        return sums[self.ends] - sums[self.starts]

    def tokens(self, index: int) -> list[int]:
        """See `Slot`."""
        token_ids: list[int] = []
        for item in self.flat_items[self.starts[index] : self.ends[index]]:
            if self.titles.counts[item]:
                token_ids += self.mark
                token_ids += self.titles.text(int(self.titles.row_offsets[item]))
        return token_ids
