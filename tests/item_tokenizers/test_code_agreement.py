import dataclasses
import json

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from llmrec.errors import ItemOrderError
from llmrec.item_tokenizers.code_agreement import compare_codes
from llmrec.item_tokenizers.semantic_ids import SemanticIds


def _ids(codes, sizes=None):
    codes = np.array(codes)
    return SemanticIds(tuple(map(str, range(len(codes)))), codes, sizes or (9,) * codes.shape[1])


def test_by_hand():
    first = _ids([[0, 0], [0, 1], [1, 2], [1, 3]])
    second = _ids([[0, 0], [0, 1], [0, 2], [1, 3]])
    found = compare_codes(first, second)
    # Pairs together: {01, 23} and {01, 02, 12}, one of them (01) in both. Of 6 pairs 2 * 3 / 6 = 1 is expected.
    assert found.prefixes[0].adjusted_rand == pytest.approx((1 - 1) / (2.5 - 1))
    assert found.prefixes[0].shared_pairs == pytest.approx(1 / 4)
    assert found.prefixes[0].equal_prefixes == 0.75
    # All tuples differ: there is nothing to agree on.
    assert (found.prefixes[1].adjusted_rand, found.prefixes[1].shared_pairs) == (None, None)
    assert found.equal_tuples == 0.75
    text = str(found)
    assert "all codes equal: 75.00% of the items" in text
    assert "0.250" in text
    json.dumps(dataclasses.asdict(found))


def test_the_rand_index_equals_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    first = generator.integers(0, 4, (400, 3))
    second = np.where(generator.random((400, 3)) < 0.7, first, generator.integers(0, 4, (400, 3)))
    found = compare_codes(_ids(first), _ids(second))
    for depth, prefix in enumerate(found.prefixes, start=1):
        left, right = (codes[:, :depth] @ (10 ** np.arange(depth)) for codes in (first, second))
        assert prefix.adjusted_rand == pytest.approx(adjusted_rand_score(left, right))
        together = [(numbers[:, None] == numbers) & ~np.eye(400, dtype=bool) for numbers in (left, right)]
        assert prefix.shared_pairs == pytest.approx(
            (together[0] & together[1]).sum() / (together[0] | together[1]).sum()
        )
    assert found.equal_tuples == pytest.approx((first == second).all(axis=1).mean())


def test_renumbered_codes_agree_though_no_code_is_equal():
    codes = np.random.default_rng(0).integers(0, 4, (50, 2))
    found = compare_codes(_ids(codes), _ids((codes + 1) % 4))
    assert all(prefix.adjusted_rand == pytest.approx(1.0) and prefix.shared_pairs == 1.0 for prefix in found.prefixes)
    assert found.equal_tuples == 0.0


def test_different_levels_compare_the_common_ones():
    first = _ids([[0, 0], [0, 1], [1, 2]])
    found = compare_codes(first, _ids([[0, 0, 0], [0, 1, 0], [1, 2, 0]]))
    assert [prefix.equal_prefixes for prefix in found.prefixes] == [1.0, 1.0]
    assert found.equal_tuples == 0.0
    assert "(2 and 3 levels)" in str(found)


def test_edges():
    assert compare_codes(_ids(np.zeros((0, 2), dtype=int)), _ids(np.zeros((0, 2), dtype=int))).equal_tuples == 0.0
    same = compare_codes(_ids([[0], [0], [0]]), _ids([[1], [1], [1]]))  # all together in both
    assert (same.prefixes[0].adjusted_rand, same.prefixes[0].shared_pairs) == (None, 1.0)


def test_another_order_is_refused():
    first = _ids([[0], [1]])
    with pytest.raises(ItemOrderError, match="the second code set"):
        compare_codes(first, SemanticIds(first.item_ids[::-1], first.codes, (9,)))
