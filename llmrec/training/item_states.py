"""What the frozen recommender says of each item, for an epoch of the item tokenizer: which samples are read for it,
and which of the sequences that lead to an item speaks for it.

This module knows samples and tables. It knows no model.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from llmrec.processes import Processes
from llmrec.tasks.base import TaskSamples
from llmrec.tasks.next_item import NextItemSamples


@dataclass(frozen=True)
class ItemStates:
    """What the frozen recommender says of the sequences that led to each item, projected.

    Attributes:
        known: bool [N] on the CPU, whether there is any for the item.
        summaries: float32 [N, d] on the CPU, in the space of the codes; 0 where not known.
        preferences: float32 [N, D] on the CPU, in the space of the reconstructions; likewise.
    """

    known: Tensor
    summaries: Tensor
    preferences: Tensor


class StateTables:
    """Collects states item by item: of several that are offered for an item the one with the greatest draw stays.

    Args:
        num_items: N.
        code_width: d.
        item_width: D.
    """

    def __init__(self, num_items: int, code_width: int, item_width: int):
        self._draws = np.full(num_items, -1.0)
        self._summaries = torch.zeros(num_items, code_width)
        self._preferences = torch.zeros(num_items, item_width)

    def offer(self, items: np.ndarray, draws: np.ndarray, summaries: Tensor, preferences: Tensor) -> None:
        """Offers n states.

        Args:
            items: Their items, int64 [n].
            draws: In [0, 1), float64 [n].
            summaries: float32 [n, d].
            preferences: float32 [n, D].
        """
        falling = np.argsort(-draws, kind="stable")
        found, first = np.unique(items[falling], return_index=True)  # the greatest draw of each item
        places = falling[first]
        better = draws[places] > self._draws[found]
        places, found = places[better], found[better]
        self._draws[found] = draws[places]
        self._summaries[found] = summaries[places]
        self._preferences[found] = preferences[places]

    def of_all(self, processes: Processes) -> ItemStates:
        """Of each item the states of the process that has the greatest draw; all processes call it."""
        own = torch.from_numpy(self._draws)
        if processes.count == 1:
            return ItemStates(own >= 0, self._summaries, self._preferences)
        greatest, winner = processes.gather_rows(own.to(processes.device)[None]).max(dim=0)  # of [processes, N]
        mine = ((winner == processes.index) & (greatest >= 0))[:, None]
        summaries, preferences = (
            processes.sum(table.to(processes.device) * mine).cpu() for table in (self._summaries, self._preferences)
        )
        return ItemStates((greatest >= 0).cpu(), summaries, preferences)


class CoveringSamples(TaskSamples):
    """Few samples of a task whose targets are all the items that are a target anywhere.

    Args:
        samples: All samples.
        chosen: Numbers of those that are kept, int64.
        draws: Of each of these, float64 in [0, 1).
    """

    name = NextItemSamples.name

    def __init__(self, samples: NextItemSamples, chosen: np.ndarray, draws: np.ndarray):
        self._samples, self._chosen, self._draws = samples, chosen, draws
        numbers, _ = samples.targets()
        self._counts = np.bincount(numbers, minlength=len(samples))[chosen]
        self._lengths = samples.lengths(0)[chosen]

    @classmethod
    def drawn(cls, samples: NextItemSamples, num_items: int, generator: np.random.Generator) -> "CoveringSamples":
        """See `covering_samples`."""
        numbers, items = samples.targets()
        chosen = covering_samples(numbers, items, len(samples), num_items, generator)
        return cls(samples, chosen, generator.random(len(samples))[chosen])

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def num_targets(self) -> int:
        """Targets of the samples together."""
        return int(self._counts.sum())

    def lengths(self, epoch: int = 0) -> np.ndarray:
        """See `TaskSamples`."""
        return self._lengths

    def sample(self, index: int, epoch: int = 0) -> dict[str, list[int]]:
        """See `TaskSamples`."""
        return self._samples.sample(int(self._chosen[index]), epoch)

    def draws_of_targets(self, numbers: np.ndarray) -> np.ndarray:
        """A draw for each target of some samples, in their order: float64 in [0, 1).

        Those of one sample differ, in case an item stands twice in it.
        """
        counts = self._counts[numbers]
        ordinal = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        drawn: np.ndarray = (np.repeat(self._draws[numbers], counts) + 0.618034 * ordinal) % 1.0
        return drawn


def covering_samples(
    samples: np.ndarray, items: np.ndarray, num_samples: int, num_items: int, generator: np.random.Generator
) -> np.ndarray:
    """Few samples whose targets are, together, all the items that are a target anywhere.

    Samples are gone through in random order, several times: at first those with many targets that no chosen sample has
    are taken, at last those with a single one. Where a sample has one target this draws one sample an item.

    Args:
        samples: Number of the sample of each target, int64 [T], ascending.
        items: Its item, int64 [T].
        num_samples: How many samples there are.
        num_items: N.
        generator: Source of the order.

    Returns:
        Numbers of the chosen samples, ascending, int64.
    """
    starts = np.searchsorted(samples, np.arange(num_samples + 1)).tolist()
    targets = items.tolist()
    covered = bytearray(num_items)
    left = generator.permutation(num_samples).tolist()
    threshold = max((end - start for start, end in pairwise(starts)), default=1)
    chosen = []
    while left:
        threshold = max(threshold // 2, 1)
        later = []
        for sample in left:
            new = {item for item in targets[starts[sample] : starts[sample + 1]] if not covered[item]}
            if not new:
                continue
            if len(new) >= threshold:
                chosen.append(sample)
                for item in new:
                    covered[item] = 1
            else:
                later.append(sample)
        left = later
    return np.sort(np.array(chosen, dtype=np.int64))
