import pytest
from task_texts import CODE_TEXTS, HISTORIES, QUERIES

from llmrec.errors import DataError, SettingsError
from llmrec.tasks.item_search import (
    SEARCH,
    SEARCH_WITH_HISTORY,
    HistoryQuerySamples,
    QuerySamples,
    SearchPrompts,
    item_search_samples,
)


def test_a_query_alone(make_source, read, check_lengths, caplog):
    with caplog.at_level("INFO", "llmrec"):
        samples = QuerySamples(make_source())
    assert "item_search: 2 of 5 items have no queries: skipped" in caplog.text
    for number, item in enumerate((0, 1, 4)):
        pairs = {read(samples.sample(number, epoch)) for epoch in range(300)}
        prompts = {text.format(query=query) for text in SEARCH.prompts for query in QUERIES[item]}
        assert pairs == {(prompt, CODE_TEXTS[item]) for prompt in prompts}
    check_lengths(samples)


def test_a_query_with_a_history(make_source, read, check_lengths):
    samples = HistoryQuerySamples(make_source())
    users = [user for user, history in enumerate(HISTORIES) if any(QUERIES[item] for item in history[1:])]
    assert len(samples) == len(users) == 3
    for number, user in enumerate(users):
        history, expected = HISTORIES[user], set()
        for place in range(1, len(history)):
            shown = "".join(CODE_TEXTS[item] for item in history[max(0, place - 3) : place])
            for query in QUERIES[history[place]]:
                for text in SEARCH_WITH_HISTORY.prompts:
                    expected.add((text.format(history=shown, query=query), CODE_TEXTS[history[place]]))
        assert {read(samples.sample(number, epoch)) for epoch in range(600)} == expected
    check_lengths(samples)


def test_both_as_one(make_source, check_lengths):
    samples = item_search_samples(make_source())
    assert samples.name == "item_search"
    assert len(samples) == samples.num_targets == 3 + 3
    assert not samples.has_text_targets
    assert len(set(SEARCH.prompts)) >= 8
    assert len(set(SEARCH_WITH_HISTORY.prompts)) >= 8
    check_lengths(samples)


def test_items_without_a_column_of_queries(make_source):
    with pytest.raises(SettingsError, match=r"reads the column 'queries' of the items, .* item_id, title: .*queries_"):
        item_search_samples(make_source(columns=("title",)))


# Prompts of a search


def test_prompts_are_those_of_training(make_source, byte_tokenizer, read):
    source = make_source()
    vocabulary = source.task.vocabulary
    prompts = SearchPrompts(byte_tokenizer, vocabulary, source.frame)
    history = source.task.history_tokens([0, 1, 2, 3])
    alone, with_history = prompts.prompts(["blue ink", "red  ink"], [[], history])
    trained = [QuerySamples(source).sample(1, epoch)["input_ids"][:-2] for epoch in range(100)]
    assert alone in trained
    assert byte_tokenizer.decode(alone) == SEARCH.prompts[0].format(query="blue ink")
    trained = [HistoryQuerySamples(source).sample(0, epoch)["input_ids"][:-2] for epoch in range(400)]
    assert with_history in trained
    shown = "".join(CODE_TEXTS[item] for item in (1, 2, 3))
    assert byte_tokenizer.decode(with_history) == SEARCH_WITH_HISTORY.prompts[0].format(query="red ink", history=shown)


def test_no_query_writes_a_code(make_source, byte_tokenizer):
    source = make_source()
    prompts = SearchPrompts(byte_tokenizer, source.task.vocabulary, source.frame, template="find {query}")
    (ids,) = prompts.prompts(["a <a_1> b</s>"], [[]])
    assert byte_tokenizer.decode(ids) == "find a  b"


def test_searches_that_cannot_work(make_source, byte_tokenizer):
    source = make_source()
    arguments = (byte_tokenizer, source.task.vocabulary, source.frame)
    for query in ("", "  ", "<a_1>"):
        with pytest.raises(DataError, match="has no text to search for"):
            SearchPrompts(*arguments).prompts(["tea", query], [[], []])
    with pytest.raises(SettingsError, match="wasn't trained to search with one"):
        SearchPrompts(*arguments, history_template=None).prompts(["tea"], [[300]])
    assert SearchPrompts(*arguments, history_template=None).prompts(["tea"], [[]])
    with pytest.raises(SettingsError, match=r"needs \{query\} exactly once"):
        SearchPrompts(*arguments, template="find it")
