"""What every task gives the trainer: samples that depend on their number and the epoch alone.

A task turns a data set into samples of token IDs, each with a prompt and a target. Which template, part or text a
sample draws is a pure function of seed, epoch and number, never of a generator that runs along: so a run that is
killed and resumed, or spread over other numbers of processes and workers, sees what the first one saw.
"""

import abc
import zlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset

IGNORED = -100


class TaskSamples(Dataset, abc.ABC):
    """The samples of a task.

    A sample is a dictionary of two lists. For a decoder-only model, `input_ids` holds prompt and target one after the
    other, and `labels` the same but -100 where nothing is learned; the first label is always -100. For an
    encoder-decoder model `input_ids` is the prompt, which the encoder reads, and `labels` the target.

    A target is the L code tokens of one item, and in the `history` form of several items, each whole; or it is text,
    with the end-of-sequence token after it. It is never both, and no text holds a code token.

    Attributes:
        name: The task, as settings and logs name it.
    """

    name: str

    @property
    @abc.abstractmethod
    def num_targets(self) -> int:
        """Items, or texts, that one epoch teaches."""

    @property
    def has_text_targets(self) -> bool:
        """Whether some targets are text."""
        return False

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of samples an epoch, the same for all epochs."""

    @abc.abstractmethod
    def lengths(self, epoch: int = 0) -> np.ndarray:
        """Tokens of each sample, prompt and target together: int64 [len(self)].

        Where samples draw nothing, this is one array, the same object for all epochs.
        """

    @abc.abstractmethod
    def sample(self, index: int, epoch: int = 0) -> dict[str, list[int]]:
        """One sample, see the class.

        Raises:
            IndexError: There is no such sample.
        """

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """The sample of epoch 0."""
        return self.sample(index)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))


def draws(seed: int, epoch: int, size: int, choices: int, *, stream: str) -> np.ndarray:
    """Draws of one of some choices, independent of each other: int64 [size] in [0, choices).

    Args:
        seed: Of the run.
        epoch: From 0.
        size: How many.
        choices: Among how many, at least 1.
        stream: What is drawn ("item_to_codes template"), so that two draws of one seed and epoch differ.
    """
    return generator_of(seed, epoch, stream).integers(0, choices, size)


def generator_of(seed: int, epoch: int, stream: str) -> np.random.Generator:
    """The generator of one kind of draw in one epoch; see `draws`."""
    return np.random.default_rng([seed, epoch, zlib.crc32(stream.encode())])


def join(prompt: list[int], target: list[int], *, encoder_decoder: bool = False) -> dict[str, list[int]]:
    """A sample of token IDs of prompt and target; see `TaskSamples`."""
    if encoder_decoder:
        return {"input_ids": prompt, "labels": target}
    return {"input_ids": prompt + target, "labels": [IGNORED] * len(prompt) + target}
