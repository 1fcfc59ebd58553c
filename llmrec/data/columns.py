"""Columns as they come to what llmrec works with: string IDs and whole seconds.

Everything here works on whole Arrow columns; the one loop over rows is the fallback for Python lists that mix types.
Nothing here knows what an interaction is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from llmrec.errors import DataError

MISSING_WORDS = ("", "nan", "NaN", "null", "NULL", "None", "<NA>", "#N/A")
_LARGEST_EXACT_FLOAT = 2.0**53
_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


@dataclass(frozen=True, eq=False)
class EncodedIds:
    """A column of IDs, each distinct ID once.

    Attributes:
        codes: int64 [rows], place of each row's ID in `ids`; -1 where it is missing.
        ids: The distinct IDs in the order of their first appearance.
    """

    codes: np.ndarray
    ids: pa.StringArray


def encode_ids(values: Any, what: str) -> EncodedIds:
    """Reads a column of IDs as strings.

    Integers become their decimal digits, and so do floats without a fraction, which a missing value makes of integers:
    1, "1" and 1.0 are one ID. A text column that holds nothing but whole numbers, some of them written "1.0", lost its
    integer type to a missing value too, and reads the same. Text loses surrounding white space; null, NaN, empty text
    and the words that programs write for them (`MISSING_WORDS`) are missing.

    Args:
        values: Arrow array, NumPy array, pandas series or list.
        what: What the IDs are, for messages: "user ID".

    Raises:
        DataError: The column is of a type that can't be an ID, holds fractions, or a NUL character.
    """
    column = _arrow_column(values, what)
    kind = column.type
    if pa.types.is_null(kind):
        column = column.cast(pa.string())
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        column = _whole_numbers(column.cast(pa.float64()), what)
    elif not (pa.types.is_integer(kind) or _is_text(kind)):
        raise DataError(f"the {what} column is of type {kind}: IDs must be text or integers; name another column")
    encoded = column.dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # no rows at all
        encoded = pa.array([], kind).dictionary_encode()
    codes = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    distinct = encoded.dictionary.cast(pa.string())
    if _is_text(kind):
        distinct = _tidy_text(distinct, what)
    merged = distinct.dictionary_encode()
    place = pc.fill_null(merged.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    return EncodedIds(codes=np.append(place, -1)[codes], ids=merged.dictionary)


@dataclass(frozen=True, eq=False)
class Timestamps:
    """A column of times.

    Attributes:
        seconds: int64 [rows], whole seconds since 1970-01-01 UTC, rounded down; 0 where there is none.
        order: [rows], the times in the resolution they came in, to sort by.
        missing: bool [rows], null or empty.
        unparsed: bool [rows], something stands there that is no time.
    """

    seconds: np.ndarray
    order: np.ndarray
    missing: np.ndarray
    unparsed: np.ndarray


def read_timestamps(values: Any, unit: str | None = None) -> Timestamps:
    """Reads a column of times: numbers, ISO 8601 text, or Arrow dates and timestamps.

    Numbers count from 1970-01-01 UTC. Unless `unit` names theirs, it follows from the largest absolute value of the
    column: under 1e11 seconds (until the year 5138), under 1e14 milliseconds, under 1e17 microseconds, else
    nanoseconds. Text of digits is read as numbers; other text as ISO 8601, in UTC unless it names a zone. Text in
    other forms ("03/04/2020") could mean two days and counts as unparsed.

    Args:
        values: Arrow array, NumPy array, pandas series or list.
        unit: "s", "ms", "us" or "ns"; only for numbers.

    Raises:
        DataError: More than half of the times that are there don't parse, or the column's type can't be a time.
    """
    if unit is not None and unit not in _UNITS:
        raise DataError(f"timestamp_unit is {unit!r}: choose one of {', '.join(_UNITS)}, or None to tell by size")
    column = _arrow_column(values, "timestamp")
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _from_numbers(column if pa.types.is_integer(kind) else column.cast(pa.float64()), unit)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _from_instants(column, np.zeros(len(column), bool))
    if pa.types.is_null(kind):
        return _from_numbers(column.cast(pa.int64()), unit)
    if not _is_text(kind):
        raise DataError(f"the timestamp column is of type {kind}: pass numbers, ISO 8601 text or Arrow timestamps")
    column = pc.utf8_trim_whitespace(column)
    column = pc.if_else(pc.is_in(column, value_set=pa.array(MISSING_WORDS, column.type)), None, column)
    numeric = pc.match_substring_regex(column, r"^[+-]?\d+(\.\d*)?$")
    if len(column) > column.null_count and pc.mean(numeric).as_py() > 0.5:
        return _from_numeric_text(column, numeric, unit)
    parsed = pd.to_datetime(column.to_pandas(), format="ISO8601", utc=True, errors="coerce")
    instants = pa.chunked_array([pa.array(parsed, pa.timestamp("us", "UTC"), safe=False)])
    unparsed = pc.and_(pc.is_valid(column), pc.is_null(instants)).to_numpy()
    _check_unparsed(column, unparsed)
    return _from_instants(instants, unparsed)


def instant_seconds(value: int | float | str | datetime, what: str) -> float:
    """Reads one point in time as seconds since 1970-01-01 UTC.

    Args:
        value: Seconds, ISO 8601 text or a `datetime`; the latter two in UTC unless they name a zone.
        what: Name of the setting, for messages.

    Raises:
        DataError: It is no point in time.
    """
    if (
        isinstance(value, int | float | np.integer | np.floating)
        and not isinstance(value, bool)
        and np.isfinite(value)
    ):
        return float(value)
    try:
        instant = pd.Timestamp(value)
        if instant is not pd.NaT:
            return (instant.tz_localize("UTC") if instant.tz is None else instant).timestamp()
    except (ValueError, TypeError):
        pass
    raise DataError(f"{what} is {value!r}: pass seconds since 1970, ISO 8601 text such as '2014-03-01', or a datetime")


def require_columns(found: Sequence[str], wanted: Iterable[str], source: str) -> None:
    """Refuses a table without the columns that are asked for.

    Raises:
        DataError: One is missing, or stands there twice; the message lists those that are there.
    """
    for column in wanted:
        if list(found).count(column) == 0:
            raise DataError(
                f"{source} has no column {column!r}; its columns are {', '.join(map(repr, found)) or 'none'}: name the"
                " right one with user_column=, item_column=, timestamp_column= or title_column="
            )
        if list(found).count(column) > 1:
            raise DataError(f"{source} has the column {column!r} more than once: rename all but one")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _arrow_column(values: Any, what: str) -> pa.ChunkedArray:
    if isinstance(values, pa.Array):
        values = pa.chunked_array([values])
    if not isinstance(values, pa.ChunkedArray):
        try:
            values = pa.array(values, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            values = pa.array([_one_text(value, what) for value in values], pa.string())
        if not isinstance(values, pa.ChunkedArray):
            values = pa.chunked_array([values])
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values


def _one_text(value: Any, what: str) -> str | None:
    """One entry of a column that mixes types."""
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, float | np.floating):
        if np.isnan(value):
            return None
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    if isinstance(value, str | int | np.integer) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    raise DataError(f"the {what} column holds {value!r} of type {type(value).__name__}: IDs must be text or integers")


def _whole_numbers(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    column = pc.if_else(pc.is_nan(column), None, column)
    bad = pc.or_(pc.not_equal(pc.floor(column), column), pc.greater(pc.abs(column), _LARGEST_EXACT_FLOAT))
    if pc.any(bad).as_py():
        value = column.filter(bad)[0].as_py()
        raise DataError(
            f"the {what} column holds the number {value!r}: only whole numbers up to 2**53 can be IDs; store the"
            " column as text or integers, or name another column"
        )
    return column.cast(pa.int64())


def _tidy_text(distinct: pa.StringArray, what: str) -> pa.StringArray:
    """Distinct IDs, trimmed; null where missing; "7.0" to "7" where all are whole numbers."""
    nul = pc.match_substring(distinct, "\0")
    if pc.any(nul).as_py():
        raise DataError(
            f"the {what} {distinct.filter(nul)[0].as_py()!r} holds a NUL character: the file is damaged, or in another"
            " encoding (try encoding='utf-16')"
        )
    distinct = pc.utf8_trim_whitespace(distinct)
    distinct = pc.if_else(
        pc.is_in(distinct, value_set=pa.array(MISSING_WORDS)), pa.scalar(None, pa.string()), distinct
    )
    pointed = pc.match_substring_regex(distinct, r"^-?\d+\.0+$")
    if pc.any(pointed).as_py() and pc.all(pc.match_substring_regex(distinct, r"^-?\d+(\.0+)?$")).as_py():
        distinct = pc.replace_substring_regex(distinct, r"\.0+$", "")
    return distinct


def _from_numbers(column: pa.ChunkedArray, unit: str | None, unparsed: np.ndarray | None = None) -> Timestamps:
    missing = column.is_null().to_numpy()
    order = pc.fill_null(column, 0).to_numpy()
    if order.dtype.kind == "f":
        missing = missing | ~np.isfinite(order)
        order = np.where(missing, 0.0, order)
    else:
        order = order.astype(np.int64)
    largest = max(abs(int(order.max())), abs(int(order.min()))) if len(order) else 0
    size = "s" if largest < 10**11 else "ms" if largest < 10**14 else "us" if largest < 10**17 else "ns"
    seconds = np.floor_divide(order, _UNITS[unit or size]).astype(np.int64)
    unparsed = np.zeros(len(order), bool) if unparsed is None else unparsed
    return Timestamps(seconds=seconds, order=order, missing=missing & ~unparsed, unparsed=unparsed)


def _from_numeric_text(column: pa.ChunkedArray, numeric: pa.ChunkedArray, unit: str | None) -> Timestamps:
    unparsed = pc.fill_null(pc.invert(numeric), False).to_numpy()
    _check_unparsed(column, unparsed)
    numbers = pc.if_else(pc.fill_null(numeric, False), column, None)
    try:
        numbers = numbers.cast(pa.int64())
    except pa.ArrowInvalid:  # some have a fraction
        numbers = numbers.cast(pa.float64())
    return _from_numbers(numbers, unit, unparsed)


def _from_instants(column: pa.ChunkedArray, unparsed: np.ndarray) -> Timestamps:
    zone = getattr(column.type, "tz", None)
    unit = getattr(column.type, "unit", "s")  # dates have none
    ticks = column.cast(pa.timestamp(unit, zone)).cast(pa.int64())
    return _from_numbers(ticks, unit, unparsed)


def _check_unparsed(column: pa.ChunkedArray, unparsed: np.ndarray) -> None:
    present = len(column) - column.null_count
    if unparsed.sum() * 2 > present:
        examples = column.filter(pa.array(unparsed))[:3].to_pylist()
        raise DataError(
            f"{int(unparsed.sum())} of {present} timestamps don't parse, such as {', '.join(map(repr, examples))}: use"
            " numbers since 1970 or ISO 8601 text such as '2014-03-01T12:00:00', or pass timestamp_column=None to take"
            " the order of the rows"
        )
