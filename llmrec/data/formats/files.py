"""Reads interactions and items from two files, each in the format that its suffix names."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmrec.data.building import WithoutMetadata
from llmrec.data.formats.delimited import read_delimited
from llmrec.data.formats.json_lines import read_json_lines
from llmrec.data.formats.parquet import read_parquet
from llmrec.errors import DataError, MissingPartError

DEFAULT_TIMESTAMP_COLUMN = "timestamp"
_DELIMITED = {".csv", ".tsv", ".txt"}
_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_COMPRESSED = {".gz", ".bz2", ".zst"}


def read_files(
    interactions: str | os.PathLike[str],
    items: str | os.PathLike[str] | None = None,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
    timestamp_column: str | None = DEFAULT_TIMESTAMP_COLUMN,
    timestamp_unit: str | None = None,
    title_column: str = "title",
    delimiter: str | None = None,
    encoding: str = "utf-8",
    items_without_metadata: WithoutMetadata = "drop",
    name: str | None = None,
) -> dict[str, Any]:
    """Reads files into the arguments of `InteractionDataset.from_columns`.

    Args:
        interactions: .csv, .tsv, .txt (tabs), .jsonl, .ndjson, .json (one object a line), each also compressed (.gz,
            .bz2, .zst), .parquet, or a folder of .parquet shards. One row an interaction.
        items: One row an item, likewise; None: the catalogue is the items that occur, and their IDs are their titles.
        user_column: Column of `interactions` with the user ID.
        item_column: Column of both files with the item ID.
        timestamp_column: Column of `interactions` with the time; None takes the order of the rows. The default name
            may be missing (then likewise, said in the log); another name must exist.
        timestamp_unit: "s", "ms", "us" or "ns"; None tells by the size of the numbers (`columns.read_timestamps`).
        title_column: Column of `items` with the title; becomes "title". The default name may be missing.
        delimiter: Of .csv, .tsv and .txt; None follows the suffix.
        encoding: Of text files.
        items_without_metadata: "drop" or "keep", see `building.build_interactions`.
        name: Name of the data set; the file's name without suffix by default.

    Raises:
        MissingPartError: A file does not exist.
        DataError: It can't be read or lacks a column.
    """
    required = [user_column, item_column]
    if timestamp_column not in (None, DEFAULT_TIMESTAMP_COLUMN):
        required.append(timestamp_column)
    wanted = [*required, *([timestamp_column] if timestamp_column else [])]
    ids = [user_column, item_column]
    table = read_table(interactions, wanted, required, ids, delimiter, encoding)
    arguments: dict[str, Any] = {
        "user_ids": table[user_column],
        "item_ids": table[item_column],
        "timestamps": table[timestamp_column] if timestamp_column in table.column_names else None,
        "item_column": item_column,
        "title_column": title_column,
        "timestamp_unit": timestamp_unit,
        "items_without_metadata": items_without_metadata,
        "name": name or Path(interactions).name.split(".")[0],
        "source": str(interactions),
    }
    if items is not None:
        required = [item_column] if title_column == "title" else [item_column, title_column]
        arguments["items"] = read_table(items, None, required, [item_column], delimiter, encoding)
    return arguments


def read_table(
    path: str | os.PathLike[str],
    columns: Sequence[str] | None,
    required: Sequence[str],
    text_columns: Sequence[str],
    delimiter: str | None = None,
    encoding: str = "utf-8",
) -> pa.Table:
    """Reads one file in the format that its suffix names; arguments as of the readers.

    Raises:
        MissingPartError: The file does not exist.
        DataError: The suffix is unknown, or the reader refuses the file.
    """
    source = Path(path)
    if not source.exists():
        raise MissingPartError(f"{source} does not exist")
    suffixes = [suffix.lower() for suffix in source.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if source.is_dir() or suffix == ".parquet":
        return read_parquet(source, columns=columns, required=required)
    if suffix in _JSON_LINES:
        return read_json_lines(
            source, columns=columns, required=required, text_columns=text_columns, encoding=encoding
        )
    if suffix in _DELIMITED:
        return read_delimited(
            source,
            columns=columns,
            required=required,
            text_columns=text_columns,
            delimiter=delimiter,
            encoding=encoding,
        )
    known = ", ".join(sorted(_DELIMITED | _JSON_LINES | {".parquet"}))
    raise DataError(f"{source} has the suffix {suffix!r}, which no reader knows: use one of {known}")
