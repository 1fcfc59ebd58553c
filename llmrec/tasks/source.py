"""What tasks make their samples of: the training part, the texts of its items and users, and how prompts are written.

Texts are tokenised when a task first asks for them, once for all tasks. Nothing but training interactions is read, so
no task can show or teach what validation and test hold back; a text column says what it says, and one that was written
with knowledge of held-out interactions would leak it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmrec.data.filters import positions, users_of
from llmrec.data.interactions import InteractionDataset
from llmrec.errors import SettingsError
from llmrec.tasks.next_item import NextItemTask
from llmrec.tasks.slots import CodeHistorySlot, ItemSlot
from llmrec.tasks.texts import RowTexts, read_texts, tokenize_texts, without_trailing_punctuation

logger = logging.getLogger(__name__)

DEFAULT_MAX_TEXT_TOKENS = 64


@dataclass(frozen=True)
class TextColumns:
    """Names of the columns that tasks read texts from.

    Attributes:
        title: Of the items; one text.
        description: Of the items; one text, or a list of its paragraphs.
        queries: Of the items; a text or a list of texts, each something that a user who wants the item could type or
            say: a search query, or an intention.
        preferences: Of the users; a text or a list of texts, each saying what the user likes. They must be written
            from training interactions alone.
    """

    title: str = "title"
    description: str = "description"
    queries: str = "queries"
    preferences: str = "preferences"

    def require(self, settings: Sequence[str], dataset: InteractionDataset, task: str) -> None:
        """Refuses a data set that has none of some columns.

        Args:
            settings: Names of attributes, such as "title" and "description"; one of their columns is enough.
            dataset: Items and users.
            task: What reads them, for the message.

        Raises:
            SettingsError: The message names the columns that are there.
        """
        of_users = "preferences" in settings
        present = dataset.user_columns if of_users else dataset.items.column_names
        wanted = [getattr(self, setting) for setting in settings]
        if any(column in present for column in wanted):
            return
        unit = "users" if of_users else "items"
        raise SettingsError(
            f"the task {task!r} reads the column {' or '.join(map(repr, wanted))} of the {unit}, which have only"
            f" {', '.join(present) or 'their IDs'}: name the right one ({settings[0]}_column), or leave the task out"
        )


class TaskSource:
    """What the samples of all tasks are made of.

    Args:
        task: Next-item prediction: its vocabulary, code tokens, kind of prompts and `max_history` hold for all tasks.
        train: The training part, and nothing but that; its users carry the column of preferences.
        columns: Where texts are.
        max_text_tokens: Longer titles, descriptions, queries and preferences are cut there. 64 tokens are about 45
            words: all of nearly every title, and the beginning of a description.
        seed: Of all draws.

    Raises:
        SettingsError: The task is about another number of items; `max_text_tokens` is below 1.
    """

    def __init__(
        self,
        task: NextItemTask,
        train: InteractionDataset,
        *,
        columns: TextColumns | None = None,
        max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
        seed: int = 0,
    ):
        if len(task.item_tokens) != train.num_items:
            raise SettingsError(
                f"the task knows the codes of {len(task.item_tokens)} items, the data set has {train.num_items}: make"
                " both from the same catalogue"
            )
        if max_text_tokens < 1:
            raise SettingsError(f"max_text_tokens is {max_text_tokens}; a text needs at least 1 token")
        self.task = task
        self.frame = task.frame
        self.train = train
        self.columns = columns or TextColumns()
        self.max_text_tokens = max_text_tokens
        self.seed = seed

    @cached_property
    def titles(self) -> RowTexts | None:
        """One title an item, or none; None where there is no such column."""
        return self._of_items(self.columns.title, is_title=True)

    @cached_property
    def descriptions(self) -> RowTexts | None:
        """One description an item, or none; None where there is no such column."""
        return self._of_items(self.columns.description)

    @cached_property
    def queries(self) -> RowTexts:
        """The queries of each item.

        Raises:
            SettingsError: There is no such column.
        """
        self.columns.require(["queries"], self.train, "item_search")
        return self._tokenize(read_texts(self.train.items[self.columns.queries], self.columns.queries), "queries")

    @cached_property
    def preferences(self) -> RowTexts:
        """The preferences of each user.

        Raises:
            SettingsError: There is no such column.
        """
        self.columns.require(["preferences"], self.train, "preference")
        column = self.columns.preferences
        return self._tokenize(read_texts(self.train.histories[column], column), "preferences")

    def texts_of_items(self, task: str) -> tuple[RowTexts, RowTexts]:
        """Titles and descriptions; where one of the columns is missing, no item has such a text.

        Raises:
            SettingsError: Both are missing.
        """
        self.columns.require(["title", "description"], self.train, task)
        nothing = _no_texts(self.train.num_items)
        titles = nothing if self.titles is None else self.titles
        descriptions = nothing if self.descriptions is None else self.descriptions
        return titles, descriptions

    def item_slot(self, items: np.ndarray) -> ItemSlot:
        """The codes of catalogue rows."""
        return ItemSlot(self.task.item_tokens, items)

    def history_slot(self, starts: np.ndarray, ends: np.ndarray) -> CodeHistorySlot:
        """The codes of runs of the training part's `flat_items`."""
        return CodeHistorySlot(self.task.item_tokens, self.train.flat_items, starts, ends)

    def keep(self, usable: np.ndarray, task: str, unit: str, lacking: str) -> np.ndarray:
        """Rows that a task can use, int64; how many it skips is logged.

        Args:
            usable: bool, of all rows.
            task: Its name.
            unit: What a row is: "items", "users".
            lacking: What the others lack: "no title".

        Raises:
            SettingsError: None is left.
        """
        skipped = int(len(usable) - usable.sum())
        if skipped == len(usable):
            raise SettingsError(f"{task}: all {skipped:,} {unit} have {lacking}; leave this task out")
        if skipped:
            logger.info("%s: %s of %s %s have %s: skipped", task, f"{skipped:,}", f"{len(usable):,}", unit, lacking)
        return np.flatnonzero(usable)

    def _of_items(self, column: str, *, is_title: bool = False) -> RowTexts | None:
        if column not in self.train.items.column_names:
            return None
        texts = read_texts(self.train.items[column], column, one_a_row=True)
        return self._tokenize(without_trailing_punctuation(texts) if is_title else texts, column)

    def _tokenize(self, texts: Sequence[Sequence[str]], what: str) -> RowTexts:
        return tokenize_texts(
            texts, self.frame.text_tokenizer, self.task.vocabulary, max_tokens=self.max_text_tokens, what=what
        )


class OneTargetAUser:
    """One of the items of each user's training history, drawn anew each epoch, and the items before it.

    LC-Rec makes a sample of every item and takes a random part of them. One a user and epoch is a like number, is
    spread evenly, and reaches the others in later epochs.

    Args:
        source: Histories, and how many items are shown.
        candidates: bool [interactions] of the training part: which of them can be a target. The first of a user can't.
        name: Of the task, for the log.
        lacking: What users lack who have no candidate.
    """

    def __init__(self, source: TaskSource, candidates: np.ndarray, *, name: str, lacking: str):
        offsets = source.train.offsets
        usable = candidates & (positions(offsets) > 0)
        users = users_of(offsets)[usable]
        counts = np.bincount(users, minlength=source.train.num_users)
        chosen = source.keep(counts > 0, name, "users", lacking)
        self._places = np.flatnonzero(usable)
        self._first = (np.cumsum(counts) - counts)[chosen]
        self._user_starts = offsets[:-1][chosen]
        self._max_history = source.task.max_history
        self.counts = counts[chosen]
        """int64 [S]: how many candidates each of the S users has."""

    def __len__(self) -> int:
        return len(self.counts)

    def places(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the histories of drawn targets begin and end in `flat_items`; a target stands at its history's end.

        Args:
            drawn: int64 [S], which of its candidates each user draws.
        """
        ends = self._places[self._first + drawn]
        return np.maximum(self._user_starts, ends - self._max_history), ends


def _no_texts(num_rows: int) -> RowTexts:
    return RowTexts(np.empty(0, np.int32), np.zeros(1, np.int64), np.zeros(num_rows + 1, np.int64))
