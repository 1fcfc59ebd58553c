import dataclasses

import numpy as np
import pytest
from scipy import stats

from llmrec.errors import SettingsError
from llmrec.evaluation.evaluator import EvaluationResult
from llmrec.evaluation.metrics import all_metrics, per_example
from llmrec.evaluation.significance import compare_paired


def result(name, ranks, examples="abc"):
    ranks = np.asarray(ranks)
    return EvaluationResult(name, all_metrics(ranks, (10,)), len(ranks), False, ranks, 0.0, "d", "test", examples)


def test_agrees_with_scipy():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 12, 400), generator.integers(0, 20, 400)
    compared = compare_paired(result("a", first), result("b", second), "ndcg@10")
    left, right = per_example(first, "ndcg@10"), per_example(second, "ndcg@10")
    assert compared.difference == pytest.approx(left.mean() - right.mean())
    assert compared.p_value == pytest.approx(stats.ttest_rel(left, right).pvalue)
    reference = stats.bootstrap((left - right,), np.mean, n_resamples=5000, method="percentile", batch=100)
    assert compared.low == pytest.approx(reference.confidence_interval.low, abs=0.004)
    assert compared.high == pytest.approx(reference.confidence_interval.high, abs=0.004)
    assert "ndcg@10 +" in str(compared)


def test_direction_and_equality():
    good, bad = result("good", [1] * 50 + [2]), result("bad", [9] * 40 + [1] * 11)
    compared = compare_paired(good, bad, "mrr@10")
    assert 0 < compared.low < compared.difference < compared.high
    assert compared.p_value < 1e-6
    assert compare_paired(bad, good, "mrr@10").difference == -compared.difference
    same = compare_paired(good, good)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    always = compare_paired(result("a", [1] * 5), result("b", [0] * 5), "recall@10")
    assert (always.difference, always.p_value) == (1, 0)


def test_the_seed_decides():
    first, second = result("a", [1, 2, 0, 4] * 20), result("b", [0, 1, 3, 4] * 20)
    assert compare_paired(first, second, seed=1) == compare_paired(first, second, seed=1)


def test_what_can_not_be_compared():
    first = result("a", [1, 2, 3])
    with pytest.raises(SettingsError, match="different examples"):
        compare_paired(first, result("b", [1, 2, 3], examples="xyz"))
    without = dataclasses.replace(first, ranks=np.zeros(0, int))
    with pytest.raises(SettingsError, match="has 0 ranks"):
        compare_paired(without, without)
    with pytest.raises(SettingsError, match="the metric is"):
        compare_paired(first, first, "ndcg")
