import pickle

import pytest

from llmrec.errors import SettingsError
from llmrec.tasks.next_item import NextItemSamples
from llmrec.tasks.registry import TASKS, build_samples, check_columns, read_tasks
from llmrec.tasks.source import TextColumns


def test_names_and_weights():
    assert read_tasks(["next_item", "item_to_codes:0.5", "fused:2"]) == {
        "next_item": 1.0,
        "item_to_codes": 0.5,
        "fused": 2.0,
    }


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "give a list of names, of next_item, item_to_codes"),
        ("next_item", "give a list of names"),
        (["next"], "no task 'next'; the tasks are next_item, item_to_codes, codes_to_item, fused, item_search, pref"),
        (["fused", "fused:2"], "'fused' stands twice"),
        (["fused:"], "'fused:' has the weight ''"),
        (["fused:a"], "has the weight 'a'"),
        (["fused:0"], "has the weight '0'"),
        (["fused:-1"], "has the weight '-1'"),
        (["fused:nan"], "has the weight 'nan'"),
    ],
)
def test_entries_that_make_no_sense(tasks, message):
    with pytest.raises(SettingsError, match=message):
        read_tasks(tasks)


def test_one_task_alone(make_task, make_train):
    samples = build_samples(["next_item"], make_task(), make_train())
    assert isinstance(samples, NextItemSamples)
    assert samples.form == "history"
    assert build_samples(["next_item"], make_task(), make_train(), form="prefix").form == "prefix"


def test_all_six_as_one(make_task, make_train, check_lengths, caplog):
    with caplog.at_level("INFO", "llmrec"):
        samples = build_samples([*TASKS[:1], *(f"{name}:0.5" for name in TASKS[1:])], make_task(), make_train())
    assert len(samples) == 5 + 2 + 2 + round(9 / 2) + 3 + round(3 / 2)
    assert "item_to_codes: 4 samples, weight 0.5" in caplog.text
    check_lengths(samples)
    assert samples.has_text_targets
    assert samples.name.startswith("next_item:1, item_to_codes:0.5, codes_to_item:0.5")


def test_a_weight_of_a_single_task_counts(make_task, make_train):
    alone = build_samples(["item_to_codes"], make_task(), make_train())
    assert len(build_samples(["item_to_codes:2"], make_task(), make_train())) == 2 * len(alone)


def test_columns_can_have_other_names(make_task, make_train, read):
    columns = TextColumns(title="item_id", description="none", queries="title", preferences="preferences")
    samples = build_samples(["codes_to_item"], make_task(), make_train(), columns=columns)
    assert [read(sample)[1] for sample in samples] == ["a</s>", "b</s>", "c</s>", "d</s>", "e</s>"]
    assert len(build_samples(["item_search"], make_task(), make_train(), columns=columns)) > 4


def test_what_is_missing_is_named(make_task, make_train):
    train = make_train(columns=("title",), users=None)
    with pytest.raises(SettingsError, match="column 'queries' of the items, which have only item_id, title"):
        build_samples(["next_item", "item_search"], make_task(), train)
    with pytest.raises(SettingsError, match="column 'preferences' of the users, which have only their IDs"):
        build_samples(["preference"], make_task(), train)
    with pytest.raises(SettingsError, match="max_text_tokens is 0"):
        build_samples(["codes_to_item"], make_task(), train, max_text_tokens=0)


def test_missing_columns_are_found_without_a_task(make_train):
    check_columns(TASKS, make_train())
    check_columns(["fused:2"], make_train(columns=("description",)))
    check_columns(["next_item"], make_train(columns=(), users=None))
    bare = make_train(columns=(), users=None)
    for name in TASKS[1:]:
        with pytest.raises(SettingsError, match=f"the task '{name}' reads the column"):
            check_columns(["next_item", f"{name}:0.5"], bare)
    check_columns(["item_search"], make_train(columns=("title",)), TextColumns(queries="title"))
    with pytest.raises(SettingsError, match="no task 'x'"):
        check_columns(["x"], bare)


def test_another_catalogue_is_refused(make_task, factories):
    with pytest.raises(SettingsError, match="codes of 5 items, the data set has 12"):
        build_samples(["next_item"], make_task(), factories.make_dataset())


def test_samples_can_be_sent_to_other_processes(make_task, make_train):
    samples = build_samples(list(TASKS), make_task(), make_train(), seed=5)
    sent = pickle.loads(pickle.dumps(samples))
    assert [sent.sample(index, 2) for index in range(len(sent))] == [
        samples.sample(index, 2) for index in range(len(samples))
    ]


def test_an_encoder_decoder_model(make_task, make_train):
    task = make_task(encoder_decoder=True)
    samples = build_samples(list(TASKS), task, make_train(), form="prefix")
    for index in range(len(samples)):
        sample = samples.sample(index, 1)
        assert sample["input_ids"][-1] == task.frame.text_tokenizer.eos_token_id
        assert -100 not in sample["labels"]
        assert samples.lengths(1)[index] == len(sample["input_ids"]) + len(sample["labels"])
    with pytest.raises(SettingsError, match="an encoder reads a sequence whole"):
        build_samples(["next_item"], task, make_train())
