"""Clusterings that codebooks start from, and that LETTER's diversity loss groups codes by: NumPy and scikit-learn.

LETTER's authors use the package k-means-constrained (a minimum-cost flow in each round, started in a pool of ten
processes). Here clusters keep to their size limits by vectorised greedy rules: not the cheapest assignment, which is
in `balanced_assignment.py`, but in milliseconds for 256 codes, in seconds for a catalogue, and for any number of
vectors.
"""

import warnings

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans, kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning

from llmrec.item_tokenizers.balanced_assignment import check_sizes

MINI_BATCH_ABOVE = 100_000  # vectors; above, k-means in mini-batches


def _random_state(generator: np.random.Generator) -> int:
    return int(generator.integers(2**31 - 1))


def _spread(centres: np.ndarray, vectors: np.ndarray, num_clusters: int, generator: np.random.Generator) -> np.ndarray:
    """Fills up to `num_clusters` rows with vectors drawn at random, slightly moved so that no two are equal."""
    missing = num_clusters - len(centres)
    if missing <= 0:
        return centres.astype(np.float32)
    scale = 0.01 * float(vectors.std()) + 1e-4
    drawn = vectors[generator.integers(len(vectors), size=missing)]
    noise = generator.normal(scale=scale, size=drawn.shape)
    return np.concatenate([centres, drawn + noise]).astype(np.float32)


def _few_distinct(vectors: np.ndarray, num_clusters: int) -> np.ndarray | None:
    """The different vectors, where they are no more than `num_clusters`; looked for only in few vectors."""
    if len(vectors) > 4 * num_clusters:
        return None
    distinct = np.unique(vectors, axis=0)
    return distinct if len(distinct) <= num_clusters else None


def start_centres(vectors: np.ndarray, num_clusters: int, generator: np.random.Generator) -> np.ndarray:
    """Centres by k-means++; with no more different vectors than centres, these, and others close by.

    Args:
        vectors: float [N, d], N >= 1.
        num_clusters: K.
        generator: Source of all draws.

    Returns:
        float32 [K, d].
    """
    distinct = _few_distinct(vectors, num_clusters)
    if distinct is not None:
        return _spread(distinct, vectors, num_clusters, generator)
    centres, _ = kmeans_plusplus(vectors, num_clusters, random_state=_random_state(generator))
    return centres.astype(np.float32)


def kmeans_centres(
    vectors: np.ndarray, num_clusters: int, generator: np.random.Generator, *, iterations: int = 100
) -> np.ndarray:
    """Centres of k-means, k-means++ start; in mini-batches above 100,000 vectors.

    With no more than `num_clusters` different vectors these are the centres, and the other centres lie close to
    vectors drawn at random.

    Args:
        vectors: float [N, d], N >= 1.
        num_clusters: K.
        generator: Source of all draws.
        iterations: Rounds at most.

    Returns:
        float32 [K, d].
    """
    distinct = _few_distinct(vectors, num_clusters)
    if distinct is not None:
        return _spread(distinct, vectors, num_clusters, generator)
    algorithm = KMeans if len(vectors) <= MINI_BATCH_ABOVE else MiniBatchKMeans
    model = algorithm(num_clusters, n_init=1, max_iter=iterations, random_state=_random_state(generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different vectors than centres: defined below
        model.fit(vectors)
    return model.cluster_centers_.astype(np.float32)


def constrained_kmeans(
    vectors: np.ndarray,
    num_clusters: int,
    generator: np.random.Generator,
    *,
    min_size: int,
    max_size: int,
    iterations: int = 10,
) -> tuple[np.ndarray, np.ndarray]:
    """K-means whose clusters have between `min_size` and `max_size` members.

    Each round: every vector asks for its nearest centre; a centre keeps those that are nearest to it, the others ask
    for their next nearest with room; then clusters below `min_size` take the vectors whose way is the shortest from
    clusters that can spare them; centres become means.

    Args:
        vectors: float [N, d].
        num_clusters: C.
        generator: Source of all draws.
        min_size: Least members of a cluster.
        max_size: Most members of a cluster.
        iterations: Rounds at most; ends earlier when no label changes.

    Returns:
        Centres float32 [C, d] (an empty cluster keeps its start) and labels int64 [N].

    Raises:
        SettingsError: N vectors don't fit into such clusters.
    """
    count = len(vectors)
    check_sizes(count, num_clusters, min_size, max_size)
    vectors = np.asarray(vectors, dtype=np.float32)
    centres = start_centres(vectors, num_clusters, generator)
    labels = np.full(count, -1, dtype=np.int64)
    squares = (vectors**2).sum(1)[:, None]
    for _ in range(iterations):
        distances = squares + (centres**2).sum(1) - 2.0 * vectors @ centres.T  # [N, C]
        before, labels = labels, _assign_up_to(distances, max_size)
        _fill_up_to(labels, distances, min_size)
        sizes = np.bincount(labels, minlength=num_clusters)
        filled = sizes > 0
        starts = (np.cumsum(sizes) - sizes)[filled]
        sums = np.add.reduceat(vectors[np.argsort(labels, kind="stable")], starts, axis=0, dtype=np.float64)
        centres[filled] = sums / sizes[filled, None]
        if np.array_equal(before, labels):
            break
    return centres, labels


def _rank_within(groups: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Position of each element among those of its group, by ascending cost: int64 [n]."""
    order = np.lexsort((costs, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    lengths = np.diff(starts, append=len(groups))
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - np.repeat(starts, lengths)
    return ranks


def _assign_up_to(distances: np.ndarray, max_size: int) -> np.ndarray:
    """A column for each row, near ones first, no column more than `max_size` times: int64 [N]."""
    num_rows, num_columns = distances.shape
    labels = np.full(num_rows, -1, dtype=np.int64)
    room = np.full(num_columns, max_size, dtype=np.int64)
    waiting = np.arange(num_rows)
    while len(waiting):  # each round fills at least one column or ends
        columns = np.flatnonzero(room)
        wanted = columns[distances[np.ix_(waiting, columns)].argmin(1)]
        accepted = _rank_within(wanted, distances[waiting, wanted]) < room[wanted]
        labels[waiting[accepted]] = wanted[accepted]
        room -= np.bincount(wanted[accepted], minlength=num_columns)
        waiting = waiting[~accepted]
    return labels


def _fill_up_to(labels: np.ndarray, distances: np.ndarray, min_size: int) -> None:
    """Moves rows, in place, from larger clusters into those below `min_size`."""
    sizes = np.bincount(labels, minlength=distances.shape[1])
    for cluster in np.flatnonzero(sizes < min_size):
        spare = np.maximum(sizes - min_size, 0)
        rows = np.flatnonzero(spare[labels] > 0)
        extra = distances[rows, cluster] - distances[rows, labels[rows]]
        rows = rows[np.argsort(extra, kind="stable")]
        extra = np.sort(extra, kind="stable")
        rows = rows[_rank_within(labels[rows], extra) < spare[labels[rows]]][: min_size - sizes[cluster]]
        sizes -= np.bincount(labels[rows], minlength=len(sizes))
        sizes[cluster] += len(rows)
        labels[rows] = cluster
