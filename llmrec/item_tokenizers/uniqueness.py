"""Ways to give every item codes of its own: pure functions on arrays, deterministic.

Items are grouped by sorting 64-bit mixed-radix keys, never by dictionaries of tuples. `SemanticIds.make_unique` is the
door to what is here. The reason for minimum-cost assignment in place of the published Sinkhorn repair was measured:
the repaired last codes of LETTER and LC-Rec are about as far away as random ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from scipy.optimize import linear_sum_assignment

from llmrec.errors import SettingsError

GREEDY_ABOVE = 512  # items of a prefix; above, optimal assignment (cubic) gives way to greedy


@dataclass(frozen=True)
class CodeGeometry:
    """Where items and codes lie: what distances between them are computed from.

    Attributes:
        latents: float32 [N, d], the vectors that were quantised.
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


@dataclass(frozen=True)
class UniquenessReport:
    """What a uniqueness policy did.

    Attributes:
        policy: Its name.
        collisions_before: N minus the number of different tuples, before.
        collisions_after: The same after; above 0 only for "sinkhorn".
        moved: Items with a changed code ("extra_level": with a counter above 0).
        distortion_before: Mean squared distance between the latents of the moved items and their codes, before; None
            without geometry, where nothing moved, or for "extra_level".
        distortion_after: The same after.
    """

    policy: str
    collisions_before: int
    collisions_after: int
    moved: int
    distortion_before: float | None
    distortion_after: float | None

    @classmethod
    def measure(
        cls, policy: str, before: np.ndarray, after: np.ndarray, collisions: int, geometry: CodeGeometry | None
    ) -> "UniquenessReport":
        """Compares codes before (int [N, L]) and after ([N, L], or [N, L + 1] with a counter)."""
        levels = before.shape[1]
        if after.shape[1] > levels:
            return cls(policy, collisions, 0, int(np.count_nonzero(after[:, levels])), None, None)
        moved = np.flatnonzero((before != after).any(axis=1))
        sizes = tuple(int(size) for size in after.max(axis=0, initial=0) + 1)
        left = len(after) - len(np.unique(mixed_radix_keys(after, sizes)))
        if geometry is None or len(moved) == 0:
            return cls(policy, collisions, left, len(moved), None, None)
        distortions = [
            float((geometry.residuals(moved, codes[moved], levels) ** 2).sum(1).mean()) for codes in (before, after)
        ]
        return cls(policy, collisions, left, len(moved), *distortions)

    def __str__(self) -> str:
        text = f"{self.policy}: {self.collisions_before:,} collisions before, {self.collisions_after:,} after"
        text += f", {self.moved:,} items moved"
        if self.distortion_before is not None:
            text += f", their mean squared distance {self.distortion_before:.4g} -> {self.distortion_after:.4g}"
        return text


def mixed_radix_keys(codes: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Code tuples as numbers, the first code most significant: int64 [N]. Their product of sizes must fit in int64."""
    keys = np.zeros(len(codes), dtype=np.int64)
    for level, size in enumerate(sizes):
        keys *= size
        keys += codes[:, level]
    return keys


def _groups(keys: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of each different key, ascending; `keys` are those of `rows`."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    yield from (rows[group] for group in np.split(order, starts[1:]))


def append_counter_level(codes: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Appends the number of the item among those with equal codes, in row order.

    Returns:
        Codes int32 [N, L + 1] and sizes of length L + 1; the new level has as many codes as the largest group items.
    """
    keys = mixed_radix_keys(codes, sizes)
    order = np.argsort(keys, kind="stable")
    is_start = np.diff(keys[order], prepend=-1) != 0
    positions = np.arange(len(keys))
    counter = np.empty(len(keys), dtype=np.int32)
    counter[order] = positions - np.maximum.accumulate(np.where(is_start, positions, 0))
    size = int(counter.max(initial=0)) + 1
    return np.column_stack([codes, counter]).astype(np.int32), (*sizes, size)


def assign_min_cost(codes: np.ndarray, sizes: Sequence[int], geometry: CodeGeometry | None) -> np.ndarray:
    """Moves colliding items to the last-level codes that are free under their prefix, at the least cost.

    Under each prefix the items that share their codes with another are assigned together, to the codes that no other
    item of the prefix holds, so that the sum of squared distances from their last residuals to the code vectors is
    smallest (one of each group may keep its code). Above 512 such items of one prefix the assignment is greedy,
    cheapest pair first.

    Where a prefix holds more items than there are tuples below it, some can't stay: the ones that lose least move to
    the nearest sibling prefix with room, and their later codes are chosen anew. This is done from the first level
    down, so it succeeds whenever the catalogue has no more items than there are code tuples.

    Without geometry every change of a code costs 1, so as few items as possible move: the first of each group keeps
    its codes, the others take the lowest free code numbers.

    Args:
        codes: int [N, L].
        sizes: Codebook sizes, length L, their product below 2**63.
        geometry: Vectors of items and codes, or None.

    Returns:
        int32 [N, L], no two rows equal.

    Raises:
        SettingsError: More items than code tuples.
    """
    if len(codes) > prod(sizes):
        raise SettingsError(
            f"{len(codes):,} items can't have codes of their own: codebook sizes {list(sizes)} give {prod(sizes):,}"
            " tuples; use larger codebooks or more levels, or the policy extra_level"
        )
    codes = np.array(codes, dtype=np.int32)
    for level in range(len(sizes)):
        _fit_into_level(codes, sizes, level, geometry)
    return codes


def _fit_into_level(codes: np.ndarray, sizes: Sequence[int], level: int, geometry: CodeGeometry | None) -> None:
    """Moves items, in place, until no prefix of level + 1 codes has more items than tuples below it."""
    capacity = prod(sizes[level + 1 :])
    if capacity >= len(codes):
        return
    keys = mixed_radix_keys(codes[:, : level + 1], sizes[: level + 1])
    ordered = np.sort(keys)
    repeats = np.flatnonzero(ordered[capacity:] == ordered[:-capacity])
    if len(repeats) == 0:
        return
    full_parents = np.unique(ordered[repeats] // sizes[level])
    rows = np.flatnonzero(np.isin(keys // sizes[level], full_parents))
    last = level == len(sizes) - 1
    for members in _groups(keys[rows] // sizes[level], rows):
        used = np.bincount(codes[members, level], minlength=sizes[level])
        crowded = members[used[codes[members, level]] > capacity]
        if geometry is None:
            distances = (np.arange(sizes[level]) != codes[crowded, level][:, None]).astype(np.float64)
        else:
            distances = geometry.distances(crowded, codes[crowded], level)
        if last:
            staying = np.setdiff1d(members, crowded, assume_unique=True)
            free = np.setdiff1d(np.arange(sizes[level]), codes[staying, level])
            codes[crowded, level] = free[_assign(distances[:, free])]
        else:
            moved = _relocate(codes[crowded, level], distances, used, capacity)
            changed = crowded[moved != codes[crowded, level]]
            codes[crowded, level] = moved
            if geometry is None:
                continue
            for later in range(level + 1, len(sizes)):
                codes[changed, later] = geometry.distances(changed, codes[changed], later).argmin(1)


def _assign(distances: np.ndarray) -> np.ndarray:
    """A column of its own for each row, the sum smallest (greedy for many rows): int64 [rows]."""
    if len(distances) <= GREEDY_ABOVE:
        return linear_sum_assignment(distances)[1]
    chosen = np.full(len(distances), -1, dtype=np.int64)
    taken = np.zeros(distances.shape[1], dtype=bool)
    for pair in np.argsort(distances, axis=None, kind="stable"):
        row, column = divmod(int(pair), distances.shape[1])
        if chosen[row] < 0 and not taken[column]:
            chosen[row], taken[column] = column, True
    return chosen


def _relocate(own: np.ndarray, distances: np.ndarray, used: np.ndarray, capacity: int) -> np.ndarray:
    """New codes of the items of overfull codes, those that lose least moved: int64 [items].

    Args:
        own: Their codes, int [items].
        distances: To all codes, float64 [items, K].
        used: Items at each code, int [K].
        capacity: Items that a code may have.
    """
    used, new = used.copy(), own.astype(np.int64)
    targets = np.flatnonzero(used < capacity)
    loss = distances[:, targets] - distances[np.arange(len(own)), own][:, None]
    moved = np.zeros(len(own), dtype=bool)
    overflow = int(np.maximum(used - capacity, 0).sum())
    for pair in np.argsort(loss, axis=None, kind="stable"):
        if overflow == 0:
            break
        row, column = divmod(int(pair), len(targets))
        target = targets[column]
        if not moved[row] and used[own[row]] > capacity and used[target] < capacity:
            used[own[row]] -= 1
            used[target] += 1
            overflow -= 1
            new[row], moved[row] = target, True
    return new


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
