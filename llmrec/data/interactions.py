"""Who took which item when: a catalogue of items and the histories of users, on Arrow.

Items and users have outside IDs (strings); inside, an item is its row number in the catalogue. This module knows no
models. Reading files is in `formats/`, cleaning columns in `columns.py` and `building.py`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmrec.data.building import WithoutMetadata, build_interactions
from llmrec.data.filters import gather_users, k_core_masks, repeats_mask
from llmrec.data.item_order import ItemIndex
from llmrec.data.summary import DatasetSummary, summarize
from llmrec.data.user_columns import HISTORY_COLUMNS, align_users
from llmrec.errors import DataError, MissingPartError
from llmrec.files import atomic_folder, check_format, read_json, write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
PathLike = str | os.PathLike[str]


class InteractionDataset:
    """A catalogue of items and the histories of users.

    Usually made by one of the `from_...` methods, not by the constructor.

    Args:
        items: One row an item: string column "item_id", further columns are attributes ("title", ...). An item's row
            is its number.
        histories: One row a user: "user_id" (string), "items" (list of int32 rows of the catalogue, oldest first) and,
            where times are known, "timestamps" (list of int64, seconds since 1970-01-01 UTC). Further columns are
            attributes of the users.
        name: Name of the data set.
        drops: Reason to number of rows that were dropped on the way here.

    Raises:
        DataError: A column is missing, or a history points outside the catalogue.
    """

    def __init__(
        self,
        items: datasets.Dataset,
        histories: datasets.Dataset,
        *,
        name: str = "dataset",
        drops: Mapping[str, int] | None = None,
    ):
        for table, columns, what in ((items, ["item_id"], "items"), (histories, ["user_id", "items"], "histories")):
            missing = [column for column in columns if column not in table.column_names]
            if missing:
                raise DataError(f"{what} has no column {missing[0]!r}; its columns are {table.column_names}")
        self.items = items
        self.histories = histories
        self.name = name
        self.drops: dict[str, int] = dict(drops or {})
        if self.num_interactions and not 0 <= self.flat_items.min() <= self.flat_items.max() < len(items):
            raise DataError(
                f"the histories of {name!r} point to item rows {self.flat_items.min()} to {self.flat_items.max()}, but"
                f" the catalogue has {len(items)} items"
            )

    def __repr__(self) -> str:
        return (
            f"InteractionDataset({self.name!r}, {self.num_users} users, {self.num_items} items,"
            f" {self.num_interactions} interactions)"
        )

    @property
    def num_items(self) -> int:
        """Items of the catalogue, those that nobody took included."""
        return len(self.items)

    @property
    def num_users(self) -> int:
        """Users, those without interactions included."""
        return len(self.histories)

    @property
    def num_interactions(self) -> int:
        """Interactions of all users."""
        return len(self.flat_items)

    @cached_property
    def item_ids(self) -> tuple[str, ...]:
        """Outside IDs of the items, in row order."""
        return tuple(_column(self.items, "item_id").to_pylist())

    @cached_property
    def item_index(self) -> ItemIndex:
        """Item IDs to rows and back."""
        return ItemIndex(self.item_ids)

    @cached_property
    def user_ids(self) -> tuple[str, ...]:
        """Outside IDs of the users, in row order."""
        return tuple(_column(self.histories, "user_id").to_pylist())

    @cached_property
    def titles(self) -> tuple[str, ...]:
        """Titles in row order: "" where an item has none, the item IDs where the catalogue has no column "title"."""
        if "title" not in self.items.column_names:
            return self.item_ids
        return tuple("" if title is None else str(title) for title in _column(self.items, "title").to_pylist())

    @property
    def item_keys(self) -> tuple[str, ...] | None:
        """What published index files (LETTER, MiniOneRec) call the items, in row order; None where not known."""
        if "item_key" not in self.items.column_names:
            return None
        return tuple(_column(self.items, "item_key").to_pylist())

    @cached_property
    def flat_items(self) -> np.ndarray:
        """int32 [num_interactions], the histories one after the other."""
        return _flatten(self.histories, "items").astype(np.int32, copy=False)

    @cached_property
    def flat_timestamps(self) -> np.ndarray | None:
        """int64 [num_interactions] seconds since 1970-01-01 UTC, parallel to `flat_items`; None without timestamps."""
        if "timestamps" not in self.histories.column_names:
            return None
        return _flatten(self.histories, "timestamps").astype(np.int64, copy=False)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [num_users + 1]: the history of user `u` is `flat_items[offsets[u]:offsets[u + 1]]`."""
        lengths = pc.list_value_length(_column(self.histories, "items")).to_numpy()
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    @property
    def user_columns(self) -> tuple[str, ...]:
        """Names of the attributes of users."""
        return tuple(name for name in self.histories.column_names if name not in HISTORY_COLUMNS)

    def history(self, user: int) -> np.ndarray:
        """Catalogue rows of one user, int32, oldest first; `user` is a row of `histories`."""
        return self.flat_items[self.offsets[user] : self.offsets[user + 1]]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content (items, users, their attributes, histories, times), the same after save and load."""
        digest = hashlib.sha256()
        for column in sorted(self.items.column_names):
            values = _column(self.items, column).to_pylist()
            digest.update(json.dumps([column, values], ensure_ascii=False, default=str).encode())
        digest.update("\0".join(self.user_ids).encode())
        for column in sorted(self.user_columns):
            values = _column(self.histories, column).to_pylist()
            digest.update(json.dumps([column, values], ensure_ascii=False, default=str).encode())
        for array in (self.offsets, self.flat_items, self.flat_timestamps):
            digest.update(b"none" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:32]

    def summary(self) -> DatasetSummary:
        """Counts that describe the data set; `print` shows them as a table."""
        return summarize(self)

    def k_core(self, k: int = 5) -> "InteractionDataset":
        """Keeps users and items with at least `k` interactions each.

        Repeated until nothing changes, because a user that goes can take an item under `k`. Items under `k` leave the
        catalogue, those that nobody took included.

        Raises:
            DataError: `k` is below 1, or nothing is left.
        """
        if k < 1:
            raise DataError(f"k is {k}: a k-core needs k of at least 1")
        keep, users, items = k_core_masks(self.flat_items, self.offsets, self.num_items, k)
        if not keep.any():
            raise DataError(
                f"nothing is left of {self.name!r} in its {k}-core ({self.num_interactions} interactions before): use"
                " a smaller k"
            )
        return self.select(keep, users=users, items=items, reason=f"outside the {k}-core")

    def without_repeats(
        self, policy: Literal["keep", "drop_later", "drop_consecutive"] = "drop_later"
    ) -> "InteractionDataset":
        """Treats items that a user took more than once.

        Args:
            policy: "drop_later" keeps the first time only, as LC-Rec does before its k-core; "drop_consecutive" keeps
                the first of several in a row; "keep" changes nothing.
        """
        if policy == "keep":
            return self
        keep = ~repeats_mask(self.flat_items, self.offsets, self.num_items, policy)
        return self.select(keep, reason=f"repeat ({policy})")

    def select(
        self,
        interactions: np.ndarray,
        *,
        users: np.ndarray | None = None,
        items: np.ndarray | None = None,
        reason: str | None = None,
    ) -> "InteractionDataset":
        """Keeps a part of the interactions.

        Args:
            interactions: bool [num_interactions].
            users: bool [num_users], None keeps all. Interactions of users that go must be False.
            items: bool [num_items], None keeps the catalogue as it is. Likewise.
            reason: Under which name the others are counted in `drops` and logged; None: they are not dropped for a
                fault, for instance held out.
        """
        flat_items = self.flat_items[interactions]
        table, catalogue = _table(self.histories.select_columns(["user_id", *self.user_columns])), self.items
        lengths = gather_users(interactions, self.offsets)
        if items is not None:
            flat_items = (np.cumsum(items) - 1)[flat_items]
            catalogue = datasets.Dataset(_table(self.items).filter(pa.array(items)))
        if users is not None:
            table, lengths = table.filter(pa.array(users)), lengths[users]
        drops = dict(self.drops)
        dropped = int(len(interactions) - interactions.sum())
        if reason and dropped:
            drops[reason] = drops.get(reason, 0) + dropped
            logger.info("dropped %d of %d interactions: %s", dropped, len(interactions), reason)
        times = None if self.flat_timestamps is None else self.flat_timestamps[interactions]
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        histories = _histories(table, flat_items, times, offsets)
        return InteractionDataset(catalogue, histories, name=self.name, drops=drops)

    def with_user_columns(self, users: Any, *, user_column: str = "user_id") -> "InteractionDataset":
        """The same data set, with attributes of its users: a text of what each likes, for instance.

        Args:
            users: Table of users, see `user_columns.align_users`. Its columns but for the ID become attributes, in
                the place of those of the same name. Users that the data set doesn't have are left out; those that the
                table lacks get null.
            user_column: Its column with the user ID.

        Raises:
            DataError: What `align_users` refuses.
        """
        attributes = align_users(users, self.user_ids, user_column=user_column)
        histories = _table(self.histories)
        replaced = [name for name in attributes.column_names if name in histories.column_names]
        histories = histories.drop_columns(replaced) if replaced else histories
        for name in attributes.column_names:
            histories = histories.append_column(name, attributes[name])
        return InteractionDataset(self.items, datasets.Dataset(histories), name=self.name, drops=self.drops)

    @classmethod
    def from_columns(
        cls,
        user_ids: Any,
        item_ids: Any,
        timestamps: Any = None,
        *,
        items: Any = None,
        item_column: str = "item_id",
        title_column: str = "title",
        timestamp_unit: str | None = None,
        items_without_metadata: WithoutMetadata = "drop",
        name: str = "dataset",
        source: str = "the table of interactions",
    ) -> Self:
        """Makes a data set out of parallel columns; `building.build_interactions` describes the arguments.

        Example:
            >>> dataset = InteractionDataset.from_columns(["u", "u", "v"], ["a", "b", "a"], [20, 10, 15])
            >>> [dataset.item_ids[row] for row in dataset.history(0)]
            ['b', 'a']
        """
        built = build_interactions(
            user_ids,
            item_ids,
            timestamps,
            items=items,
            item_column=item_column,
            title_column=title_column,
            timestamp_unit=timestamp_unit,
            items_without_metadata=items_without_metadata,
            source=source,
        )
        users = pa.table({"user_id": built.user_ids})
        histories = _histories(users, built.flat_items, built.flat_timestamps, built.offsets)
        return cls(datasets.Dataset(built.items), histories, name=name, drops=built.drops)

    @classmethod
    def from_files(cls, interactions: PathLike, items: PathLike | None = None, **options: Any) -> Self:
        """Reads CSV, TSV, JSON Lines or Parquet by suffix; `formats.files.read_files` describes the options."""
        from llmrec.data.formats.files import read_files

        return cls.from_columns(**read_files(interactions, items, **options))

    @classmethod
    def from_letter(
        cls,
        folder_or_prefix: PathLike,
        *,
        items_without_metadata: WithoutMetadata = "drop",
        name: str | None = None,
    ) -> Self:
        """Reads the layout of LETTER and LC-Rec, X.inter.json and X.item.json; see `formats.letter.read_letter`."""
        from llmrec.data.formats.letter import read_letter

        columns = read_letter(folder_or_prefix, name=name)
        return cls.from_columns(**columns, items_without_metadata=items_without_metadata)

    @classmethod
    def from_minionerec(
        cls,
        folder_or_prefix: PathLike,
        *,
        items_without_metadata: WithoutMetadata = "drop",
        name: str | None = None,
    ) -> Self:
        """Reads the layout of MiniOneRec, X.item.json and X.train.csv; see `formats.minionerec.read_minionerec`."""
        from llmrec.data.formats.minionerec import read_minionerec

        columns = read_minionerec(folder_or_prefix, name=name)
        return cls.from_columns(**columns, items_without_metadata=items_without_metadata)

    @classmethod
    def from_hub(cls, path: str, **options: Any) -> Self:
        """Reads what `datasets.load_dataset` reads, Hub or local; `formats.hub.read_hub` describes the options."""
        from llmrec.data.formats.hub import read_hub

        return cls.from_columns(**read_hub(path, **options))

    def save(self, folder: PathLike) -> None:
        """Writes items.parquet, histories.parquet and dataset.json, whole or not at all.

        Raises:
            DataError: The folder exists and holds something else.
        """
        target = Path(folder)
        if target.is_dir() and any(target.iterdir()) and not (target / "dataset.json").is_file():
            raise DataError(f"{target} exists and holds no data set: choose an empty or a new folder")
        with atomic_folder(target) as temporary:
            pq.write_table(_table(self.items), temporary / "items.parquet")
            pq.write_table(_table(self.histories), temporary / "histories.parquet")
            content = {"format_version": FORMAT_VERSION, "name": self.name, "fingerprint": self.fingerprint}
            write_json(temporary / "dataset.json", content | {"drops": self.drops})

    @classmethod
    def load(cls, folder: PathLike) -> Self:
        """Reads what `save` wrote.

        Raises:
            MissingPartError: A file is missing.
            DataError: A file is damaged, or of a later llmrec.
        """
        source = Path(folder)
        content = read_json(source / "dataset.json")
        check_format(content, FORMAT_VERSION, source / "dataset.json")
        tables = {}
        for part in ("items", "histories"):
            path = source / f"{part}.parquet"
            if not path.is_file():
                raise MissingPartError(f"{path} is missing: save the data set again")
            try:
                tables[part] = datasets.Dataset(pq.read_table(path))
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(f"{path} is damaged: {error}; save the data set again") from error
        return cls(tables["items"], tables["histories"], name=content["name"], drops=content["drops"])


def _table(dataset: datasets.Dataset) -> pa.Table:
    return dataset.with_format("arrow")[:].replace_schema_metadata(None)


def _column(dataset: datasets.Dataset, column: str) -> pa.ChunkedArray:
    return _table(dataset.select_columns([column]))[column]


def _flatten(dataset: datasets.Dataset, column: str) -> np.ndarray:
    return pc.list_flatten(_column(dataset, column)).to_numpy()


def _histories(
    users: pa.Table, flat_items: np.ndarray, times: np.ndarray | None, offsets: np.ndarray
) -> datasets.Dataset:
    starts = pa.array(offsets, pa.int32())
    columns = {"user_id": users["user_id"]}
    columns["items"] = pa.ListArray.from_arrays(starts, pa.array(flat_items, pa.int32()))
    if times is not None:
        columns["timestamps"] = pa.ListArray.from_arrays(starts, pa.array(times, pa.int64()))
    attributes = {name: users[name] for name in users.column_names if name != "user_id"}
    return datasets.Dataset(pa.table(columns | attributes))
