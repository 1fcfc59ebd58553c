import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import tiny

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, ItemOrderError, SettingsError, UnknownItemError
from llmrec.item_tokenizers.rq_kmeans import RQKMeansConfig, RQKMeansTokenizer
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.recommendation import catalogue_search
from llmrec.recommendation.catalogue import Catalogue
from llmrec.recommender import Recommender

SIZES = (4, 4, 4)
# Clustered, so that new items collide with old ones and with each other.
VECTORS = np.random.default_rng(0).normal(size=(12, 8))[np.random.default_rng(1).integers(0, 12, 40)]
VECTORS = (VECTORS + 0.01 * np.random.default_rng(2).normal(size=(40, 8))).astype(np.float32)
ITEM_IDS = tuple(f"item-{row}" for row in range(40))
NEW = [{"title": f"New {row}", "item_id": f"item-{row}"} for row in range(30, 40)]


def embeddings(rows):
    return ItemEmbeddings(tuple(ITEM_IDS[row] for row in rows), VECTORS[list(rows)])


@pytest.fixture(scope="module")
def item_tokenizer():
    config = RQKMeansConfig(num_codebooks=3, codebook_size=4)
    return RQKMeansTokenizer(config).fit(embeddings(range(30)), progress=False)


def make(folder, item_tokenizer, policy="min_cost", **settings):
    """A recommender of the first thirty items."""
    semantic_ids = item_tokenizer.encode(embeddings(range(30)), policy=policy)
    base = tiny.recommender(folder, codes=semantic_ids.codes, sizes=semantic_ids.codebook_sizes, **settings)
    return rebuilt(base, semantic_ids, base.items, item_tokenizer)


def rebuilt(recommender, semantic_ids, items, item_tokenizer=None):
    """The same model with another catalogue, all made anew."""
    task = recommender.task.with_semantic_ids(semantic_ids)
    parts = (recommender.model, recommender.text_tokenizer, semantic_ids, recommender.vocabulary, items, task)
    return Recommender(*parts, recommender.config, item_tokenizer)


def _assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        assert [(entry.item_id, entry.title) for entry in one] == [(entry.item_id, entry.title) for entry in other]
        assert [entry.score for entry in one] == pytest.approx([entry.score for entry in other], abs=1e-4)


HISTORIES = tiny.histories(3, (3, 0, 5, 2))


@pytest.mark.parametrize("policy", ["min_cost", "allow", "extra_level"])
def test_added_items_can_be_recommended_at_once(tmp_path, item_tokenizer, policy, caplog):
    recommender = make(tmp_path, item_tokenizer, policy)
    before = recommender.catalogue
    if policy == "extra_level":  # room for more that share their codes
        sizes = (*SIZES, 16)
        codes = SemanticIds(before.semantic_ids.item_ids, before.semantic_ids.codes, sizes, "extra_level")
        base = tiny.recommender(tmp_path, codes=codes.codes, sizes=sizes)
        recommender = rebuilt(base, codes, base.items, item_tokenizer)
        before = recommender.catalogue
    with caplog.at_level(logging.INFO, logger="llmrec.recommender"):
        recommender.add_items(NEW, embeddings(range(30, 40)))
    assert "added 10 items" in caplog.text
    assert "the catalogue has 40" in caplog.text
    assert recommender.semantic_ids.item_ids == ITEM_IDS
    assert recommender.semantic_ids.policy == policy
    assert (recommender.semantic_ids.codes[:30] == before.semantic_ids.codes).all()
    assert recommender.semantic_ids.is_unique == (policy != "allow")
    assert recommender.items["title"][30:] == [f"New {row}" for row in range(30, 40)]
    assert recommender.items["price"][28:] == [1.5, 1.5, *[None] * 10]
    assert recommender.titles[29:31] == ("Title of item-29", "New 30")

    whole = rebuilt(recommender, recommender.semantic_ids, recommender.items)
    histories = [*HISTORIES, ["item-35", "item-3", "item-39"]]  # new items can be in histories too
    answers = recommender.recommend(histories, k=40)
    _assert_same(answers, whole.recommend(histories, k=40))
    assert len(answers[1]) == 40
    assert not {"item-35", "item-39"} & {entry.item_id for entry in answers[-1]}
    assert recommender.recommend([], k=10, allow=ITEM_IDS[30:]) != []
    assert len(before) == 30  # the old one is as it was
    assert len(before.items) == before.trie.num_items == 30


def test_the_saved_folder_holds_the_new_items(tmp_path, item_tokenizer):
    recommender = make(tmp_path, item_tokenizer)
    recommender.add_items(NEW, embeddings(range(30, 40)))
    recommender.remove_items(["item-4"])
    recommender.save_pretrained(tmp_path / "saved")
    loaded = Recommender.from_pretrained(tmp_path / "saved", device="cpu")
    _assert_same(loaded.recommend(HISTORIES[:2], k=39), recommender.recommend(HISTORIES[:2], k=39))
    loaded.add_items([{"item_id": "item-4"}], embeddings([4]))
    assert loaded.items[-1] == {"item_id": "item-4", "title": None, "price": None}
    assert loaded.semantic_ids.is_unique


def test_items_come_in_any_form_and_embeddings_in_any_order(tmp_path, item_tokenizer):
    first = make(tmp_path, item_tokenizer)
    first.add_items(NEW, embeddings(range(30, 40)))
    table = pa.table({"title": [item["title"] for item in NEW], "item_id": [item["item_id"] for item in NEW]})
    shuffled = embeddings(np.random.default_rng(0).permutation(40).tolist())
    for items in (table, datasets.Dataset(table), NEW):
        for given in (shuffled, {"text": shuffled}, {"anything": shuffled}):
            other = make(tmp_path, item_tokenizer)
            other.add_items(items, given)
            assert (other.semantic_ids.codes == first.semantic_ids.codes).all()
            assert other.items.to_list() == first.items.to_list()
    price = [{"item_id": "item-30", "price": 3}, {"item_id": "item-31"}]  # an integer where the column has floats
    other = make(tmp_path, item_tokenizer)
    other.add_items(price, embeddings([30, 31]))
    assert other.items[30:] == {"item_id": ["item-30", "item-31"], "title": [None, None], "price": [3.0, None]}
    before = other.catalogue
    other.add_items([], embeddings([32]))
    assert other.catalogue is before


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        (
            [{"item_id": "item-30", "colour": "red"}],
            DataError,
            "the column 'colour', which the catalogue doesn't have",
        ),
        ([{"title": "New"}], DataError, "need the column 'item_id'"),
        ([{"item_id": 30}], DataError, "new item 0 has the ID 30: item IDs are strings"),
        ([{"item_id": "item-30"}, {"title": "New"}], DataError, "new item 1 has the ID None"),
        ([{"item_id": "item-30"}, {"item_id": "item-30"}], DataError, "'item-30' stands twice"),
        ([{"item_id": "item-30"}, {"item_id": "item-3"}], DataError, "1 of 2 new items are in the catalogue already"),
        ([{"item_id": "item-30", "price": "cheap"}], DataError, "column 'price' of the new items is string"),
        ([{"item_id": "item-30", "price": "cheap"}, {"item_id": "item-31", "price": 3}], DataError, "different types"),
        (["item-30"], DataError, "a list of dictionaries"),
        ([{"item_id": "item-39"}], ItemOrderError, "no vector for 1 of the 1 items.*'item-39'"),
    ],
)
def test_what_can_not_be_added_changes_nothing(tmp_path, item_tokenizer, items, error, message):
    recommender = make(tmp_path, item_tokenizer)
    before = recommender.catalogue
    with pytest.raises(error, match=message):
        recommender.add_items(items, embeddings([30, 31]))
    assert recommender.catalogue is before


def test_an_error_on_the_way_changes_nothing(tmp_path, item_tokenizer, monkeypatch):
    recommender = make(tmp_path, item_tokenizer)
    expected, before = recommender.recommend(HISTORIES, k=30), recommender.catalogue

    def fail(*arguments, **settings):
        raise MemoryError("no more")

    for place in (
        "llmrec.item_tokenizers.base.ItemTokenizer.extend",
        "llmrec.generation.trie.ItemTrie.insert",
        "llmrec.tasks.next_item.NextItemTask.with_semantic_ids",
        "llmrec.recommendation.catalogue.datasets.concatenate_datasets",
        "llmrec.recommendation.catalogue.Catalogue.trie_on",
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, fail)
            with pytest.raises(MemoryError, match="no more"):
                recommender.add_items(NEW, embeddings(range(30, 40)))
        assert recommender.catalogue is before
    for place in ("llmrec.generation.trie.ItemTrie.remove", "llmrec.item_tokenizers.semantic_ids.SemanticIds.remove"):
        with monkeypatch.context() as patched:
            patched.setattr(place, fail)
            with pytest.raises(MemoryError, match="no more"):
                recommender.remove_items(["item-3"])
        assert recommender.catalogue is before
    _assert_same(recommender.recommend(HISTORIES, k=30), expected)
    with pytest.raises(DataError, match="width 4, this RQKMeansTokenizer was fitted with 8"):
        recommender.add_items(NEW, ItemEmbeddings(ITEM_IDS[30:], VECTORS[30:, :4]))
    recommender.add_items(NEW, embeddings(range(30, 40)))  # nothing is left locked
    assert len(recommender.catalogue) == 40


def test_without_item_tokenizer_nothing_can_be_added(tmp_path):
    recommender = tiny.recommender(tmp_path)
    with pytest.raises(SettingsError, match="no item tokenizer"):
        recommender.add_items(NEW, embeddings(range(30, 40)))


def test_more_items_than_codes_are_refused(tmp_path, item_tokenizer):
    recommender = make(tmp_path, item_tokenizer)
    count = 64 - 30 + 1
    vectors = np.random.default_rng(4).normal(size=(count, 8)).astype(np.float32)
    item_ids = tuple(f"more-{row}" for row in range(count))
    with pytest.raises(SettingsError, match="65 items can't have codes of their own"):
        recommender.add_items([{"item_id": item_id} for item_id in item_ids], ItemEmbeddings(item_ids, vectors))
    assert len(recommender.catalogue) == 30
    recommender.add_items([{"item_id": name} for name in item_ids[1:]], ItemEmbeddings(item_ids, vectors))
    assert recommender.semantic_ids.is_unique  # every tuple is taken


@pytest.mark.parametrize("policy", ["min_cost", "allow"])
def test_removed_items_are_unknown_and_the_others_stay(tmp_path, item_tokenizer, policy, caplog):
    recommender = make(tmp_path, item_tokenizer, policy)
    before = recommender.catalogue
    gone = {"item-0", "item-7", "item-29", "item-12"}
    histories = [[item for item in history if item not in gone] for history in HISTORIES]
    rankings = recommender.recommend(histories, k=30)
    with caplog.at_level(logging.INFO, logger="llmrec.recommender"):
        recommender.remove_items([*sorted(gone), "item-7"])
    assert "removed 4 items; the catalogue has 26" in caplog.text
    kept = [row for row in range(30) if f"item-{row}" not in gone]
    assert recommender.semantic_ids.item_ids == tuple(f"item-{row}" for row in kept)
    assert (recommender.semantic_ids.codes == before.semantic_ids.codes[kept]).all()
    assert recommender.items["item_id"][:] == list(recommender.semantic_ids.item_ids)
    assert recommender.items.features == before.items.features
    answers = recommender.recommend(histories, k=30)
    _assert_same(answers, [[entry for entry in ranking if entry.item_id not in gone] for ranking in rankings])
    whole = rebuilt(recommender, recommender.semantic_ids, recommender.items)
    _assert_same(answers, whole.recommend(histories, k=30))
    with pytest.raises(UnknownItemError, match="'item-7'"):
        recommender.recommend(["item-7"])
    _assert_same([recommender.recommend(["item-7", "item-1"], on_unknown="skip")], [recommender.recommend(["item-1"])])
    assert len(before) == before.trie.num_items == 30


def test_what_can_not_be_removed(tmp_path, item_tokenizer):
    recommender = make(tmp_path, item_tokenizer)
    before = recommender.catalogue
    with pytest.raises(UnknownItemError, match="'item-30'"):
        recommender.remove_items(["item-3", "item-30"])
    with pytest.raises(DataError, match="all 30 items would be removed"):
        recommender.remove_items([f"item-{row}" for row in range(30)])
    with pytest.raises(DataError, match="pass a list of item IDs"):
        recommender.remove_items("item-3")
    with pytest.raises(DataError, match="one list of item IDs"):
        recommender.remove_items([["item-3"]])
    assert recommender.catalogue is before


def test_sets_of_an_older_catalogue_are_refused_even_where_the_codes_are_the_same(tmp_path, item_tokenizer):
    recommender = make(tmp_path, item_tokenizer)
    recommender.add_items([{"item_id": "item-30"}], embeddings([30]))
    allow, before = recommender.item_set(["item-30"]), recommender.catalogue
    recommender.remove_items(["item-30"])
    twin = ItemEmbeddings(("twin",), VECTORS[[30]])
    recommender.add_items([{"item_id": "twin"}], twin)
    assert (recommender.semantic_ids.codes == before.semantic_ids.codes).all()  # the trie can't tell them apart
    for sets in ({"allow": allow}, {"deny": allow}):
        with pytest.raises(SettingsError, match=r"not made for this catalogue of 31.*make it again by item_set"):
            recommender.recommend([], **sets)
    with pytest.raises(SettingsError, match="not made for this catalogue"):
        recommender.item_set(allow)
    assert [entry.item_id for entry in recommender.recommend([], allow=recommender.item_set(["twin"]))] == ["twin"]


def test_a_call_under_way_ends_with_the_catalogue_it_started_with(tmp_path, item_tokenizer, monkeypatch):
    recommender = make(tmp_path, item_tokenizer)
    histories = [["item-29", "item-5"], ["item-28"], []]
    expected = recommender.recommend(histories, k=30)
    scores = recommender.score(histories, ["item-29", "item-1"])
    for name in ("beam_search", "score_leaves"):
        function = getattr(catalogue_search, name)

        def change_meanwhile(*arguments, function=function, **settings):
            recommender.remove_items([recommender.semantic_ids.item_ids[0]])
            return function(*arguments, **settings)

        monkeypatch.setattr(catalogue_search, name, change_meanwhile)
    _assert_same(recommender.recommend(histories, k=30, batch_size=1), expected)
    assert len(recommender.catalogue) == 27
    assert recommender.score(histories, ["item-29", "item-4"], batch_size=1)[0][0] == pytest.approx(
        scores[0][0], abs=1e-4
    )
    assert len(recommender.catalogue) == 24


def test_answers_while_items_come_and_go_are_of_one_catalogue(tmp_path, item_tokenizer):
    recommender = make(tmp_path, item_tokenizer)
    # A batch of one each: a call makes several searches, between which the catalogue may be swapped.
    histories = [history for history in HISTORIES if "item-3" not in history]

    def ask():
        return [[entry.item_id for entry in answer] for answer in recommender.recommend(histories, k=30, batch_size=1)]

    def without():
        recommender.remove_items(["item-3"])

    def again():
        recommender.add_items([{"item_id": "item-3"}], embeddings([3]))

    without()
    again()  # now it stands at the end, and every removal and addition changes rows
    expected = [ask()]
    without()
    expected.append(ask())
    assert expected[0] != expected[1]
    again()
    assert ask() == expected[0]

    seen, stop = set(), []

    def reader(_):
        while not stop:
            seen.add(expected.index(ask()))

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(reader, number) for number in range(3)]
        try:
            rounds, deadline = 0, time.monotonic() + 60
            while (rounds < 15 or seen != {0, 1}) and time.monotonic() < deadline:
                without()
                if rounds % 3:  # readers aren't given a moment in every round
                    time.sleep(0.01)
                again()
                rounds += 1
        finally:
            stop.append(True)
        for one in readers:
            one.result()
    assert seen == {0, 1}


def test_changes_from_several_threads_are_all_made(tmp_path, item_tokenizer):
    recommender = make(tmp_path, item_tokenizer)

    def change(row):
        recommender.add_items([{"item_id": f"item-{row}"}], embeddings([row]))
        recommender.remove_items([f"item-{row - 30}"])

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(change, range(30, 40)))
    assert set(recommender.semantic_ids.item_ids) == set(ITEM_IDS[10:])
    assert recommender.items["item_id"][:] == list(recommender.semantic_ids.item_ids)
    assert recommender.semantic_ids.is_unique


def test_a_merged_recommender_has_the_catalogue_as_it_is(tmp_path, item_tokenizer):
    recommender = make(tmp_path, item_tokenizer)
    recommender.add_items(NEW, embeddings(range(30, 40)))
    merged = recommender.merge()
    _assert_same(merged.recommend(HISTORIES, k=40), recommender.recommend(HISTORIES, k=40))


def test_items_and_codes_in_another_order_are_refused(tmp_path):
    recommender = tiny.recommender(tmp_path)
    with pytest.raises(ItemOrderError, match="differ first at row 0"):
        Catalogue.of(recommender.semantic_ids, recommender.items.select([1, 0, *range(2, 30)]), recommender.task)


def test_titles_are_read_when_they_are_asked_for(tmp_path):
    recommender = tiny.recommender(tmp_path)
    catalogue = recommender.catalogue
    assert [catalogue.title(row) for row in (0, 1)] == ["", "Title of item-1"]
    assert catalogue.titles == tuple(f"Title of item-{row}" if row % 5 else "" for row in range(30))
    chosen = recommender.items.select(range(30)).map(lambda item: {"title": item["title"]})
    bare = replace(catalogue, items=chosen.select_columns(["item_id"]))
    assert bare.title(3) == ""
    assert bare.titles == ("",) * 30


def test_the_trie_is_copied_to_a_device_once(tmp_path):
    catalogue = tiny.recommender(tmp_path).catalogue
    assert catalogue.trie_on("cpu") is catalogue.trie
    with ThreadPoolExecutor(4) as pool:
        tries = list(pool.map(lambda _: catalogue.trie_on("meta"), range(20)))
    assert all(trie is tries[0] for trie in tries)
    assert tries[0].device.type == "meta"
