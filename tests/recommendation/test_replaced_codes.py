"""Codes that change while the items stay, as in joint training."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tiny

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import ItemOrderError, SettingsError
from llmrec.item_tokenizers.rq_kmeans import RQKMeansConfig, RQKMeansTokenizer
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.recommendation import catalogue_search
from llmrec.recommender import Recommender

ITEM_IDS = tuple(f"item-{row}" for row in range(34))
VECTORS = np.random.default_rng(0).normal(size=(34, 8)).astype(np.float32)
HISTORIES = tiny.histories(3, (3, 0, 5, 2))


def embeddings(rows):
    return ItemEmbeddings(tuple(ITEM_IDS[row] for row in rows), VECTORS[list(rows)])


def fitted(seed):
    config = RQKMeansConfig(num_codebooks=2, codebook_size=4, iterations=seed + 1, seed=seed)
    return RQKMeansTokenizer(config).fit(embeddings(range(30)), progress=False)


def codes_of(tokenizer, policy="extra_level"):
    return tokenizer.quantize(embeddings(range(30))).make_unique(policy, counter_size=8)


@pytest.fixture(scope="module")
def first():
    return fitted(0)


@pytest.fixture(scope="module")
def second():
    return fitted(1)


def make(folder, item_tokenizer, **settings):
    semantic_ids = codes_of(item_tokenizer)
    base = tiny.recommender(folder, codes=semantic_ids.codes, sizes=(4, 4, 8), **settings)
    return with_codes(base, semantic_ids, item_tokenizer)


def with_codes(recommender, semantic_ids, item_tokenizer=None):
    """The same model with these codes, all made anew."""
    task = recommender.task.with_semantic_ids(semantic_ids)
    parts = (recommender.model, recommender.text_tokenizer, semantic_ids, recommender.vocabulary, recommender.items)
    return Recommender(*parts, task, recommender.config, item_tokenizer)


def answers_of(recommender, k=30):
    answers = recommender.recommend(HISTORIES, k=k, num_beams=80, exclude_seen=False)
    return [[(entry.item_id, round(entry.score, 3)) for entry in answer] for answer in answers]


@pytest.mark.parametrize("scope", ["vocabulary", "trie"])
def test_all_answers_are_by_the_new_codes(tmp_path, first, second, scope, caplog):
    recommender = make(tmp_path, first, scope=scope)
    before, new = recommender.catalogue, codes_of(second)
    old_answers = answers_of(recommender)  # whatever is kept between calls is kept now
    changed = (new.codes != before.semantic_ids.codes).any(axis=1)
    assert changed.sum() > 15
    with caplog.at_level("INFO", logger="llmrec.recommender"):
        recommender.replace_codes(new)
    assert "replaced the codes of 30 items" in caplog.text
    assert recommender.semantic_ids is new
    assert recommender.items is before.items
    assert recommender.item_tokenizer is first

    answers = answers_of(recommender)
    assert answers != old_answers
    prompt = recommender.task.prompt([int(item.removeprefix("item-")) for item in HISTORIES[0]])
    exact = tiny.exhaustive_scores(
        recommender.model, prompt, new.codes, recommender.trie, recommender.vocabulary, scope
    )
    expected = [f"item-{row}" for row in exact.argsort(descending=True).tolist()]
    assert [item for item, _ in answers[0]] == expected
    assert [score for _, score in answers[0]] == pytest.approx(sorted(exact.tolist(), reverse=True), abs=2e-3)
    ids = list(new.item_ids)
    for history, answer in zip(HISTORIES, answers, strict=True):
        scores = dict(zip(ids, recommender.score(history, ids), strict=True))
        assert [item for item, _ in answer] == sorted(ids, key=lambda item: -scores[item])
        assert [score for _, score in answer] == pytest.approx(sorted(scores.values(), reverse=True), abs=2e-3)
    assert answers == answers_of(with_codes(recommender, new))
    # A tuple that only the old codes had is no path any more.
    of_new = {tuple(item) for item in new.codes.tolist()}
    gone = [item for item in before.semantic_ids.codes.tolist() if tuple(item) not in of_new]
    assert gone
    assert all(len(rows) == 0 for rows in recommender.semantic_ids.rows_of(gone))
    assert recommender.trie.num_leaves == len(of_new)

    recommender.replace_codes(before.semantic_ids)
    assert answers_of(recommender) == old_answers


def test_the_old_catalogue_stays_and_shares_nothing_that_depends_on_codes(tmp_path, first, second):
    catalogue = make(tmp_path, first).catalogue
    old_trie = catalogue.trie_on("meta")
    other = catalogue.with_codes(codes_of(second))
    assert other.trie_on("meta") is not old_trie
    assert other.trie_on("meta").fingerprint == other.trie.fingerprint != catalogue.trie.fingerprint
    assert other.item_index is catalogue.item_index
    assert catalogue.trie_on("meta") is old_trie
    assert (catalogue.task.item_tokens != other.task.item_tokens).any()
    np.testing.assert_array_equal(other.task.item_tokens, other.task.vocabulary.token_ids(codes_of(second).codes))
    assert other.title(3) == "Title of item-3"


def test_item_sets_made_before_are_refused(tmp_path, first, second):
    recommender = make(tmp_path, first)
    allow = recommender.item_set(["item-3", "item-4"])
    recommender.replace_codes(codes_of(second))
    for sets in ({"allow": allow}, {"deny": allow}):
        with pytest.raises(SettingsError, match="not made for this catalogue"):
            recommender.recommend([], **sets)
    answer = recommender.recommend([], allow=recommender.item_set(["item-3", "item-4"]))
    assert {entry.item_id for entry in answer} == {"item-3", "item-4"}
    unchanged = recommender.item_set(["item-3"])
    recommender.replace_codes(recommender.semantic_ids)  # even by the same codes: it is another catalogue
    with pytest.raises(SettingsError, match="not made for this catalogue"):
        recommender.recommend([], allow=unchanged)


def test_new_items_join_the_new_codes(tmp_path, first, second):
    recommender = make(tmp_path, first)
    new = codes_of(second)
    recommender.replace_codes(new, second)
    assert recommender.item_tokenizer is second
    added = range(30, 34)
    recommender.add_items([{"item_id": ITEM_IDS[row]} for row in added], embeddings(added))
    assert (recommender.semantic_ids.codes[:30] == new.codes).all()
    of_added = second.quantize(embeddings(added)).semantic_ids.codes
    assert (of_added != first.quantize(embeddings(added)).semantic_ids.codes).any()
    np.testing.assert_array_equal(recommender.semantic_ids.codes[30:, :2], of_added)
    assert recommender.semantic_ids.is_unique
    assert {item for item, _ in answers_of(recommender, k=34)[0]} == set(ITEM_IDS)
    recommender.save_pretrained(tmp_path / "saved")
    loaded = Recommender.from_pretrained(tmp_path / "saved", device="cpu")
    assert answers_of(loaded, k=34) == answers_of(recommender, k=34)
    np.testing.assert_array_equal(loaded.item_tokenizer.code_vectors()[0], second.code_vectors()[0])


def test_what_does_not_fit_changes_nothing(tmp_path, first, second):
    recommender = make(tmp_path, first)
    before, new = recommender.catalogue, codes_of(second)
    other_items = SemanticIds(tuple(reversed(new.item_ids)), new.codes, new.codebook_sizes, new.policy)
    with pytest.raises(ItemOrderError, match="the new semantic IDs and the catalogue differ first at row 0"):
        recommender.replace_codes(other_items, second)
    fewer = SemanticIds(new.item_ids[:20], new.codes[:20], new.codebook_sizes, new.policy)
    with pytest.raises(ItemOrderError, match="hold 20 items, the catalogue 30"):
        recommender.replace_codes(fewer)
    wider = replace(new, codebook_sizes=(4, 4, 9))
    with pytest.raises(SettingsError, match=r"sizes \(4, 4, 9\), the catalogue \(4, 4, 8\).*counter_size"):
        recommender.replace_codes(wider, second)
    three_levels = RQKMeansTokenizer(RQKMeansConfig(num_codebooks=3, codebook_size=4))
    with pytest.raises(SettingsError, match=r"the item tokenizer has codebooks of sizes \(4, 4, 4\)"):
        recommender.replace_codes(new, three_levels)
    assert recommender.catalogue is before
    assert recommender.item_tokenizer is first


def test_a_call_under_way_ends_with_the_codes_it_started_with(tmp_path, first, second, monkeypatch):
    recommender = make(tmp_path, first)
    old, new = codes_of(first), codes_of(second)
    ids = list(old.item_ids)
    expected = recommender.recommend(HISTORIES, k=10, num_beams=80), recommender.score(HISTORIES, ids)
    for name in ("beam_search", "score_leaves"):
        function = getattr(catalogue_search, name)

        def change_meanwhile(*arguments, function=function, **settings):
            recommender.replace_codes(new if recommender.semantic_ids is old else old)
            return function(*arguments, **settings)

        monkeypatch.setattr(catalogue_search, name, change_meanwhile)
    recommender.replace_codes(old)
    found = recommender.recommend(HISTORIES[:3], k=10, num_beams=80, batch_size=1)
    assert recommender.semantic_ids is new  # three searches, and as many changes
    for answer, wanted in zip(found, expected[0], strict=False):
        assert [entry.item_id for entry in answer] == [entry.item_id for entry in wanted]
    recommender.replace_codes(old)
    scores = recommender.score(HISTORIES[:3], ids, batch_size=1)
    assert recommender.semantic_ids is new
    for row, wanted in zip(scores, expected[1], strict=False):
        assert row == pytest.approx(wanted, abs=1e-4)


def test_replacing_and_removing_from_several_threads_loses_nothing(tmp_path, first, second):
    recommender = make(tmp_path, first)
    codes = [codes_of(first), codes_of(second)]

    def change(number):
        if number % 2:
            recommender.add_items([{"item_id": ITEM_IDS[30]}], embeddings([30]))
            recommender.remove_items([ITEM_IDS[30]])
            return True
        try:
            recommender.replace_codes(codes[number % 4 // 2])
        except ItemOrderError:  # the new item was there just then
            return False
        return True

    with ThreadPoolExecutor(1) as adding, ThreadPoolExecutor(3) as replacing:
        futures = [(adding if number % 2 else replacing).submit(change, number) for number in range(16)]
        done = [future.result() for future in futures]
    assert all(done[1::2])
    recommender.replace_codes(codes[0])
    assert answers_of(recommender) == answers_of(with_codes(recommender, codes[0]))
