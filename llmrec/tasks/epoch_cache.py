"""Keeps what was drawn for the latest few epochs, so that reading a sample doesn't draw for all samples anew."""

from collections.abc import Callable
from typing import Generic, TypeVar

Drawn = TypeVar("Drawn")
# A mixture that repeats a task reads it in several of its epochs at once.
_MOST_EPOCHS = 16


class EpochCache(Generic[Drawn]):
    """Calls a function of the epoch once for each epoch.

    Args:
        draw: Pure function of the epoch; a bound method, so that samples can be sent to other processes.
    """

    def __init__(self, draw: Callable[[int], Drawn]):
        self._draw = draw
        self._drawn: dict[int, Drawn] = {}

    def __call__(self, epoch: int) -> Drawn:
        """What the function gives for an epoch."""
        if epoch not in self._drawn:
            while len(self._drawn) >= _MOST_EPOCHS:
                del self._drawn[next(iter(self._drawn))]
            self._drawn[epoch] = self._draw(epoch)
        return self._drawn[epoch]
