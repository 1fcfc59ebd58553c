"""One order of items for every array about items.

Inside llmrec an item is its row number in the catalogue. An array about items travels with its list of item IDs, and
using one against another catalogue is an error that shows the first difference.
"""

from collections.abc import Sequence

import numpy as np

from llmrec.errors import ItemOrderError, UnknownItemError


def check_item_order(expected: Sequence[str], found: Sequence[str], what: str) -> None:
    """Compares the item IDs of an array with those of the catalogue.

    Args:
        expected: Item IDs of the catalogue, in row order.
        found: Item IDs that the array came with.
        what: What the array is, for the message: "the text embeddings".

    Raises:
        ItemOrderError: They differ in number, order or content.
    """
    if expected is found:
        return
    for row, (left, right) in enumerate(zip(expected, found, strict=False)):
        if left != right:
            raise ItemOrderError(
                f"{what} and the catalogue differ first at row {row}: the catalogue has item {left!r}, they have"
                f" {right!r}; make them again from this catalogue"
            )
    if len(expected) != len(found):
        raise ItemOrderError(
            f"{what} hold {len(found)} items, the catalogue {len(expected)} (the first"
            f" {min(len(expected), len(found))} agree); make them again from this catalogue"
        )


class ItemIndex:
    """Item IDs to row numbers and back.

    Args:
        item_ids: Outside IDs in row order, all different.

    Raises:
        ItemOrderError: An ID stands there twice.
    """

    def __init__(self, item_ids: Sequence[str]):
        self.item_ids: tuple[str, ...] = tuple(item_ids)
        self._row = {item_id: row for row, item_id in enumerate(self.item_ids)}
        if len(self._row) != len(self.item_ids):
            twice = next(item_id for row, item_id in enumerate(self.item_ids) if self._row[item_id] != row)
            raise ItemOrderError(f"item ID {twice!r} stands twice in the catalogue; item IDs must be unique")

    def __len__(self) -> int:
        return len(self.item_ids)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._row

    def rows(self, item_ids: Sequence[str]) -> np.ndarray:
        """Row numbers, int64 [len(item_ids)].

        Raises:
            UnknownItemError: One of the IDs is not in the catalogue.
        """
        try:
            return np.fromiter((self._row[item_id] for item_id in item_ids), dtype=np.int64, count=len(item_ids))
        except KeyError:
            unknown = [item_id for item_id in item_ids if item_id not in self._row]
            raise UnknownItemError(
                f"{len(unknown)} unknown item ID(s), first {unknown[0]!r}: the catalogue of {len(self)} items doesn't"
                f" hold it (its IDs look like {self.item_ids[0]!r})"
            ) from None
