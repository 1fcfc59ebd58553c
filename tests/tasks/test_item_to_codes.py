from collections import Counter

import numpy as np
import pytest
from task_texts import CODE_TEXTS, DESCRIPTIONS, TITLES, fillings

from llmrec.errors import SettingsError
from llmrec.tasks.item_to_codes import KINDS, item_to_codes_samples

WITH_TEXT = [0, 1, 2, 3]


def test_every_template_of_what_an_item_has_is_drawn(make_source, read):
    """Over many epochs, an item shows all prompts of its texts and no other; the target is its codes."""
    samples = item_to_codes_samples(make_source())
    assert len(samples) == samples.num_targets == len(WITH_TEXT)
    assert not samples.has_text_targets
    for number, item in enumerate(WITH_TEXT):
        read_in = [read(samples.sample(number, epoch)) for epoch in range(300)]
        assert {target for _, target in read_in} == {CODE_TEXTS[item]}
        expected = fillings(KINDS, title=TITLES[item], description=DESCRIPTIONS[item])
        assert {prompt for prompt, _ in read_in} == expected
        counts = Counter(prompt for prompt, _ in read_in)
        assert max(counts.values()) < 4 * 300 / len(expected)


def test_lengths_and_kinds(make_source, check_lengths):
    check_lengths(item_to_codes_samples(make_source()))
    assert all(len(kind.prompts) >= 8 for kind in KINDS)
    assert len({text for kind in KINDS for text in kind.prompts}) == sum(len(kind.prompts) for kind in KINDS)


def test_draws_depend_on_seed_epoch_and_item_alone(make_source):
    samples, again = item_to_codes_samples(make_source(seed=3)), item_to_codes_samples(make_source(seed=3))
    later = [again.sample(index, 5) for index in range(4)]
    for epoch in range(5):  # another order of reading
        assert list(samples) == [samples.sample(index) for index in range(4)]
        samples.lengths(epoch)
    assert [samples.sample(index, 5) for index in range(4)] == later
    other = item_to_codes_samples(make_source(seed=4))
    assert any(other.sample(index, epoch) != samples.sample(index, epoch) for index in range(4) for epoch in range(5))


def test_items_without_text_are_skipped_and_counted(make_source, caplog, read):
    with caplog.at_level("INFO", "llmrec"):
        samples = item_to_codes_samples(make_source(columns=("title",)))
    assert "item_to_codes: 2 of 5 items have no title and no description: skipped" in caplog.text
    assert [read(sample)[1] for sample in samples] == [CODE_TEXTS[item] for item in (0, 1, 3)]
    prompts = {read(samples.sample(0, epoch))[0] for epoch in range(100)}
    assert prompts == fillings(KINDS[:1], title="Red pen")


def test_descriptions_alone(make_source, read):
    samples = item_to_codes_samples(make_source(columns=("description",)))
    assert {read(samples.sample(1, epoch))[0] for epoch in range(100)} == fillings(
        KINDS[2:], description=DESCRIPTIONS[2]
    )


def test_a_catalogue_without_texts_is_refused(make_source):
    with pytest.raises(SettingsError, match=r"'item_to_codes' reads the column 'title' .* only item_id, queries"):
        item_to_codes_samples(make_source(columns=("queries",)))


def test_long_texts_are_cut(make_source, read, caplog):
    with caplog.at_level("INFO", "llmrec"):
        samples = item_to_codes_samples(make_source(max_text_tokens=4))
    assert "title: 2 of 3 texts are cut at 4 tokens" in caplog.text
    assert {read(samples.sample(1, epoch))[0] for epoch in range(100)} == fillings(KINDS[:1], title="Blue")


def test_an_encoder_decoder_model(make_source, byte_tokenizer):
    source = make_source(encoder_decoder=True)
    samples = item_to_codes_samples(source)
    sample = samples.sample(3, 7)
    assert sample["labels"] == source.task.item_tokens[3].tolist()
    assert sample["input_ids"][-1] == byte_tokenizer.eos_token_id
    assert byte_tokenizer.decode(sample["input_ids"][:-1]) in fillings(KINDS[:1], title="Tent")
    assert samples.lengths(7)[3] == len(sample["input_ids"]) + 2


def test_a_chat(make_source, byte_tokenizer, read):
    byte_tokenizer.chat_template = "[user]{{ messages[0]['content'] }}[assistant]"
    samples = item_to_codes_samples(make_source(chat=True))
    prompt, target = read(samples.sample(3, 7))
    assert target == CODE_TEXTS[3]
    assert prompt.startswith("[user]")
    assert prompt.endswith("[assistant]")
    assert prompt[6:-11] in {text.strip() for text in fillings(KINDS[:1], title="Tent")}


def test_titles_that_hold_codes_and_special_tokens_are_words(make_source, monkeypatch):
    import task_texts

    monkeypatch.setitem(task_texts.ITEMS, "title", ["Pen <a_0><b_1>", "</s> <pad> cup", None, "Tent", None])
    source = make_source(columns=("title",))
    samples = item_to_codes_samples(source)
    first = source.task.vocabulary.first_token_id
    for epoch in range(20):
        for sample in (samples.sample(index, epoch) for index in range(3)):
            ids = np.array(sample["input_ids"])
            assert np.flatnonzero(ids >= 256).tolist() == [len(ids) - 2, len(ids) - 1]  # the target's codes alone
            assert (ids[-2:] >= first).all()
