"""Training, validation and test parts of a data set, nothing of the future reaching training.

`leave_one_out` is the protocol of LETTER, LC-Rec and ETEGRec (one validation and one test item a user);
`split_by_time` cuts at two moments that hold for all users. Both keep the catalogue and the users as they are, so
every array about items or users fits all parts.
"""

import hashlib
import logging
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Literal

import numpy as np

from llmrec.data.columns import instant_seconds
from llmrec.data.filters import positions, users_of
from llmrec.data.interactions import InteractionDataset
from llmrec.errors import DataError, SettingsError

logger = logging.getLogger(__name__)

Instant = int | float | str | datetime


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Examples to evaluate on: a history, and the one item that came next.

    Attributes:
        name: "validation" or "test".
        user_ids: User of each example, `E` of them; a user can have several.
        flat_histories: int32, catalogue rows of all histories one after the other, each oldest first.
        offsets: int64 [E + 1], where each history begins.
        targets: int32 [E], catalogue row of the item that came next.
    """

    name: str
    user_ids: tuple[str, ...]
    flat_histories: np.ndarray
    offsets: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.user_ids) == len(self.targets) == len(self.offsets) - 1:
            raise DataError(
                f"the examples {self.name!r} have {len(self.user_ids)} users, {len(self.targets)} targets and"
                f" {len(self.offsets) - 1} histories: they must be parallel"
            )

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return f"EvaluationSet({self.name!r}, {len(self)} examples)"

    def history(self, example: int) -> np.ndarray:
        """Catalogue rows before the target of one example, int32, oldest first."""
        return self.flat_histories[self.offsets[example] : self.offsets[example + 1]]

    def take(self, examples: np.ndarray | list[int]) -> "EvaluationSet":
        """The examples of these numbers, in this order."""
        chosen = np.asarray(examples, np.int64)
        flat, offsets = _gather_runs(self.flat_histories, self.offsets[chosen], np.diff(self.offsets)[chosen])
        users = tuple(self.user_ids[example] for example in chosen)
        return EvaluationSet(self.name, users, flat, offsets, self.targets[chosen])

    def sample(self, num_examples: int, seed: int = 0) -> "EvaluationSet":
        """A random part of `num_examples` in their present order; all where there are no more than that."""
        if num_examples >= len(self):
            return self
        chosen = np.random.default_rng(seed).choice(len(self), size=num_examples, replace=False)
        return self.take(np.sort(chosen))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of users, histories and targets: equal for equal examples in equal order."""
        digest = hashlib.sha256("\0".join(self.user_ids).encode())
        for array, kind in ((self.flat_histories, np.int32), (self.offsets, np.int64), (self.targets, np.int32)):
            digest.update(np.ascontiguousarray(array, kind).tobytes())
        return digest.hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class DatasetSplits:
    """A data set and its three parts.

    Attributes:
        dataset: The whole.
        train: Same catalogue and same users in the same order, training interactions only. Whatever is learnt or
            counted (popularity, co-occurrence, collaborative embeddings) may look at nothing else.
        validation: Examples to choose settings by.
        test: Examples to report.
        method: How the cut was made, for results tables.
    """

    dataset: InteractionDataset
    train: InteractionDataset
    validation: EvaluationSet
    test: EvaluationSet
    method: str

    def examples(self, name: str) -> EvaluationSet:
        """The examples called "validation" or "test".

        Raises:
            SettingsError: Another name.
        """
        if name not in ("validation", "test"):
            raise SettingsError(f"the split is {name!r}: choose 'validation' or 'test'")
        return self.validation if name == "validation" else self.test


def leave_one_out(dataset: InteractionDataset) -> DatasetSplits:
    """Last item of each user = test, second last = validation, the rest = training.

    The history of a test example includes the validation item. Users with fewer than three interactions give no
    examples; all they did is training. The test item of one user can be older than training interactions of another:
    for a cut that no later moment crosses, use `split_by_time`.

    Raises:
        DataError: No user has three interactions.
    """
    lengths = np.diff(dataset.offsets)
    splittable = lengths >= 3
    if not splittable.any():
        raise DataError(
            f"no user of {dataset.name!r} has three interactions, so leave-one-out has nothing to test: use"
            " split_by_time, or more data"
        )
    if (short := int((~splittable).sum())) > 0:
        logger.info("%d of %d users have fewer than 3 interactions: all in training", short, dataset.num_users)
    users = np.flatnonzero(splittable)
    held_out = np.zeros(dataset.num_interactions, bool)
    ends = dataset.offsets[1:][users]
    held_out[ends - 1] = held_out[ends - 2] = True
    return DatasetSplits(
        dataset=dataset,
        train=dataset.select(~held_out),
        validation=_examples(dataset, "validation", ends - 2),
        test=_examples(dataset, "test", ends - 1),
        method="leave-one-out",
    )


def split_by_time(
    dataset: InteractionDataset,
    *,
    validation_from: Instant | None = None,
    test_from: Instant | None = None,
    fractions: tuple[float, float, float] | None = None,
    empty_histories: Literal["drop", "keep"] = "drop",
) -> DatasetSplits:
    """Cuts at two moments that hold for all users.

    All before `validation_from` is training, from there to before `test_from` is validation, the rest is test. Every
    interaction of the later parts is an example; its history is all that its user did before it, in the order of the
    history (which also decides where timestamps are equal), training, validation and test alike.

    Args:
        dataset: Data with timestamps.
        validation_from: Seconds since 1970-01-01 UTC, ISO 8601 text or a datetime (UTC unless they name a zone).
        test_from: Likewise.
        fractions: Instead of the two moments: shares of the interactions for training, validation and test, such as
            (0.8, 0.1, 0.1). Interactions of the same second stay together, in the later part.
        empty_histories: Whether an interaction that is its user's first makes an example.

    Raises:
        SettingsError: Neither or both ways of saying where to cut, shares that don't add up to 1, moments in the wrong
            order.
        DataError: No timestamps, or a part is empty.
    """
    times = dataset.flat_timestamps
    if times is None:
        raise DataError(
            f"{dataset.name!r} has no timestamps, so it can't be split by time: name their column, or use"
            " leave_one_out"
        )
    first, second = _moments(times, validation_from, test_from, fractions)
    if empty_histories not in ("drop", "keep"):
        raise SettingsError(f"empty_histories is {empty_histories!r}: choose 'drop' or 'keep'")
    usable = positions(dataset.offsets) > 0 if empty_histories == "drop" else np.ones(len(times), bool)
    train, later = times < first, times >= second
    between = ~train & ~later
    for name, part in (("training", train), ("validation", between & usable), ("test", later & usable)):
        if not part.any():
            raise DataError(
                f"the {name} part is empty: the interactions of {dataset.name!r} are from {times.min()} to"
                f" {times.max()} (seconds), cut at {first:g} and {second:g}; choose other moments"
            )
    if without := int((~train & ~usable).sum()):
        logger.info("%d later interactions are their user's first and make no example", without)
    cut = f"fractions={fractions}" if fractions else f"validation_from={validation_from}, test_from={test_from}"
    return DatasetSplits(
        dataset=dataset,
        train=dataset.select(train),
        validation=_examples(dataset, "validation", np.flatnonzero(between & usable)),
        test=_examples(dataset, "test", np.flatnonzero(later & usable)),
        method=f"by time ({cut})",
    )


def _moments(
    times: np.ndarray,
    validation_from: Instant | None,
    test_from: Instant | None,
    fractions: tuple[float, float, float] | None,
) -> tuple[float, float]:
    if fractions is None:
        if validation_from is None or test_from is None:
            raise SettingsError("split_by_time needs validation_from and test_from, or fractions=(0.8, 0.1, 0.1)")
        first = instant_seconds(validation_from, "validation_from")
        second = instant_seconds(test_from, "test_from")
        if not first < second:
            raise SettingsError(
                f"validation_from ({validation_from}) must be before test_from ({test_from}): swap or move them"
            )
        return first, second
    if validation_from is not None or test_from is not None:
        raise SettingsError("give split_by_time the two moments or fractions, not both")
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise SettingsError(f"fractions is {fractions}: three positive shares that add up to 1 are needed")
    ordered = np.sort(times)
    cuts = np.round(np.cumsum(fractions[:2]) * len(times)).astype(np.int64)
    first, second = ordered[np.minimum(cuts, len(times) - 1)]
    if not ordered[0] < first < second:
        raise DataError(
            f"{len(times)} interactions with {len(np.unique(times))} different timestamps can't be cut into"
            f" {fractions} by time: use other fractions or leave_one_out"
        )
    return float(first), float(second)


def _examples(dataset: InteractionDataset, name: str, target_places: np.ndarray) -> EvaluationSet:
    """Examples whose targets stand at these places of the flat histories."""
    users = users_of(dataset.offsets)[target_places]
    starts = dataset.offsets[users]
    flat, offsets = _gather_runs(dataset.flat_items, starts, target_places - starts)
    user_ids = tuple(dataset.user_ids[user] for user in users)
    return EvaluationSet(name, user_ids, flat, offsets, dataset.flat_items[target_places])


def _gather_runs(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copies runs of `flat` one after the other; returns them with their offsets."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return flat[places], offsets
