"""From columns of interactions and a table of items to a catalogue and histories, as arrays.

The one place that every reader ends in: IDs become strings, rows that can't be used are dropped and counted, items and
users get their numbers, and the rows of a user are put in the order of time. No loop runs over rows.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from llmrec.data.columns import encode_ids, read_timestamps, require_columns
from llmrec.errors import DataError

logger = logging.getLogger(__name__)

WithoutMetadata = Literal["drop", "keep"]


@dataclass(frozen=True, eq=False)
class BuiltInteractions:
    """Catalogue and histories as plain arrays.

    Attributes:
        items: Table with the string column "item_id" first, one row an item.
        user_ids: Distinct user IDs in the order of their first row.
        flat_items: int32 [interactions], rows of `items`; users one after the other, oldest first.
        flat_timestamps: int64 [interactions] seconds since 1970 UTC, or None.
        offsets: int64 [users + 1], where each user's run begins.
        drops: Reason to number of dropped rows.
    """

    items: pa.Table
    user_ids: pa.StringArray
    flat_items: np.ndarray
    flat_timestamps: np.ndarray | None
    offsets: np.ndarray
    drops: dict[str, int] = field(default_factory=dict)


def build_interactions(
    user_ids: Any,
    item_ids: Any,
    timestamps: Any = None,
    *,
    items: Any = None,
    item_column: str = "item_id",
    title_column: str = "title",
    timestamp_unit: str | None = None,
    items_without_metadata: WithoutMetadata = "drop",
    source: str = "the table of interactions",
) -> BuiltInteractions:
    """Builds catalogue and histories out of parallel columns.

    Args:
        user_ids: User of each interaction (list, NumPy, pandas, Arrow).
        item_ids: Item of each interaction.
        timestamps: Time of each interaction; None takes the order of the rows.
        items: Table of items (`datasets.Dataset`, Arrow table, data frame, dict of columns) or None: then the
            catalogue is the items that occur, in the order of their first row.
        item_column: Column of `items` with the item ID.
        title_column: Column of `items` with the title; becomes "title".
        timestamp_unit: See `columns.read_timestamps`.
        items_without_metadata: What becomes of interactions whose item is not in `items`: "drop" leaves them out, as
            LC-Rec does, because an item without text can't get a meaningful semantic ID; "keep" appends these items to
            the catalogue with empty attributes.
        source: Where the columns come from, for messages.

    Raises:
        DataError: Columns of different length, no usable row, or what `columns` refuses.
    """
    if items_without_metadata not in ("drop", "keep"):
        raise DataError(f"items_without_metadata is {items_without_metadata!r}: choose 'drop' or 'keep'")
    drops: dict[str, int] = {}
    users, taken = encode_ids(user_ids, "user ID"), encode_ids(item_ids, "item ID")
    lengths = {"user IDs": len(users.codes), "item IDs": len(taken.codes)}
    times = None if timestamps is None else read_timestamps(timestamps, timestamp_unit)
    if times is not None:
        lengths["timestamps"] = len(times.seconds)
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{count} {what}" for what, count in lengths.items())
        raise DataError(f"{source} has columns of different length ({counts}): they must be parallel")
    if not len(users.codes):
        raise DataError(f"{source} is empty: it has no rows")
    if times is not None and times.missing.all():
        raise DataError(
            f"{source} has a timestamp column without a single timestamp: fill it, or pass timestamp_column=None to"
            " take the order of the rows"
        )

    catalogue, item_of_code = _catalogue(items, taken.ids, item_column, title_column, items_without_metadata, drops)
    item_rows = np.append(item_of_code, -2)[taken.codes]  # -1: no metadata, -2: no ID
    reasons = [("missing user ID", users.codes < 0), ("missing item ID", item_rows == -2)]
    reasons.append(("interaction with an item without metadata", item_rows == -1))
    if times is not None:
        reasons += [("missing timestamp", times.missing), ("timestamp that doesn't parse", times.unparsed)]
    usable = _usable(reasons, drops)
    if not usable.any():
        raise DataError(_nothing_left(source, len(usable), drops, taken.ids, catalogue["item_id"]))

    user_codes = _by_first_appearance(users.codes[usable], len(users.ids))
    user_names = users.ids.take(pa.array(user_codes.distinct))
    item_rows = item_rows[usable]
    if items is None:  # items of dropped rows alone are no part of the catalogue
        kept = _by_first_appearance(item_rows, len(catalogue))
        catalogue, item_rows = catalogue.take(pa.array(kept.distinct)), kept.codes
    if times is None:
        logger.info("%s has no timestamps: the order of its rows is taken as the order in time", source)
        order = np.argsort(user_codes.codes, kind="stable")
    else:
        order = np.lexsort((times.order[usable], user_codes.codes))  # stable: ties keep the order of the rows
    offsets = np.zeros(len(user_names) + 1, np.int64)
    np.cumsum(np.bincount(user_codes.codes, minlength=len(user_names)), out=offsets[1:])
    return BuiltInteractions(
        items=catalogue,
        user_ids=user_names,
        flat_items=item_rows[order].astype(np.int32),
        flat_timestamps=None if times is None else times.seconds[usable][order],
        offsets=offsets,
        drops=drops,
    )


def as_item_table(items: Any) -> pa.Table:
    """Any table of items as an Arrow table."""
    if isinstance(items, pa.Table):
        return items
    if isinstance(items, datasets.Dataset):
        return items.with_format("arrow")[:].replace_schema_metadata(None)
    if isinstance(items, pd.DataFrame):
        return pa.Table.from_pandas(items, preserve_index=False).replace_schema_metadata(None)
    if isinstance(items, Mapping):
        return pa.table(dict(items))
    raise DataError(
        f"items is a {type(items).__name__}: pass a datasets.Dataset, an Arrow table, a pandas data frame or a dict of"
        " columns"
    )


@dataclass(frozen=True, eq=False)
class _Renumbered:
    codes: np.ndarray
    distinct: np.ndarray  # old numbers in new order


def _by_first_appearance(codes: np.ndarray, count: int) -> _Renumbered:
    """Numbers the codes that occur anew, in the order of their first appearance."""
    first = np.full(count, len(codes), np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)  # the last assignment to a place stays
    distinct = np.argsort(first, kind="stable")[: int((first < len(codes)).sum())]
    renumber = np.full(count, -1, np.int64)
    renumber[distinct] = np.arange(len(distinct))
    return _Renumbered(renumber[codes], distinct)


def _usable(reasons: list[tuple[str, np.ndarray]], drops: dict[str, int]) -> np.ndarray:
    """Rows without any fault; each faulty row is counted once, under its first reason."""
    usable = np.ones(len(reasons[0][1]), bool)
    for reason, faulty in reasons:
        faulty = faulty & usable
        usable &= ~faulty
        if count := int(faulty.sum()):
            drops[reason] = drops.get(reason, 0) + count
            logger.warning("dropped %d of %d interactions: %s", count, len(usable), reason)
    return usable


def _catalogue(
    items: Any,
    occurring: pa.StringArray,
    item_column: str,
    title_column: str,
    items_without_metadata: WithoutMetadata,
    drops: dict[str, int],
) -> tuple[pa.Table, np.ndarray]:
    """The item table, and for each of the `occurring` IDs its row in it (-1: none)."""
    if items is None:
        return pa.table({"item_id": occurring}), np.arange(len(occurring))
    table = as_item_table(items)
    require_columns(table.column_names, [item_column], "the items table")
    encoded = encode_ids(table[item_column], "item ID")
    rows = np.arange(len(encoded.codes))
    first = np.full(len(encoded.ids), -1, np.int64)
    first[encoded.codes[encoded.codes >= 0][::-1]] = rows[encoded.codes >= 0][::-1]
    missing = int((encoded.codes < 0).sum())
    for reason, count in (
        ("item without an ID in the items table", missing),
        ("duplicate item in the items table (the first stays)", len(rows) - missing - len(first)),
    ):
        if count:
            drops[reason] = count
            logger.warning("dropped %d of %d rows of the items table: %s", count, len(rows), reason)
    columns = {"item_id": encoded.ids}  # in the order of first appearance, so `first` is sorted
    for column in table.column_names:
        name = "title" if column == title_column else column
        if column != item_column and name not in columns and (name == column or "title" not in table.column_names):
            columns[name] = table[column].take(pa.array(first))
    catalogue = pa.table(columns)
    item_of_code = pc.fill_null(pc.index_in(occurring, value_set=encoded.ids), -1).to_numpy(zero_copy_only=False)
    item_of_code = item_of_code.astype(np.int64)
    if items_without_metadata == "keep" and (item_of_code < 0).any():
        new = np.flatnonzero(item_of_code < 0)
        logger.info("%d items occur without metadata; they are kept with empty attributes", len(new))
        extra = pa.table({"item_id": occurring.take(pa.array(new))})
        item_of_code[new] = len(catalogue) + np.arange(len(new))
        catalogue = pa.concat_tables([catalogue, extra], promote_options="default")
    return catalogue, item_of_code


def _nothing_left(
    source: str, rows: int, drops: dict[str, int], occurring: pa.StringArray, catalogue: pa.ChunkedArray
) -> str:
    reasons = ", ".join(f"{reason}: {count}" for reason, count in drops.items())
    message = f"no usable row is left of the {rows} of {source} ({reasons})"
    if "interaction with an item without metadata" in drops:
        message += (
            f"; the interactions' item IDs look like {occurring[:2].to_pylist()}, those of the items table like"
            f" {catalogue[:2].to_pylist()}: name the matching columns, or pass items_without_metadata='keep'"
        )
    return message
