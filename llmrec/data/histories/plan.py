"""Which files hold the histories, and how their rows are cut into runs."""

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from llmrec.errors import DataError, MissingPartError

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

PARQUET = (".parquet",)
JSON_LINES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")


@dataclass(frozen=True)
class HistoryFile:
    """One file, as it was when it was looked through.

    Attributes:
        path: Where it is.
        size: Bytes.
        num_rows: Histories in it.
        num_row_groups: Of a Parquet file; 1 for JSON Lines.
        sha256: Of its content (of a .gz file: unpacked).
    """

    path: str
    size: int
    num_rows: int
    num_row_groups: int
    sha256: str


@dataclass(frozen=True, slots=True)
class RowRun:
    """Neighbouring rows that are read together.

    Attributes:
        file: Number of the file.
        row_group: Row group of a Parquet file; 0 for JSON Lines.
        start: First row within the row group; in JSON Lines the byte where the first line starts.
        num_rows: How many rows.
        first_row: First row within the file, from 0; in JSON Lines the number of the first line, from 1.
    """

    file: int
    row_group: int
    start: int
    num_rows: int
    first_row: int


NO_ROWS = RowRun(0, 0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class HistoryPlan:
    """All histories of some files, cut into runs in the order of files and rows.

    Attributes:
        files: All Parquet or all JSON Lines.
        runs: A run lies within one row group. Where there is no row at all, one run without rows.
        history_column: Column of the histories.
        kept: Names and types of the columns that are read beside them; the same in every run.
    """

    files: tuple[HistoryFile, ...]
    runs: tuple[RowRun, ...]
    history_column: str
    kept: pa.Schema

    @property
    def num_rows(self) -> int:
        """Histories in all files."""
        return sum(file.num_rows for file in self.files)


def is_parquet(path: str | os.PathLike[str]) -> bool:
    """Whether a file is Parquet by its name."""
    return os.fspath(path).lower().endswith(PARQUET)


def find_history_files(source: Source) -> list[Path]:
    """The files that a source stands for, all Parquet or all JSON Lines.

    Args:
        source: A file, a folder (its files in the order of their names, without those that start with "." or "_"), a
            pattern such as "users-*.parquet", or a list of such.

    Raises:
        MissingPartError: There is no such file.
        DataError: A suffix that isn't known, both kinds, or a file given twice.
    """
    entries = [source] if isinstance(source, str | os.PathLike) else list(source)
    paths = [path for entry in entries for path in _files_of(os.fspath(entry))]
    if not paths:
        raise MissingPartError("no file of histories is given: name at least one")
    seen = set()
    for path in paths:
        if not path.name.lower().endswith(PARQUET + JSON_LINES):
            known = ", ".join(PARQUET + JSON_LINES)
            raise DataError(f"{path} is no file of histories that can be read: its name must end in one of {known}")
        if path.resolve() in seen:
            raise DataError(f"{path} is given twice: its users would be answered twice; name it once")
        seen.add(path.resolve())
        if is_parquet(path) != is_parquet(paths[0]):
            raise DataError(f"{paths[0]} and {path} are of two kinds: give either Parquet or JSON Lines")
    return paths


def _files_of(entry: str) -> list[Path]:
    path = Path(entry)
    if path.is_dir():
        known = [file for file in sorted(path.iterdir()) if file.name.lower().endswith(PARQUET + JSON_LINES)]
        found = [file for file in known if file.is_file() and not file.name.startswith((".", "_"))]
        if not found:
            raise MissingPartError(f"the folder {path} holds no file that ends in {', '.join(PARQUET + JSON_LINES)}")
        return found
    if path.is_file():
        return [path]
    found = [Path(name) for name in sorted(glob.glob(entry, recursive=True)) if Path(name).is_file()]
    if not found:
        what = "no file matches" if glob.has_magic(entry) else "there is no file"
        raise MissingPartError(f"{what} {entry}")
    return found


def check_columns(found: Iterable[str], history_column: str, keep_columns: Sequence[str] | None, where: str) -> None:
    """Refuses columns that aren't there, or stand there twice.

    Raises:
        DataError: With the columns that are there.
    """
    names = list(found)
    for column in (history_column, *(keep_columns or ())):
        if names.count(column) != 1:
            problem = "more than once" if column in names else "not"
            raise DataError(
                f"{where}: the column {column!r} is {problem} there; the columns are"
                f" {', '.join(map(repr, names)) or 'none'}. Name that of the histories, and those to keep, as they are"
            )
    if keep_columns is not None and len(set(keep_columns)) < len(keep_columns):
        raise DataError(f"the columns to keep name one twice: {', '.join(keep_columns)}")
