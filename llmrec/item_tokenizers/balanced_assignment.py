"""Rows to clusters of limited sizes: exactly at the least cost, or by OneRec's rule. NumPy alone.

The exact assignment is the transport problem that k-means-constrained (used by LETTER, arXiv 2405.07314, and
MiniOneRec) gives to a minimum-cost flow solver, one edge for each row and cluster. Here it is solved on the graph of
the K clusters alone: an edge from a to b costs what the cheapest member of a costs more in b. Knows costs and sizes;
nothing of vectors, centres or items.
"""

from itertools import pairwise

import numpy as np

from llmrec.errors import DataError, SettingsError

PRICE_ROUNDS = 100
PATIENCE = 20  # rounds without fewer rows outside the limits
STEP_GROWTH = 1.1
STEP_SHRINKAGE = 0.5
ROWS_AT_ONCE = 16_384


def assign_balanced(
    costs: np.ndarray, min_size: int, max_size: int, *, prices: np.ndarray | None = None
) -> np.ndarray:
    """A cluster for each row, at the least total cost among all assignments that keep to the sizes.

    Three steps. Prices: giving every row the cluster of its least cost plus price is, whatever the prices, the
    cheapest assignment for the sizes that come out (duality of linear programs), so prices that make these sizes
    nearly right leave little to do. Repair: a row at a time moves along each shortest path, over any number of
    clusters, from those above `max_size` to those with room, then into those below `min_size`; shortest paths keep
    the assignment the cheapest for its sizes. Gain: while a path from a cluster that can spare a row to one with room
    has a negative length, a row moves along it. When there is none, no assignment within the limits costs less.

    Ties go to the lowest cluster; which of several equally cheap assignments comes out is fixed by the arguments, but
    not specified. For N = 12,101 and K = 256 a call takes tenths of a second, for 100,000 x 256 seconds; up to half a
    minute for 12,101 rows whose norms have long tails, where prices settle badly. The graph has K x K edges, so K up
    to some 2,000.

    Args:
        costs: float [N, K], finite; float32 or float64. Sums are taken in float64.
        min_size: Least rows of a cluster.
        max_size: Most rows of a cluster.
        prices: float [K], taken in place of searching for them: those of `balanced_prices`. Any give the same total
            cost; good ones give it sooner.

    Returns:
        int64 [N].

    Raises:
        SettingsError: N rows don't fit into such clusters.
        DataError: A cost is NaN or infinite.
    """
    check_sizes(len(costs), costs.shape[1], min_size, max_size)
    if not np.isfinite(costs.sum(dtype=np.float64)):
        raise DataError("a cost is NaN or infinite: the vectors or centres it comes from aren't finite")
    if len(costs) == 0:
        return np.zeros(0, dtype=np.int64)
    if prices is None:
        prices = balanced_prices(costs, min_size, max_size)
    return _PathRepair(costs, _cheapest(costs, prices)).run(min_size, max_size)


def balanced_prices(costs: np.ndarray, min_size: int, max_size: int, *, start: np.ndarray | None = None) -> np.ndarray:
    """Prices of clusters under which the cheapest cluster of each row gives sizes close to the limits.

    Raises the prices of clusters that are too large, lowers those that are too small, by the logarithm of size over
    limit; prices that aren't needed any more go back to 0. Each cluster has a step of its own, which grows while the
    direction stays and is halved where it turns: the scales of clusters differ by much where vectors have long tails.

    Args:
        costs: float [N, K], N at least 1.
        min_size: Least rows of a cluster.
        max_size: Most rows of a cluster.
        start: float [K], where to begin; zeros where None.

    Returns:
        float32 [K]; not the optimal dual prices, but near them.
    """
    num_clusters = costs.shape[1]
    prices = np.zeros(num_clusters, dtype=np.float32) if start is None else start.astype(np.float32)
    if num_clusters == 1:
        return prices
    sample = np.partition(costs[:: max(1, len(costs) // 4096)], 1, axis=1)
    gap = float((sample[:, 1] - sample[:, 0]).mean())  # how much dearer the second choice is
    steps, before = np.full(num_clusters, gap), np.zeros(num_clusters)
    fewest, best, best_round = 2 * len(costs) + 1, prices, 0
    for number in range(PRICE_ROUNDS):
        sizes = np.bincount((costs + prices).argmin(1), minlength=num_clusters)
        outside = int(np.maximum(sizes - max_size, 0).sum() + np.maximum(min_size - sizes, 0).sum())
        if outside < fewest:
            fewest, best, best_round = outside, prices, number
        if outside == 0 or number > best_round + PATIENCE:
            break
        allowed = (sizes >= min_size) & (sizes <= max_size)
        limits = np.where((sizes > max_size) | ((prices > 0) & (sizes >= min_size)), max_size, min_size)
        wanted = np.log((sizes + 0.5) / (limits + 0.5))
        wanted[allowed & (prices == 0)] = 0.0
        steps *= np.where(wanted * before > 0, STEP_GROWTH, np.where(wanted * before < 0, STEP_SHRINKAGE, 1.0))
        before = wanted
        moved = prices + (steps * wanted).astype(np.float32)
        prices = np.where(allowed & (moved * prices < 0), np.float32(0), moved)  # back to 0, not beyond
    return best


def assign_greedy_in_order(costs: np.ndarray) -> np.ndarray:
    """OneRec's balanced assignment (arXiv 2502.18965): clusters in order, each takes the nearest rows that are left.

    The rule is the paper's, and so is its weakness: the last clusters get what nobody wanted. The paper gives every
    cluster N / K rows and doesn't say what happens where that is no whole number; here the first N mod K clusters
    take one row more. Ties go to the lowest row.

    Args:
        costs: float [N, K].

    Returns:
        int64 [N]; sizes differ by at most 1.
    """
    num_rows, num_clusters = costs.shape
    labels = np.empty(num_rows, dtype=np.int64)
    left = np.ones(num_rows, dtype=bool)
    for cluster, column in enumerate(np.ascontiguousarray(costs.T)):
        size = num_rows // num_clusters + (cluster < num_rows % num_clusters)
        if size == 0:
            break
        column = np.where(left, column, np.inf)
        furthest = np.partition(column, size - 1)[size - 1]
        nearer = np.flatnonzero(column < furthest)
        taken = np.concatenate([nearer, np.flatnonzero(left & (column == furthest))[: size - len(nearer)]])
        labels[taken] = cluster
        left[taken] = False
    return labels


def check_sizes(num_rows: int, num_clusters: int, min_size: int, max_size: int) -> None:
    """Raises `SettingsError` where `num_rows` don't fit into `num_clusters` of `min_size` to `max_size`."""
    if not 0 <= min_size <= max_size or not num_clusters * min_size <= num_rows <= num_clusters * max_size:
        raise SettingsError(
            f"{num_rows} vectors don't fit into {num_clusters} clusters of {min_size} to {max_size}: the limits must"
            f" hold {num_rows / max(num_clusters, 1):.1f} between them"
        )


def _cheapest(costs: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """The cluster of least cost plus price, in float64 and a part of the rows at a time: int64 [N]."""
    parts = range(0, len(costs), ROWS_AT_ONCE)
    wide = prices.astype(np.float64)
    return np.concatenate([(costs[start : start + ROWS_AT_ONCE] + wide).argmin(1) for start in parts])


class _PathRepair:
    """An assignment that is the cheapest for its sizes, and stays so while rows move along shortest paths.

    Attributes:
        labels: int64 [N].
        sizes: int64 [K].
        edges: float64 [K, K]; from cluster a to b the least of costs[i, b] - costs[i, a] over the members i of a.
    """

    def __init__(self, costs: np.ndarray, labels: np.ndarray):
        num_clusters = costs.shape[1]
        self.costs = costs
        self.labels = labels
        self.sizes = np.bincount(labels, minlength=num_clusters)
        self.edges = np.full((num_clusters, num_clusters), np.inf)
        self.tolerance = 1e-12 * float(np.abs(costs).max())
        self._refresh(range(num_clusters))

    def run(self, min_size: int, max_size: int) -> np.ndarray:
        """Moves rows until all sizes are within the limits and nothing is left to gain; returns the labels."""
        while self._move(np.maximum(self.sizes - max_size, 0), np.maximum(max_size - self.sizes, 0)):
            pass
        while self._move(np.maximum(self.sizes - min_size, 0), np.maximum(min_size - self.sizes, 0)):
            pass
        while self._move(self.sizes - min_size, max_size - self.sizes, only_gains=True):
            pass
        return self.labels

    def _move(self, spare: np.ndarray, room: np.ndarray, *, only_gains: bool = False) -> bool:
        """Moves a row along each of some shortest paths from clusters with spare rows to clusters with room.

        With the lengths of the shortest paths taken as prices, every row on such a path is as cheap where it goes as
        where it is. So all paths of one shortest-path forest may be used at once, as long as no row is moved twice,
        and the assignment stays the cheapest for its sizes.
        """
        lengths, previous = self._shortest_paths(spare > 0)
        limit = -self.tolerance if only_gains else np.inf
        targets = np.flatnonzero((room > 0) & (lengths < limit))
        targets = targets[np.argsort(lengths[targets], kind="stable")]
        if not only_gains:  # no further than the room that is needed
            targets = targets[: np.searchsorted(np.cumsum(room[targets]), spare.sum()) + 1]
        moves: dict[int, tuple[int, int]] = {}
        members: dict[int, np.ndarray] = {}
        for target in targets:
            path = _trace(previous, int(target))
            if len(path) < 2 or spare[path[0]] <= 0:
                continue
            for cluster in path[:-1]:
                if cluster not in members:
                    members[cluster] = np.flatnonzero(self.labels == cluster)
            pairs = list(pairwise(path))
            rows = [self._cheapest_member(members[before], before, after) for before, after in pairs]
            if not any(row in moves for row in rows):
                spare[path[0]] -= 1
                moves.update(zip(rows, pairs, strict=True))
        for row, (before, after) in moves.items():
            self.labels[row] = after
            self.sizes[before] -= 1
            self.sizes[after] += 1
        self._refresh({cluster for pair in moves.values() for cluster in pair})
        return bool(moves)

    def _shortest_paths(self, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths from the nearest source (bool [K]) and the cluster before each on its path, -1: none.

        Bellman and Ford's rounds, over the clusters alone whose length has changed: edges may be negative, but no
        cycle is.
        """
        lengths = np.where(sources, 0.0, np.inf)
        previous = np.full(len(lengths), -1)
        changed = np.flatnonzero(sources)
        for _ in range(len(lengths)):
            through = self.edges[changed] + lengths[changed, None]
            shorter = np.flatnonzero(through.min(axis=0, initial=np.inf) < lengths - self.tolerance)
            if len(shorter) == 0:
                break
            via = through[:, shorter].argmin(axis=0)
            lengths[shorter] = through[via, shorter]
            previous[shorter] = changed[via]
            changed = shorter
        return lengths, previous

    def _cheapest_member(self, members: np.ndarray, before: int, after: int) -> int:
        extra = self.costs[members, after].astype(np.float64) - self.costs[members, before]
        return int(members[extra.argmin()])

    def _refresh(self, clusters: "range | set[int]") -> None:
        for cluster in clusters:
            own = self.costs[self.labels == cluster].astype(np.float64)
            self.edges[cluster] = (own - own[:, cluster, None]).min(axis=0, initial=np.inf)
            self.edges[cluster, cluster] = np.inf


def _trace(previous: np.ndarray, target: int) -> list[int]:
    """The clusters of a path, from its source to `target`."""
    path = [target]
    while previous[path[-1]] >= 0:
        path.append(int(previous[path[-1]]))
        if len(path) > len(previous):  # a cycle of rounding errors: no path
            return []
    return path[::-1]
