"""The next-item task: a history of items in, the code tokens of the next item out.

LC-Rec's sequential prediction, and the task of LETTER. A prompt is a sentence with the code tokens of the history in
it. The target is the L code tokens of the next item and nothing more: every item has exactly L of them, so an
end-of-sequence token would be certain, and cost a decode step (LETTER and LC-Rec train one; here the search stops by
itself).

Two forms of training samples, which teach the same targets:

* `history` (the default) reads a user's sequence once and learns every item in it from the items before. At the
  position of a target the model has seen exactly the prompt it will see when it recommends. That holds for templates
  that end with the history only: text after it (a chat's assistant turn, an encoder's end token) stands in the prompt
  of a recommendation but not inside a sequence, so such prompts are refused in this form.
* `prefix` makes one sample for every target (LC-Rec, LETTER): about six times the tokens on Amazon Beauty, but the
  template may have text after the history, and the model may be an encoder-decoder.

Recommending shows the latest `max_history` items. Training cuts alike: no target of either form sees more than
`max_history` items before it, those right before it. In the `prefix` form it always sees as many of them as there are;
in the `history` form the targets of a sequence of more than `max_history + 1` items see at least half as many, see
`training_samples`.
"""

import copy
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import EvaluationSet
from llmrec.errors import SettingsError
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.tasks.base import IGNORED, TaskSamples, draws, join
from llmrec.tasks.epoch_cache import EpochCache
from llmrec.tasks.prompt_frame import PromptFrame
from llmrec.vocabulary import CodeVocabulary

DEFAULT_TEMPLATE = "Items chosen by one person, oldest first: {history}"
# All end with the history, so that each can have the `history` form.
TEMPLATES = (
    DEFAULT_TEMPLATE,
    "A shopper's purchases in order, and then the next one: {history}",
    "Continue this list of items by what the same customer takes next: {history}",
    "What follows in this person's order history? {history}",
    "Here is what somebody bought over time. Go on with the list: {history}",
    "Order record of one account, earliest entry first: {history}",
    "Each item below was picked after the one before it. Add the item that comes next: {history}",
    "Recommend the next item to a user whose past choices, from old to new, are: {history}",
    "The basket history of a customer, in the order of time: {history}",
    "Look at what this user took so far and name the item to take next: {history}",
    "One person's interactions with our catalogue, most recent last: {history}",
    "Predict how the following series of chosen items goes on: {history}",
    "Someone picked these items one by one, and will pick another: {history}",
    "Past and next items of the same user: {history}",
)
FORMS = ("history", "prefix")


class NextItemTask:
    """Makes prompts and training samples of next-item prediction.

    Args:
        text_tokenizer: With the code tokens in it.
        vocabulary: Where they are.
        semantic_ids: Codes of the catalogue, unique or not.
        template: Text with "{history}" in it exactly once. Prompts of recommendations are made with it.
        templates: Further ones. A training sample draws one of all, anew each epoch; none of them (the default) trains
            with `template` alone, which is what recommends. `TEMPLATES` holds some.
        max_history: The latest items of a history that a prompt shows (LETTER and LC-Rec: 20).
        chat: The template is the user's turn of a chat, see `PromptFrame`.
        encoder_decoder: The prompt is for an encoder, and the codes are written by a decoder.

    Raises:
        SettingsError: A template has no or several "{history}", or leaves the prompt of an empty history empty;
            `max_history` is below 1; the codes and the vocabulary have different levels; `chat` without a chat
            template.
    """

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerBase,
        vocabulary: CodeVocabulary,
        semantic_ids: SemanticIds,
        *,
        template: str = DEFAULT_TEMPLATE,
        templates: Sequence[str] = (),
        max_history: int = 20,
        chat: bool = False,
        encoder_decoder: bool = False,
    ):
        if max_history < 1:
            raise SettingsError(f"max_history is {max_history}; a prompt shows at least 1 item")
        _check_same_sizes(semantic_ids, vocabulary)
        self.template = template
        self.max_history = max_history
        self.vocabulary = vocabulary
        self.frame = PromptFrame(text_tokenizer, chat=chat, encoder_decoder=encoder_decoder)
        texts = dict.fromkeys([template, *templates])
        self._templates = [self.frame.prompt(text, ("history",)) for text in texts]
        for read in self._templates:
            if not read.num_tokens:
                raise SettingsError(
                    f"with the template {read.text!r} and a text tokenizer that adds no start token, the prompt of an"
                    " empty history is empty; begin with some text"
                )
        self.item_tokens = vocabulary.token_ids(semantic_ids.codes)
        """int64 [N, L]: the code tokens of each item."""

    def with_semantic_ids(self, semantic_ids: SemanticIds) -> "NextItemTask":
        """The same task for other items of the same codes: those of a catalogue that items joined or left.

        Raises:
            SettingsError: The codes have other codebook sizes.
        """
        _check_same_sizes(semantic_ids, self.vocabulary)
        task = copy.copy(self)
        task.item_tokens = self.vocabulary.token_ids(semantic_ids.codes)
        return task

    @property
    def text_after_history(self) -> bool:
        """Whether some template goes on after the history, which the `history` form can't have."""
        return any(template.pieces[-1] for template in self._templates)

    @property
    def template_lengths(self) -> np.ndarray:
        """int64 [templates]: tokens of each template, without a history."""
        return np.array([template.num_tokens for template in self._templates], dtype=np.int64)

    def history_tokens(self, history: Sequence[int] | np.ndarray) -> list[int]:
        """Code tokens of the latest `max_history` items of a history: catalogue rows, oldest first."""
        shown = np.asarray(history, dtype=np.int64)[-self.max_history :]
        return self.item_tokens[shown].ravel().tolist()

    def prompt(self, history: Sequence[int] | np.ndarray, template: int = 0) -> list[int]:
        """Token IDs that end right where the next item's codes begin (for an encoder-decoder: the encoder's).

        Args:
            history: Catalogue rows, oldest first; the latest `max_history` are shown. May be empty: the prompt is then
                the template without items, and the model answers with what it holds likely for anyone.
            template: Number of the template; 0 is the one that recommends.
        """
        codes = self.history_tokens(history)
        return self._templates[template].fill(lambda _: codes)

    def prefix_sample(self, history: np.ndarray, target: int, template: int = 0) -> dict[str, list[int]]:
        """One sample of the `prefix` form: `input_ids`, and `labels` that are -100 but for the target's L codes."""
        target_codes = self.item_tokens[target].tolist()
        return join(self.prompt(history, template), target_codes, encoder_decoder=self.frame.encoder_decoder)

    def history_sample(self, items: np.ndarray, num_targets: int, template: int = 0) -> dict[str, list[int]]:
        """One sample of the `history` form.

        Args:
            items: Up to `max_history + 1` catalogue rows, oldest first.
            num_targets: How many of them, counted from the last, are learned.
            template: Number of the template.
        """
        before = self._templates[template].pieces[0]
        codes = self.item_tokens[items].ravel().tolist()
        num_labels = num_targets * self.vocabulary.num_levels
        ignored = len(before) + len(codes) - num_labels
        return {"input_ids": [*before, *codes], "labels": [IGNORED] * ignored + codes[len(codes) - num_labels :]}


def _check_same_sizes(semantic_ids: SemanticIds, vocabulary: CodeVocabulary) -> None:
    if tuple(semantic_ids.codebook_sizes) != vocabulary.codebook_sizes:
        raise SettingsError(
            f"the semantic IDs have codebooks of sizes {tuple(semantic_ids.codebook_sizes)}, the vocabulary"
            f" {vocabulary.codebook_sizes}; add the code tokens of these semantic IDs"
        )


class NextItemSamples(TaskSamples):
    """The training samples of a task, made when they are read.

    Args:
        task: Makes the samples.
        sequences: (items, num_targets) for each sample: the catalogue rows, oldest first, and how many of them, from
            the last, are targets. Made by `training_samples` and `evaluation_samples`.
        form: "history" or "prefix".
        seed: Of the draw of templates; None: every sample has the template that recommends.
    """

    name = "next_item"

    def __init__(self, task: NextItemTask, sequences: "_Sequences", form: str, *, seed: int | None = None):
        self.task = task
        self.form = form
        self._sequences = sequences
        self._template_lengths = task.template_lengths
        self._seed = seed if len(self._template_lengths) > 1 else None
        # one code per level an item, and the text around them
        self._code_lengths = sequences.lengths * task.vocabulary.num_levels
        self._plain_lengths = self._code_lengths + self._template_lengths[0]
        self._drawn = EpochCache(self._draw_templates)

    def __len__(self) -> int:
        return len(self._plain_lengths)

    @property
    def num_targets(self) -> int:
        """Number of items that one epoch teaches."""
        return int(self._sequences.num_targets.sum())

    def lengths(self, epoch: int = 0) -> np.ndarray:
        """Tokens of each sample; see `TaskSamples`."""
        if self._seed is None:
            return self._plain_lengths
        return self._code_lengths + self._template_lengths[self._drawn(epoch)]

    def sample(self, index: int, epoch: int = 0) -> dict[str, list[int]]:
        """One sample; see `TaskSamples`."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        template = 0 if self._seed is None else int(self._drawn(epoch)[index])
        items, num_targets = self._sequences.get(index)
        if self.form == "prefix":
            return self.task.prefix_sample(items[:-1], int(items[-1]), template)
        return self.task.history_sample(items, num_targets, template)

    def targets(self) -> tuple[np.ndarray, np.ndarray]:
        """What is learned: the number of the sample and the catalogue row of each target, int64 [num_targets] each.

        Sample after sample, and within a sample in the order of its tokens.
        """
        counts = self._sequences.num_targets
        ends = self._sequences.starts + self._sequences.lengths
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.asarray(self._sequences.flat_items)[np.repeat(ends - counts, counts) + within]
        return np.repeat(np.arange(len(self)), counts), rows.astype(np.int64)

    def _draw_templates(self, epoch: int) -> np.ndarray:
        seed = 0 if self._seed is None else self._seed
        return draws(seed, epoch, len(self), len(self._template_lengths), stream="next_item template")


class _Sequences:
    """Runs of a flat array of items: start, length and number of targets of each."""

    def __init__(self, flat_items: np.ndarray, starts: np.ndarray, lengths: np.ndarray, num_targets: np.ndarray):
        self.flat_items, self.starts, self.lengths, self.num_targets = flat_items, starts, lengths, num_targets

    def get(self, index: int) -> tuple[np.ndarray, int]:
        start = self.starts[index]
        return self.flat_items[start : start + self.lengths[index]], int(self.num_targets[index])


def training_samples(
    task: NextItemTask, train: InteractionDataset, *, form: str = "history", seed: int = 0
) -> NextItemSamples:
    """Samples that teach every item of the training part but each user's first, once an epoch.

    In the `history` form a sequence of more than `max_history + 1` items is cut into windows of that length, each of
    which begins half a window after the one before. Every item is a target in one window only: the first in which it
    appears, so beyond the first window a target sees between `max_history / 2` and `max_history` items.

    Args:
        task: Makes the samples.
        train: The training part, and nothing but that.
        form: "history" or "prefix".
        seed: Of the draw of templates, where the task has several.

    Raises:
        SettingsError: An unknown form; the `history` form with a template that has text after the history, with a chat
            or with an encoder-decoder model; no user with two interactions.
    """
    if form not in FORMS:
        raise SettingsError(f"sample form {form!r} is not one of {FORMS}")
    if form == "history":
        _check_history_form(task)
    lengths = np.diff(train.offsets)
    if not (lengths >= 2).any():
        raise SettingsError("no user of the training part has two interactions: there is nothing to predict")
    if form == "prefix":
        return NextItemSamples(task, _prefixes(train, task.max_history), form, seed=seed)
    return NextItemSamples(task, _windows(train, task.max_history), form, seed=seed)


def _check_history_form(task: NextItemTask) -> None:
    if task.frame.encoder_decoder:
        raise SettingsError(
            "the form 'history' learns all items of one sequence, but an encoder reads a sequence whole, with the"
            " targets in it; use the form 'prefix' for an encoder-decoder model"
        )
    if task.frame.chat:
        raise SettingsError(
            "in a chat the assistant's turn begins after the history, so a target inside a sequence would be learned"
            " without it and predicted with it; use the form 'prefix', or plain prompts (chat: false)"
        )
    if task.text_after_history:
        raise SettingsError(
            f"the template {task.template!r}, or another, has text after {{history}}, so a target inside a sequence"
            " would be learned without it and predicted with it; end the template with {history} or use the form"
            " 'prefix'"
        )


def evaluation_samples(task: NextItemTask, examples: EvaluationSet) -> NextItemSamples:
    """Samples whose only target is the held-out item, with the template that recommends, for a validation loss."""
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
