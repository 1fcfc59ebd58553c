"""Several tasks as one, each with a weight that says how much of it an epoch has.

Weight 1 is every sample once an epoch; 0.3 a random 30 % of them, drawn anew each epoch; 2.5 every sample twice, and a
random half a third time. Repeats read the task in epochs of its own, so they draw other templates and targets. An
epoch always has the same number of samples.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from llmrec.errors import SettingsError
from llmrec.tasks.base import TaskSamples, generator_of
from llmrec.tasks.epoch_cache import EpochCache


class TaskMixture(TaskSamples):
    """The samples of several tasks, one task after the other; training puts them in a random order.

    Args:
        samples: Of each task.
        weights: As many numbers above 0.
        seed: Of the draw of parts.
        name: In logs; by default the names and weights of the tasks.

    Raises:
        SettingsError: No task, another number of weights than of tasks, or a weight that is no number above 0.
    """

    def __init__(
        self, samples: Sequence[TaskSamples], weights: Sequence[float], *, seed: int, name: str | None = None
    ):
        if not samples or len(samples) != len(weights):
            raise SettingsError(f"a mixture needs tasks and as many weights, got {len(samples)} and {len(weights)}")
        for task, weight in zip(samples, weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise SettingsError(f"the weight of the task {task.name!r} is {weight}; it must be above 0")
        described = ", ".join(f"{task.name}:{weight:g}" for task, weight in zip(samples, weights, strict=True))
        self.name = described if name is None else name
        self._parts = [
            _Part(task, weight, seed, f"mixture {number} of {described}")
            for number, (task, weight) in enumerate(zip(samples, weights, strict=True))
        ]
        self._ends = np.cumsum([len(part) for part in self._parts]).tolist()
        self._last_lengths: tuple[list[np.ndarray], np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def num_targets(self) -> int:
        """Items and texts that one epoch teaches; on average, where a part of a task is drawn."""
        return sum(round(part.weight * part.task.num_targets) for part in self._parts)

    @property
    def has_text_targets(self) -> bool:
        """Whether some targets are text."""
        return any(part.task.has_text_targets for part in self._parts)

    def lengths(self, epoch: int = 0) -> np.ndarray:
        """Tokens of each sample; see `TaskSamples`."""
        of_parts = [lengths for part in self._parts for lengths in part.lengths(epoch)]
        last = self._last_lengths
        if last is None or any(new is not old for new, old in zip(of_parts, last[0], strict=True)):
            self._last_lengths = last = (of_parts, np.concatenate(of_parts))
        return last[1]

    def sample(self, index: int, epoch: int = 0) -> dict[str, list[int]]:
        """One sample; see `TaskSamples`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self._parts[number].sample(index - (self._ends[number - 1] if number else 0), epoch)


class _Part:
    """What one task adds to an epoch: some whole passes over its samples, and a random part of another."""

    def __init__(self, task: TaskSamples, weight: float, seed: int, stream: str):
        self.task = task
        self.weight = weight
        self._seed, self._stream = seed, stream
        self._num_whole = math.floor(weight)
        self._num_drawn = round((weight - self._num_whole) * len(task))
        if not self._num_whole:
            self._num_drawn = max(self._num_drawn, 1)
        self._num_passes = self._num_whole + (self._num_drawn > 0)
        self._drawn = EpochCache(self._draw)

    def __len__(self) -> int:
        return self._num_whole * len(self.task) + self._num_drawn

    def lengths(self, epoch: int) -> list[np.ndarray]:
        """Tokens of the samples of each pass."""
        passes = [self.task.lengths(self._epoch_of(number, epoch)) for number in range(self._num_passes)]
        if self._num_drawn:
            passes[-1] = passes[-1][self._drawn(epoch)]
        return passes

    def sample(self, index: int, epoch: int) -> dict[str, list[int]]:
        number, of_task = divmod(index, len(self.task))
        if number == self._num_whole:
            of_task = int(self._drawn(epoch)[of_task])
        return self.task.sample(of_task, self._epoch_of(number, epoch))

    def _epoch_of(self, number: int, epoch: int) -> int:
        """The task's own epoch that a pass reads: no two passes of a training read the same."""
        return epoch * self._num_passes + number

    def _draw(self, epoch: int) -> np.ndarray:
        """Which samples the last pass has, int64, in their order."""
        generator = generator_of(self._seed, epoch, self._stream)
        return np.sort(generator.choice(len(self.task), self._num_drawn, replace=False))
