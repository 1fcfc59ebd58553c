import logging

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch

from llmrec.errors import DataError, SettingsError, UnknownItemError

HISTORIES = tiny.histories(5, (3, 0, 7, 2))
# Thirty items on twelve code tuples: most share theirs with others.
SHARED_CODES = np.stack(np.unravel_index(np.random.default_rng(3).integers(0, 12, 30), (3, 2, 2)), axis=1)


@pytest.fixture(scope="module", params=["unique", "shared"])
def recommender(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recommender")
    if request.param == "unique":
        return tiny.recommender(folder)
    return tiny.recommender(folder, codes=SHARED_CODES, sizes=(3, 2, 2))


@pytest.fixture(scope="module")
def rankings(recommender):
    """All items for each history, best first, none left out."""
    return recommender.recommend(HISTORIES, k=30, exclude_seen=False)


def _ids(answer):
    return [entry.item_id for entry in answer]


def _expected(ranking, keep, k=30):
    return [entry.item_id for entry in ranking if keep(entry.item_id)][:k]


def _rows(item_ids):
    return np.array([int(item_id.removeprefix("item-")) for item_id in item_ids])


@pytest.mark.parametrize("size", [1, 4, 15, 29])
def test_an_allowed_set_in_every_form_gives_the_best_of_it(recommender, rankings, size):
    chosen = [f"item-{row}" for row in np.random.default_rng(size).choice(30, size, replace=False)]
    mask = np.zeros(30, dtype=bool)
    mask[_rows(chosen)] = True
    prepared = recommender.item_set(chosen)
    assert prepared.rows.tolist() == mask.tolist()
    expected = [_expected(ranking, chosen.__contains__, k=8) for ranking in rankings]
    forms = [chosen, set(chosen), mask, mask.tolist(), torch.from_numpy(mask), prepared, np.array(chosen)]
    forms += [recommender.item_set(mask), pa.chunked_array([mask])]
    for allow in forms:
        answers = recommender.recommend(HISTORIES, k=8, num_beams=30, exclude_seen=False, allow=allow)
        assert [_ids(answer) for answer in answers] == expected
    for answer, ranking in zip(answers, rankings, strict=True):
        scores = {entry.item_id: entry.score for entry in ranking}
        assert [entry.score for entry in answer] == pytest.approx([scores[item] for item in _ids(answer)], abs=1e-4)


@pytest.mark.parametrize("size", [1, 4, 15, 29])
def test_a_denied_set_in_every_form_leaves_the_best_of_the_others(recommender, rankings, size):
    chosen = [f"item-{row}" for row in np.random.default_rng(size).choice(30, size, replace=False)]
    mask = np.isin(np.arange(30), _rows(chosen))
    expected = [_expected(ranking, lambda item: item not in chosen) for ranking in rankings]
    for deny in (chosen, mask, recommender.item_set(chosen), [chosen, mask, recommender.item_set(mask), chosen]):
        answers = recommender.recommend(HISTORIES, k=30, exclude_seen=False, deny=deny)
        assert [_ids(answer) for answer in answers] == expected


def test_a_long_shared_list_of_denied_items_is_made_a_set_once(recommender, rankings, monkeypatch):
    monkeypatch.setattr("llmrec.recommendation.item_filters._MOST_SHARED_ROWS", 3)
    chosen = [f"item-{row}" for row in range(0, 30, 2)]
    expected = [
        _expected(ranking, lambda item, seen=history: item not in chosen and item not in seen)
        for history, ranking in zip(HISTORIES, rankings, strict=True)
    ]
    made = []
    monkeypatch.setattr(type(recommender.catalogue), "item_set", _counted(type(recommender.catalogue).item_set, made))
    answers = recommender.recommend(HISTORIES, k=30, deny=chosen, batch_size=1)
    assert [_ids(answer) for answer in answers] == expected
    assert len(made) == 1


def _counted(function, calls):
    def counted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return counted


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_seen_allowed_and_denied_combine_one_each_a_history(recommender, rankings, batch_size):
    generator = np.random.default_rng(9)
    allow_masks = generator.random((4, 30)) < 0.7
    deny_masks = generator.random((4, 30)) < 0.3
    allow = [allow_masks[0], None, [f"item-{row}" for row in np.flatnonzero(allow_masks[2])], allow_masks[3]]
    deny = [
        recommender.item_set(deny_masks[0]),
        deny_masks[1],
        None,
        [f"item-{row}" for row in np.flatnonzero(deny_masks[3])],
    ]
    expected = []
    for number, (history, ranking) in enumerate(zip(HISTORIES, rankings, strict=True)):
        left = np.ones(30, dtype=bool)
        left[_rows(history).astype(int)] = False
        left &= True if number == 1 else allow_masks[number]
        left &= True if number == 2 else ~deny_masks[number]
        expected.append(_expected(ranking, lambda item, left=left: left[_rows([item])[0]]))
    answers = recommender.recommend(HISTORIES, k=30, allow=allow, deny=deny, batch_size=batch_size)
    assert [_ids(answer) for answer in answers] == expected
    alone = [
        recommender.recommend(history, k=30, allow=one, deny=other)
        for history, one, other in zip(HISTORIES, allow, deny, strict=True)
    ]
    assert [_ids(answer) for answer in alone] == expected
    shared = recommender.recommend(HISTORIES, k=30, allow=allow_masks[0], deny=deny, batch_size=batch_size)
    for number, (history, ranking) in enumerate(zip(HISTORIES, rankings, strict=True)):
        left = allow_masks[0] & (True if number == 2 else ~deny_masks[number])
        keep = [item for item in _ids(ranking) if left[_rows([item])[0]] and item not in history]
        assert _ids(shared[number]) == keep


def test_an_empty_set_allows_nothing(recommender):
    for nothing in ([], set(), np.zeros(30, dtype=bool), recommender.item_set([])):
        assert recommender.recommend(HISTORIES[0], allow=nothing) == []
        assert recommender.recommend(HISTORIES, allow=nothing) == [[], [], [], []]
    assert recommender.recommend(HISTORIES[0], allow=["item-4"], deny=["item-4"]) == []
    assert len(recommender.recommend(HISTORIES, k=30, deny=[])[1]) == 30
    one, other = recommender.recommend(HISTORIES[:2], allow=[[], None])
    assert one == []
    assert len(other) == 10


def test_sampled_and_diverse_answers_keep_to_the_sets(recommender):
    allowed = {f"item-{row}" for row in range(0, 30, 3)}
    for settings in (
        {"temperature": 2.0},
        {"temperature": 2.0, "top_k": 8},
        {"num_groups": 2, "diversity_penalty": 1.0},
    ):
        for history, answer in zip(
            HISTORIES, recommender.recommend(HISTORIES, k=5, allow=allowed, **settings), strict=True
        ):
            assert answer
            assert set(_ids(answer)) <= allowed - set(history)


def test_unknown_items_in_sets_are_an_error_or_skipped(recommender, caplog):
    with pytest.raises(UnknownItemError, match=r"1 unknown item ID.*'nope'"):
        recommender.recommend([], allow=["item-1", "nope"])
    with pytest.raises(UnknownItemError, match="'nope'"):
        recommender.item_set(["nope"])
    with caplog.at_level(logging.WARNING, logger="llmrec.recommendation.item_filters"):
        answer = recommender.recommend([], allow=["item-1", "nope"], on_unknown="skip")
    assert _ids(answer) == ["item-1"]
    assert "skipped 1 unknown item IDs in allow" in caplog.text


def test_sets_that_make_no_sense(recommender, tmp_path):
    with pytest.raises(DataError, match="deny is 'item-1': pass a list of item IDs"):
        recommender.recommend([], deny="item-1")
    with pytest.raises(DataError, match="allow holds 3"):
        recommender.recommend([], allow=[3, 4])
    with pytest.raises(DataError, match=r"allow is a mask of shape \(29,\), the catalogue has 30 items"):
        recommender.recommend([], allow=np.ones(29, dtype=bool))
    with pytest.raises(SettingsError, match="allow is a list of 1 sets for 2 histories"):
        recommender.recommend([[], []], allow=[["item-1"]])
    with pytest.raises(SettingsError, match="allow is a list of 1 sets for one history"):
        recommender.recommend([], allow=[["item-1"]])
    other = tiny.recommender(tmp_path, seed=1)
    for allow in (other.item_set(["item-1"]), [other.item_set(["item-1"])] * 2):
        with pytest.raises(SettingsError, match="was not made for this catalogue"):
            recommender.recommend([[], []], allow=allow)
