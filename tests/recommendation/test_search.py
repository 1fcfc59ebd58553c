import json

import datasets
import pytest
import tiny
import torch

from llmrec.data.interactions import InteractionDataset
from llmrec.errors import DataError, SettingsError, UnknownItemError
from llmrec.recommender import Recommender
from llmrec.tasks.collator import RowCollator
from llmrec.tasks.item_search import SEARCH, QuerySamples, SearchPrompts
from llmrec.tasks.next_item import NextItemTask
from llmrec.tasks.source import TaskSource

ALONE, WITH_HISTORY = "Next item : {query} :", "Items : {history} one {query} Next"


@pytest.fixture
def recommender(tmp_path):
    return tiny.recommender(tmp_path, search_template=ALONE, search_history_template=WITH_HISTORY)


def expected(recommender, query, history=()):
    """Item IDs and scores of all items, best first, each by a plain forward."""
    rows = [int(item.removeprefix("item-")) for item in history]
    codes = recommender.task.history_tokens(rows)
    tokenizer = recommender.text_tokenizer
    template = WITH_HISTORY if history else ALONE
    before, after = template.split("{query}")
    ids = tokenizer(query).input_ids + tokenizer(after).input_ids
    if history:
        ids = [*tokenizer("Items :").input_ids, *codes, *tokenizer("one").input_ids, *ids]
    else:
        ids = tokenizer(before).input_ids + ids
    scores = tiny.exhaustive_scores(
        recommender.model,
        ids,
        recommender.semantic_ids.codes,
        recommender.trie,
        recommender.vocabulary,
        recommender.config.scope,
    )
    order = scores.argsort(descending=True).tolist()
    return [(f"item-{row}", scores[row].item()) for row in order]


def found(answer):
    return [(item.item_id, item.score) for item in answer]


def assert_same(answer, wanted):
    assert [item_id for item_id, _ in found(answer)] == [item_id for item_id, _ in wanted]
    for (_, score), (_, exact) in zip(found(answer), wanted, strict=True):
        assert score == pytest.approx(exact, abs=1e-4)


def test_a_model_that_learned_queries_finds_their_items(tmp_path):
    """From samples of the task to answers: after some steps each query finds its item, with every template."""
    recommender = tiny.recommender(tmp_path, kind="rows", search_template=SEARCH.prompts[0])
    queries = [f"{word} {other}" for word in tiny.WORDS[:6] for other in tiny.WORDS[5:]]
    items = {"item_id": list(recommender.semantic_ids.item_ids), "queries": queries}
    histories = {"user_id": ["u"], "items": [[0, 1]]}
    train = InteractionDataset(datasets.Dataset.from_dict(items), datasets.Dataset.from_dict(histories))
    samples = QuerySamples(TaskSource(recommender.task, train))
    collator, model = RowCollator(pad_token_id=2), recommender.model
    optimizer = torch.optim.Adam([parameter.requires_grad_() for parameter in model.parameters()], lr=0.005)
    for epoch in range(120):
        batch = collator([samples.sample(index, epoch) for index in range(len(samples))])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    answers = recommender.search(queries, k=1)
    right = [answer[0].item_id == item for answer, item in zip(answers, items["item_id"], strict=True)]
    assert sum(right) >= 27  # of 30


def test_a_query_finds_what_the_model_scores_highest(recommender):
    assert_same(recommender.search("oldest person", k=30), expected(recommender, "oldest person"))
    other = expected(recommender, "first , chosen")
    assert other != expected(recommender, "oldest person")
    assert_same(recommender.search("first , chosen", k=5, num_beams=30), other[:5])


def test_a_history_changes_the_answer_and_is_left_out_of_it(recommender):
    history = ["item-3", "item-8"]
    wanted = expected(recommender, "oldest", history)
    assert_same(recommender.search("oldest", k=30, history=history, exclude_seen=False), wanted)
    left = [entry for entry in wanted if entry[0] not in history]
    assert_same(recommender.search("oldest", k=28, history=history), left)
    assert wanted != expected(recommender, "oldest")


def test_many_queries_are_answered_as_each_alone(recommender):
    queries, histories = ["oldest person", "first", "chosen by"], [["item-1"], [], ["item-2", "item-9"]]
    together = recommender.search(queries, k=6, history=histories)
    alone = [recommender.search(query, k=6, history=of) for query, of in zip(queries, histories, strict=True)]
    for one, many in zip(alone, together, strict=True):
        assert_same(many, found(one))
    assert_same(recommender.search(queries, k=6)[1], found(recommender.search("first", k=6)))


def test_filters(recommender):
    allowed = [f"item-{row}" for row in range(6)]
    answer = recommender.search("first", k=10, allow=allowed, deny=["item-2"])
    assert {item.item_id for item in answer} == set(allowed) - {"item-2"}
    by_query = recommender.search(["first", "one"], k=3, allow=[["item-1"], None])
    assert [item.item_id for item in by_query[0]] == ["item-1"]
    assert len(by_query[1]) == 3
    history = ["item-3", "gone"]
    with pytest.raises(UnknownItemError):
        recommender.search("first", history=history)
    assert recommender.search("first", history=history, on_unknown="skip")


def test_searches_that_cannot_work(recommender, tmp_path):
    with pytest.raises(SettingsError, match="was not trained to search"):
        tiny.recommender(tmp_path / "other").search("first")
    with pytest.raises(SettingsError, match="wasn't trained to search with one"):
        tiny.recommender(tmp_path / "third", search_template=ALONE).search("first", history=["item-1"])
    for query in (3, None, ["first", 4]):
        with pytest.raises(DataError, match=r"is a \w+: pass a text"):
            recommender.search(query)
    with pytest.raises(DataError, match="no text to search for"):
        recommender.search(["first", " "])
    with pytest.raises(SettingsError, match="one query with 1 histories"):
        recommender.search("first", history=[["item-1"]])
    with pytest.raises(SettingsError, match="2 queries with one history"):
        recommender.search(["first", "one"], history=["item-1"])
    with pytest.raises(SettingsError, match="2 queries with 3 histories"):
        recommender.search(["first", "one"], history=[[], [], []])


def test_a_saved_recommender_searches_alike(recommender, tmp_path):
    recommender.save_pretrained(tmp_path / "saved")
    loaded = Recommender.from_pretrained(tmp_path / "saved", device="cpu")
    assert loaded.config.search_template == ALONE
    for history in (None, ["item-4"]):
        wanted = recommender.search("first one", k=9, history=history)
        assert_same(loaded.search("first one", k=9, history=history), found(wanted))
    merged = recommender.merge()
    assert_same(merged.search("first one", k=9), found(recommender.search("first one", 9)))


def test_items_that_were_added_or_removed(recommender):
    best = recommender.search("first one", k=2)
    recommender.remove_items([best[0].item_id])
    assert recommender.search("first one", k=1)[0].item_id == best[1].item_id


def test_a_folder_of_before_searches_were_there_still_loads(recommender, tmp_path):
    recommender.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "recommender_config.json"
    content = json.loads(path.read_text())
    for name in ("search_template", "search_history_template", "chat"):
        del content[name]
    path.write_text(json.dumps(content))
    loaded = Recommender.from_pretrained(tmp_path / "saved", device="cpu")
    assert_same(loaded.recommend(["item-1"], k=5), found(recommender.recommend(["item-1"], k=5)))
    with pytest.raises(SettingsError, match="was not trained to search"):
        loaded.search("first")


def test_a_chat_is_kept_by_the_folder(tmp_path):
    plain = tiny.recommender(tmp_path)
    plain.text_tokenizer.chat_template = "{{ messages[0]['content'] }}</s>Next :"
    task = NextItemTask(plain.text_tokenizer, plain.vocabulary, plain.semantic_ids, max_history=4, chat=True)
    parts = (plain.model, plain.text_tokenizer, plain.semantic_ids, plain.vocabulary, plain.items, task)
    with pytest.raises(SettingsError, match="chat is False in the config, True in the task"):
        Recommender(*parts, plain.config)
    config = type(plain.config)(
        **{**vars(plain.config), "chat": True, "search_template": ALONE, "search_history_template": WITH_HISTORY}
    )
    chat = Recommender(*parts, config)
    chat.save_pretrained(tmp_path / "saved")
    loaded = Recommender.from_pretrained(tmp_path / "saved", device="cpu")
    prompt = loaded.task.prompt([1])
    assert prompt == task.prompt([1]) != plain.task.prompt([1])
    assert_same(loaded.recommend(["item-1"], k=5), found(chat.recommend(["item-1"], k=5)))
    assert_same(loaded.search("first", k=5), found(chat.search("first", k=5)))
    frame = SearchPrompts(plain.text_tokenizer, plain.vocabulary, plain.task.frame, template=ALONE)
    chat_frame = SearchPrompts(plain.text_tokenizer, plain.vocabulary, task.frame, template=ALONE)
    assert frame.prompts(["first"], [[]]) != chat_frame.prompts(["first"], [[]])


def test_a_chat_without_its_template_is_refused(tmp_path):
    recommender = tiny.recommender(tmp_path)
    recommender.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "recommender_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat": True}))
    with pytest.raises(SettingsError, match="no chat template"):
        Recommender.from_pretrained(tmp_path / "saved", device="cpu")
