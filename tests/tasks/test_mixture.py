from collections import Counter

import numpy as np
import pytest

from llmrec.errors import SettingsError
from llmrec.tasks.base import TaskSamples, join
from llmrec.tasks.mixture import TaskMixture


class Numbered(TaskSamples):
    """Sample `i` of epoch `e` is the prompt [mark, i] and the target [e + 1], with `i` more tokens before."""

    has_text_targets = False

    def __init__(self, mark, size, *, draws=True):
        self.name, self.mark, self.size = f"task {mark}", mark, size
        self.fixed = None if draws else self._lengths()

    num_targets = property(lambda self: 2 * self.size)

    def _lengths(self):
        return np.arange(self.size) + 3

    def __len__(self):
        return self.size

    def lengths(self, epoch=0):
        return self._lengths() if self.fixed is None else self.fixed

    def sample(self, index, epoch=0):
        return join([self.mark, index, *[0] * index], [epoch + 1])


class Texts(Numbered):
    has_text_targets = True


def contents(mixture, epoch):
    """(mark, index, epoch of the task) of each sample."""
    samples = [mixture.sample(index, epoch)["input_ids"] for index in range(len(mixture))]
    assert [len(ids) for ids in samples] == mixture.lengths(epoch).tolist()
    return [(ids[0], ids[1], ids[-1] - 1) for ids in samples]


def test_weight_1_is_every_sample_once_in_the_tasks_own_epoch():
    mixture = TaskMixture([Numbered(7, 3), Numbered(8, 2)], [1, 1], seed=0)
    assert contents(mixture, 4) == [(7, 0, 4), (7, 1, 4), (7, 2, 4), (8, 0, 4), (8, 1, 4)]
    assert mixture.num_targets == 10
    assert mixture.name == "task 7:1, task 8:1"


def test_below_1_a_random_part_is_drawn_anew_each_epoch():
    mixture = TaskMixture([Numbered(7, 200)], [0.3], seed=0)
    assert len(mixture) == 60
    assert mixture.num_targets == 120
    parts = [contents(mixture, epoch) for epoch in range(40)]
    for epoch, part in enumerate(parts):
        assert len({index for _, index, _ in part}) == 60  # none twice
        assert {own for *_, own in part} == {epoch}
    counts = Counter(index for part in parts for _, index, _ in part)
    assert len(counts) == 200  # expected 12 times each
    assert max(counts.values()) < 25
    assert parts[1] == contents(TaskMixture([Numbered(7, 200)], [0.3], seed=0), 1)
    assert parts[1] != contents(TaskMixture([Numbered(7, 200)], [0.3], seed=1), 1)


def test_above_1_samples_repeat_with_other_draws():
    mixture = TaskMixture([Numbered(7, 10)], [2.5], seed=0)
    assert len(mixture) == 25
    read = set()
    for epoch in range(6):
        found = contents(mixture, epoch)
        counts = Counter(index for _, index, _ in found)
        assert sorted(counts.values()) == [2] * 5 + [3] * 5
        own = {epoch_of_task for *_, epoch_of_task in found}
        assert len(own) == 3
        assert not own & read  # no two passes of the training draw alike
        read |= own


def test_tasks_of_different_weights():
    mixture = TaskMixture([Numbered(7, 4), Numbered(8, 10), Texts(9, 3)], [2, 0.5, 1], seed=3)
    assert [len(contents(mixture, epoch)) for epoch in range(3)] == [16, 16, 16]
    assert Counter(mark for mark, *_ in contents(mixture, 1)) == {7: 8, 8: 5, 9: 3}
    assert mixture.has_text_targets
    assert not TaskMixture([Numbered(7, 4)], [1], seed=3).has_text_targets
    assert mixture.num_targets == 16 + 10 + 6
    with pytest.raises(IndexError, match="sample 16 of 16"):
        mixture.sample(16)


def test_a_mixture_of_a_mixture():
    inner = TaskMixture([Numbered(7, 4), Numbered(8, 2)], [1, 1], seed=3, name="both")
    mixture = TaskMixture([inner, Numbered(9, 2)], [0.5, 1], seed=3)
    assert mixture.name == "both:0.5, task 9:1"
    assert Counter(mark == 9 for mark, *_ in contents(mixture, 0)) == {False: 3, True: 2}


def test_a_small_task_is_never_left_out():
    assert len(TaskMixture([Numbered(7, 2)], [0.01], seed=0)) == 1


def test_lengths_are_the_same_object_where_nothing_is_drawn():
    """Plans of batches are then made once for all epochs."""
    fixed = [Numbered(7, 3, draws=False), Numbered(8, 2, draws=False)]
    mixture = TaskMixture(fixed, [1, 2], seed=0)
    assert mixture.lengths(0) is mixture.lengths(5)
    assert TaskMixture(fixed, [1, 0.5], seed=0).lengths(0).tolist()[:3] == [3, 4, 5]
    drawn = TaskMixture([*fixed, Numbered(9, 2)], [1, 1, 1], seed=0)
    assert drawn.lengths(0) is not drawn.lengths(1)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_that_make_no_sense(weight):
    with pytest.raises(SettingsError, match="weight of the task 'task 7' is"):
        TaskMixture([Numbered(7, 3)], [weight], seed=0)


def test_as_many_weights_as_tasks():
    with pytest.raises(SettingsError, match="got 1 and 2"):
        TaskMixture([Numbered(7, 3)], [1, 1], seed=0)
    with pytest.raises(SettingsError, match="got 0 and 0"):
        TaskMixture([], [], seed=0)
