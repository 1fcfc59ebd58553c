"""The next-item task: a history of items in, the code tokens of the next item out.

A prompt is a sentence with the code tokens of the history in it. Text and codes are joined as token IDs, never as
text, so no merge of the text tokenizer can cross from one into the other. The target is the L code tokens of the next
item and nothing more: every item has exactly L of them, so an end-of-sequence token would be certain, and cost a
decode step (LETTER and LC-Rec train one; here the search stops by itself).

Two forms of training samples, which teach the same targets:

* `history` (the default) reads a user's sequence once and learns every item in it from the items before. At the
  position of a target the model has seen exactly the prompt it will see when it recommends.
* `prefix` makes one sample for every target (LC-Rec, LETTER): about six times the tokens on Amazon Beauty, but the
  template may have text after the history.
"""

import copy
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import EvaluationSet
from llmrec.errors import SettingsError
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.vocabulary import CodeVocabulary

DEFAULT_TEMPLATE = "Items chosen by one person, oldest first: {history}"
FORMS = ("history", "prefix")


class NextItemTask:
    """Makes prompts and training samples of next-item prediction.

    Args:
        text_tokenizer: With the code tokens in it.
        vocabulary: Where they are.
        semantic_ids: Codes of the catalogue, unique or not.
        template: Text with "{history}" in it exactly once.
        max_history: The latest items of a history that a prompt shows (LETTER and LC-Rec: 20).

    Raises:
        SettingsError: The template has no or several "{history}", or leaves the prompt of an empty history empty;
            `max_history` is below 1; the codes and the vocabulary have different levels.
    """

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerBase,
        vocabulary: CodeVocabulary,
        semantic_ids: SemanticIds,
        *,
        template: str = DEFAULT_TEMPLATE,
        max_history: int = 20,
    ):
        if template.count("{history}") != 1:
            raise SettingsError(f"a template needs {{history}} exactly once, got {template!r}")
        if max_history < 1:
            raise SettingsError(f"max_history is {max_history}; a prompt shows at least 1 item")
        _check_same_sizes(semantic_ids, vocabulary)
        self.template = template
        self.max_history = max_history
        self.vocabulary = vocabulary
        before, after = template.split("{history}")
        self._before = _text_ids(text_tokenizer, before, first=True)
        self._after = _text_ids(text_tokenizer, after, first=False)
        if not self._before and not self._after:
            raise SettingsError(
                f"with the template {template!r} and a text tokenizer that adds no start token, the prompt of an empty"
                " history is empty; begin with some text"
            )
        self._item_tokens = vocabulary.token_ids(semantic_ids.codes)  # [N, L]

    def with_semantic_ids(self, semantic_ids: SemanticIds) -> "NextItemTask":
        """The same task for other items of the same codes: those of a catalogue that items joined or left.

        Raises:
            SettingsError: The codes have other codebook sizes.
        """
        _check_same_sizes(semantic_ids, self.vocabulary)
        task = copy.copy(self)
        task._item_tokens = self.vocabulary.token_ids(semantic_ids.codes)
        return task

    @property
    def text_after_history(self) -> bool:
        """Whether the template goes on after the history, which the `history` form can't have."""
        return bool(self._after)

    def prompt(self, history: Sequence[int] | np.ndarray) -> list[int]:
        """Token IDs that end right where the next item's codes begin.

        Args:
            history: Catalogue rows, oldest first; the latest `max_history` are shown. May be empty: the prompt is then
                the template without items, and the model answers with what it holds likely for anyone.
        """
        shown = np.asarray(history, dtype=np.int64)[-self.max_history :]
        return [*self._before, *self._item_tokens[shown].ravel().tolist(), *self._after]

    def prefix_sample(self, history: np.ndarray, target: int) -> dict[str, list[int]]:
        """One sample of the `prefix` form: `input_ids`, and `labels` that are -100 but for the target's L codes."""
        prompt, codes = self.prompt(history), self._item_tokens[target].tolist()
        return {"input_ids": prompt + codes, "labels": [-100] * len(prompt) + codes}

    def history_sample(self, items: np.ndarray, num_targets: int) -> dict[str, list[int]]:
        """One sample of the `history` form.

        Args:
            items: Up to `max_history + 1` catalogue rows, oldest first.
            num_targets: How many of them, counted from the last, are learned.
        """
        codes = self._item_tokens[items].ravel().tolist()
        num_labels = num_targets * self.vocabulary.num_levels
        ignored = len(self._before) + len(codes) - num_labels
        return {"input_ids": self._before + codes, "labels": [-100] * ignored + codes[len(codes) - num_labels :]}


def _check_same_sizes(semantic_ids: SemanticIds, vocabulary: CodeVocabulary) -> None:
    if tuple(semantic_ids.codebook_sizes) != vocabulary.codebook_sizes:
        raise SettingsError(
            f"the semantic IDs have codebooks of sizes {tuple(semantic_ids.codebook_sizes)}, the vocabulary"
            f" {vocabulary.codebook_sizes}; add the code tokens of these semantic IDs"
        )


def _text_ids(text_tokenizer: PreTrainedTokenizerBase, text: str, *, first: bool) -> list[int]:
    """Token IDs of a piece of the template; the tokenizer's own start token stands before the first piece."""
    ids = text_tokenizer(text, add_special_tokens=False).input_ids if text else []
    if first and text_tokenizer.bos_token_id is not None and _adds_start_token(text_tokenizer):
        ids = [text_tokenizer.bos_token_id, *ids]
    return [int(token_id) for token_id in ids]


def _adds_start_token(text_tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = text_tokenizer("a").input_ids
    return bool(ids) and ids[0] == text_tokenizer.bos_token_id


class NextItemSamples(Dataset):
    """The training samples of a task, made when they are read.

    Args:
        task: Makes the samples.
        sequences: (items, num_targets) for each sample: the catalogue rows, oldest first, and how many of them, from
            the last, are targets. Made by `training_samples` and `evaluation_samples`.
        form: "history" or "prefix".
    """

    def __init__(self, task: NextItemTask, sequences: "_Sequences", form: str):
        self.task = task
        self.form = form
        self._sequences = sequences
        # one code per level an item, and the text around them
        num_tokens = sequences.lengths * task.vocabulary.num_levels
        self.lengths: list[int] = (num_tokens + len(task._before) + len(task._after)).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_targets(self) -> int:
        """Number of items that one epoch teaches."""
        return int(self._sequences.num_targets.sum())

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        items, num_targets = self._sequences.get(index)
        if self.form == "prefix":
            return self.task.prefix_sample(items[:-1], int(items[-1]))
        return self.task.history_sample(items, num_targets)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return (self[index] for index in range(len(self)))


class _Sequences:
    """Runs of a flat array of items: start, length and number of targets of each."""

    def __init__(self, flat_items: np.ndarray, starts: np.ndarray, lengths: np.ndarray, num_targets: np.ndarray):
        self.flat_items, self.starts, self.lengths, self.num_targets = flat_items, starts, lengths, num_targets

    def get(self, index: int) -> tuple[np.ndarray, int]:
        start = self.starts[index]
        return self.flat_items[start : start + self.lengths[index]], int(self.num_targets[index])


def training_samples(task: NextItemTask, train: InteractionDataset, *, form: str = "history") -> NextItemSamples:
    """Samples that teach every item of the training part but each user's first, once an epoch.

    In the `history` form a sequence of more than `max_history + 1` items is cut into windows of that length, each of
    which begins half a window after the one before. Every item is a target in one window only: the first in which it
    appears, so beyond the first window a target sees between `max_history / 2` and `max_history` items.

    Args:
        task: Makes the samples.
        train: The training part, and nothing but that.
        form: "history" or "prefix".

    Raises:
        SettingsError: An unknown form; the `history` form with a template that has text after the history; no user
            with two interactions.
    """
    if form not in FORMS:
        raise SettingsError(f"sample form {form!r} is not one of {FORMS}")
    if form == "history" and task.text_after_history:
        raise SettingsError(
            f"the template {task.template!r} has text after {{history}}, so a target inside a sequence would be"
            " learned without it and predicted with it; end the template with {history} or use the form 'prefix'"
        )
    lengths = np.diff(train.offsets)
    if not (lengths >= 2).any():
        raise SettingsError("no user of the training part has two interactions: there is nothing to predict")
    if form == "prefix":
        return NextItemSamples(task, _prefixes(train, task.max_history), form)
    return NextItemSamples(task, _windows(train, task.max_history), form)


def evaluation_samples(task: NextItemTask, examples: EvaluationSet) -> NextItemSamples:
    """Samples whose only target is the held-out item, for a validation loss."""
    lengths = np.minimum(np.diff(examples.offsets), task.max_history)
    flat = np.empty(int((lengths + 1).sum()), dtype=np.int64)
    ends = np.cumsum(lengths + 1)
    for example in range(len(examples)):
        end = ends[example]
        flat[end - 1] = examples.targets[example]
        if lengths[example]:
            flat[end - 1 - lengths[example] : end - 1] = examples.history(example)[-lengths[example] :]
    sequences = _Sequences(flat, ends - lengths - 1, lengths + 1, np.ones(len(lengths), dtype=np.int64))
    return NextItemSamples(task, sequences, "prefix")


def _prefixes(train: InteractionDataset, max_history: int) -> _Sequences:
    lengths = np.diff(train.offsets)
    first = np.repeat(train.offsets[:-1], np.maximum(lengths - 1, 0))
    within = np.concatenate([np.arange(1, length) for length in lengths if length > 1]).astype(np.int64)
    targets = first + within
    shown = np.minimum(within, max_history)
    return _Sequences(train.flat_items, targets - shown, shown + 1, np.ones(len(targets), dtype=np.int64))


def _windows(train: InteractionDataset, max_history: int) -> _Sequences:
    starts, lengths, targets = [], [], []
    stride = max(1, (max_history + 1) // 2)
    for offset, length in zip(train.offsets[:-1].tolist(), np.diff(train.offsets).tolist(), strict=True):
        if length < 2:
            continue
        start, learned = 0, 1  # the first item has nothing before it
        while learned < length:
            end = min(start + max_history + 1, length)
            starts.append(offset + start)
            lengths.append(end - start)
            targets.append(end - learned)
            learned = end
            start += stride
    return _Sequences(train.flat_items, *(np.asarray(values, dtype=np.int64) for values in (starts, lengths, targets)))
