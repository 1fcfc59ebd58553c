"""Histories in JSON Lines: one object a line, one of its values a list of item IDs."""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from llmrec.data.histories.plan import NO_ROWS, HistoryFile, HistoryPlan, RowRun, check_columns
from llmrec.errors import DataError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def plan_json_lines(
    paths: Sequence[Path], history_column: str, keep_columns: Sequence[str] | None, rows_per_run: int
) -> HistoryPlan:
    """Looks through JSON Lines; see `files.plan_histories`."""
    files: list[HistoryFile] = []
    runs: list[RowRun] = []
    kinds: dict[str, set[str]] = {}  # column -> what its values are
    for number, path in enumerate(paths):
        digest, start, first_line, num_rows, end = hashlib.sha256(), 0, 1, 0, 0
        with _open(path) as stream:
            for line_number, line in enumerate(_lines(stream, path), start=1):
                digest.update(line)
                if record := _read_record(line, path, line_number):
                    _read_history(record, history_column, path, line_number)
                    for name, value in record.items():
                        kinds.setdefault(name, set()).add(_kind(value))
                    if num_rows % rows_per_run == 0:
                        start, first_line = end, line_number
                    num_rows += 1
                    if num_rows % rows_per_run == 0:
                        runs.append(RowRun(number, 0, start, rows_per_run, first_line))
                end += len(line)
        if num_rows % rows_per_run:
            runs.append(RowRun(number, 0, start, num_rows % rows_per_run, first_line))
        files.append(HistoryFile(str(path), path.stat().st_size, num_rows, 1, digest.hexdigest()))
    if runs:
        check_columns(kinds, history_column, keep_columns, ", ".join(map(str, paths[:3])))
    names = [name for name in kinds if name != history_column] if keep_columns is None else keep_columns
    kept = pa.schema([pa.field(name, _arrow_type(kinds.get(name, set()))) for name in names])
    return HistoryPlan(tuple(files), tuple(runs) or (NO_ROWS,), history_column, kept)


class JsonLinesReader:
    """Reads the runs of one file.

    Args:
        path: The file.
        plan: What was planned of it.
    """

    def __init__(self, path: Path, plan: HistoryPlan):
        self._path = path
        self._plan = plan
        self._stream = _open(path)

    def read(self, run: RowRun) -> tuple[list[list[str]], pa.Table]:
        """Histories of a run, and the kept columns of the same rows."""
        self._stream.seek(run.start)
        histories: list[list[str]] = []
        records: list[dict[str, Any]] = []
        for line_number, line in enumerate(_lines(self._stream, self._path), start=run.first_row):
            if record := _read_record(line, self._path, line_number):
                histories.append(_read_history(record, self._plan.history_column, self._path, line_number))
                records.append(record)
            if len(records) == run.num_rows:
                break
        else:
            raise DataError(f"{self._path} ends too early: the file has changed while it was read")
        columns = [_as_column([record.get(field.name) for record in records], field.type) for field in self._plan.kept]
        return histories, pa.table(columns, schema=self._plan.kept)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def _open(path: Path) -> BinaryIO:
    """Its bytes; a .gz file is unpacked, and seeking forwards in it unpacks what lies between."""
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb"))


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        while line := stream.readline():  # `yield from` would close the stream with the generator
            yield line
    except (EOFError, OSError) as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _read_record(line: bytes, path: Path, line_number: int) -> dict[str, Any]:
    """The object of a line; {} for a blank line."""
    content = line.removeprefix(_BYTE_ORDER_MARK) if line_number == 1 else line
    if not content.strip():
        return {}
    try:
        record = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}, line {line_number}, is not valid JSON: {error}; fix or remove the line") from error
    if not isinstance(record, dict) or not record:
        raise DataError(f"{path}, line {line_number}: JSON Lines needs one JSON object a line, with a history in it")
    return record


def _read_history(record: dict[str, Any], history_column: str, path: Path, line_number: int) -> list[str]:
    if history_column not in record:
        raise DataError(
            f"{path}, line {line_number}: the column {history_column!r} is not there; the columns are"
            f" {', '.join(map(repr, record))}. Name that of the histories, or write an empty list"
        )
    history = record[history_column]
    if not isinstance(history, list):
        raise DataError(f"{path}, line {line_number}: the history is {json.dumps(history)}; write a list of item IDs")
    for item in history:
        if not isinstance(item, str | int) or isinstance(item, bool):
            raise DataError(
                f"{path}, line {line_number}: an item of the history is {json.dumps(item)}; every entry must be an"
                " item ID (text or an integer)"
            )
    return [str(item) for item in history]


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return "int" if -(2**63) <= value < 2**63 else "text"
    return {type(None): "null", bool: "bool", float: "float"}.get(type(value), "text")


def _arrow_type(kinds: set[str]) -> pa.DataType:
    """The type of a column whose values are of these kinds."""
    found = kinds - {"null"}
    if found == {"bool"}:
        return pa.bool_()
    if found == {"int"}:
        return pa.int64()
    if found in ({"float"}, {"int", "float"}):
        return pa.float64()
    return pa.string()


def _as_column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_floating(kind):
        values = [None if value is None else float(value) for value in values]
    elif pa.types.is_string(kind):
        values = [_as_text(value) for value in values]
    return pa.array(values, kind)


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
