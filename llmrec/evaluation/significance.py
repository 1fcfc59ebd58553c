"""Whether one recommender is better than another on the same examples, or the difference is chance.

The differences of single examples are compared (paired): a t-test gives the probability of a difference at least as
large by chance, and a bootstrap over examples its interval. Both say nothing of the chance in training: for that,
compare several seeds.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from llmrec.errors import SettingsError
from llmrec.evaluation.evaluator import EvaluationResult
from llmrec.evaluation.metrics import per_example


@dataclass(frozen=True)
class PairedComparison:
    """First minus second.

    Attributes:
        metric: What was compared, such as "ndcg@10".
        difference: Mean of the first minus mean of the second.
        low: Lower end of the 95 % bootstrap interval of the difference.
        high: Upper end.
        p_value: Of the paired two-sided t-test; 1 where no example differs.
    """

    metric: str
    difference: float
    low: float
    high: float
    p_value: float

    def __str__(self) -> str:
        return (
            f"{self.metric} {self.difference:+.4f} (95 %: {self.low:+.4f} to {self.high:+.4f}; p = {self.p_value:.2g})"
        )


def compare_paired(
    first: EvaluationResult,
    second: EvaluationResult,
    metric: str = "ndcg@10",
    *,
    num_samples: int = 10_000,
    seed: int = 0,
) -> PairedComparison:
    """Compares two results on the same examples.

    Args:
        first: Result with ranks.
        second: Result on the same examples.
        metric: Such as "recall@10", at a k that both were evaluated at or below.
        num_samples: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        SettingsError: Different or fewer than two examples, results without ranks, or an unknown metric.
    """
    if first.examples != second.examples or len(first.ranks) != len(second.ranks):
        raise SettingsError(
            f"{first.name!r} and {second.name!r} were evaluated on different examples: evaluate both on the same"
        )
    if len(first.ranks) < 2 or len(first.ranks) != first.num_examples:
        raise SettingsError(
            f"{first.name!r} has {len(first.ranks)} ranks: a paired comparison needs those of 2 or more"
        )
    differences = per_example(first.ranks, metric) - per_example(second.ranks, metric)
    # The values are few (a pair of ranks up to k each), so a bootstrap sample is one multinomial draw of their counts.
    values, counts = np.unique(differences, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(differences), counts / len(differences), size=num_samples)
    low, high = np.quantile(draws @ values / len(differences), [0.025, 0.975])
    constant = len(values) == 1
    p_value = float(values[0] == 0) if constant else float(stats.ttest_1samp(differences, 0.0).pvalue)
    return PairedComparison(metric, float(differences.mean()), float(low), float(high), p_value)
