import numpy as np
import pytest

from llmrec.data.splits import leave_one_out
from llmrec.data.synthetic import synthetic_dataset, synthetic_with_process
from llmrec.errors import SettingsError
from llmrec.evaluation.metrics import recall_at_k


def ranks_of(scores, histories, targets):
    """Rank of each target, seen items left out."""
    ranks = []
    for score, history, target in zip(scores, histories, targets, strict=True):
        score = score.copy()
        score[history] = -1.0
        ranks.append(1 + int((score > score[target]).sum()))
    return np.array(ranks)


@pytest.fixture(scope="module")
def made():
    dataset, process = synthetic_with_process()
    return dataset, process, leave_one_out(dataset)


def test_shape(made):
    dataset, _, _ = made
    assert (dataset.name, dataset.num_users, dataset.num_items) == ("synthetic", 2000, 400)
    lengths = np.diff(dataset.offsets)
    assert (lengths.min(), lengths.max()) == (8, 15)
    assert dataset.summary().repeats == 0
    assert len(set(dataset.titles)) == dataset.num_items
    assert set(dataset.items.column_names) == {"item_id", "title", "brand", "category"}
    assert dataset.drops == {}
    for user in range(0, 2000, 97):
        times = dataset.flat_timestamps[dataset.offsets[user] : dataset.offsets[user + 1]]
        assert (np.diff(times) > 0).all()


def test_titles_tell_the_series(made):
    dataset, process, _ = made
    for item in np.flatnonzero(process.next_in_series >= 0):
        *series, number = dataset.titles[item].split()
        *next_series, next_number = dataset.titles[process.next_in_series[item]].split()
        assert series == next_series
        assert int(next_number) == int(number) + 1
    rows = np.arange(dataset.num_items)[process.next_in_series >= 0]
    assert np.mean(process.next_in_series[rows] == rows + 1) < 0.1  # rows don't give the series away
    brands, categories = dataset.items["brand"][:], dataset.items["category"][:]
    for item, related in enumerate(process.related):
        assert item not in related
        shared = [(categories[item] == categories[other], brands[item] == brands[other]) for other in related]
        assert any(category for category, _ in shared)
        assert any(brand for _, brand in shared)


def test_order_and_taste_can_be_learnt_and_popularity_knows_neither(made):
    dataset, process, splits = made
    test, train = splits.test, splits.train
    histories = [test.history(n) for n in range(len(test))]
    last = np.array([history[-1] for history in histories])
    popularity = np.bincount(train.flat_items, minlength=dataset.num_items).astype(float)
    transitions = np.zeros((dataset.num_items, dataset.num_items))
    for user in range(train.num_users):
        history = train.history(user)
        np.add.at(transitions, (history[:-1], history[1:]), 1.0)
    none_seen = np.zeros((len(test), dataset.num_items), bool)
    scores = {
        "popularity": np.tile(popularity, (len(test), 1)),
        "markov": transitions[last] + 1e-6 * popularity,
        "oracle": process.probabilities(np.arange(len(test)), last, none_seen),
    }
    recall = {name: recall_at_k(ranks_of(score, histories, test.targets), 10) for name, score in scores.items()}
    assert 0.03 < recall["popularity"] < 0.1
    assert recall["markov"] > 2 * recall["popularity"]
    assert recall["oracle"] > 0.6
    assert recall["oracle"] > recall["markov"] + 0.05  # taste is worth knowing too


def test_shares_set_the_structure():
    dataset, process = synthetic_with_process(500, 200, next_share=0.6, related_share=0.0)
    follows = steps = 0
    for user in range(dataset.num_users):
        history = dataset.history(user)
        continues = process.next_in_series[history[:-1]] >= 0
        follows += (process.next_in_series[history[:-1]] == history[1:])[continues].sum()
        steps += continues.sum()
    assert 0.55 < follows / steps < 0.75  # taste adds some, seen followers take some away


def test_probabilities_by_hand():
    _, process = synthetic_with_process(3, 40, max_length=10, min_length=10)
    seen = np.zeros((2, 40), bool)
    seen[1, 0] = True
    first, second = process.probabilities(np.array([0, 1]), np.array([-1, 0]), seen)
    np.testing.assert_allclose(first, process.taste[0])
    assert second[0] == 0.0
    expected = 0.25 * process.taste[1]
    for item, weight in zip(process.related[0], [0.4, 0.3, 0.2, 0.1], strict=True):
        expected[item] += 0.25 * weight
    if process.next_in_series[0] >= 0:
        expected[process.next_in_series[0]] += 0.5
    expected[0] = 0.0
    np.testing.assert_allclose(second, expected / expected.sum())


def test_the_seed_decides():
    same = [synthetic_dataset(50, 60, seed).fingerprint for seed in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


def test_large_catalogues_have_distinct_titles():
    dataset = synthetic_dataset(5, 5003)  # more than the 960 kinds of series
    assert len(set(dataset.titles)) == 5003
    assert any(title.endswith("edition 2") for title in dataset.titles)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_users": 0}, "at least one user"),
        ({"min_length": 9, "max_length": 8}, "1 <= min_length <= max_length"),
        ({"num_items": 20}, "twice as many"),
        ({"next_share": 0.8, "related_share": 0.3}, "add up to less than 1"),
        ({"next_share": -0.1}, "must not be negative"),
    ],
)
def test_settings_that_can_not_work(options, message):
    with pytest.raises(SettingsError, match=message):
        synthetic_dataset(**options)
