"""What ways of giving every item codes of its own share, and the two published ones: pure functions, deterministic.

Items are grouped by sorting 64-bit mixed-radix keys, never by dictionaries of tuples. `SemanticIds.make_unique` is the
door to what is here and in `code_assignment.py`, which holds the default, minimum-cost assignment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_BLOCK_ROWS = 2**16  # items whose vectors are read at a time


@dataclass(frozen=True)
class CodeGeometry:
    """Where items and codes lie: what distances between them are computed from.

    Attributes:
        latents: float32 [N, d], the vectors that were quantised; may be memory-mapped: read some rows at a time.
        codebooks: Of each level float32 [K_l, d]; an item's residual at level l is its latent minus its earlier
            levels' code vectors.
    """

    latents: np.ndarray
    codebooks: tuple[np.ndarray, ...]

    def residuals(self, rows: np.ndarray, codes: np.ndarray, level: int) -> np.ndarray:
        """What is left of some items before a level: float32 [len(rows), d].

        Args:
            rows: Row numbers.
            codes: Their codes, [len(rows), at least level].
            level: Number of levels that are taken off.
        """
        left = np.array(self.latents[rows], dtype=np.float32)
        for earlier in range(level):
            left -= self.codebooks[earlier][codes[:, earlier]]
        return left

    def distances(self, rows: np.ndarray, codes: np.ndarray, level: int) -> np.ndarray:
        """Squared distances of the residuals of some items to all codes of a level: float64 [len(rows), K_l]."""
        left = self.residuals(rows, codes, level).astype(np.float64)
        codebook = self.codebooks[level].astype(np.float64)
        squared = (left**2).sum(1)[:, None] + (codebook**2).sum(1) - 2.0 * left @ codebook.T
        return np.maximum(squared, 0.0)

    def distortion(self, rows: np.ndarray, codes: np.ndarray) -> float:
        """Mean squared distance between the latents of some items and the sums of their code vectors.

        Args:
            rows: Row numbers, at least one.
            codes: Of all N items, [N, at least as many levels as codebooks].
        """
        total = 0.0
        for start in range(0, len(rows), _BLOCK_ROWS):
            some = rows[start : start + _BLOCK_ROWS]
            total += float(np.square(self.residuals(some, codes[some], len(self.codebooks)), dtype=np.float64).sum())
        return total / len(rows)


@dataclass(frozen=True)
class UniquenessReport:
    """What a uniqueness policy did.

    Attributes:
        policy: Its name.
        collisions_before: N minus the number of different tuples, before. For items that were appended: how many of
            them would not have added a tuple.
        collisions_after: The same after; above 0 only for "sinkhorn" and "allow".
        moved: Items with a changed code ("extra_level": or with a counter above 0).
        distortion_before: Mean squared distance between the latents of the moved items and their codes, before; None
            without geometry, or where nothing moved.
        distortion_after: The same after. Equal for "extra_level" where no group was larger than the counter: it stands
            for no vector, and costs nothing but the token.
    """

    policy: str
    collisions_before: int
    collisions_after: int
    moved: int
    distortion_before: float | None
    distortion_after: float | None

    @classmethod
    def measure(
        cls,
        policy: str,
        before: np.ndarray,
        after: np.ndarray,
        sizes: Sequence[int],
        geometry: CodeGeometry | None,
        *,
        taken: np.ndarray | None = None,
    ) -> "UniquenessReport":
        """Compares codes before and after.

        Args:
            policy: Its name.
            before: int [N, L].
            after: int [N, L], or [N, L + 1] with a counter.
            sizes: Codebook sizes of `after`.
            geometry: Vectors of these items and of the codes, or None.
            taken: Ascending keys of further items, or None; collisions with them count.
        """
        levels = before.shape[1]
        if after.shape[1] > levels:
            moved = np.flatnonzero((after[:, levels] > 0) | (before != after[:, :levels]).any(axis=1))
        elif after is before:
            moved = np.zeros(0, dtype=np.int64)
        else:
            moved = np.flatnonzero((before != after).any(axis=1))
        distortions: list[float | None] = [None, None]
        if geometry is not None and len(moved):
            distortions = [geometry.distortion(moved, codes) for codes in (before, after)]
        left = count_collisions(mixed_radix_keys(after, sizes), taken)
        if after is before:
            collided = left
        else:
            collided = count_collisions(
                mixed_radix_keys(before, sizes[:levels]), _without_counter(taken, sizes[levels:])
            )
        return cls(policy, collided, left, len(moved), *distortions)

    def __str__(self) -> str:
        text = f"{self.policy}: {self.collisions_before:,} collisions before, {self.collisions_after:,} after"
        text += f", {self.moved:,} items moved"
        if self.distortion_before is not None:
            text += f", their mean squared distance {self.distortion_before:.4g} -> {self.distortion_after:.4g}"
        return text


def mixed_radix_keys(codes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Code tuples as numbers, the first code most significant: int64 [N]. Their product of sizes must fit in int64.

    Args:
        codes: int [N, at least len(sizes)]; later levels are not looked at.
        sizes: Codebook sizes.
    """
    keys = np.zeros(len(codes), dtype=np.int64)
    for level, size in enumerate(sizes):
        keys *= size
        keys += codes[:, level]
    return keys


def occurrence_numbers(values: np.ndarray) -> np.ndarray:
    """How many earlier entries equal each entry: int64 [N]; [7, 5, 7, 7] gives [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ordered, positions = values[order], np.arange(len(values))
    is_start = np.ones(len(values), dtype=bool)
    is_start[1:] = ordered[1:] != ordered[:-1]
    positions -= np.maximum.accumulate(np.where(is_start, positions, 0))
    numbers = np.empty(len(values), dtype=np.int64)
    numbers[order] = positions
    return numbers


def sorted_contains(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which values stand in an ascending array: bool [values]."""
    if len(ascending) == 0:
        return np.zeros(len(values), dtype=bool)
    places = np.searchsorted(ascending, values)
    np.minimum(places, len(ascending) - 1, out=places)
    return ascending[places] == values


def count_collisions(keys: np.ndarray, taken: np.ndarray | None = None) -> int:
    """N minus the number of different keys that aren't taken.

    Args:
        keys: int64 [N].
        taken: Ascending keys of further items, or None.
    """
    ordered = np.sort(keys)
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    if taken is not None:
        new &= ~sorted_contains(taken, ordered)
    return len(keys) - int(np.count_nonzero(new))


def _without_counter(taken: np.ndarray | None, counter_sizes: Sequence[int]) -> np.ndarray | None:
    """Ascending keys with the last level taken off, where there is a counter."""
    return taken // counter_sizes[0] if taken is not None and counter_sizes else taken


def append_counter_level(codes: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Appends the number of the item among those with equal codes, in row order.

    Returns:
        Codes int32 [N, L + 1] and sizes of length L + 1; the new level has as many codes as the largest group items.
    """
    counter = occurrence_numbers(mixed_radix_keys(codes, sizes))
    size = int(counter.max(initial=0)) + 1
    with_counter = np.empty((len(codes), len(sizes) + 1), dtype=np.int32)
    with_counter[:, :-1], with_counter[:, -1] = codes, counter
    return with_counter, (*sizes, size)


def _groups(keys: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of each different key, ascending; `keys` are those of `rows`."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    yield from (rows[group] for group in np.split(order, starts[1:]))


def repair_with_sinkhorn(
    codes: np.ndarray, sizes: Sequence[int], geometry: CodeGeometry, *, rounds: int = 20
) -> np.ndarray:
    """The repair of LETTER's and LC-Rec's authors: each colliding group alone, Sinkhorn on the last level.

    For reproduction only (methods.md 1.4 and 12.2). Collisions may be left, of identical residuals always.

    Args:
        codes: int [N, L].
        sizes: Codebook sizes, length L.
        geometry: Vectors of items and codes.
        rounds: Passes over the colliding groups at most.

    Returns:
        int32 [N, L].
    """
    import torch

    from llmrec.item_tokenizers.quantizers import sinkhorn_codes

    codes = np.array(codes, dtype=np.int32)
    level = len(sizes) - 1
    for _ in range(rounds):
        keys = mixed_radix_keys(codes, sizes)
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        rows = np.flatnonzero(counts[inverse] > 1)
        if len(rows) == 0:
            break
        before = codes[rows, level].copy()
        for group in _groups(keys[rows], rows):
            distances = geometry.distances(group, codes[group], level)
            codes[group, level] = sinkhorn_codes(torch.from_numpy(distances)).numpy()
        if np.array_equal(before, codes[rows, level]):
            break
    return codes
