"""Histories in Parquet files: a column of lists of item IDs."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmrec.data.histories.plan import NO_ROWS, HistoryFile, HistoryPlan, RowRun, check_columns
from llmrec.errors import DataError

_BUFFER = 1 << 20  # bytes; without a buffer, pyarrow reads a column of a row group at once
_CHECKED_AT_ONCE = 8192  # rows


def plan_parquet(
    paths: Sequence[Path], history_column: str, keep_columns: Sequence[str] | None, rows_per_run: int
) -> HistoryPlan:
    """Looks through Parquet files; see `files.plan_histories`."""
    files: list[HistoryFile] = []
    runs: list[RowRun] = []
    kept: pa.Schema | None = None
    for number, path in enumerate(paths):
        with closing(_open(path)) as parquet:
            found = _kept_columns(parquet.schema_arrow, history_column, keep_columns, path)
            if kept is not None and found != kept:
                raise DataError(
                    f"{paths[0]} and {path} have different columns: {_names(kept)}; and {_names(found)}. Choose"
                    " columns to keep that all files have, of one type"
                )
            kept = found
            rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            first_row = 0
            for group, num_rows in enumerate(rows):
                _check_row_group(parquet, history_column, group, first_row, path)
                for start in range(0, num_rows, rows_per_run):
                    size = min(rows_per_run, num_rows - start)
                    runs.append(RowRun(number, group, start, size, first_row + start))
                first_row += num_rows
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        files.append(HistoryFile(str(path), path.stat().st_size, sum(rows), len(rows), digest))
    return HistoryPlan(tuple(files), tuple(runs) or (NO_ROWS,), history_column, cast(pa.Schema, kept))


class ParquetReader:
    """Reads the runs of one file. Going back in a row group starts it anew.

    Args:
        path: The file.
        plan: What was planned of it.
    """

    def __init__(self, path: Path, plan: HistoryPlan):
        self._path = path
        self._plan = plan
        self._file = _open(path)
        self._row_group = -1
        self._rows: _RowGroup | None = None
        self._batch_size = max(run.num_rows for run in plan.runs)

    def read(self, run: RowRun) -> tuple[list[list[str]], pa.Table]:
        """Histories of a run, and the kept columns of the same rows."""
        if self._rows is None or self._row_group != run.row_group or self._rows.position > run.start:
            columns = [self._plan.history_column, *self._plan.kept.names]
            batches = _batches(self._file, list(dict.fromkeys(columns)), run.row_group, self._batch_size, self._path)
            self._row_group, self._rows = run.row_group, _RowGroup(batches)
        rows = self._rows.take(run.start, run.num_rows)
        histories = rows[self._plan.history_column].combine_chunks()
        _check_histories(histories, f"{self._path}, row group {run.row_group}", run.first_row)
        texts = histories.cast(pa.large_list(pa.large_string())).to_pylist()
        return texts, rows.select(self._plan.kept.names).cast(self._plan.kept)

    def close(self) -> None:
        """Closes the file."""
        self._rows = None
        self._file.close()


class _RowGroup:
    """The rows of one row group, forwards; no more than a batch and what is taken are in memory."""

    def __init__(self, batches: Iterator[pa.RecordBatch]):
        self._batches = batches
        self._rest: pa.RecordBatch | None = None
        self.position = 0  # of the first row of `_rest` within the row group

    def take(self, start: int, count: int) -> pa.Table:
        """Rows `start` to `start + count`; what stands before them is passed over."""
        pieces: list[pa.RecordBatch] = []
        while self.position < start + count:
            if self._rest is None or not self._rest.num_rows:
                self._rest = next(self._batches)
            until = start if self.position < start else start + count
            size = min(self._rest.num_rows, until - self.position)
            if self.position >= start:
                pieces.append(self._rest.slice(0, size))
            self._rest = self._rest.slice(size)
            self.position += size
        return pa.Table.from_batches(pieces)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} can't be read as Parquet: {str(error).splitlines()[0]}") from error


def _batches(
    parquet: pq.ParquetFile, columns: list[str], group: int, batch_size: int, path: Path
) -> Iterator[pa.RecordBatch]:
    try:
        yield from parquet.iter_batches(batch_size=batch_size, row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}, row group {group}, can't be read: {str(error).splitlines()[0]}") from error
    raise DataError(f"{path}, row group {group}, ends too early: the file has changed while it was read")


def _kept_columns(schema: pa.Schema, history_column: str, keep_columns: Sequence[str] | None, path: Path) -> pa.Schema:
    """The columns to keep, of a file whose history column holds lists of IDs."""
    check_columns(schema.names, history_column, keep_columns, str(path))
    kind = schema.field(history_column).type
    without_values = pa.types.is_null(kind)  # what pandas writes for a table without rows
    if not without_values and (not _is_list(kind) or not _is_id(kind.value_type)):
        raise DataError(
            f"{path}: the column {history_column!r} is of type {kind}; histories must be lists of item IDs (text or"
            " integers): name another column, or convert it"
        )
    names = [name for name in schema.names if name != history_column] if keep_columns is None else keep_columns
    return pa.schema([pa.field(name, schema.field(name).type) for name in names])


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_id(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(text or pa.types.is_integer(kind) or pa.types.is_null(kind))  # null: every list is empty


def _names(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"


def _check_row_group(parquet: pq.ParquetFile, history_column: str, group: int, first_row: int, path: Path) -> None:
    end = first_row + parquet.metadata.row_group(group).num_rows
    batches = _batches(parquet, [history_column], group, _CHECKED_AT_ONCE, path)
    while first_row < end:
        batch = next(batches)
        _check_histories(batch.column(0), f"{path}, row group {group}", first_row)
        first_row += batch.num_rows


def _check_histories(histories: pa.Array, where: str, first_row: int) -> None:
    """Refuses a history, or an item of one, that is null."""
    if histories.null_count:
        row = first_row + pc.index(pc.is_null(histories), True).as_py()
        raise DataError(f"{where}, row {row}: the history is null; write an empty list, or leave the row out")
    items = pc.list_flatten(histories)
    if items.null_count:
        place = pc.index(pc.is_null(items), True).as_py()
        row = first_row + pc.list_parent_indices(histories)[place].as_py()
        raise DataError(f"{where}, row {row}: an item of the history is null; every entry must be an item ID")
