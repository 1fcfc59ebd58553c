import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment, linprog

from llmrec.errors import DataError, SettingsError
from llmrec.item_tokenizers.balanced_assignment import assign_balanced, assign_greedy_in_order, balanced_prices


def draws(seed=0):
    return np.random.default_rng(seed)


def total(costs, labels):
    return costs[np.arange(len(costs)), labels].sum(dtype=np.float64)


def clustered_costs(count, clusters, seed):
    """Distances of which most rows prefer the same few clusters."""
    vectors = draws(seed).exponential(size=(count, 1)) * draws(seed + 1).normal(size=(count, 3))
    centres = draws(seed + 2).normal(size=(clusters, 3))
    return ((vectors[:, None] - centres) ** 2).sum(2).astype(np.float32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("clusters", "size"), [(8, 25), (40, 5), (2, 60), (30, 1)])
def test_equal_sizes_cost_what_the_optimal_assignment_costs(seed, clusters, size):
    costs = clustered_costs(clusters * size, clusters, seed)
    rows, columns = linear_sum_assignment(np.repeat(costs.astype(np.float64), size, axis=1))
    labels = assign_balanced(costs, size, size)
    assert set(np.bincount(labels, minlength=clusters)) == {size}
    assert total(costs, labels) == pytest.approx(total(costs[rows], columns // size), rel=1e-9)


def optimum_between(costs, least, most):
    """The linear program; its optimum is whole numbers, since the matrix is that of a flow."""
    count, clusters = costs.shape
    of_row = np.kron(np.eye(count), np.ones(clusters))
    of_cluster = np.kron(np.ones(count), np.eye(clusters))
    limits = np.concatenate([np.full(clusters, most), np.full(clusters, -least)])
    result = linprog(
        costs.astype(np.float64).ravel(), A_ub=np.vstack([of_cluster, -of_cluster]), b_ub=limits, A_eq=of_row,
        b_eq=np.ones(count),
    )  # fmt: skip
    return result.fun


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("least", "most"), [(5, 6), (2, 30), (0, 7), (4, 60), (0, 60), (5, 9)])
def test_sizes_between_limits_cost_what_the_linear_program_costs(seed, least, most):
    costs = clustered_costs(57, 10, seed)
    labels = assign_balanced(costs, least, most)
    sizes = np.bincount(labels, minlength=10)
    assert least <= sizes.min()
    assert sizes.max() <= most
    assert total(costs, labels) == pytest.approx(optimum_between(costs, least, most), rel=1e-7)
    blind = assign_balanced(costs, least, most, prices=draws(seed).normal(size=10))  # any prices: the paths alone
    assert total(costs, blind) == pytest.approx(total(costs, labels), rel=1e-9)


def test_a_small_case_by_hand():
    """All rows want column 0; who stays is who would lose most, not who is nearest."""
    costs = np.array([[0.0, 10.0], [1.0, 2.0], [2.0, 9.0], [0.5, 1.0]])
    np.testing.assert_array_equal(assign_balanced(costs, 2, 2), [0, 1, 0, 1])
    np.testing.assert_array_equal(assign_balanced(costs, 0, 3), [0, 0, 0, 1])
    np.testing.assert_array_equal(assign_balanced(costs, 0, 4), [0, 0, 0, 0])
    np.testing.assert_array_equal(assign_balanced(costs, 1, 4), [0, 0, 0, 1])


def test_ties_negative_costs_and_empty_clusters():
    labels = assign_balanced(np.zeros((10, 4)), 2, 3)
    assert sorted(np.bincount(labels, minlength=4)) == [2, 2, 3, 3]
    costs = -clustered_costs(60, 6, 9)
    columns = linear_sum_assignment(np.repeat(costs.astype(np.float64), 10, axis=1))[1]
    assert total(costs, assign_balanced(costs, 10, 10)) == pytest.approx(total(costs, columns // 10))
    few = assign_balanced(clustered_costs(3, 8, 0), 0, 1)
    assert len(set(few.tolist())) == 3
    assert assign_balanced(np.zeros((0, 4)), 0, 0).shape == (0,)
    np.testing.assert_array_equal(assign_balanced(np.ones((3, 1)), 3, 3), [0, 0, 0])


@pytest.mark.parametrize("seed", range(20))
def test_many_equal_costs(seed):
    """One row is then the cheapest to move to several clusters at once, and must be moved once."""
    costs = draws(seed).integers(0, 4, size=(120, 12)).astype(np.float32) * (1 + np.arange(12) % 3)
    costs[:, 0] -= 5  # all want the same cluster
    columns = linear_sum_assignment(np.repeat(costs.astype(np.float64), 10, axis=1))[1]
    labels = assign_balanced(costs, 10, 10, prices=np.zeros(12))
    assert set(np.bincount(labels, minlength=12)) == {10}
    assert total(costs, labels) == pytest.approx(total(costs, columns // 10))


def test_it_repeats_itself_and_does_not_change_its_arguments():
    costs = clustered_costs(500, 16, 3)
    before, prices = costs.copy(), balanced_prices(costs, 31, 32)
    kept = prices.copy()
    labels = assign_balanced(costs, 31, 32, prices=prices)
    np.testing.assert_array_equal(labels, assign_balanced(costs, 31, 32, prices=prices))
    np.testing.assert_array_equal(costs, before)
    np.testing.assert_array_equal(prices, kept)


def test_prices_bring_sizes_near_their_limits():
    costs = clustered_costs(4000, 32, 5)

    def outside(prices):
        sizes = np.bincount((costs + prices).argmin(1), minlength=32)
        return int(np.maximum(sizes - 125, 0).sum())

    assert outside(balanced_prices(costs, 125, 125)) < 0.1 * outside(np.zeros(32))


def test_what_does_not_fit_is_refused():
    with pytest.raises(SettingsError, match="5 vectors don't fit into 2 clusters of 0 to 2"):
        assign_balanced(np.zeros((5, 2)), 0, 2)
    with pytest.raises(SettingsError, match="don't fit"):
        assign_balanced(np.zeros((5, 2)), 3, 4)
    with pytest.raises(DataError, match="NaN or infinite"):
        assign_balanced(np.array([[0.0, np.nan]]), 0, 1)


def test_greedy_in_order_is_onerecs_loop():
    costs = clustered_costs(53, 6, 2)
    left, expected = list(range(53)), np.empty(53, dtype=np.int64)
    for cluster in range(6):
        size = 9 if cluster < 5 else 8
        nearest = sorted(left, key=lambda row: (costs[row, cluster], row))[:size]
        expected[nearest] = cluster
        left = [row for row in left if row not in nearest]
    np.testing.assert_array_equal(assign_greedy_in_order(costs), expected)
    np.testing.assert_array_equal(assign_greedy_in_order(np.zeros((5, 2))), [0, 0, 0, 1, 1])  # ties: the lowest row
    assert sorted(assign_greedy_in_order(clustered_costs(3, 8, 0))) == [0, 1, 2]
    assert total(costs, expected) > total(costs, assign_balanced(costs, 8, 9))  # the price of the order
