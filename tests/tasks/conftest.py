"""What the samples of tasks are made of in tests: the catalogue of tests/task_texts.py, and tokens that are bytes."""

import datasets
import numpy as np
import pytest
from task_texts import CODES, HISTORIES, ITEMS, USERS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmrec.data.interactions import InteractionDataset
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.tasks.next_item import NextItemTask
from llmrec.tasks.source import TaskSource
from llmrec.vocabulary import CodeVocabulary


@pytest.fixture
def byte_tokenizer():
    """Every byte is a token; `<unk>`, `<s>`, `</s>` and `<pad>` are special, and no start token is added."""
    vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>", "<pad>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def make_task(byte_tokenizer):
    """`make_task(**settings)`: next-item prediction of the five items."""

    def make(**settings):
        known = len(byte_tokenizer) > 260
        find = CodeVocabulary.from_tokenizer if known else CodeVocabulary.add_to
        vocabulary = find(byte_tokenizer, (2, 3))
        return NextItemTask(
            byte_tokenizer,
            vocabulary,
            SemanticIds(tuple("abcde"), CODES, (2, 3)),
            **{"template": "Items: {history}", "max_history": 3, **settings},
        )

    return make


@pytest.fixture
def make_train():
    """`make_train(columns, histories, users)`: the training part, of some columns of the items."""

    def make(columns=("title", "description", "queries"), histories=HISTORIES, users=USERS):
        items = {name: ITEMS[name] for name in ("item_id", *columns)}
        if "queries" in items:  # a column has one type
            items["queries"] = [[entry] if isinstance(entry, str) else entry for entry in items["queries"]]
        if "description" in items:
            items["description"] = [[e] if isinstance(e, str) else e for e in items["description"]]
        table = {"user_id": list("uvwxyz"[: len(histories)]), "items": [list(history) for history in histories]}
        data = InteractionDataset(datasets.Dataset.from_dict(items), datasets.Dataset.from_dict(table))
        if users is None:
            return data
        texts = [[entry] if isinstance(entry, str) else entry for entry in users["preferences"]]
        return data.with_user_columns({**users, "preferences": texts})

    return make


@pytest.fixture
def make_source(make_task, make_train):
    """`make_source(columns=..., histories=..., max_text_tokens=..., seed=..., **settings of the task)`."""

    def make(columns=("title", "description", "queries"), histories=HISTORIES, users=USERS, **settings):
        own = {name: settings.pop(name) for name in ("seed", "max_text_tokens") if name in settings}
        return TaskSource(make_task(**settings), make_train(columns, histories, users), **own)

    return make


@pytest.fixture
def read(byte_tokenizer):
    """`read(sample)`: its prompt and its target, as text."""

    def read(sample):
        ids, labels = sample["input_ids"], sample["labels"]
        if len(ids) != len(labels) or labels[0] != -100:  # an encoder-decoder model's
            return byte_tokenizer.decode(ids), byte_tokenizer.decode(labels)
        start = next(place for place, label in enumerate(labels) if label != -100)
        assert all(label == -100 for label in labels[:start])
        assert labels[start:] == ids[start:]
        return byte_tokenizer.decode(ids[:start]), byte_tokenizer.decode(labels[start:])

    return read


@pytest.fixture
def check_lengths():
    """`check_lengths(samples, epochs=3)`: lengths are those of the samples, in each epoch."""

    def check(samples, epochs=3):
        for epoch in range(epochs):
            found = [len(samples.sample(index, epoch)["input_ids"]) for index in range(len(samples))]
            lengths = samples.lengths(epoch)
            assert lengths.dtype == np.int64
            assert lengths.tolist() == found
        with pytest.raises(IndexError, match=f"sample {len(samples)} of {len(samples)}"):
            samples.sample(len(samples))

    return check
