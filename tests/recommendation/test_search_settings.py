import numpy as np
import pytest

from llmrec.data.recommendation import Recommendation
from llmrec.errors import SettingsError
from llmrec.recommendation.search_settings import SearchSettings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 10, "num_beams": 5}, "a search of 5 beams can't give 10 items"),
        ({"k": 1, "temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"k": 1, "temperature": float("nan")}, "temperature is nan"),
        ({"k": 1, "temperature": float("inf")}, "temperature is inf"),
        ({"k": 1, "seed": -1}, "seed is -1"),
        ({"k": 1, "seed": True}, "seed is True"),
        ({"k": 1, "top_k": 5}, "top_k is 5 without a temperature"),
        ({"k": 3, "top_k": 2, "temperature": 1.0}, "top_k is 2, k is 3"),
        ({"k": 3, "top_k": 9, "temperature": 1.0, "num_beams": 8}, "top_k is 9, k is 3, num_beams is 8"),
        ({"k": 1, "num_groups": 0}, "num_groups is 0"),
        ({"k": 1, "num_groups": 2, "diversity_penalty": -1.0}, "diversity_penalty is -1.0"),
        ({"k": 1, "diversity_penalty": 1.0}, "with one group"),
        ({"k": 1, "num_groups": 2, "temperature": 1.0}, "leave out one of them"),
        ({"k": 1, "num_groups": 3, "num_beams": 2}, "every group needs a beam"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(SettingsError, match=message):
        SearchSettings(**settings)


def test_the_width_of_the_search():
    assert SearchSettings(3).width(1000) == 20
    assert SearchSettings(50).width(1000) == 100
    assert SearchSettings(50).width(70) == 70
    assert SearchSettings(50, num_beams=60).width(1000) == 60
    assert SearchSettings(5, temperature=1.0).width(1000) == 5
    assert SearchSettings(5, temperature=1.0, top_k=40).width(1000) == 40
    assert SearchSettings(1, num_groups=30).width(1000) == 30
    assert SearchSettings(1, num_groups=4).width(2) == 4


def test_a_seed_follows_from_seed_and_history_alone():
    settings = SearchSettings(1, temperature=1.0, seed=3)
    seeds = {settings.seed_of(history) for history in (["a"], ["b"], ["a", "b"], ["b", "a"], ["ab"], [])}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert settings.seed_of(["a", "b"]) == SearchSettings(4, temperature=2.0, seed=3).seed_of(["a", "b"])
    assert settings.seed_of(["a"]) != SearchSettings(1, temperature=1.0, seed=4).seed_of(["a"])


def test_top_k_draws_in_proportion_to_the_tempered_probabilities():
    scores = np.log([0.5, 0.3, 0.2])
    found = [Recommendation(name, float(score), "") for name, score in zip("abc", scores, strict=True)]
    settings = SearchSettings(2, temperature=2.0, top_k=3)
    draws = [settings.choose(found, seed) for seed in range(4000)]
    assert all(len({entry.item_id for entry in draw}) == 2 for draw in draws)
    first = np.array([sum(draw[0].item_id == name for draw in draws) for name in "abc"]) / len(draws)
    expected = np.sqrt([0.5, 0.3, 0.2])
    assert first == pytest.approx(expected / expected.sum(), abs=0.03)
    # Without replacement: after "a" the others in proportion to each other.
    second = [draw[1].item_id for draw in draws if draw[0].item_id == "a"]
    assert second.count("b") / len(second) == pytest.approx(expected[1] / expected[1:].sum(), abs=0.04)
    only_two = SearchSettings(2, temperature=2.0, top_k=2)
    assert {entry.item_id for seed in range(50) for entry in only_two.choose(found, seed)} == {"a", "b"}
