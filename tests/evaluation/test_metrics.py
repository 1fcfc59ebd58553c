import numpy as np
import pytest

from llmrec.errors import SettingsError
from llmrec.evaluation.metrics import all_metrics, mrr_at_k, ndcg_at_k, per_example, recall_at_k

RANKS = np.array([1, 2, 5, 6, 11, 0])  # 0: not found


def test_by_hand():
    assert recall_at_k(RANKS, 5) == 3 / 6
    assert recall_at_k(RANKS, 10) == 4 / 6
    assert mrr_at_k(RANKS, 5) == pytest.approx((1 + 1 / 2 + 1 / 5) / 6)
    assert mrr_at_k(RANKS, 10) == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 6) / 6)
    # 1/log2(2) = 1, 1/log2(3) = 0.6309, 1/log2(6) = 0.3869, 1/log2(7) = 0.3562
    assert ndcg_at_k(RANKS, 5) == pytest.approx((1 + 0.6309298 + 0.3868528) / 6)
    assert ndcg_at_k(RANKS, 10) == pytest.approx((1 + 0.6309298 + 0.3868528 + 0.3562072) / 6)
    assert recall_at_k(RANKS, 1) == ndcg_at_k(RANKS, 1) == mrr_at_k(RANKS, 1) == 1 / 6


def test_agrees_with_scikit_learn():
    from sklearn.metrics import ndcg_score

    generator = np.random.default_rng(0)
    scores = generator.random((30, 40))
    targets = generator.integers(0, 40, 30)
    relevance = np.eye(40)[targets]
    ranks = 1 + (scores > scores[np.arange(30), targets][:, None]).sum(1)
    for k in (1, 5, 10, 40):
        assert ndcg_at_k(ranks, k) == pytest.approx(ndcg_score(relevance, scores, k=k))


def test_all_and_per_example():
    metrics = all_metrics(RANKS, (5, 10))
    assert list(metrics) == ["recall@5", "ndcg@5", "mrr@5", "recall@10", "ndcg@10", "mrr@10"]
    assert metrics["ndcg@10"] == ndcg_at_k(RANKS, 10)
    assert per_example(RANKS, "recall@5").tolist() == [1, 1, 1, 0, 0, 0]
    assert per_example(RANKS, "mrr@10").tolist() == pytest.approx([1, 1 / 2, 1 / 5, 1 / 6, 0, 0])


def test_what_has_no_value():
    with pytest.raises(SettingsError, match="no examples"):
        recall_at_k(np.array([], int), 5)
    with pytest.raises(SettingsError, match="k is 0"):
        ndcg_at_k(RANKS, 0)
    for metric in ("precision@5", "ndcg", "ndcg@x"):
        with pytest.raises(SettingsError, match=f"the metric is '{metric}'"):
            per_example(RANKS, metric)
