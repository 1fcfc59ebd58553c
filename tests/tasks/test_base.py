import numpy as np

from llmrec.tasks.base import draws, join


def test_draws_are_a_function_of_their_arguments():
    first = draws(1, 0, 1000, 5, stream="a")
    assert np.array_equal(first, draws(1, 0, 1000, 5, stream="a"))
    for other in (
        draws(2, 0, 1000, 5, stream="a"),
        draws(1, 1, 1000, 5, stream="a"),
        draws(1, 0, 1000, 5, stream="b"),
    ):
        assert 100 < (first == other).sum() < 300  # one in five by chance
    assert np.bincount(first, minlength=5).min() > 150
    assert (draws(1, 0, 10, 1, stream="a") == 0).all()


def test_draws_leave_the_global_generator_alone():
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    draws(1, 0, 10, 5, stream="a")
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_join():
    assert join([1, 2], [3, 4]) == {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    assert join([1, 2], [3, 4], encoder_decoder=True) == {"input_ids": [1, 2], "labels": [3, 4]}
