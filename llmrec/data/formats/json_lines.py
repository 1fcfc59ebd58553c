"""Reads JSON Lines: one JSON object a line."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json

from llmrec.data.columns import require_columns
from llmrec.data.formats.delimited import check_encoding
from llmrec.errors import DataError

_BLOCK = 16 * 1024 * 1024  # bytes; a line must fit into one


def read_json_lines(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    required: Sequence[str] = (),
    text_columns: Sequence[str] = (),
    encoding: str = "utf-8",
) -> pa.Table:
    """Reads a file of one JSON object a line, plain or compressed.

    Arrow's reader does it where every column has one type. Where it refuses (a column with 1 and "1", NaN), or takes
    IDs for dates, the lines are read one after the other in Python.

    Args:
        path: The file.
        columns: Columns to read where they exist; None reads all.
        required: Columns that must exist.
        text_columns: Columns of IDs; text in them stays text, even where it looks like a date.
        encoding: Of the text.

    Raises:
        DataError: The file is empty, not in this encoding, has a line that is no JSON object (named), or lacks a
            column.
    """
    source = Path(path)
    if source.stat().st_size == 0:
        raise DataError(f"{source} is empty")
    try:
        if encoding.lower().replace("_", "-") not in ("utf-8", "utf8"):
            raise pa.ArrowInvalid("Arrow reads UTF-8 only")
        table = pyarrow.json.read_json(source, read_options=pyarrow.json.ReadOptions(block_size=_BLOCK))
        table.validate(full=True)  # the reader itself lets bytes through that are no UTF-8
        if any(
            pa.types.is_timestamp(table.schema.field(name).type) for name in text_columns if name in table.schema.names
        ):
            raise pa.ArrowInvalid("IDs taken for dates")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeError):
        table = _read_slowly(source, encoding)
    if not table.column_names:
        raise DataError(f"{source} is empty: it has blank lines only")
    require_columns(table.column_names, required, str(source))
    return table if columns is None else table.select([name for name in table.column_names if name in columns])


def attribute_column(values: list[Any]) -> pa.Array:
    """A column of any JSON values; values of mixed types become text, JSON where they are not text."""
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        texts = (v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values)
        return pa.array(list(texts), pa.string())


def _read_slowly(source: Path, encoding: str) -> pa.Table:
    check_encoding(source, encoding)
    records: list[dict[str, Any]] = []
    with pa.input_stream(str(source)) as stream:
        text = stream.read().decode("utf-8-sig" if encoding.lower().replace("_", "-") == "utf-8" else encoding)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{source}, line {number}, is not valid JSON: {error.msg}; fix or remove the line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{source}, line {number}, holds a {type(record).__name__}: JSON Lines needs one JSON object a line"
            )
        records.append(record)
    if not records:
        raise DataError(f"{source} is empty")
    names = dict.fromkeys(name for record in records for name in record)
    return pa.table({name: attribute_column([record.get(name) for record in records]) for name in names})
