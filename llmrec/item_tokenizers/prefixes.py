"""Items grouped by the first codes of their semantic IDs: what the measures of code sets count with.

Pure functions on arrays, by sorting 64-bit numbers. Knows nothing of distances or embeddings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MAX_KEY = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class PrefixUsage:
    """How the items spread over the prefixes of one depth.

    Attributes:
        depth: Number of codes of the prefix, from 1.
        distinct: Different prefixes.
        items_each: Mean items of such a prefix; 0 for an empty catalogue.
        largest: Items of the most crowded prefix.
    """

    depth: int
    distinct: int
    items_each: float
    largest: int


def prefix_numbers(codes: np.ndarray, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """Numbers the prefixes of every depth, in the order of their codes.

    Args:
        codes: int [N, L].
        sizes: Codebook sizes, length L. Their product may be above what 64 bits hold: numbers are dense at each depth.

    Yields:
        L times int64 [N], for depth 1 to L: equal exactly where the first codes are, 0 to (distinct prefixes - 1).
    """
    numbers = np.zeros(len(codes), dtype=np.int64)
    for level, size in enumerate(sizes):
        numbers = np.unique(numbers * size + codes[:, level], return_inverse=True)[1]
        yield numbers


def count_distinct(codes: np.ndarray, sizes: Sequence[int]) -> int:
    """Different code tuples of int [N, L]: one sort where the product of sizes fits into 64 bits."""
    keys, bound = np.zeros(len(codes), dtype=np.int64), 1
    for level, size in enumerate(sizes):
        if bound * size > MAX_KEY:
            keys, bound = np.unique(keys, return_inverse=True)[1], len(keys)
        keys = keys * size + codes[:, level]
        bound *= size
    return len(np.unique(keys))


def prefix_usage(codes: np.ndarray, sizes: Sequence[int]) -> tuple[PrefixUsage, ...]:
    """How the items of int [N, L] spread over prefixes, depth by depth."""
    found = []
    for depth, numbers in enumerate(prefix_numbers(codes, sizes), start=1):
        counts = np.bincount(numbers)
        found.append(
            PrefixUsage(depth, len(counts), len(numbers) / max(len(counts), 1), int(counts.max(initial=0)))
        )  # fmt: skip
    return tuple(found)


def pairs_together(numbers: np.ndarray) -> int:
    """Unordered pairs of items with equal numbers (int [N], from 0): the sum of n (n - 1) / 2 over groups."""
    counts = np.bincount(numbers)
    return int((counts * (counts - 1) // 2).sum())


def chance_of_sharing(numbers: np.ndarray) -> float:
    """Share of all pairs of different items that have equal numbers (int [N]); 0 for fewer than two items."""
    pairs = len(numbers) * (len(numbers) - 1) // 2
    return pairs_together(numbers) / pairs if pairs else 0.0
