import pytest
from task_texts import CODE_TEXTS, HISTORIES

from llmrec.data.splits import leave_one_out
from llmrec.errors import SettingsError
from llmrec.tasks.preference import PREFERENCE, PreferenceSamples
from llmrec.tasks.source import TaskSource

TEXTS = {0: ["likes pens", "writes"], 2: ["camps"], 4: ["tea"]}  # of users u, w, y


def expected(user, history):
    shown = "".join(CODE_TEXTS[item] for item in history[-3:])
    return {(text.format(history=shown), f"{one}</s>") for text in PREFERENCE.prompts for one in TEXTS[user]}


def test_history_in_and_preference_out(make_source, read, check_lengths, caplog):
    with caplog.at_level("INFO", "llmrec"):
        samples = PreferenceSamples(make_source())
    assert "preference: 2 of 5 users have no preference text or no training history: skipped" in caplog.text
    assert len(samples) == samples.num_targets == 3
    assert samples.has_text_targets
    for number, user in enumerate(TEXTS):
        pairs = {read(samples.sample(number, epoch)) for epoch in range(300)}
        assert pairs == expected(user, HISTORIES[user])
    assert len(set(PREFERENCE.prompts)) >= 8
    check_lengths(samples)


def test_held_out_items_are_never_shown(make_task, make_train, read):
    """Of u's 0, 1, 2, 3, 0 the last two are test and validation; y's two items are both training."""
    train = leave_one_out(make_train()).train
    samples = PreferenceSamples(TaskSource(make_task(), train))
    assert {read(samples.sample(0, epoch)) for epoch in range(300)} == expected(0, [0, 1, 2])
    assert {read(samples.sample(2, epoch)) for epoch in range(300)} == expected(4, [3, 0])


def test_users_without_a_column_of_preferences(make_source):
    with pytest.raises(SettingsError, match=r"'preference' reads the column 'preferences' of the users, .* their IDs"):
        PreferenceSamples(make_source(users=None))
