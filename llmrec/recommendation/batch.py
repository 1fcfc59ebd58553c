"""Recommendations for all users of some files: Parquet or JSON Lines in, Parquet out.

The rows are cut into parts; each is one file of the answer, which appears whole or not at all. Any number of processes
share the parts out. A run that was stopped goes on where it was: parts that are there stay as they are, and no user is
answered twice. `_manifest.json` says what the parts are the answers to, `_SUCCESS` that all of them are there.

Anything that has `recommend` can be given; nothing here knows models or codes.
"""

import inspect
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from llmrec.data.histories.files import HistoryReader, plan_histories
from llmrec.data.histories.plan import Source
from llmrec.data.recommendation import check_k
from llmrec.errors import DataError, SettingsError
from llmrec.files import atomic_file, write_json
from llmrec.processes import Processes
from llmrec.recommendation.batch_job import (
    ANSWER_COLUMNS,
    FORMAT_VERSION,
    SUCCESS_NAME,
    BatchJob,
    as_reusable,
    check_not_sharded,
    describe_options,
    make_manifest,
    prepare_job,
)

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.2

Value = TypeVar("Value")


@dataclass(frozen=True)
class BatchSummary:
    """What `recommend_file` has done.

    Attributes:
        folder: Where the answers are.
        num_rows: Users in all parts.
        num_parts: Files.
        num_new_rows: Users that this run answered, in all processes; the others had been before.
        seconds: Wall time of this run, without looking through the input.
    """

    folder: Path
    num_rows: int
    num_parts: int
    num_new_rows: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Users that all processes together answered in a second."""
        return self.num_new_rows / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        before = self.num_rows - self.num_new_rows
        return (
            f"{self.num_rows:,} users in {self.num_parts:,} parts in {self.folder}: {before:,} were there,"
            f" {self.num_new_rows:,} answered in {self.seconds:.1f} s ({self.rows_per_second:,.1f}/s)"
        )


def recommend_file(
    recommender: Any,
    source: Source,
    output_folder: str | os.PathLike[str],
    k: int = 10,
    *,
    history_column: str = "history",
    keep_columns: Sequence[str] | None = None,
    rows_per_part: int = 4096,
    processes: Processes | None = None,
    progress: bool | None = None,
    **options: Any,
) -> BatchSummary:
    """Recommends for every row of some files.

    The answer is a folder of files `part-00000-of-00123.parquet`: in the order of their names they have the rows of
    the input in its order. Columns: those that are kept; `item_ids`, list<string>, best first, fewer than k where
    fewer items are left; `scores`, list<float>, as `recommend` gives them. Any Parquet reader takes the folder as one
    table.

    A part is a run of at most `rows_per_part` rows of one row group, answered by one call of `recommend`. Process i of
    n takes every n-th of the parts that aren't there yet, so the number of processes may change from run to run, and
    the answers are the same for any. A row needs no memory once its part is written: what grows with the input is only
    the list of parts, about a hundred bytes each.

    A run that was stopped, also by SIGKILL, goes on when it is called again in the same way; at most the part that
    each process was working on is made again. A folder with parts of other input (its content counts, not its name or
    place), other settings or another recommender is refused. Only one run at a time may write to a folder.

    Every process holds the whole recommender. A model that is sharded over processes (FSDP, ZeRO-3, tensor parallel)
    is refused: its forwards need all processes at once, each of which has other parts here.

    Args:
        recommender: Has `recommend(histories, k, **options)`, which gives one list a history of objects with `item_id`
            and `score`: a `Recommender`, a baseline. A hash of what it is made of goes into the manifest, see
            `batch_job.fingerprint_of`.
        source: A file, a folder, a pattern or a list of such, of Parquet or JSON Lines; see `plan_histories`.
        output_folder: Made where it doesn't exist.
        k: Number of items wanted.
        history_column: Column with the list of item IDs, oldest first.
        keep_columns: Columns of the input that the answer has too; None: all but the histories.
        rows_per_part: Users of a part, at most. It bounds memory, and what a kill costs.
        processes: Who shares the parts out (`Processes.launched()`, called by all of them); None: this process alone.
        progress: Whether the main process shows a progress bar; None: where standard error is a terminal.
        **options: Of `recommend`: `exclude_seen`, `num_beams`, `batch_size`, ... `allow` and `deny` are one set for
            all users.

    Returns:
        The same on every process, save for `seconds`. By then all parts of all processes are there.

    Raises:
        MissingPartError: There is no such file.
        DataError: The input can't be used, found before any work is done (see `plan_histories`); the folder holds
            something else; or what `recommend` gave is no answer.
        SettingsError: k or `rows_per_part` below 1, an option that `recommend` doesn't have, a sharded model, a kept
            column that is called like one of the answer, or a folder with the parts of another job.
        UnknownItemError: An item that the catalogue doesn't hold, unless `on_unknown` is "skip". Parts that are done
            stay; a new call with `on_unknown="skip"` goes on with them.

    Example:
        >>> summary = recommend_file(model, "users-*.parquet", "runs/answers", k=10, batch_size=64)
        >>> pq.read_table(summary.folder).column_names
        ['user_id', 'item_ids', 'scores']
    """
    k = check_k(k)
    if rows_per_part < 1:
        raise SettingsError(f"rows_per_part is {rows_per_part}: a part needs at least 1 row")
    processes = processes or Processes.alone()
    check_not_sharded(recommender)
    options = {name: as_reusable(value) for name, value in options.items()}
    described = describe_options(recommender, k, options)

    def prepare() -> BatchJob:
        plan = plan_histories(
            source, history_column=history_column, keep_columns=keep_columns, rows_per_run=rows_per_part
        )
        manifest = make_manifest(plan, recommender, k, described, rows_per_part)
        return prepare_job(Path(output_folder), plan, manifest)

    job = _from_main(processes, prepare)
    started = time.perf_counter()
    _answer(recommender, k, options, job, processes, progress)
    _wait_for_all(job, processes)
    num_new = sum(job.plan.runs[part].num_rows for part in job.missing)
    summary = BatchSummary(job.folder, job.plan.num_rows, len(job.plan.runs), num_new, time.perf_counter() - started)
    if processes.is_main:
        if not (job.folder / SUCCESS_NAME).is_file():
            content = {"num_rows": summary.num_rows, "num_parts": summary.num_parts}
            write_json(job.folder / SUCCESS_NAME, {"format_version": FORMAT_VERSION, **content})
        logger.info("%s", summary)
    processes.barrier()
    return summary


def _from_main(processes: Processes, make: Callable[[], Value]) -> Value:
    """What the main process makes, on all of them; its error likewise, so that none of them is left waiting."""
    outcome: Any = None
    if processes.is_main:
        try:
            outcome = make()
        except Exception as error:
            outcome = error
    outcome = processes.broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    made: Value = outcome
    return made


def _answer(
    recommender: Any, k: int, options: dict[str, Any], job: BatchJob, processes: Processes, progress: bool | None
) -> None:
    """Makes this process's share of the missing parts."""
    if "progress" in inspect.signature(recommender.recommend).parameters:
        options = {"progress": False, **options}  # one bar is enough
    parts = job.missing[processes.index :: processes.count]
    total = sum(job.plan.runs[part].num_rows for part in parts)
    hide = (None if progress is None else not progress) if processes.is_main else True
    reader = HistoryReader(job.plan)
    try:
        with tqdm(total=total, desc="recommend", unit="user", disable=hide) as bar:
            for part in parts:
                histories, kept = reader.read(job.plan.runs[part])
                answers = recommender.recommend(histories, k, **options) if histories else []
                table = _as_table(answers, len(histories), k, kept, job.schema)
                with atomic_file(job.path(part)) as temporary:
                    pq.write_table(table, temporary)
                bar.update(len(histories))
    finally:
        reader.close()


def _as_table(answers: Sequence[Any], num_histories: int, k: int, kept: pa.Table, schema: pa.Schema) -> pa.Table:
    """Kept columns and answers of the same rows."""
    if len(answers) != num_histories:
        raise DataError(
            f"recommend gave {len(answers)} answers to {num_histories} histories: it must give one list a history"
        )
    longest = max(map(len, answers), default=0)
    if longest > k:
        raise DataError(f"recommend gave {longest} items where {k} were asked for")
    item_ids = [[item.item_id for item in answer] for answer in answers]
    scores = [[item.score for item in answer] for answer in answers]
    columns = [pa.array(values, field.type) for values, field in zip((item_ids, scores), ANSWER_COLUMNS, strict=True)]
    return pa.table([*kept.columns, *columns], schema=schema)


def _wait_for_all(job: BatchJob, processes: Processes) -> None:
    """Returns when the parts of all processes are there.

    By looking, since a barrier alone gives up after some minutes, and one process may need hours more than another.
    Where one of them fails, its launcher ends the others.
    """
    if processes.count > 1:
        wanted = {job.path(part).name for part in job.missing}
        while not wanted <= set(os.listdir(job.folder)):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    processes.barrier()
