"""Whether items that are alike have codes that are alike: nearest neighbours in an embedding space, and their codes.

A language model that reads and writes codes can only share what it learns between items that share codes. So the
neighbours of an item (by text, or by who took them together) should share its first codes far more often than chance.
Knows codes and vectors; doesn't know how either was made.
"""

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.item_tokenizers.prefixes import chance_of_sharing, prefix_numbers
from llmrec.item_tokenizers.semantic_ids import SemanticIds

ITEM_BLOCK = 8_192  # rows of the catalogue that are read and compared at a time
QUERY_BLOCK = 1_024
MAX_QUERIES = 5_000


@dataclass(frozen=True)
class NeighbourAgreement:
    """What the nearest neighbours of an item share with it, level by level.

    Attributes:
        num_items: Items with a vector (present, and not all zero); the others are left out of everything here.
        num_queries: Items whose neighbours were looked at: all, or a seeded sample.
        num_neighbours: Neighbours of each; fewer than asked for where the catalogue is that small.
        shared_prefix: Of depth 1 to L: share of (item, neighbour) pairs with equal first codes.
        chance: The same for all pairs of different items: what codes that know nothing of this space would reach.
        lift: shared_prefix / chance; None where chance is 0 (unique codes at full depth).
        equal_codes: Of each level: share of (item, neighbour) pairs with an equal code there, whatever the others.
        equal_codes_chance: The same for all pairs of different items.
        code_overlap: Mean of `equal_codes` over the levels. This is our reading of the "code overlap" of CF neighbours
            that is reported for LETTER (.2760 on Instruments, TIGER .0849); how many neighbours it was measured with
            is not known to us.
    """

    num_items: int
    num_queries: int
    num_neighbours: int
    shared_prefix: tuple[float, ...]
    chance: tuple[float, ...]
    lift: tuple[float | None, ...]
    equal_codes: tuple[float, ...]
    equal_codes_chance: tuple[float, ...]
    code_overlap: float

    def to_table(self, space: str) -> Table:
        """One row a depth; `space` names the embeddings in the title."""
        asked = "" if self.num_queries == self.num_items else f"{self.num_queries:,} of "
        title = f"Codes shared with the {self.num_neighbours} nearest: {space}\n{asked}{self.num_items:,} items"
        table = Table(title=title, title_justify="left")
        for heading in ("level", "first codes", "chance", "lift", "this code", "chance"):
            table.add_column(heading, justify="left" if heading == "level" else "right")
        for level in range(len(self.shared_prefix)):
            lift = self.lift[level]
            table.add_row(
                chr(ord("a") + level), f"{self.shared_prefix[level]:.2%}", f"{self.chance[level]:.3%}",
                "-" if lift is None else f"{lift:,.1f}", f"{self.equal_codes[level]:.2%}",
                f"{self.equal_codes_chance[level]:.3%}",
            )  # fmt: skip
        return table


def neighbour_agreement(
    semantic_ids: SemanticIds,
    embeddings: ItemEmbeddings,
    *,
    num_neighbours: int = 10,
    max_queries: int = MAX_QUERIES,
    seed: int = 0,
    what: str = "the embeddings",
) -> NeighbourAgreement:
    """Measures how often nearest neighbours by cosine share codes, against chance.

    Memory is bounded: a block of the catalogue (which may be memory-mapped) is compared with a block of queries at a
    time. The work is a product of max_queries x N x D.

    Args:
        semantic_ids: The codes.
        embeddings: Vectors of the same items in the same order. Items with `present` False, or a vector of zeros, are
            left out.
        num_neighbours: Neighbours of each item; the item itself is none of them. Equal cosines at the edge: any.
        max_queries: Above this number of items, as many are drawn.
        seed: Of that draw.
        what: Names the embeddings in errors.

    Returns:
        All shares 0 and `num_queries` 0 where fewer than two items have a vector.

    Raises:
        ItemOrderError: The embeddings are about other items, or in another order.
    """
    embeddings.check_order(semantic_ids.item_ids, what)
    usable = _usable_items(embeddings)
    rows = np.flatnonzero(usable)
    num_neighbours = max(min(num_neighbours, len(rows) - 1), 0)
    queries = rows if num_neighbours else rows[:0]
    if len(queries) > max_queries:
        queries = np.sort(np.random.default_rng(seed).choice(queries, max_queries, replace=False))
    nearest = nearest_items(embeddings.vectors, queries, num_neighbours, usable=usable)

    sizes, codes = semantic_ids.codebook_sizes, semantic_ids.codes
    prefixes = [_shared(numbers, queries, nearest, rows) for numbers in prefix_numbers(codes, sizes)]
    levels = [_shared(codes[:, level], queries, nearest, rows) for level in range(len(sizes))]
    return NeighbourAgreement(
        num_items=len(rows),
        num_queries=len(queries),
        num_neighbours=num_neighbours,
        shared_prefix=tuple(found for found, _ in prefixes),
        chance=tuple(chance for _, chance in prefixes),
        lift=tuple(found / chance if chance else None for found, chance in prefixes),
        equal_codes=tuple(found for found, _ in levels),
        equal_codes_chance=tuple(chance for _, chance in levels),
        code_overlap=sum(found for found, _ in levels) / len(levels),
    )


def nearest_items(vectors: np.ndarray, queries: np.ndarray, num_neighbours: int, *, usable: np.ndarray) -> np.ndarray:
    """The nearest items by cosine, nearest first, the item itself left out.

    Args:
        vectors: float32 [N, D].
        queries: Row numbers, int64 [Q].
        num_neighbours: k, below the number of usable items.
        usable: bool [N], the items that can be neighbours.

    Returns:
        Row numbers, int64 [Q, k].
    """
    wanted = _unit_rows(vectors[queries])
    best = np.full((len(queries), num_neighbours), -np.inf, dtype=np.float32)
    rows = np.zeros((len(queries), num_neighbours), dtype=np.int64)
    for start in range(0, len(vectors) if num_neighbours else 0, ITEM_BLOCK):
        block = _unit_rows(vectors[start : start + ITEM_BLOCK])
        unusable = ~usable[start : start + ITEM_BLOCK]
        for first in range(0, len(queries), QUERY_BLOCK):
            part = slice(first, first + QUERY_BLOCK)
            cosines = wanted[part] @ block.T  # [queries, items]
            cosines[:, unusable] = -np.inf
            own = queries[part] - start
            inside = np.flatnonzero((own >= 0) & (own < len(block)))
            cosines[inside, own[inside]] = -np.inf
            best[part], rows[part] = _keep_best(best[part], rows[part], cosines, start)
    return rows


def _keep_best(best: np.ndarray, rows: np.ndarray, cosines: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """The best of those found so far ([Q, k]) and of a new block ([Q, items]), highest first; earlier rows at ties."""
    kept = best.shape[1]
    if cosines.shape[1] > kept:
        columns = np.argpartition(cosines, -kept, axis=1)[:, -kept:]
    else:
        columns = np.tile(np.arange(cosines.shape[1]), (len(cosines), 1))
    scores = np.concatenate([best, np.take_along_axis(cosines, columns, axis=1)], axis=1)
    candidates = np.concatenate([rows, columns + start], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :kept]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(candidates, order, axis=1)


def _unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; rows of zeros stay zeros."""
    vectors = np.asarray(vectors, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _usable_items(embeddings: ItemEmbeddings) -> np.ndarray:
    """The items with a direction: bool [N]."""
    usable = np.empty(len(embeddings), dtype=bool)
    for start in range(0, len(embeddings), ITEM_BLOCK):
        usable[start : start + ITEM_BLOCK] = np.asarray(embeddings.vectors[start : start + ITEM_BLOCK]).any(axis=1)
    return usable if embeddings.present is None else usable & embeddings.present


def _shared(numbers: np.ndarray, queries: np.ndarray, nearest: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """Share of (item, neighbour) pairs with equal numbers, and that of all pairs of the items `rows`."""
    equal = numbers[nearest] == numbers[queries][:, None]
    return float(equal.mean()) if equal.size else 0.0, chance_of_sharing(numbers[rows])
