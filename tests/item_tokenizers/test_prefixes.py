import numpy as np
import pytest

from llmrec.item_tokenizers.prefixes import (
    PrefixUsage,
    chance_of_sharing,
    count_distinct,
    pairs_together,
    prefix_numbers,
    prefix_usage,
)

CODES = np.array([[1, 0, 2], [0, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0]], dtype=np.int32)


def test_prefixes_are_numbered_in_the_order_of_their_codes():
    found = [numbers.tolist() for numbers in prefix_numbers(CODES, (2, 2, 3))]
    assert found == [[1, 0, 1, 1, 0], [1, 0, 1, 2, 0], [2, 0, 1, 3, 0]]


def test_usage_by_hand():
    assert prefix_usage(CODES, (2, 2, 3)) == (
        PrefixUsage(1, 2, 2.5, 3),
        PrefixUsage(2, 3, 5 / 3, 2),
        PrefixUsage(3, 4, 1.25, 2),
    )
    assert prefix_usage(np.zeros((0, 1), dtype=int), (4,)) == (PrefixUsage(1, 0, 0.0, 0),)


def test_sizes_beyond_64_bits():
    size = 2**40
    codes = np.array([[0, 5, 7], [size - 1, 5, 7], [size - 1, 5, 6], [0, 5, 7], [1, 5 + 2**24, 7]], dtype=np.int64)
    assert count_distinct(codes, (size,) * 3) == 4
    assert [len(np.unique(numbers)) for numbers in prefix_numbers(codes, (size,) * 3)] == [3, 3, 4]


def test_distinct_tuples_equal_those_of_a_set():
    codes = np.random.default_rng(0).integers(0, 5, (300, 4))
    assert count_distinct(codes, (5,) * 4) == len({tuple(row) for row in codes.tolist()})
    assert count_distinct(codes[:0], (5,) * 4) == 0


def test_pairs():
    numbers = np.array([0, 2, 2, 2, 0, 1])  # groups of 2, 1 and 3: 1 + 0 + 3 pairs of 15
    assert pairs_together(numbers) == 4
    assert chance_of_sharing(numbers) == pytest.approx(4 / 15)
    assert chance_of_sharing(numbers[:1]) == 0.0
