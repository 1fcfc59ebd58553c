"""Histories of many users in Parquet or JSON Lines, read a run of rows at a time.

`plan_histories` looks through all files once, checks every history, and cuts the rows into runs; a `HistoryReader`
reads one run after the other. However long the files and their row groups are, no more rows than those of two runs are
in memory. What becomes of the histories isn't known here.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from llmrec.data.histories.json_lines import JsonLinesReader, plan_json_lines
from llmrec.data.histories.parquet import ParquetReader, plan_parquet
from llmrec.data.histories.plan import HistoryPlan, RowRun, Source, find_history_files, is_parquet


def plan_histories(
    source: Source, *, history_column: str, keep_columns: Sequence[str] | None = None, rows_per_run: int
) -> HistoryPlan:
    """Looks through files of histories: whether every history can be used, and where the runs lie.

    A history is a list of item IDs, oldest first; it may be empty. Integers are read as their decimal digits, as
    everywhere in llmrec. In Parquet they stand in a column of lists (also large ones, of fixed size, or of
    dictionary-encoded text). JSON Lines has one object a line; a kept column gets the one type that all its values
    have, and else text (JSON for values that aren't text); it is null where a line lacks it.

    Everything is read once, for the checks and for the SHA-256 of each file: a mistake in the last row is found before
    any work is done on the first, and a changed file is known.

    Args:
        source: What `find_history_files` takes: .parquet; or .jsonl, .ndjson, .json of one object a line, also with
            .gz.
        history_column: Column of the histories.
        keep_columns: Columns to read beside them; None: all others.
        rows_per_run: Rows of a run, at most.

    Raises:
        MissingPartError: There is no such file.
        DataError: A file that can't be read, a column that isn't there or has another type in another file; a history
            or an item that is null or no ID: the message names file, row group and row (from 0), or line (from 1).
    """
    paths = find_history_files(source)
    plan = plan_parquet if is_parquet(paths[0]) else plan_json_lines
    return plan(paths, history_column, keep_columns, rows_per_run)


class HistoryReader:
    """Reads the runs of a plan; quickest in their order.

    Args:
        plan: Of files that haven't changed since.
    """

    def __init__(self, plan: HistoryPlan):
        self._plan = plan
        self._number = -1  # of the open file
        self._reader: ParquetReader | JsonLinesReader | None = None

    def read(self, run: RowRun) -> tuple[list[list[str]], pa.Table]:
        """Histories of a run, and the kept columns of the same rows.

        Raises:
            DataError: The file can't be read, or has changed since it was looked through.
        """
        if not run.num_rows:
            return [], self._plan.kept.empty_table()
        if self._reader is None or self._number != run.file:
            self.close()
            path = Path(self._plan.files[run.file].path)
            self._reader = ParquetReader(path, self._plan) if is_parquet(path) else JsonLinesReader(path, self._plan)
            self._number = run.file
        return self._reader.read(run)

    def close(self) -> None:
        """Closes the file that is open."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None
