"""Sums of what every forward measures, over a cycle and all processes, without waiting for the device in each step."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmrec.processes import Processes

_MOST_PENDING = 256


class RunningSums:
    """Adds up scalars by name.

    Args:
        names: Of the scalars, the same on all processes.

    Attributes:
        pending: Names and scalars that were not read from their device yet.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.pending: list[tuple[str, Tensor]] = []
        self._sums = dict.fromkeys(self.names, 0.0)
        self._counts = dict.fromkeys(self.names, 0)

    def add(self, name: str, value: Tensor) -> None:
        """Adds a scalar; a graph that it hangs on is let go."""
        self.pending.append((name, value.detach()))
        if len(self.pending) >= _MOST_PENDING:
            self._read()

    def count(self, name: str) -> int:
        """How many scalars of a name this process has added."""
        self._read()
        return self._counts[name]

    def totals(self, processes: Processes) -> dict[str, float]:
        """The sums of all processes by name; all of them call it."""
        self._read()
        sums = torch.tensor([self._sums[name] for name in self.names], dtype=torch.float64)
        return dict(zip(self.names, processes.sum(sums.to(processes.device)).tolist(), strict=True))

    def state(self, processes: Processes) -> dict[str, dict[str, float]]:
        """What a checkpoint keeps, JSON values: the sums of all processes, and the counts of one. All call it."""
        return {"sums": self.totals(processes), "counts": dict(self._counts)}

    def load_state(self, state: Mapping[str, Mapping[str, float]], processes: Processes) -> None:
        """Takes what `state` gave; the main process goes on from the sums of all, the others from 0."""
        self.pending = []
        self._counts = {name: int(state["counts"][name]) for name in self.names}
        self._sums = {name: float(state["sums"][name]) if processes.is_main else 0.0 for name in self.names}

    def _read(self) -> None:
        for name in self.names:
            values = [value.double() for of, value in self.pending if of == name]
            if values:
                self._sums[name] += float(torch.stack(values).sum())
                self._counts[name] += len(values)
        self.pending = []
