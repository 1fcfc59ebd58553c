import re

import pytest
from task_texts import CODE_TEXTS, DESCRIPTIONS, HISTORIES, TITLES

from llmrec.errors import SettingsError
from llmrec.tasks.fused import FROM_TITLES, NEXT_DESCRIPTION, NEXT_TITLE, FromTitlesSamples, fused_samples

MAX_HISTORY = 3


def codes(items):
    return "".join(CODE_TEXTS[item] for item in items)


def pairs_of_next_text(kind, texts):
    """For each user, the prompts and targets there can be: every item with a text after another one."""
    users = []
    for history in HISTORIES:
        pairs = set()
        for place in range(1, len(history)):
            if texts[history[place]]:
                shown = codes(history[max(0, place - MAX_HISTORY) : place])
                pairs |= {(text.format(history=shown), f"{texts[history[place]]}</s>") for text in kind.prompts}
        users.append(pairs)
    return [pairs for pairs in users if pairs]


@pytest.mark.parametrize(("part", "kind", "texts"), [(0, NEXT_TITLE, TITLES), (2, NEXT_DESCRIPTION, DESCRIPTIONS)])
def test_codes_in_and_text_out(make_source, read, check_lengths, part, kind, texts):
    samples = fused_samples(make_source())._parts[part].task
    expected = pairs_of_next_text(kind, texts)
    assert len(samples) == samples.num_targets == len(expected)
    for number, pairs in enumerate(expected):
        assert {read(samples.sample(number, epoch)) for epoch in range(400)} == pairs
    assert samples.has_text_targets
    check_lengths(samples)


def test_titles_in_and_codes_out(make_source, read, check_lengths):
    samples = fused_samples(make_source())._parts[1].task
    assert isinstance(samples, FromTitlesSamples)
    expected = []
    for history in HISTORIES:
        pairs = set()
        for place in range(1, len(history)):
            shown = [TITLES[item] for item in history[max(0, place - MAX_HISTORY) : place] if TITLES[item]]
            titles = "".join(f"\n- {title}" for title in shown)
            if shown:
                pairs |= {(text.format(titles=titles), CODE_TEXTS[history[place]]) for text in FROM_TITLES.prompts}
        if pairs:
            expected.append(pairs)
    assert len(expected) == len(samples) == 2  # the others have no title before an item
    for number, pairs in enumerate(expected):
        assert {read(samples.sample(number, epoch)) for epoch in range(400)} == pairs
    assert not samples.has_text_targets
    check_lengths(samples)


def test_all_three_kinds_as_one(make_source, check_lengths, read, caplog):
    with caplog.at_level("INFO", "llmrec"):
        samples = fused_samples(make_source())
    assert samples.name == "fused"
    assert len(samples) == samples.num_targets == 4 + 2 + 3
    check_lengths(samples)
    assert samples.has_text_targets
    assert "fused next title: 1 of 5 users have no second item with a title: skipped" in caplog.text
    for kind in (NEXT_TITLE, NEXT_DESCRIPTION, FROM_TITLES):
        assert len(set(kind.prompts)) >= 8


def test_targets_change_from_epoch_to_epoch(make_source, read):
    samples = fused_samples(make_source(columns=("title",)))
    targets = {read(samples.sample(0, epoch))[1] for epoch in range(50)}
    assert targets == {"Blue pen</s>", "Tent</s>", "Red pen</s>"}
    assert samples.sample(0, 7) == fused_samples(make_source(columns=("title",))).sample(0, 7)


def test_a_kind_whose_column_is_missing_is_left_out(make_source, caplog):
    with caplog.at_level("INFO", "llmrec"):
        assert len(fused_samples(make_source(columns=("title",)))) == 4 + 2
    assert "fused: the items have no column 'description'; titles only" in caplog.text
    assert len(fused_samples(make_source(columns=("description",)))) == 3
    with pytest.raises(SettingsError, match="reads the column 'title'"):
        fused_samples(make_source(columns=()))


def test_nothing_after_a_first_item_is_refused(make_source):
    with pytest.raises(SettingsError, match="all 2 users have no second item with a title"):
        fused_samples(make_source(histories=[[0], [2, 2]], users=None))


def test_an_encoder_decoder_model(make_source, byte_tokenizer):
    samples = fused_samples(make_source(encoder_decoder=True))
    for index in range(len(samples)):
        sample = samples.sample(index)
        assert -100 not in sample["labels"]
        assert sample["input_ids"][-1] == byte_tokenizer.eos_token_id
        assert samples.lengths()[index] == len(sample["input_ids"]) + len(sample["labels"])
        assert not re.search("</s>.", byte_tokenizer.decode(sample["input_ids"]))
