"""Some items of a catalogue: which a request may be answered with, and which not.

The search asks one thing: is there an item left below a node of the trie. The leaves below a node are a run, so the
answer is a difference: of an allowed set, how many of its leaves stand before each leaf (a table, made once and used
by all requests); of a request's own denied leaves, how many of the sorted few fall into the run (a binary search). A
step costs the same for sets of any size.

This module knows rows and leaves. It knows nothing of codes, models or item IDs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llmrec.errors import DataError, SettingsError

if TYPE_CHECKING:
    from llmrec.generation.trie import ItemTrie

MOST_DENIED_ROWS = 4096
"""A request that denies more rows than this gets a table of its own: sorting so many takes longer than making one."""


@dataclass(frozen=True, eq=False)
class ItemSet:
    """Some items of a catalogue, prepared once by `ItemTrie.item_set`, used by any number of requests.

    Attributes:
        rows: bool [N], True where the item of that catalogue row is in the set.
        leaves_before: int32 [M_L + 1], the number of leaves before each leaf that hold an item of the set.
        fingerprint: That of the trie, which refuses sets of another catalogue.
    """

    rows: np.ndarray
    leaves_before: Tensor
    fingerprint: int


@dataclass(frozen=True, eq=False)
class LeafSubset:
    """Which leaves each of B requests may be answered with, made by `ItemTrie.subset`.

    Attributes:
        allowed: int32 [S, M_L + 1], the `leaves_before` of S sets; None where all leaves are allowed.
        set_of_request: int64 [B], the set of each request; None where all have the first.
        denied: int32 [B, D], allowed leaves to leave out all the same, ascending, padded with M_L; None where there
            are none.
    """

    allowed: Tensor | None
    set_of_request: Tensor | None
    denied: Tensor | None

    @property
    def num_requests(self) -> int | None:
        """B; None where the subset is the same for any number of requests."""
        of_requests = self.set_of_request if self.denied is None else self.denied
        return None if of_requests is None else len(of_requests)

    def to(self, device: torch.device | str) -> "LeafSubset":
        """The same subset on another device."""
        parts = (self.allowed, self.set_of_request, self.denied)
        return LeafSubset(*(None if part is None else part.to(device) for part in parts))

    def any_left(self, bounds: Tensor) -> Tensor:
        """Whether neighbouring runs of leaves hold one that is left.

        Args:
            bounds: int32 [R, C + 1]: run i of a row is from leaf `bounds[:, i]` up to `bounds[:, i + 1]`. R is B
                requests times equally many rows, the rows of a request side by side.

        Returns:
            bool [R, C].
        """
        if self.allowed is None:
            left = bounds
        elif self.set_of_request is None:
            left = self.allowed[0].index_select(0, bounds.flatten()).view_as(bounds)
        else:
            offsets = (self.set_of_request * self.allowed.shape[1]).view(-1, 1)
            places = bounds.view(len(offsets), -1) + offsets
            left = self.allowed.view(-1).index_select(0, places.flatten()).view_as(bounds)
        if self.denied is not None:
            requests = bounds.view(len(self.denied), -1)
            left = left - torch.searchsorted(self.denied, requests, out_int32=True).view_as(bounds)
        return left[:, 1:] > left[:, :-1]


def make_item_set(trie: "ItemTrie", items: np.ndarray) -> ItemSet:
    """See `ItemTrie.item_set`."""
    items = np.asarray(items)
    if items.dtype == bool:
        if items.shape != (trie.num_items,):
            raise DataError(f"a mask over {trie.num_items} items must have as many values, got shape {items.shape}")
        rows = items.copy()
    else:
        rows = np.zeros(trie.num_items, dtype=bool)
        rows[check_rows(items, trie.num_items)] = True
    before = torch.empty(trie.num_leaves + 1, dtype=torch.int32, device=trie.device)
    return ItemSet(rows, _count_leaves_before(trie, rows, before), trie.fingerprint)


def make_subset(
    trie: "ItemTrie",
    allow: ItemSet | Sequence[ItemSet | None] | None,
    deny: Sequence[np.ndarray] | None,
) -> LeafSubset | None:
    """See `ItemTrie.subset`."""
    if deny is None:
        sets = [allow] if allow is None or isinstance(allow, ItemSet) else list(allow)
        rows = [np.empty(0, dtype=np.int64)] * len(sets)
    else:
        sets = [allow] * len(deny) if allow is None or isinstance(allow, ItemSet) else list(allow)
        rows = [check_rows(of_request, trie.num_items) for of_request in deny]
    if len(sets) != len(rows):
        raise SettingsError(f"{len(sets)} allowed sets and {len(rows)} denied ones: one of each a request is needed")
    for one in {id(one): one for one in sets if one is not None}.values():
        if one.fingerprint != trie.fingerprint:
            raise SettingsError("an item set was prepared for another catalogue: make it anew with item_set")

    sets = [None if one is None or one.rows.all() else one for one in sets]
    many = [of_request if len(of_request) > MOST_DENIED_ROWS else None for of_request in rows]
    denied = [
        _NO_LEAVES if len(of_request) == 0 or of_request is of_many else _denied_leaves(trie, of_request, one)
        for of_request, of_many, one in zip(rows, many, sets, strict=True)
    ]
    longest = max(map(len, denied), default=0)
    padded = np.full((len(denied), longest), trie.num_leaves, dtype=np.int32)
    for request, leaves in enumerate(denied):
        padded[request, : len(leaves)] = leaves
    allowed, set_of_request = _tables(trie, sets, many)
    if allowed is None and longest == 0:
        return None
    return LeafSubset(allowed, set_of_request, torch.from_numpy(padded).to(trie.device) if longest else None)


_NO_LEAVES = np.empty(0, dtype=np.int32)


def _denied_leaves(trie: "ItemTrie", rows: np.ndarray, allowed: ItemSet | None) -> np.ndarray:
    """The leaves, ascending, that hold an allowed item, and whose allowed items are all among the rows."""
    rows = np.unique(rows).astype(np.int64)
    if allowed is not None:
        rows = rows[allowed.rows[rows]]
    leaves, counts = np.unique(_take(trie.leaf_of_item, rows), return_counts=True)
    if trie.shared_starts is None:
        return leaves
    starts, ends = _take(trie.shared_starts, leaves), _take(trie.shared_starts, leaves + 1)
    sizes = ends - starts
    if allowed is not None and len(leaves):
        firsts = np.cumsum(sizes) - sizes
        places = np.arange(sizes.sum()) + np.repeat(starts - firsts, sizes)
        sizes = np.add.reduceat(allowed.rows[_take(trie.items, places)], firsts, dtype=np.int64)
    return leaves[counts == sizes]


def _tables(
    trie: "ItemTrie", sets: Sequence[ItemSet | None], denied: Sequence[np.ndarray | None]
) -> tuple[Tensor | None, Tensor | None]:
    """`allowed` and `set_of_request` of a subset: each request's set without its denied rows.

    A table that several requests share is there once, and the one set of all requests isn't copied.
    """
    keys = [(id(one), id(rows)) for one, rows in zip(sets, denied, strict=True)]
    distinct = dict(zip(keys, zip(sets, denied, strict=True), strict=True))
    if all(one is None and rows is None for one, rows in distinct.values()):
        return None, None
    if len(distinct) == 1 and denied[0] is None and sets[0] is not None:
        return sets[0].leaves_before.to(trie.device).unsqueeze(0), None
    tables = torch.empty(len(distinct), trie.num_leaves + 1, dtype=torch.int32, device=trie.device)
    for table, (one, rows) in zip(tables, distinct.values(), strict=True):
        if rows is not None:
            left = np.ones(trie.num_items, dtype=bool) if one is None else one.rows.copy()
            left[rows] = False
            _count_leaves_before(trie, left, table)
        elif one is not None:
            table.copy_(one.leaves_before)
        else:
            torch.arange(len(table), out=table)
    numbers = {key: number for number, key in enumerate(distinct)}
    return tables, torch.tensor([numbers[key] for key in keys], device=trie.device)


def _take(array: Tensor, places: np.ndarray) -> np.ndarray:
    """Some values of an array that may be on another device."""
    return array.index_select(0, torch.from_numpy(places).to(array.device)).cpu().numpy()


def _count_leaves_before(trie: "ItemTrie", rows: np.ndarray, before: Tensor) -> Tensor:
    """Fills int32 [M_L + 1] with the number of leaves before each leaf that hold an item of bool [N]."""
    is_in = torch.from_numpy(rows).to(trie.device).index_select(0, trie.items)
    if trie.shared_starts is not None:
        items_before = before.new_zeros(trie.num_items + 1)
        torch.cumsum(is_in, 0, dtype=torch.int32, out=items_before[1:])
        items_before = items_before.index_select(0, trie.shared_starts)
        is_in = items_before[1:] > items_before[:-1]
    before[:1] = 0
    torch.cumsum(is_in, 0, dtype=torch.int32, out=before[1:])
    return before


def check_rows(rows: np.ndarray, num_items: int) -> np.ndarray:
    """Catalogue rows as integers [n], in the given order.

    Raises:
        DataError: A row outside the catalogue, or not integers on one axis.
    """
    rows = np.asarray(rows)
    if rows.size == 0:
        return np.empty(0, dtype=np.int64)
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise DataError(f"catalogue rows are integers on one axis, got {rows.dtype} of shape {rows.shape}")
    if rows.min() < 0 or rows.max() >= num_items:
        row = rows[(rows < 0) | (rows >= num_items)][0]
        raise DataError(f"there is no catalogue row {row}: the trie has {num_items} items, rows from 0")
    return rows
