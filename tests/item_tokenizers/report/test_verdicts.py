from dataclasses import replace

import numpy as np
import pytest

from llmrec.item_tokenizers.diagnostics import LevelUsage, Reconstruction, diagnose
from llmrec.item_tokenizers.neighbours import NeighbourAgreement
from llmrec.item_tokenizers.report.verdicts import judge
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.uniqueness import UniquenessReport


@pytest.fixture(scope="module")
def good():
    """Every pair of ten codes once: all used alike, none colliding."""
    codes = np.stack(np.divmod(np.arange(100), 10), axis=1)
    return diagnose(SemanticIds(tuple(map(str, range(100))), codes, (10, 10)))


def _by_name(*arguments):
    return {verdict.name: verdict for verdict in judge(*arguments)}


def test_good_codes_need_no_remedy(good):
    found = _by_name(replace(good), good)
    assert list(found) == ["Collisions as fitted", "Collisions left", "Codes used", "Evenness"]
    assert {(verdict.state, verdict.remedy) for verdict in found.values()} == {("good", "")}
    assert found["Codes used"].value == found["Evenness"].value == "100%"
    assert "Collisions as fitted" not in _by_name(good, good)  # the same twice says nothing


@pytest.mark.parametrize(
    ("rate", "state", "shown"),
    [(0.01, "good", "1.00%"), (0.011, "look", "1.10%"), (0.05, "look", "5.00%"), (0.305, "bad", "30.5%")],
)
def test_collisions_as_fitted(good, rate, state, shown):
    found = _by_name(replace(good, collision_rate=rate), good)["Collisions as fitted"]
    assert (found.state, found.value) == (state, shown)
    assert ("more codes" in found.remedy) == (state != "good")
    assert "Up to 1% is good, above 5% bad" in found.meaning


def test_collisions_that_are_left(good):
    states = [_by_name(good, replace(good, collision_rate=rate))["Collisions left"].state for rate in (0, 0.01, 0.02)]
    assert states == ["good", "look", "bad"]
    assert "min_cost" in str(_by_name(good, replace(good, collision_rate=0.02))["Collisions left"])


def test_the_worst_level_is_named(good):
    collapsed = LevelUsage.of_counts(np.array([96, 4] + [0] * 8))
    found = _by_name(good, replace(good, levels=(good.levels[0], collapsed)))
    assert (found["Codes used"].state, found["Codes used"].value) == ("bad", "20.0%")
    assert "(b: 2 of 10)" in found["Codes used"].meaning
    assert "revive_until" in found["Codes used"].remedy
    assert found["Evenness"].state == "good"  # 1.18 of 2 used codes
    spiked = LevelUsage.of_counts(np.array([991] + [1] * 9))
    found = _by_name(good, replace(good, levels=(good.levels[0], spiked)))
    assert (found["Codes used"].state, found["Evenness"].state) == ("good", "look")  # 1.07 of 10 used


def test_few_items_cannot_use_many_codes():
    codes = SemanticIds(tuple("abc"), np.array([[0], [7], [200]]), (256,))
    assert _by_name(diagnose(codes), diagnose(codes))["Codes used"].value == "100%"


def test_a_counter_is_no_level_to_judge(good):
    counter = LevelUsage.of_counts(np.array([100] + [0] * 9))
    levels = (*good.levels, counter)
    assert _by_name(good, replace(good, levels=levels, policy="extra_level"))["Codes used"].state == "good"
    assert _by_name(good, replace(good, levels=levels))["Codes used"].state == "bad"


def test_items_moved_and_error_left(good):
    report = UniquenessReport("min_cost", 12, 0, 11, 1.0, 2.0)
    after = replace(good, reconstruction=Reconstruction((5.0, 3.0), (0.5, 0.3), 10.0))
    found = _by_name(good, after, report)
    assert (found["Items moved"].state, found["Items moved"].value) == ("bad", "11.0%")
    assert (found["Error left"].state, found["Error left"].value) == ("look", "30.0%")


@pytest.mark.parametrize(
    ("shared", "chance", "state"),
    [(0.105, 0.005, "good"), (0.1, 0.01, "look"), (0.02, 0.005, "bad"), (0.2, 0.2, "bad"), (1.0, 1.0, "bad")],
)
def test_neighbours_are_judged_above_chance(good, shared, chance, state):
    agreement = NeighbourAgreement(100, 100, 10, (shared,), (chance,), (None,), (shared,), (chance,), shared)
    after = replace(good, neighbours={"collaborative": agreement})
    found = _by_name(good, after)["Collaborative neighbours"]
    assert (found.state, found.value) == (state, f"{shared:.1%}")
    assert ("collaborative_weight" in found.remedy) == (state != "good")
    nobody = replace(good, neighbours={"text": replace(agreement, num_queries=0)})
    assert "Text neighbours" not in _by_name(good, nobody)


def test_an_empty_catalogue_can_be_judged():
    empty = diagnose(SemanticIds((), np.zeros((0, 2), dtype=int), (4, 2)))
    assert _by_name(empty, empty)["Collisions left"].state == "good"
