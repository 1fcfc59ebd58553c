"""The catalogue of a recommender: everything about its items that must change together.

A recommender holds one reference to a `Catalogue`, and whoever answers a request takes it once. Items are added and
removed by making another catalogue beside it and swapping the reference, so a request is answered from the old one or
from the new one, never from a mixture.

Knows items, codes and the trie. Knows no model, and not how new items are encoded.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, cast

import datasets
import numpy as np
import pyarrow as pa
import torch

from llmrec.data.item_order import ItemIndex, check_item_order
from llmrec.errors import DataError, SettingsError
from llmrec.generation.item_sets import ItemSet
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.tasks.next_item import NextItemTask

NewItems: TypeAlias = datasets.Dataset | pa.Table | Sequence[Mapping[str, Any]]
"""New items as users have them: columns, or one dictionary an item."""


@dataclass(frozen=True, eq=False, repr=False)
class Catalogue:
    """N items in one order: row i is the same item in every part.

    Attributes:
        semantic_ids: Their IDs and codes.
        items: Column "item_id" and whatever else is known of them ("title").
        task: Makes prompts of their codes.
        item_index: Item IDs to rows.
        trie: Of their codes, on the CPU.
    """

    semantic_ids: SemanticIds
    items: datasets.Dataset
    task: NextItemTask
    item_index: ItemIndex
    trie: ItemTrie
    _device_tries: dict[torch.device, ItemTrie] = field(default_factory=dict, init=False)
    _item_sets: "weakref.WeakSet[ItemSet]" = field(default_factory=weakref.WeakSet, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @classmethod
    def of(cls, semantic_ids: SemanticIds, items: datasets.Dataset, task: NextItemTask) -> "Catalogue":
        """Joins the parts, and makes index and trie.

        Raises:
            ItemOrderError: Items and codes are about other items, or in another order.
        """
        check_item_order(items["item_id"][:], semantic_ids.item_ids, "the semantic IDs")
        index, trie = ItemIndex(semantic_ids.item_ids), ItemTrie.from_semantic_ids(semantic_ids)
        return cls(semantic_ids, items, task, index, trie)

    def __len__(self) -> int:
        return len(self.semantic_ids)

    def __repr__(self) -> str:
        return f"Catalogue({len(self)} items, {self.trie.num_leaves} code tuples)"

    @cached_property
    def _title_column(self) -> pa.ChunkedArray | None:
        return _table(self.items.select_columns(["title"]))["title"] if "title" in self.items.column_names else None

    def title(self, row: int) -> str:
        """Title of an item, "" where it has none. Read when it is asked for: a million strings are slow to make."""
        title = None if self._title_column is None else self._title_column[row].as_py()
        return "" if title is None else str(title)

    @cached_property
    def titles(self) -> tuple[str, ...]:
        """All titles in row order."""
        if self._title_column is None:
            return ("",) * len(self)
        return tuple("" if title is None else str(title) for title in self._title_column.to_pylist())

    def trie_on(self, device: torch.device | str) -> ItemTrie:
        """The trie on a device: copied there when it is first asked for, once, whichever thread asks."""
        device = torch.device(device)
        if device == self.trie.device:
            return self.trie
        with self._lock:
            if device not in self._device_tries:
                self._device_tries[device] = self.trie.to(device)
            return self._device_tries[device]

    def item_set(self, items: np.ndarray, device: torch.device | str) -> ItemSet:
        """Prepares some items, int rows or a bool mask [N], for any number of requests to this catalogue."""
        prepared = self.trie_on(device).item_set(items)
        self._item_sets.add(prepared)
        return prepared

    def check_item_set(self, items: ItemSet) -> None:
        """Refuses a set that was made for another catalogue: its rows may be other items here.

        The trie compares codes, and items that take each other's place may have the same.

        Raises:
            SettingsError: `item_set` of this catalogue didn't make it.
        """
        if items not in self._item_sets:
            raise SettingsError(
                f"the item set of {len(items.rows)} items was not made for this catalogue of {len(self)}: items were"
                " added or removed since, or it is another recommender's; make it again by item_set()"
            )

    def with_items(self, semantic_ids: SemanticIds, new: pa.Table) -> "Catalogue":
        """Another catalogue with further items after these.

        Costs what the new items cost and some passes over arrays of all; this one stays as it is.

        Args:
            semantic_ids: Of these items as they are, then the new ones: from `ItemTokenizer.extend`.
            new: From `item_table`, in the order of the new ones.
        """
        added = datasets.Dataset(new, info=self.items.info.copy())
        return Catalogue(
            semantic_ids,
            datasets.concatenate_datasets([self.items, added]),
            self.task.with_semantic_ids(semantic_ids),
            ItemIndex(semantic_ids.item_ids),
            self.trie.insert(semantic_ids.codes[len(self) :]),
        )

    def without_items(self, item_ids: Sequence[str]) -> "Catalogue":
        """Another catalogue without some of the items; the others keep codes and order. This one stays as it is.

        Raises:
            UnknownItemError: One of the IDs isn't here.
            DataError: No item would be left.
        """
        rows = np.unique(self.item_index.rows(item_ids))
        if len(rows) == len(self):
            raise DataError(f"all {len(self)} items would be removed: a catalogue needs at least one")
        keep = np.ones(len(self), dtype=bool)
        keep[rows] = False
        semantic_ids = self.semantic_ids.remove(item_ids)
        return Catalogue(
            semantic_ids,
            datasets.Dataset(_table(self.items).filter(pa.array(keep)), info=self.items.info.copy()),
            self.task.with_semantic_ids(semantic_ids),
            ItemIndex(semantic_ids.item_ids),
            self.trie.remove(rows),
        )

    def with_codes(self, semantic_ids: SemanticIds) -> "Catalogue":
        """Another catalogue of the same items, with other codes from codebooks of the same sizes. This one stays.

        Nothing of the old codes is left in it: trie, prompts, item sets and what was copied to devices are new.

        Args:
            semantic_ids: Of these items, in this order; under any policy.

        Raises:
            ItemOrderError: They are about other items, or in another order.
            SettingsError: The codebooks have other sizes.
        """
        check_item_order(self.semantic_ids.item_ids, semantic_ids.item_ids, "the new semantic IDs")
        sizes = self.semantic_ids.codebook_sizes
        if semantic_ids.codebook_sizes != sizes:
            raise SettingsError(
                f"the new semantic IDs have codebooks of sizes {semantic_ids.codebook_sizes}, the catalogue {sizes},"
                " and the model knows tokens for these alone: encode with the same settings (under the policy"
                " extra_level pass make_unique the counter_size)"
            )
        task, trie = self.task.with_semantic_ids(semantic_ids), ItemTrie.from_semantic_ids(semantic_ids)
        return Catalogue(semantic_ids, self.items, task, self.item_index, trie)

    def item_table(self, items: NewItems) -> pa.Table:
        """New items in the columns and types of this catalogue.

        Args:
            items: With "item_id" and any of the catalogue's other columns, in any order. A column that they lack is
                null.

        Returns:
            Their table; the IDs are strings, all different, and none of them is here.

        Raises:
            DataError: A column that the catalogue doesn't have, values of another type, or IDs that are missing, no
                strings, repeated or here already.
        """
        given, schema = _as_table(items), self.items.features.arrow_schema
        unknown = sorted(set(given.column_names) - set(schema.names))
        if unknown:
            raise DataError(
                f"new items have the column {unknown[0]!r}, which the catalogue doesn't have (its columns are"
                f" {', '.join(schema.names)}): leave it out"
            )
        if "item_id" not in given.column_names:
            raise DataError(f"new items need the column 'item_id'; they have {given.column_names}")
        columns = [
            _cast(given[column.name], column)
            if column.name in given.column_names
            else pa.nulls(len(given), column.type)
            for column in schema
        ]
        self._check_new_ids(given["item_id"].to_pylist())
        return pa.table(columns, names=schema.names)

    def _check_new_ids(self, item_ids: list[Any]) -> None:
        for row, item_id in enumerate(item_ids):
            if not isinstance(item_id, str) or not item_id:
                raise DataError(f"new item {row} has the ID {item_id!r}: item IDs are strings of at least one letter")
        known = [item_id for item_id in item_ids if item_id in self.item_index]
        if known:
            raise DataError(
                f"{len(known)} of {len(item_ids)} new items are in the catalogue already, first {known[0]!r}: leave"
                " them out, or remove them first"
            )
        if len(set(item_ids)) < len(item_ids):
            twice = Counter(item_ids).most_common(1)[0][0]
            raise DataError(f"new item {twice!r} stands twice: give every item once")


def _table(items: datasets.Dataset) -> pa.Table:
    return cast(pa.Table, items.with_format("arrow")[:])


def _as_table(items: NewItems) -> pa.Table:
    if isinstance(items, datasets.Dataset):
        return _table(items).replace_schema_metadata(None)
    if isinstance(items, pa.Table):
        return items
    rows: list[Any] = list(items)
    if not all(isinstance(row, Mapping) for row in rows):
        raise DataError("new items must be a Dataset, a pyarrow table or a list of dictionaries, one an item")
    if not rows:
        return pa.table({"item_id": pa.array([], pa.string())})
    names = dict.fromkeys(name for row in rows for name in row)  # of all, in the order in which they appear
    try:
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    except pa.ArrowException as error:
        raise DataError(f"new items have values of different types in one column: {error}") from error


def _cast(values: pa.ChunkedArray, column: pa.Field) -> pa.ChunkedArray:
    try:
        return values.cast(column.type)
    except pa.ArrowException as error:
        raise DataError(
            f"the column {column.name!r} of the new items is {values.type}, the catalogue's {column.type}: {error}"
        ) from error
