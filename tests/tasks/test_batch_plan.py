import pickle

import numpy as np
import pytest

from llmrec.errors import SettingsError
from llmrec.tasks.base import TaskSamples, draws
from llmrec.tasks.batch_plan import BatchPlan, PlannedOrder, PlannedRows, epochs_of, pack_best_fit, pack_in_order


class Samples(TaskSamples):
    """Sample i is `length` times token i; with `drawn`, lengths differ from epoch to epoch."""

    name = "counted"
    num_targets = 0

    def __init__(self, lengths, drawn=False):
        self.given = np.asarray(lengths, dtype=np.int64)
        self.drawn = drawn

    def __len__(self):
        return len(self.given)

    def lengths(self, epoch=0):
        return self.given + draws(0, epoch, len(self), 4, stream="length") if self.drawn else self.given

    def sample(self, index, epoch=0):
        return {"input_ids": [index] * int(self.lengths(epoch)[index]), "labels": [-100]}


LENGTHS = np.random.default_rng(0).integers(2, 40, 501)


def plan(lengths=LENGTHS, drawn=False, **settings):
    return BatchPlan(Samples(lengths, drawn), **{"rows_per_step": 6, "seed": 1, "packing": True, **settings})


@pytest.mark.parametrize("order", ["group_by_length", "random", "sequential"])
@pytest.mark.parametrize("packing", [True, False])
def test_every_sample_once_an_epoch(packing, order):
    planned = plan(packing=packing, order=order, row_length=64, num_epochs=2)
    for epoch in (0, 1):
        rows = planned.rows(epoch)
        assert len(rows) == planned.num_steps * 6
        assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(501))
        if packing:
            assert max(LENGTHS[row].sum() for row in rows) <= 64
        else:
            assert max(map(len, rows)) == 1


@pytest.mark.parametrize("packing", [True, False])
def test_steps_share_the_rows_out_evenly(packing):
    planned = plan(packing=packing, row_length=64)
    filled = [sum(len(row) > 0 for row in planned.rows(0)[step * 6 :][:6]) for step in range(planned.num_steps)]
    assert max(filled) - min(filled) <= 1
    assert max(filled) == 6
    assert all(len(row) > 0 for row in planned.rows(0)[::6])  # rows that are missing are a step's last


@pytest.mark.parametrize("packing", [True, False])
def test_a_function_of_seed_and_epoch(packing):
    def flat(planned, epoch):
        return np.concatenate(planned.rows(epoch)).tolist()

    one, other = (plan(packing=packing, num_epochs=3) for _ in range(2))
    assert flat(one, 2) == flat(other, 2)  # asked for first
    assert flat(one, 0) == flat(other, 0) != flat(one, 1)
    assert flat(plan(packing=packing, seed=2), 0) != flat(one, 0)


def test_the_rows_of_a_step_do_not_depend_on_how_it_is_split():
    """`rows_per_step` is the batch of all processes and accumulated parts: equal products, equal plans."""
    assert [row.tolist() for row in plan(rows_per_step=8).rows(0)] == [
        row.tolist() for row in plan(rows_per_step=2 * 4).rows(0)
    ]


def test_all_epochs_have_as_many_steps_where_lengths_are_drawn():
    planned = plan(drawn=True, row_length=64, rows_per_step=1, num_epochs=6)
    counts = [sum(len(row) > 0 for row in planned.rows(epoch)) for epoch in range(6)]
    assert len(set(counts)) > 1  # else this shows nothing
    assert planned.num_steps == max(counts)
    assert {len(planned.rows(epoch)) for epoch in range(6)} == {max(counts)}


def test_grouped_samples_of_a_step_have_like_lengths():
    def spread(order):
        rows = plan(packing=False, order=order).rows(0)
        steps = [np.concatenate(rows[step * 6 :][:6]) for step in range(len(rows) // 6)]
        return np.mean([np.ptp(LENGTHS[step]) for step in steps])

    assert spread("group_by_length") < spread("random") / 5
    rows = plan(packing=False).rows(0)
    assert LENGTHS[rows[0][0]] == LENGTHS.max()  # what doesn't fit into memory shows at once


def test_best_fit_by_hand():
    # 6 opens a row (4 left), 5 another (5 left); 4 goes into the first, 3 into the second (2 left), 2 fills it.
    assert [row.tolist() for row in pack_best_fit(np.array([2, 3, 4, 5, 6]), 10)] == [[4, 2], [3, 1, 0]]
    assert [row.tolist() for row in pack_best_fit(np.array([10, 10]), 10)] == [[0], [1]]


def test_in_order_by_hand():
    assert [row.tolist() for row in pack_in_order(np.array([4, 5, 3, 7, 10, 1]), 10)] == [[0, 1], [2, 3], [4], [5]]


def test_share_of_real_tokens_by_hand():
    padded = plan([4, 2, 3], packing=False, order="sequential", rows_per_step=2)
    # steps of 1 and 2 samples: (4, empty) and (2, 3); forwards of 2 rows read 8 and 6 tokens
    assert [row.tolist() for row in padded.rows(0)] == [[0], [], [1], [2]]
    assert padded.real_token_share(batch_size=2) == pytest.approx(9 / 14)
    assert padded.real_token_share(batch_size=1) == pytest.approx(9 / 10)  # the empty row is one token
    packed = plan([4, 2, 3], packing=True, row_length=6, order="sequential", rows_per_step=2)
    assert packed.real_token_share(batch_size=2) == pytest.approx(9 / 12)


def test_packing_fills_rows():
    assert plan(row_length=256, rows_per_step=1).real_token_share() > 0.97


def test_the_row_is_at_least_as_long_as_the_longest_sample():
    assert plan().row_length == 512
    assert plan([700, 3]).row_length == 700
    with pytest.raises(SettingsError, match="39 tokens, row_length is 30"):
        plan(row_length=30)
    assert plan(row_length=30, packing=False).num_steps == 84


def test_nothing_to_train_on_and_unknown_orders_are_refused():
    with pytest.raises(SettingsError, match="'counted' has no samples"):
        plan([])
    with pytest.raises(SettingsError, match="by_colour"):
        plan(order="by_colour")


def test_rows_are_read_by_epoch_and_number():
    rows = PlannedRows(plan(drawn=True, row_length=64, num_epochs=2))
    of_epoch = pickle.loads(pickle.dumps(rows)).plan.rows(1)  # as a worker process gets it
    for number in (3, 0):
        assert [sample["input_ids"][0] for sample in rows[1, number]] == of_epoch[number].tolist()
        lengths = rows.plan.samples.lengths(1)[of_epoch[number]]
        assert [len(sample["input_ids"]) for sample in rows[1, number]] == lengths.tolist()
    epoch = iter([4, 5])
    order = PlannedOrder(rows, epoch=lambda: next(epoch))
    assert list(order)[:2] == [(4, 0), (4, 1)]
    assert list(order)[-1] == (5, len(rows) - 1)


def test_epochs_to_plan():
    def of_ten_steps():
        return plan(np.ones(60), packing=False)

    assert epochs_of(2.5, -1, of_ten_steps) == 3
    assert epochs_of(3.0, 25, of_ten_steps) == 3
    assert epochs_of(3.0, 10, of_ten_steps) == 1
