import numpy as np
import pytest

from llmrec.item_tokenizers.diagnostics import LevelUsage, diagnose
from llmrec.item_tokenizers.semantic_ids import SemanticIds


def test_usage_by_hand():
    usage = LevelUsage.of_counts(np.array([4, 2, 2, 0]))
    assert (usage.codebook_size, usage.used, usage.dead, usage.largest) == (4, 3, 1, 4)
    assert usage.entropy == pytest.approx(1.5)  # 1/2 * 1 + 1/4 * 2 + 1/4 * 2
    assert usage.perplexity == pytest.approx(2**1.5)
    # Gini = mean absolute difference / (2 * mean): |differences| of 0, 2, 2, 4 add up to 2 * (2+2+4+0+2+2) = 24
    assert usage.gini == pytest.approx(24 / 16 / (2 * 2))


def test_limits_of_the_measures():
    even, one = LevelUsage.of_counts(np.full(8, 3)), LevelUsage.of_counts(np.array([9, 0, 0, 0]))
    assert (even.entropy, even.perplexity, even.gini) == (3.0, 8.0, 0.0)
    assert (one.entropy, one.perplexity, one.gini) == (0.0, 1.0, 0.75)


def test_collisions_and_groups():
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 0], [1, 0], [2, 1]])
    found = diagnose(SemanticIds(tuple("abcdefg"), codes, (4, 2)))
    assert (found.num_items, found.num_distinct, found.items_in_collision) == (7, 4, 5)
    assert found.collision_rate == pytest.approx(3 / 7)
    assert found.group_sizes == {1: 2, 2: 1, 3: 1}
    assert [level.used for level in found.levels] == [3, 2]
    text = str(found)
    assert "collision rate 42.86%: 4 different tuples, 5 items share one, largest group 3" in text
    assert len(text.splitlines()) == 8


def test_an_empty_catalogue_has_a_table_too():
    found = diagnose(SemanticIds((), np.zeros((0, 2), dtype=int), (4, 2)))
    assert found.levels[0].dead == 4
    assert "collision rate 0.00%" in str(found)
