"""Recall, NDCG and MRR at k, from the ranks of the targets. Pure functions on NumPy arrays.

Each example has one target, so Recall@k equals the hit rate, and the ideal DCG is 1: NDCG@k of an example is
1 / log2(rank + 1) (Järvelin and Kekäläinen 2002, with one relevant item), MRR@k is 1 / rank. Ranks count from 1; 0
means that the target was not among the answers, and counts as 0 in every metric.
"""

from collections.abc import Callable, Iterable

import numpy as np

from llmrec.errors import SettingsError


def recalls(ranks: np.ndarray, k: int) -> np.ndarray:
    """Recall@k of each example, float64 [E]: 1 where the target is among the first k."""
    return _found(ranks, k).astype(np.float64)


def ndcgs(ranks: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k of each example, float64 [E]: 1 / log2(rank + 1) where the target is among the first k."""
    found = _found(ranks, k)
    return found / np.log2(np.where(found, ranks, 1) + 1.0)


def reciprocal_ranks(ranks: np.ndarray, k: int) -> np.ndarray:
    """Reciprocal rank of each example, float64 [E], 0 where the target is not among the first k."""
    found = _found(ranks, k)
    return found / np.where(found, ranks, 1).astype(np.float64)


def recall_at_k(ranks: np.ndarray, k: int) -> float:
    """Mean Recall@k over examples; with one target each the same as Hit@k.

    Args:
        ranks: int [E], 1-based rank of each target, 0 where it was not found.
        k: Items looked at.

    Raises:
        SettingsError: k below 1, or no examples.

    Example:
        >>> recall_at_k(np.array([1, 3, 0, 11]), 10)
        0.5
    """
    return _mean(recalls, ranks, k)


def ndcg_at_k(ranks: np.ndarray, k: int) -> float:
    """Mean NDCG@k over examples; arguments as of `recall_at_k`.

    Example:
        >>> ndcg_at_k(np.array([1, 3, 0, 11]), 10)  # (1 + 1/2) / 4
        0.375
    """
    return _mean(ndcgs, ranks, k)


def mrr_at_k(ranks: np.ndarray, k: int) -> float:
    """Mean reciprocal rank over examples, ranks past k counting 0; arguments as of `recall_at_k`.

    Example:
        >>> mrr_at_k(np.array([1, 4, 0, 11]), 10)  # (1 + 1/4) / 4
        0.3125
    """
    return _mean(reciprocal_ranks, ranks, k)


METRICS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "recall": recalls,
    "ndcg": ndcgs,
    "mrr": reciprocal_ranks,
}


def all_metrics(ranks: np.ndarray, ks: Iterable[int]) -> dict[str, float]:
    """Every metric at every k, under names such as "recall@10"."""
    return {f"{name}@{k}": _mean(metric, ranks, k) for k in ks for name, metric in METRICS.items()}


def per_example(ranks: np.ndarray, metric: str) -> np.ndarray:
    """A metric such as "ndcg@10" of each example, float64 [E].

    Raises:
        SettingsError: There is no such metric.
    """
    name, _, k = metric.partition("@")
    if name not in METRICS or not k.isdecimal():
        raise SettingsError(
            f"the metric is {metric!r}: choose one of {', '.join(METRICS)} with a number, as in 'ndcg@10'"
        )
    return METRICS[name](ranks, int(k))


def _found(ranks: np.ndarray, k: int) -> np.ndarray:
    if k < 1:
        raise SettingsError(f"k is {k}: metrics need k of at least 1")
    ranks = np.asarray(ranks)
    return (ranks >= 1) & (ranks <= k)


def _mean(metric: Callable[[np.ndarray, int], np.ndarray], ranks: np.ndarray, k: int) -> float:
    values = metric(ranks, k)
    if not len(values):
        raise SettingsError("there are no examples, so there is no mean: evaluate on at least one")
    return float(values.mean())
