"""Which samples stand in which row of which step of an epoch.

The plan is made for the whole batch of a step, of all processes and accumulated parts together, from seed and epoch
alone. So one process and eight train on the same batches, a resumed run goes on with the ones that were left, and no
sample is trained twice in an epoch to fill up the last step (accelerate refills it with samples of the beginning): the
steps of an epoch share out its rows evenly, and rows that are missing in a step are empty.

With packing, a row is several samples one after the other, chosen so that rows are full (best fit, longest samples
first). Without, a row is one sample, and samples of like length share a step.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from torch.utils.data import Dataset, Sampler

from llmrec.errors import SettingsError
from llmrec.tasks.base import TaskSamples, generator_of

ORDERS = ("group_by_length", "random", "sequential")
# Rows are packed among so many samples at a time, drawn at random: enough to fill rows, and never sorted as a whole.
_WINDOW = 2**16
# Samples are grouped by length within so many steps, as transformers does.
_STEPS_GROUPED = 50
_SHORTEST_ROW = 512


class BatchPlan:
    """The rows of every step of every epoch.

    Args:
        samples: What is trained on.
        rows_per_step: Rows of a step: batch of a process times accumulated batches times processes.
        seed: Of the order.
        packing: Whether a row holds several samples.
        row_length: Most tokens of a packed row; None: 512, or the longest sample where that is longer.
        order: "group_by_length" and "random" are the same where rows are packed; "sequential" keeps the order of the
            samples.
        num_epochs: Epochs that are planned, so that all have as many steps as the longest.

    Raises:
        SettingsError: No sample; a sample longer than `row_length`; an unknown order.
    """

    def __init__(
        self,
        samples: TaskSamples,
        *,
        rows_per_step: int,
        seed: int,
        packing: bool,
        row_length: int | None = None,
        order: str = "group_by_length",
        num_epochs: int = 1,
    ):
        if not len(samples):
            raise SettingsError(f"the task {samples.name!r} has no samples: there is nothing to train on")
        if order not in ORDERS:
            raise SettingsError(f"train_sampling_strategy is {order!r}; choose one of {ORDERS}")
        self.samples = samples
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.packing = packing
        self.order = order
        longest = self._longest(num_epochs)
        self.row_length = max(_SHORTEST_ROW, longest) if row_length is None else row_length
        if packing and longest > self.row_length:
            raise SettingsError(
                f"the longest sample has {longest} tokens, row_length is {self.row_length}: raise it, or lower"
                " max_history"
            )
        self._last: tuple[int, list[np.ndarray]] | None = None
        self.num_steps = -(-self._most_rows(num_epochs) // rows_per_step)

    def rows(self, epoch: int) -> list[np.ndarray]:
        """The rows of an epoch, step after step: `num_steps * rows_per_step` arrays of sample numbers, int64."""
        filled = self._rows_of_epoch(epoch)
        bounds = [step * len(filled) // self.num_steps for step in range(self.num_steps + 1)]
        steps = [filled[start:end] for start, end in pairwise(bounds)]
        if self._is_grouped:
            steps = self._shuffled(steps, epoch)
        nothing = np.empty(0, dtype=np.int64)
        return [row for step in steps for row in [*step, *[nothing] * (self.rows_per_step - len(step))]]

    def real_token_share(self, epoch: int = 0, *, batch_size: int = 1) -> float:
        """Tokens of samples over all tokens that the model reads, padding of rows and of batches included.

        Args:
            epoch: From 0.
            batch_size: Rows of one forward.
        """
        lengths = self.samples.lengths(epoch)
        of_row = np.array([max(int(lengths[row].sum()), 1) for row in self.rows(epoch)])
        longest = np.maximum.reduceat(of_row, np.arange(0, len(of_row), batch_size))
        widths = np.repeat(longest, batch_size)[: len(of_row)]
        return float(lengths.sum() / widths.sum())

    def _longest(self, num_epochs: int) -> int:
        first = self.samples.lengths(0)
        longest = int(first.max())
        for epoch in range(1, num_epochs):
            lengths = self.samples.lengths(epoch)
            if lengths is first:  # drawn from nothing: the same in all epochs
                break
            longest = max(longest, int(lengths.max()))
        return longest

    def _most_rows(self, num_epochs: int) -> int:
        """Most rows that one of the planned epochs has."""
        if not self.packing:
            return len(self.samples)
        first = self.samples.lengths(0)
        most = len(self._rows_of_epoch(0))
        for epoch in range(1, num_epochs):
            one_window = len(self.samples) <= _WINDOW
            if one_window and self.samples.lengths(epoch) is first:  # the same lengths fill as many rows
                break
            most = max(most, len(self._rows_of_epoch(epoch)))
        return most

    def _rows_of_epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows that hold samples; those of the epoch asked for last are kept."""
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._make_rows(epoch))
        return self._last[1]

    def _make_rows(self, epoch: int) -> list[np.ndarray]:
        lengths = self.samples.lengths(epoch)
        if self.order == "sequential":
            order = np.arange(len(lengths))
        else:
            order = generator_of(self.seed, epoch, "order of samples").permutation(len(lengths))
        if self.packing:
            return self._packed(lengths, order, epoch)
        if self._is_grouped:
            order = self._grouped(lengths, order)
        return list(order.astype(np.int64)[:, None])

    def _packed(self, lengths: np.ndarray, order: np.ndarray, epoch: int) -> list[np.ndarray]:
        if self.order == "sequential":
            return pack_in_order(lengths, self.row_length)
        rows: list[np.ndarray] = []
        for start in range(0, len(order), _WINDOW):
            window = order[start : start + _WINDOW]
            rows += [window[row] for row in pack_best_fit(lengths[window], self.row_length)]
        shuffled = generator_of(self.seed, epoch, "order of rows").permutation(len(rows))
        return [rows[row] for row in shuffled]

    @property
    def _is_grouped(self) -> bool:
        return self.order == "group_by_length" and not self.packing

    def _grouped(self, lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Samples of like length side by side, within a number of steps."""
        size = _STEPS_GROUPED * self.rows_per_step
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        return np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])

    def _shuffled(self, steps: list[list[np.ndarray]], epoch: int) -> list[list[np.ndarray]]:
        """Steps of grouped samples in random order, but the one with the longest sample first.

        What doesn't fit into memory shows in the first step then.
        """
        lengths = self.samples.lengths(epoch)
        longest = max(range(len(steps)), key=lambda step: int(lengths[np.concatenate(steps[step])].max()))
        shuffled = generator_of(self.seed, epoch, "order of rows").permutation(len(steps)).tolist()
        shuffled.remove(longest)
        return [steps[step] for step in [longest, *shuffled]]


def pack_best_fit(lengths: np.ndarray, row_length: int) -> list[np.ndarray]:
    """Packs samples into rows: the longest first, each into the fullest row that still takes it.

    Args:
        lengths: int64 [N], none above `row_length`.
        row_length: Most tokens of a row.

    Returns:
        Sample numbers of each row, int64.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # free tokens -> rows with so many
    spaces: list[int] = []  # the keys of `with_space`, ascending
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        place = bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), row_length
            rows.append([])
        else:
            space = spaces[place]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        rows[row].append(sample)
        left = space - length
        if left in with_space:
            with_space[left].append(row)
        elif left:
            with_space[left] = [row]
            insort(spaces, left)
    return [np.array(row, dtype=np.int64) for row in rows]


def pack_in_order(lengths: np.ndarray, row_length: int) -> list[np.ndarray]:
    """Packs samples into rows in their order: a row ends where the next sample would not fit."""
    starts, filled = [], row_length
    for sample, length in enumerate(lengths.tolist()):
        if filled + length > row_length:
            starts.append(sample)
            filled = 0
        filled += length
    return np.split(np.arange(len(lengths)), starts[1:])


class PlannedRows(Dataset):
    """The rows of a plan as a data set, read by (epoch, row)."""

    def __init__(self, plan: BatchPlan):
        self.plan = plan

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.rows_per_step

    def __getitem__(self, place: tuple[int, int]) -> list[dict[str, list[int]]]:
        """The samples of a row; none where the row fills up a step."""
        epoch, row = place
        return [self.plan.samples.sample(int(index), epoch) for index in self._rows(epoch)[row]]

    def _rows(self, epoch: int) -> list[np.ndarray]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._planned = epoch, self.plan.rows(epoch)
        return self._planned


class PlannedOrder(Sampler):
    """Yields (epoch, row) of every row of an epoch, in order.

    Args:
        rows: The rows.
        epoch: Gives the number of the epoch that begins. It is asked for, not told: accelerate's loader doesn't hand
            it on when several processes resume within an epoch.
    """

    def __init__(self, rows: PlannedRows, epoch: Callable[[], int]):
        self._rows = rows
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self._epoch()
        return iter([(epoch, row) for row in range(len(self._rows))])


def epochs_of(num_train_epochs: float, max_steps: int, plan_one: Callable[[], BatchPlan]) -> int:
    """Number of epochs to plan for: those of the settings, or as many as `max_steps` steps begin."""
    if max_steps <= 0:
        return max(1, math.ceil(num_train_epochs))
    return max(1, math.ceil(max_steps / plan_one().num_steps))
