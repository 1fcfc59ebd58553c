"""Moves items to code tuples that nobody holds: minimum-cost assignment, and counters. Pure, deterministic.

Works on sorted 64-bit keys and on blocks of rows, so that memory beyond the input stays at a few arrays of one number
an item, whatever the width of the vectors. The reason for minimum-cost assignment in place of the published Sinkhorn
repair was measured: the repaired last codes of LETTER and LC-Rec are about as far away as random ones (methods.md
12.2).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from scipy.optimize import linear_sum_assignment

from llmrec.errors import SettingsError
from llmrec.item_tokenizers.uniqueness import CodeGeometry, mixed_radix_keys, occurrence_numbers, sorted_contains

GREEDY_ABOVE = 512  # items of a prefix; above, optimal assignment (cubic) gives way to greedy
BLOCK_DISTANCES = 2**21  # distances that are held at a time: 16 MB
_NOTHING = np.zeros(0, dtype=np.int64)  # no keys are taken


def assign_min_cost(
    codes: np.ndarray, sizes: Sequence[int], geometry: CodeGeometry | None, *, taken: np.ndarray | None = None
) -> np.ndarray:
    """Moves colliding items to the last-level codes that are free under their prefix, at the least cost.

    Under each prefix the items that share their codes with another are assigned together, to the codes that no other
    item of the prefix holds, so that the sum of squared distances from their last residuals to the code vectors is
    smallest (one of each group may keep its code). Where more than 512 items of one prefix collide, the assignment is
    greedy: the items come in the order of their distance to the nearest code, and each takes the nearest that is left.

    Where a prefix holds more items than there are tuples below it, some can't stay: the ones that lose least move to
    the nearest sibling prefix with room, and their later codes are chosen anew. This is done from the first level
    down, so it succeeds whenever the catalogue has no more items than there are code tuples. Greedy here too: the
    distance to the nearest prefix with room settles who moves, and in that order each takes the nearest with room.

    Without geometry every change of a code costs 1, so as few items as possible move: the first of each group keeps
    its codes, the others take the lowest free code numbers (of a full prefix, the lowest sibling with room).

    Args:
        codes: int [N, L].
        sizes: Codebook sizes, length L, their product below 2**63.
        geometry: Vectors of these N items and of the codes, or None.
        taken: Keys (`mixed_radix_keys`) that further items hold, which stay as they are: int64, ascending, all
            different. None of the N gets one of them.

    Returns:
        int32 [N, L], no two rows equal, none of them taken.

    Raises:
        SettingsError: More items than code tuples.
    """
    taken = _NOTHING if taken is None else taken
    if len(codes) + len(taken) > prod(sizes):
        raise SettingsError(
            f"{len(codes) + len(taken):,} items can't have codes of their own: codebook sizes {list(sizes)} give"
            f" {prod(sizes):,} tuples; use larger codebooks or more levels, or the policy extra_level"
        )
    codes = np.array(codes, dtype=np.int32)
    by_key = _make_room_everywhere(codes, sizes, geometry, taken)
    _separate(codes, sizes, geometry, by_key, taken)
    return codes


def assign_fixed_counters(
    codes: np.ndarray, sizes: Sequence[int], counter_size: int, geometry: CodeGeometry | None
) -> np.ndarray:
    """Appends a counter with a fixed number of codes: the number of the item among those with equal codes.

    For codes that are made anew again and again while a language model has rows for so many counters (ETEGRec, whose
    released code stops with an error where a group is larger). Here the items that are too many move: of an overfull
    group those that lose least, each to the nearest sibling prefix with room, as in `assign_min_cost`, and from the
    first level down, so that it succeeds whenever there are no more items than tuples. Without geometry the last ones
    move, to the lowest siblings with room. Counters are given after that, in row order.

    Args:
        codes: int [N, L].
        sizes: Codebook sizes, length L; their product times `counter_size` below 2**63.
        counter_size: Codes of the counter, at least 1.
        geometry: Vectors of these N items and of the codes, or None.

    Returns:
        int32 [N, L + 1], no two rows equal. Where no group has more than `counter_size` items the first L are those
        given.

    Raises:
        SettingsError: More items than code tuples.
    """
    with_counter = (*sizes, counter_size)
    if len(codes) > prod(with_counter):
        raise SettingsError(
            f"{len(codes):,} items can't have codes of their own: codebook sizes {list(sizes)} and a counter of"
            f" {counter_size} give {prod(with_counter):,} tuples; raise counter_size, or use larger codebooks or more"
            " levels"
        )
    counted = np.zeros((len(codes), len(with_counter)), dtype=np.int32)
    counted[:, :-1] = codes
    _make_room_everywhere(counted, with_counter, geometry, _NOTHING)
    counted[:, -1] = occurrence_numbers(mixed_radix_keys(counted, sizes))
    return counted


def assign_counters(codes: np.ndarray, sizes: Sequence[int], taken: np.ndarray) -> np.ndarray:
    """Appends to new items the lowest counter that is free in their group.

    Args:
        codes: int [N, L - 1], without the counter.
        sizes: Codebook sizes, length L, the last one that of the counter.
        taken: Keys of the items that are there: int64, ascending, all different.

    Returns:
        int32 [N, L], no two rows equal, none of them taken.

    Raises:
        SettingsError: A group would have more items than the last level has codes.
    """
    size = sizes[-1]
    prefixes, counts = np.unique(mixed_radix_keys(codes, sizes[:-1]), return_counts=True)
    needed = counts + _count_within(taken, prefixes * size, size)
    if needed.max(initial=0) > size:
        raise SettingsError(
            f"{int(needed.max()):,} items would share the codes before the counter, which the last level of"
            f" {size} code(s) can't tell apart: the vocabulary would need more tokens; encode the whole catalogue"
            " again with extra_level (and fine-tune again), remove items, or use the policy min_cost, which needs no"
            " counter"
        )
    codes = np.column_stack([codes, np.zeros(len(codes), dtype=np.int32)]).astype(np.int32)
    _separate(codes, sizes, None, _sorted_by_key(codes, sizes), taken)
    return codes


@dataclass(frozen=True)
class _ByKey:
    """Items sorted by key, those of equal keys by row: int64 [n] each."""

    rows: np.ndarray
    keys: np.ndarray

    def part(self, chosen: np.ndarray | slice) -> "_ByKey":
        """Some of them: by a mask [n], or a slice."""
        return _ByKey(self.rows[chosen], self.keys[chosen])


def _sorted_by_key(codes: np.ndarray, sizes: Sequence[int]) -> _ByKey:
    keys = mixed_radix_keys(codes, sizes)
    order = np.argsort(keys, kind="stable")
    return _ByKey(order, keys[order])


def _count_within(ascending: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """How many of some ascending numbers lie in [start, start + length), for each start."""
    return np.searchsorted(ascending, starts + length) - np.searchsorted(ascending, starts)


def _make_room_everywhere(
    codes: np.ndarray, sizes: Sequence[int], geometry: CodeGeometry | None, taken: np.ndarray
) -> _ByKey:
    """Moves items, in place, until no prefix of any length has more items than tuples below it; the new order."""
    by_key = _sorted_by_key(codes, sizes)
    for level in range(len(sizes) - 1):
        if _make_room(codes, sizes, level, geometry, by_key, taken):
            by_key = _sorted_by_key(codes, sizes)
    return by_key


def _make_room(
    codes: np.ndarray,
    sizes: Sequence[int],
    level: int,
    geometry: CodeGeometry | None,
    by_key: _ByKey,
    taken: np.ndarray,
) -> bool:
    """Moves items, in place, until no prefix of level + 1 codes has more items than tuples below it.

    Returns:
        Whether any moved.
    """
    capacity, size = prod(sizes[level + 1 :]), sizes[level]
    if capacity >= len(codes) + len(taken):
        return False
    prefixes = by_key.keys // capacity
    starts = _run_starts(prefixes)
    prefixes, counts = prefixes[starts], np.diff(starts, append=len(prefixes))
    if len(taken):
        counts += _count_within(taken, prefixes * capacity, capacity)
    parents = np.unique(prefixes[counts > capacity] // size)
    bounds = np.searchsorted(by_key.keys, [parents * size * capacity, (parents + 1) * size * capacity])
    for parent, start, end in zip(parents, *bounds, strict=True):
        members = np.sort(by_key.rows[start:end])
        used = _count_within(taken, (parent * size + np.arange(size)) * capacity, capacity)
        used += np.bincount(codes[members, level], minlength=size)
        crowded = members[used[codes[members, level]] > capacity]
        if geometry is None:
            _spread(codes, crowded, level, used, capacity)
        else:
            _relocate(codes, crowded, level, used, capacity, geometry)
    return len(parents) > 0


def _spread(codes: np.ndarray, rows: np.ndarray, level: int, used: np.ndarray, capacity: int) -> None:
    """Without distances: the last items of overfull codes go, in place, to the lowest codes with room."""
    overflow, own = np.maximum(used - capacity, 0), codes[rows, level]
    leaving = rows[occurrence_numbers(own[::-1])[::-1] < overflow[own]]
    room = np.maximum(capacity - used, 0)
    filled = np.minimum(room, np.maximum(len(leaving) - (np.cumsum(room) - room), 0))
    codes[leaving, level] = np.repeat(np.arange(len(used)), filled)


def _relocate(
    codes: np.ndarray, rows: np.ndarray, level: int, used: np.ndarray, capacity: int, geometry: CodeGeometry
) -> None:
    """Moves, in place, the items that lose least from overfull codes to the nearest code with room.

    Args:
        codes: int32 [N, L].
        rows: The items of the overfull codes.
        level: Level of the code that changes; all later ones are chosen anew, save for a counter, which has no
            vectors.
        used: Items at each code, int [K].
        capacity: Items that a code may have.
        geometry: Distances.
    """
    room = np.maximum(capacity - used, 0)
    losses = np.concatenate(
        [
            distances[:, room > 0].min(1) - distances[np.arange(len(distances)), codes[some, level]]
            for some, distances in _distance_blocks(codes, rows, level, geometry)
        ]
    )
    in_order = rows[np.argsort(losses, kind="stable")]
    sources = codes[in_order, level]
    moving = in_order[occurrence_numbers(sources) < (used - capacity)[sources]]
    codes[moving, level] = _take_nearest(codes, moving, level, room, geometry)
    for later in range(level + 1, len(geometry.codebooks)):
        for some, distances in _distance_blocks(codes, moving, later, geometry):
            codes[some, later] = distances.argmin(1)


def _take_nearest(
    codes: np.ndarray, rows: np.ndarray, level: int, room: np.ndarray, geometry: CodeGeometry
) -> np.ndarray:
    """One after the other, each item takes the nearest code that still has room: int64 [rows].

    Args:
        codes: int32 [N, L].
        rows: Items in the order in which they choose.
        level: Level of the code.
        room: How many items each code takes, int [K]; in all at least as many as there are rows.
        geometry: Distances.
    """
    room, chosen = room.copy(), []
    full = np.where(room > 0, 0.0, np.inf)
    for _, distances in _distance_blocks(codes, rows, level, geometry):
        for row_distances in distances:
            row_distances += full
            code = int(row_distances.argmin())
            chosen.append(code)
            room[code] -= 1
            if room[code] == 0:
                full[code] = np.inf
    return np.array(chosen, dtype=np.int64)


def _distance_blocks(
    codes: np.ndarray, rows: np.ndarray, level: int, geometry: CodeGeometry
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some of the rows, and their distances to all codes of a level, until all rows had their turn."""
    step = max(1, BLOCK_DISTANCES // len(geometry.codebooks[level]))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        yield some, geometry.distances(some, codes[some], level)


def _separate(
    codes: np.ndarray, sizes: Sequence[int], geometry: CodeGeometry | None, by_key: _ByKey, taken: np.ndarray
) -> None:
    """Gives, in place, colliding items last codes of their own; no prefix may have more items than last codes."""
    size, last = sizes[-1], len(sizes) - 1
    shared = sorted_contains(taken, by_key.keys)
    repeated = by_key.keys[1:] == by_key.keys[:-1]
    shared[1:] |= repeated
    shared[:-1] |= repeated
    held = (by_key.keys[~shared], taken)
    colliding = by_key.part(shared)
    groups = _run_starts(colliding.keys // size)
    counts = np.diff(groups, append=len(colliding.rows))
    huge = np.zeros(len(counts), dtype=bool) if geometry is None else counts > GREEDY_ABOVE
    small = colliding.part(np.repeat(~huge, counts))
    for block in _prefix_blocks(small.keys // size, size):
        part = small.part(block)
        starts = _run_starts(part.keys // size)
        occupied = _occupied(held, part.keys[starts] // size, size)
        if geometry is None:
            codes[part.rows, last] = _lowest_free(part, starts, occupied)
        else:
            codes[part.rows, last] = _optimal(codes, part.rows, starts, occupied, geometry)
    if geometry is not None:
        for start, count in zip(groups[huge], counts[huge], strict=True):
            part = colliding.part(slice(start, start + count))
            occupied = _occupied(held, part.keys[:1] // size, size)[0]
            codes[part.rows, last] = _greedy(codes, part.rows, occupied, geometry)


def _occupied(held: Sequence[np.ndarray], prefixes: np.ndarray, size: int) -> np.ndarray:
    """Which last codes some ascending arrays of keys hold under some prefixes: bool [P, size]."""
    occupied = np.zeros((len(prefixes), size), dtype=bool)
    for keys in held:
        starts, lengths = np.searchsorted(keys, prefixes * size), _count_within(keys, prefixes * size, size)
        groups = np.repeat(np.arange(len(prefixes)), lengths)
        within = np.arange(len(groups)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        found = keys[np.repeat(starts, lengths) + within]
        occupied[groups, found - prefixes[groups] * size] = True
    return occupied


def _run_starts(ascending: np.ndarray) -> np.ndarray:
    """Where each run of equal numbers (from 0) begins."""
    return np.flatnonzero(np.diff(ascending, prepend=-1))


def _prefix_blocks(prefixes: np.ndarray, size: int) -> Iterator[slice]:
    """Cuts ascending prefixes into slices of about BLOCK_DISTANCES / size rows, none of them split."""
    bounds = np.append(_run_starts(prefixes), len(prefixes))
    step = max(1, BLOCK_DISTANCES // size)
    first = 0
    while first < len(bounds) - 1:
        end = max(first + 1, int(np.searchsorted(bounds, bounds[first] + step, side="right")) - 1)
        yield slice(int(bounds[first]), int(bounds[end]))
        first = end


def _lowest_free(part: _ByKey, starts: np.ndarray, occupied: np.ndarray) -> np.ndarray:
    """The first of equal keys keeps its code where nobody else holds it, the others get the lowest free ones."""
    size = occupied.shape[1]
    groups = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(part.rows)))
    chosen = part.keys % size
    keeps = (np.diff(part.keys, prepend=-1) != 0) & ~occupied[groups, chosen]
    occupied[groups[keeps], chosen[keeps]] = True
    owners, free = np.nonzero(~occupied)
    moving = groups[~keeps]
    chosen[~keeps] = free[np.searchsorted(owners, moving) + occurrence_numbers(moving)]
    return chosen


def _optimal(
    codes: np.ndarray, rows: np.ndarray, starts: np.ndarray, occupied: np.ndarray, geometry: CodeGeometry
) -> np.ndarray:
    """Of every group the last codes with the smallest sum of distances."""
    ends = np.append(starts[1:], len(rows))
    distances = geometry.distances(rows, codes[rows], codes.shape[1] - 1)
    distances[np.repeat(occupied, ends - starts, axis=0)] = np.inf
    chosen = np.empty(len(rows), dtype=np.int64)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        group = distances[start:end]
        if (group == group[0]).all():  # equal vectors, which linear_sum_assignment is slow on
            chosen[start:end] = np.argsort(group[0], kind="stable")[: end - start]
        else:
            chosen[start:end] = linear_sum_assignment(group)[1]
    return chosen


def _greedy(codes: np.ndarray, rows: np.ndarray, occupied: np.ndarray, geometry: CodeGeometry) -> np.ndarray:
    """The last codes of one group: nearest items first, each takes the nearest code that is left."""
    level = codes.shape[1] - 1
    blocks = _distance_blocks(codes, rows, level, geometry)
    order = np.argsort(np.concatenate([distances[:, ~occupied].min(1) for _, distances in blocks]), kind="stable")
    chosen = np.empty(len(rows), dtype=np.int64)
    chosen[order] = _take_nearest(codes, rows[order], level, (~occupied).astype(np.int64), geometry)
    return chosen
