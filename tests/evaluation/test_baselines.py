import pytest

from llmrec.data.interactions import InteractionDataset
from llmrec.data.recommendation import Recommendation
from llmrec.data.splits import leave_one_out
from llmrec.errors import DataError, SettingsError, UnknownItemError
from llmrec.evaluation.baselines import PopularityRecommender

ITEMS = {"item_id": list("edcba"), "title": list("EDCBA")}


@pytest.fixture
def popularity():
    # c three times, a twice, d and b once, e never; at ties the order of the catalogue: d before b
    users, items = ["u"] * 4 + ["v"] * 3, list("cabdcac")
    return PopularityRecommender(InteractionDataset.from_columns(users, items, items=ITEMS))


def ids(answer):
    return [item.item_id for item in answer]


def test_order_scores_and_titles(popularity):
    answer = popularity.recommend([], k=10, exclude_seen=False)
    assert ids(answer) == ["c", "a", "d", "b", "e"]
    assert [item.score for item in answer] == [3.0, 2.0, 1.0, 1.0, 0.0]
    assert answer[0] == Recommendation("c", 3.0, "C")


def test_one_history_or_many(popularity):
    assert ids(popularity.recommend(["c", "d"], k=2)) == ["a", "b"]
    assert ids(popularity.recommend(["c", "d"], k=2, exclude_seen=False)) == ["c", "a"]
    many = popularity.recommend([["c", "d"], [], ["c", "c"]], k=2)
    assert [ids(answer) for answer in many] == [["a", "b"], ["c", "a"], ["a", "d"]]
    assert [ids(answer) for answer in popularity.recommend([[]], k=1)] == [["c"]]


def test_fewer_where_fewer_are_left(popularity):
    assert ids(popularity.recommend(list("abcd"), k=10)) == ["e"]
    assert popularity.recommend(list("abcde"), k=3) == []


def test_what_is_refused(popularity):
    with pytest.raises(UnknownItemError, match="'zzz'"):
        popularity.recommend(["a", "zzz"])
    with pytest.raises(DataError, match="pass a list"):
        popularity.recommend("a")
    with pytest.raises(SettingsError, match="k is 0"):
        popularity.recommend(["a"], k=0)


def test_only_training_interactions_count():
    dataset = InteractionDataset.from_columns(["u"] * 3 + ["v"] * 3, ["a", "z", "z", "b", "z", "z"])
    answer = PopularityRecommender(leave_one_out(dataset).train).recommend([], k=3)
    assert {item.item_id: item.score for item in answer} == {"a": 1.0, "b": 1.0, "z": 0.0}
