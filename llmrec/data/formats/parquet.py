"""Reads Parquet: one file, or a folder of shards."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset

from llmrec.data.columns import require_columns
from llmrec.errors import DataError


def read_parquet(
    path: str | os.PathLike[str], *, columns: Sequence[str] | None = None, required: Sequence[str] = ()
) -> pa.Table:
    """Reads a Parquet file, or all .parquet files of a folder in the order of their names.

    Args:
        path: File or folder.
        columns: Columns to read where they exist; None reads all.
        required: Columns that must exist.

    Raises:
        DataError: The file is empty or no Parquet, or lacks a column.
    """
    source = Path(path)
    shards = sorted(str(shard) for shard in source.glob("*.parquet")) if source.is_dir() else [str(source)]
    if not shards:
        raise DataError(f"the folder {source} holds no .parquet file")
    if any(Path(shard).stat().st_size == 0 for shard in shards):
        raise DataError(f"{source} is empty: it has no bytes")
    try:
        table = pyarrow.dataset.dataset(shards, format="parquet")
        names = table.schema.names
        require_columns(names, required, str(source))
        return table.to_table(columns=[name for name in names if columns is None or name in columns])
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise DataError(f"{source} can't be read as Parquet: {str(error).splitlines()[0]}") from error
