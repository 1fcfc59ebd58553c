import numpy as np
import pytest

from llmrec.data.recommendation import Recommendation, as_histories, check_k
from llmrec.errors import DataError, SettingsError


@pytest.mark.parametrize(
    ("given", "histories", "single"),
    [
        (["a", "b"], [["a", "b"]], True),
        (("a",), [["a"]], True),
        ([], [[]], True),
        ([[]], [[]], False),
        ([["a"], []], [["a"], []], False),
        ([("a", "b"), ["c"]], [["a", "b"], ["c"]], False),
        (np.array(["a", "b"]), [["a", "b"]], True),
        ((item for item in "ab"), [["a", "b"]], True),
    ],
)
def test_one_history_or_many(given, histories, single):
    read, is_single = as_histories(given)
    assert (read, is_single) == (histories, single)
    assert all(type(item) is str for history in read for item in history)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a", r"is the string 'a': pass a list.*\['a'\]"),
        (b"a", "is the string"),
        (7, "history is 7"),
        ([1, 2], r"has 1 \(int\) at position 0.*pass '1'"),
        (["a", None], "has None"),
        (["a", ["b"]], "mixes item IDs and lists: entry 0"),
        ([["a"], [3]], "history 1 has 3"),
    ],
)
def test_what_is_no_history_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        as_histories(given)


def test_k():
    assert check_k(np.int64(3)) == 3
    for k in (0, -1, 2.0, True, "3"):
        with pytest.raises(SettingsError, match="number of items to recommend"):
            check_k(k)


def test_a_recommendation_cannot_be_changed():
    with pytest.raises(AttributeError):
        Recommendation("a", 1.0, "A").score = 2.0
