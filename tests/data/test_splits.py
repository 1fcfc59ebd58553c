import logging
from datetime import datetime

import numpy as np
import pytest

from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import EvaluationSet, leave_one_out, split_by_time
from llmrec.errors import DataError, SettingsError


def named(dataset, rows):
    return [dataset.item_ids[row] for row in rows]


def examples_of(dataset, examples):
    return [
        (examples.user_ids[n], named(dataset, examples.history(n)), dataset.item_ids[examples.targets[n]])
        for n in range(len(examples))
    ]


def histories(dataset):
    return {user: named(dataset, dataset.history(n)) for n, user in enumerate(dataset.user_ids)}


def random_dataset(seed):
    generator = np.random.default_rng(seed)
    rows = 400
    return InteractionDataset.from_columns(
        generator.integers(0, 60, rows), generator.integers(0, 30, rows), generator.integers(0, 100, rows)
    )


def test_leave_one_out_by_hand(caplog):
    dataset = InteractionDataset.from_columns(list("uuuuvvw") + ["x"] * 3, list("abcdababca"))
    with caplog.at_level(logging.INFO, "llmrec"):
        splits = leave_one_out(dataset)
    assert histories(splits.train) == {"u": ["a", "b"], "v": ["a", "b"], "w": ["a"], "x": ["b"]}
    assert examples_of(dataset, splits.validation) == [("u", ["a", "b"], "c"), ("x", ["b"], "c")]
    assert examples_of(dataset, splits.test) == [("u", ["a", "b", "c"], "d"), ("x", ["b", "c"], "a")]
    assert "2 of 4 users have fewer than 3 interactions: all in training" in caplog.text
    assert splits.train.item_ids == dataset.item_ids  # d, which is in test only, stays in the catalogue
    assert splits.train.user_ids == dataset.user_ids
    assert splits.train.drops == {}
    assert splits.examples("test") is splits.test
    assert splits.examples("validation") is splits.validation
    with pytest.raises(SettingsError, match="choose 'validation' or 'test'"):
        splits.examples("train")


def test_leave_one_out_needs_a_user_of_three():
    with pytest.raises(DataError, match=r"no user .* has three interactions"):
        leave_one_out(InteractionDataset.from_columns(["u", "u", "v"], ["a", "b", "a"]))


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_splits_every_history(seed):
    dataset = random_dataset(seed)
    splits = leave_one_out(dataset)
    for user in range(dataset.num_users):
        whole, train = dataset.history(user).tolist(), splits.train.history(user).tolist()
        assert train == (whole[:-2] if len(whole) >= 3 else whole)
    assert splits.train.num_interactions + len(splits.validation) + len(splits.test) == dataset.num_interactions
    assert splits.train.flat_timestamps is not None


def test_by_time_by_hand():
    users = list("uuuuvvvw")
    items = list("abcdabca")
    times = [10, 20, 30, 40, 15, 25, 35, 38]
    dataset = InteractionDataset.from_columns(users, items, times)
    splits = split_by_time(dataset, validation_from=20, test_from=35)
    assert histories(splits.train) == {"u": ["a"], "v": ["a"], "w": []}
    assert examples_of(dataset, splits.validation) == [
        ("u", ["a"], "b"),
        ("u", ["a", "b"], "c"),
        ("v", ["a"], "b"),
    ]
    assert examples_of(dataset, splits.test) == [("u", ["a", "b", "c"], "d"), ("v", ["a", "b"], "c")]
    kept = split_by_time(dataset, validation_from=20, test_from=35, empty_histories="keep")
    assert examples_of(dataset, kept.test)[-1] == ("w", [], "a")
    assert len(kept.validation) == len(splits.validation)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_of_the_future_reaches_training_or_a_history(seed):
    dataset = random_dataset(seed)
    splits = split_by_time(dataset, fractions=(0.7, 0.15, 0.15), empty_histories="keep")
    validation_from = splits.train.flat_timestamps.max()
    later = dataset.flat_timestamps > validation_from
    assert splits.train.num_interactions == (~later).sum()  # all before the cut, nothing after
    assert len(splits.validation) + len(splits.test) == later.sum()
    assert abs(splits.train.num_interactions / dataset.num_interactions - 0.7) < 0.05
    # an example is a whole prefix of its user's history, followed by its target
    place = {user: n for n, user in enumerate(dataset.user_ids)}
    for examples in (splits.validation, splits.test):
        for n in range(len(examples)):
            history, whole = examples.history(n), dataset.history(place[examples.user_ids[n]])
            np.testing.assert_array_equal(history, whole[: len(history)])
            assert whole[len(history)] == examples.targets[n]


def test_equal_timestamps_stay_together():
    dataset = InteractionDataset.from_columns(["u"] * 10, list("abcdefghij"), [1] * 4 + [2] * 3 + [3] * 3)
    splits = split_by_time(dataset, fractions=(0.5, 0.2, 0.3))
    assert splits.train.flat_timestamps.tolist() == [1] * 4
    assert named(dataset, splits.validation.targets) == list("efg")
    assert named(dataset, splits.test.targets) == list("hij")
    assert named(dataset, splits.validation.history(1)) == list("abcde")  # at ties the order of the history decides


def test_moments_as_text_and_datetime():
    dataset = InteractionDataset.from_columns(["u"] * 3, list("abc"), ["2020-01-01", "2020-02-01", "2020-03-01"])
    for first, second in [("2020-01-15", "2020-02-15"), (datetime(2020, 1, 15), datetime(2020, 2, 15))]:
        splits = split_by_time(dataset, validation_from=first, test_from=second)
        assert (named(dataset, splits.validation.targets), named(dataset, splits.test.targets)) == (["b"], ["c"])


def test_splits_by_time_that_can_not_work():
    dataset = InteractionDataset.from_columns(["u"] * 4, list("abcd"), [1, 2, 3, 4])
    with pytest.raises(DataError, match="no timestamps"):
        split_by_time(InteractionDataset.from_columns(["u"], ["a"]), validation_from=1, test_from=2)
    with pytest.raises(SettingsError, match="needs validation_from and test_from, or fractions"):
        split_by_time(dataset, validation_from=1)
    with pytest.raises(SettingsError, match="not both"):
        split_by_time(dataset, validation_from=1, test_from=2, fractions=(0.5, 0.25, 0.25))
    with pytest.raises(SettingsError, match=r"validation_from \(3\) must be before test_from \(2\)"):
        split_by_time(dataset, validation_from=3, test_from=2)
    with pytest.raises(SettingsError, match="add up to 1"):
        split_by_time(dataset, fractions=(0.8, 0.1, 0.2))
    with pytest.raises(DataError, match="the test part is empty"):
        split_by_time(dataset, validation_from=2, test_from=9)
    with pytest.raises(DataError, match="the training part is empty"):
        split_by_time(dataset, validation_from=0, test_from=3)
    with pytest.raises(DataError, match="can't be cut"):
        split_by_time(InteractionDataset.from_columns(["u"] * 3, list("abc"), [1] * 3), fractions=(0.4, 0.3, 0.3))
    with pytest.raises(SettingsError, match="empty_histories is 'skip'"):
        split_by_time(dataset, validation_from=2, test_from=3, empty_histories="skip")


def test_take_and_sample():
    dataset = random_dataset(0)
    test = leave_one_out(dataset).test
    taken = test.take([4, 0, 4])
    assert examples_of(dataset, taken) == [examples_of(dataset, test)[n] for n in (4, 0, 4)]
    sample = test.sample(10, seed=1)
    assert len(sample) == 10
    every = examples_of(dataset, test)
    places = [every.index(one) for one in examples_of(dataset, sample)]
    assert places == sorted(places)
    assert sample.fingerprint == test.sample(10, seed=1).fingerprint != test.sample(10, seed=2).fingerprint
    assert test.sample(10_000) is test
    assert len(test.take([])) == 0


def test_parts_that_are_not_parallel_are_refused():
    with pytest.raises(DataError, match="1 users, 2 targets and 2 histories"):
        EvaluationSet("test", ("u",), np.zeros(0, np.int32), np.zeros(3, np.int64), np.zeros(2, np.int32))


def test_beauty(beauty_dir):
    dataset = InteractionDataset.from_letter(beauty_dir)
    assert (dataset.num_users, dataset.num_items, dataset.num_interactions) == (22_363, 12_101, 198_502)
    assert dataset.k_core(5).fingerprint == dataset.fingerprint  # it is a 5-core already
    splits = leave_one_out(dataset)
    assert len(splits.test) == len(splits.validation) == 22_363
    assert splits.train.num_interactions == 198_502 - 2 * 22_363
    assert splits.test.history(1).tolist() == [5, 6, 7, 8, 9, 3]
    assert splits.test.targets[1] == 10
