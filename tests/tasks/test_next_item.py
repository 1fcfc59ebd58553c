from collections import Counter

import numpy as np
import pytest
import torch

from llmrec.data.splits import EvaluationSet
from llmrec.errors import SettingsError
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.tasks.next_item import (
    DEFAULT_TEMPLATE,
    TEMPLATES,
    NextItemTask,
    evaluation_samples,
    training_samples,
)
from llmrec.vocabulary import CodeVocabulary, add_code_rows

# Text tokens 0 to 15, so <a_0> is 16 and <b_0> is 18.
CODES = np.array([[0, 2], [1, 0], [1, 1], [0, 0]])
TOKENS = {0: [16, 20], 1: [17, 18], 2: [17, 19], 3: [16, 18]}
ITEMS, CHOSEN, COLON, NEXT = 4, 5, 12, 13  # "Items", "chosen", ":", "Next"
BEFORE = [ITEMS, CHOSEN, COLON]


def make_task(text_tokenizer, *, template="Items chosen : {history}", max_history=3):
    vocabulary = CodeVocabulary.add_to(text_tokenizer, (2, 3))
    return NextItemTask(
        text_tokenizer,
        vocabulary,
        SemanticIds(tuple("abcd"), CODES, (2, 3)),
        template=template,
        max_history=max_history,
    )


def item_tokens(*items):
    return [token for item in items for token in TOKENS[item]]


# Prompts


def test_a_prompt_by_hand(text_tokenizer):
    task = make_task(text_tokenizer)
    assert task.prompt([3, 0]) == [*BEFORE, 16, 18, 16, 20]
    assert all(type(token) is int for token in task.prompt([3, 0]))
    assert task.prompt(np.array([3, 0], dtype=np.int32)) == task.prompt([3, 0])


def test_a_prompt_shows_the_latest_items(text_tokenizer):
    task = make_task(text_tokenizer)
    assert task.prompt([0, 1, 2, 3, 0]) == BEFORE + item_tokens(2, 3, 0)
    assert task.prompt([1, 2, 3]) == BEFORE + item_tokens(1, 2, 3)


def test_an_empty_history(text_tokenizer):
    assert make_task(text_tokenizer).prompt([]) == BEFORE


def test_text_after_the_history_and_a_start_token(start_token_tokenizer):
    task = make_task(start_token_tokenizer, template="Items : {history} Next :")
    assert task.text_after_history
    assert task.prompt([1]) == [1, ITEMS, COLON, 17, 18, NEXT, COLON]  # <s> first, and once


def test_a_start_token_stands_before_a_template_without_text(start_token_tokenizer):
    assert make_task(start_token_tokenizer, template="{history}").prompt([1]) == [1, 17, 18]


def test_a_prompt_that_could_be_empty_is_refused(text_tokenizer):
    """Without a start token the first code would have nothing before it to be predicted from."""
    with pytest.raises(SettingsError, match="begin with some text"):
        make_task(text_tokenizer, template="{history}")


def test_settings_that_make_no_sense(text_tokenizer):
    vocabulary = CodeVocabulary.add_to(text_tokenizer, (2, 3))
    semantic_ids = SemanticIds(tuple("abcd"), CODES, (2, 3))
    for template in ("Items :", "{history} and {history}"):
        with pytest.raises(SettingsError, match="exactly once"):
            NextItemTask(text_tokenizer, vocabulary, semantic_ids, template=template)
    with pytest.raises(SettingsError, match="max_history is 0"):
        NextItemTask(text_tokenizer, vocabulary, semantic_ids, max_history=0)
    with pytest.raises(SettingsError, match=r"sizes \(2, 3\), the vocabulary \(3, 3\)"):
        NextItemTask(text_tokenizer, CodeVocabulary((3, 3), 16), semantic_ids)


# Training samples


def dataset_of(factories, *histories):
    import datasets

    from llmrec.data.interactions import InteractionDataset

    items = datasets.Dataset.from_dict({"item_id": list("abcd")})
    users = {"user_id": [f"user-{user}" for user in range(len(histories))], "items": [list(h) for h in histories]}
    return InteractionDataset(items, datasets.Dataset.from_dict(users))


def test_both_forms_by_hand(factories, text_tokenizer):
    task = make_task(text_tokenizer)
    train = dataset_of(factories, [3, 1, 2], [0], [2, 0])
    history = training_samples(task, train)
    assert list(history) == [
        {
            "input_ids": BEFORE + item_tokens(3, 1, 2),
            "labels": [-100] * 5 + item_tokens(1, 2),
        },
        {"input_ids": BEFORE + item_tokens(2, 0), "labels": [-100] * 5 + item_tokens(0)},
    ]
    prefix = training_samples(task, train, form="prefix")
    assert list(prefix) == [
        {"input_ids": BEFORE + item_tokens(3, 1), "labels": [-100] * 5 + item_tokens(1)},
        {"input_ids": BEFORE + item_tokens(3, 1, 2), "labels": [-100] * 7 + item_tokens(2)},
        {"input_ids": BEFORE + item_tokens(2, 0), "labels": [-100] * 5 + item_tokens(0)},
    ]
    assert history.num_targets == prefix.num_targets == 3
    with pytest.raises(IndexError, match="sample 2 of 2"):
        history[2]


def test_the_prefix_form_shows_the_latest_items(factories, text_tokenizer):
    task = make_task(text_tokenizer, template="Items : {history} Next :", max_history=2)
    samples = training_samples(task, dataset_of(factories, [0, 1, 2, 3]), form="prefix")
    last = samples[2]
    assert last["input_ids"] == [ITEMS, COLON, *item_tokens(1, 2), NEXT, COLON, *TOKENS[3]]
    assert last["labels"] == [-100] * 8 + TOKENS[3]


@pytest.mark.parametrize("form", ["history", "prefix"])
@pytest.mark.parametrize("template", ["Items chosen : {history}", "Items : {history} Next :"])
def test_lengths_are_those_of_the_samples(small_dataset, small_semantic_ids, text_tokenizer, form, template):
    vocabulary = CodeVocabulary.add_to(text_tokenizer, small_semantic_ids.codebook_sizes)
    task = NextItemTask(text_tokenizer, vocabulary, small_semantic_ids, template=template, max_history=3)
    if form == "history" and task.text_after_history:
        with pytest.raises(SettingsError, match=r"text after \{history\}"):
            training_samples(task, small_dataset, form=form)
        return
    samples = training_samples(task, small_dataset, form=form)
    assert samples.lengths().tolist() == [len(sample["input_ids"]) for sample in samples]
    assert samples.lengths().tolist() == [len(sample["labels"]) for sample in samples]
    assert len(set(samples.lengths().tolist())) > 2
    assert samples.num_targets == sum(
        sum(label != -100 for label in sample["labels"]) // vocabulary.num_levels for sample in samples
    )


@pytest.mark.parametrize("max_history", [1, 2, 3, 4, 5, 8, 20])
def test_every_item_but_the_first_is_a_target_once(text_tokenizer, max_history):
    """Every interaction here is with an item of its own, so a target is known by its item."""
    import datasets

    from llmrec.data.interactions import InteractionDataset

    lengths = [1, 2, 3, 4, 5, 6, 7, 9, 12, 17, 23, 30, 45]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    runs = [list(range(start, start + length)) for start, length in zip(starts[:-1], lengths, strict=True)]
    ids = [str(number) for number in range(starts[-1])]
    users = {"user_id": [str(user) for user in range(len(runs))], "items": runs}
    train = InteractionDataset(datasets.Dataset.from_dict({"item_id": ids}), datasets.Dataset.from_dict(users))
    semantic_ids = SemanticIds(tuple(ids), np.arange(len(ids))[:, None], (len(ids),))
    vocabulary = CodeVocabulary.add_to(text_tokenizer, (len(ids),))
    task = NextItemTask(text_tokenizer, vocabulary, semantic_ids, max_history=max_history)
    num_words = len(task.prompt([]))

    seen: Counter[int] = Counter()
    for sample in training_samples(task, train):
        items = (np.array(sample["input_ids"][num_words:]) - vocabulary.first_token_id).tolist()
        assert items == list(range(items[0], items[0] + len(items)))  # one run of one user, in order
        for position, label in enumerate(sample["labels"][num_words:]):
            if label == -100:
                continue
            item, context = items[position], position
            user = int(np.searchsorted(starts, item, side="right")) - 1
            before = item - int(starts[user])
            assert label == sample["input_ids"][num_words + position]
            assert items[0] >= starts[user]
            if before <= max_history:
                assert context == before  # all there is
            else:
                assert max_history / 2 <= context <= max_history
            seen[item] += 1
    expected = {item for run in runs for item in run[1:]}
    assert seen == Counter(expected)


def test_at_a_target_the_history_form_has_seen_exactly_the_prompt(factories, small_semantic_ids, text_tokenizer):
    """Up to `max_history + 1` items: tokens and logits at every target equal those of the prefix form."""
    vocabulary = CodeVocabulary.add_to(text_tokenizer, small_semantic_ids.codebook_sizes)
    task = NextItemTask(text_tokenizer, vocabulary, small_semantic_ids, max_history=5)
    train = factories.make_dataset((6, 4, 2))
    model = factories.make_tiny_model()
    add_code_rows(model, vocabulary)
    prefixes = iter(training_samples(task, train, form="prefix"))
    targets = 0
    for user, sample in enumerate(training_samples(task, train)):
        items = train.history(user)
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0]
        for number in range(1, len(items)):
            prefix = next(prefixes)
            prompt = task.prompt(items[:number])
            assert prefix["input_ids"][: len(prompt)] == sample["input_ids"][: len(prompt)] == prompt
            with torch.no_grad():
                alone = model(input_ids=torch.tensor([prefix["input_ids"]])).logits[0]
            rows = slice(len(prompt) - 1, len(prompt) - 1 + vocabulary.num_levels)
            torch.testing.assert_close(whole[rows], alone[rows], atol=1e-5, rtol=1e-5)
            labels = sample["labels"][len(prompt) : len(prompt) + vocabulary.num_levels]
            assert labels == prefix["labels"][len(prompt) :]
            targets += 1
    assert targets == 5 + 3 + 1
    assert next(prefixes, None) is None


def test_training_without_targets_is_refused(factories, text_tokenizer):
    task = make_task(text_tokenizer)
    with pytest.raises(SettingsError, match="nothing to predict"):
        training_samples(task, dataset_of(factories, [0], [1]))
    with pytest.raises(SettingsError, match="'packed' is not one of"):
        training_samples(task, dataset_of(factories, [0, 1]), form="packed")


# Evaluation samples


def test_evaluation_samples_by_hand(text_tokenizer):
    task = make_task(text_tokenizer, max_history=2)
    flat = np.array([0, 1, 2, 3], dtype=np.int32)
    examples = EvaluationSet(
        "test", ("u", "v", "w"), flat, np.array([0, 3, 3, 4]), np.array([3, 2, 0], dtype=np.int32)
    )
    samples = evaluation_samples(task, examples)
    assert list(samples) == [
        {"input_ids": BEFORE + item_tokens(1, 2, 3), "labels": [-100] * 7 + item_tokens(3)},
        {"input_ids": BEFORE + item_tokens(2), "labels": [-100] * 3 + item_tokens(2)},
        {"input_ids": BEFORE + item_tokens(3, 0), "labels": [-100] * 5 + item_tokens(0)},
    ]
    assert samples.lengths().tolist() == [9, 5, 7]
    assert samples.num_targets == 3


# Several templates, chats, encoder-decoder models

SHORT, LONG = "Items : {history}", "Items chosen by one person : {history}"


def make_task_of(text_tokenizer, **settings):
    vocabulary = CodeVocabulary.add_to(text_tokenizer, (2, 3))
    return NextItemTask(text_tokenizer, vocabulary, SemanticIds(tuple("abcd"), CODES, (2, 3)), **settings)


@pytest.mark.parametrize("form", ["history", "prefix"])
def test_training_draws_a_template_a_sample_and_epoch(factories, text_tokenizer, form):
    task = make_task_of(text_tokenizer, template=SHORT, templates=(LONG, SHORT), max_history=3)
    train = dataset_of(factories, *[[3, 1, 2]] * 50)
    samples = training_samples(task, train, form=form, seed=4)
    befores = {"short": [ITEMS, COLON], "long": text_tokenizer("Items chosen by one person :").input_ids}
    drawn = []
    for epoch in range(3):
        lengths = samples.lengths(epoch)
        for index in range(len(samples)):
            sample = samples.sample(index, epoch)
            assert len(sample["input_ids"]) == len(sample["labels"]) == lengths[index]
            (name,) = [name for name, before in befores.items() if sample["input_ids"][: len(before)] == before]
            drawn.append(name)
    counts = Counter(drawn)
    assert min(counts.values()) > len(drawn) / 3
    halves = drawn[: len(drawn) // 3], drawn[len(drawn) // 3 : 2 * len(drawn) // 3]
    assert halves[0] != halves[1]  # anew each epoch
    again = training_samples(task, train, form=form, seed=4)
    assert again.sample(7, 2) == samples.sample(7, 2)
    assert training_samples(task, train, form=form, seed=5).lengths(0).tolist() != samples.lengths(0).tolist()


def test_recommending_and_the_validation_loss_take_the_first_template(text_tokenizer):
    task = make_task_of(text_tokenizer, template=SHORT, templates=TEMPLATES, max_history=2)
    assert task.template == SHORT
    assert task.prompt([1]) == [ITEMS, COLON, *TOKENS[1]]
    flat = np.zeros(60, dtype=np.int32)
    examples = EvaluationSet("test", ("u",) * 30, flat, np.arange(31) * 2, np.ones(30, dtype=np.int32))
    samples = evaluation_samples(task, examples)
    assert {tuple(sample["input_ids"][:2]) for sample in samples} == {(ITEMS, COLON)}
    assert samples.lengths(0) is samples.lengths(3)


def test_one_template_draws_nothing(factories, text_tokenizer):
    samples = training_samples(make_task(text_tokenizer), dataset_of(factories, [3, 1, 2], [0, 1]))
    assert samples.lengths(0) is samples.lengths(1)
    assert samples.sample(1, 0) == samples.sample(1, 9)


def test_the_templates_can_all_have_the_history_form(byte_tokenizer):
    assert TEMPLATES[0] == DEFAULT_TEMPLATE
    assert len(set(TEMPLATES)) >= 12
    task = make_task_of(byte_tokenizer, templates=TEMPLATES)
    assert not task.text_after_history


def test_one_template_with_text_after_the_history_is_enough_to_be_refused(factories, text_tokenizer):
    task = make_task_of(text_tokenizer, template=SHORT, templates=("Items : {history} Next :",))
    with pytest.raises(SettingsError, match=r"text after \{history\}"):
        training_samples(task, dataset_of(factories, [0, 1]))


def test_a_chat_is_trained_as_it_recommends(factories, text_tokenizer):
    text_tokenizer.chat_template = "a {{ messages[0]['content'] }} Next :"
    task = make_task_of(text_tokenizer, template="Items : {history}", chat=True)
    assert task.prompt([1]) == [14, ITEMS, COLON, *TOKENS[1], NEXT, COLON]
    train = dataset_of(factories, [3, 1, 2])
    with pytest.raises(SettingsError, match="in a chat the assistant's turn begins after the history"):
        training_samples(task, train)
    samples = training_samples(task, train, form="prefix")
    assert samples.sample(1)["input_ids"] == task.prompt([3, 1]) + TOKENS[2]


def test_an_encoder_decoder_model(factories, start_token_tokenizer):
    task = make_task_of(start_token_tokenizer, template="{history}", encoder_decoder=True, max_history=2)
    end = start_token_tokenizer.eos_token_id
    assert task.prompt([0, 1, 2]) == [1, *item_tokens(1, 2), end]
    train = dataset_of(factories, [3, 1, 2])
    with pytest.raises(SettingsError, match="an encoder reads a sequence whole"):
        training_samples(task, train)
    samples = training_samples(task, train, form="prefix")
    assert samples.sample(1) == {"input_ids": task.prompt([3, 1]), "labels": TOKENS[2]}
    assert samples.lengths().tolist() == [6, 8]
