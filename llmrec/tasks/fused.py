"""Histories in one language, the next item in the other: LC-Rec's asymmetric prediction, in our own words.

Three kinds: codes of the history in and title of the next item out, codes in and description out, titles of the
history in and codes of the next item out. Each kind has one sample a user and epoch, whose target is drawn among those
items of the user's training history that have the text and anything before them. A kind whose column the catalogue
lacks is left out, and the log says so.
"""

import logging

import numpy as np

from llmrec.tasks.base import TaskSamples
from llmrec.tasks.mixture import TaskMixture
from llmrec.tasks.slots import Slot, TextSlot, TitleHistorySlot
from llmrec.tasks.source import OneTargetAUser, TaskSource
from llmrec.tasks.templated import Draw, Kind, TemplatedSamples
from llmrec.tasks.texts import RowTexts

logger = logging.getLogger(__name__)

NAME = "fused"
_NEXT_TITLE = (
    "A customer took {history} in this order. What is the next item called?\n",
    "Order history: {history}\nName of the item that was ordered after that:\n",
    "Given the items {history}, oldest first, write the title of the one that follows.\n",
    "Someone chose {history}. Say by name what this person chooses next.\n",
    "After {history}, which product does the same user pick? Give its name.\n",
    "The series {history} goes on. Name the product that comes next.\n",
    "Past choices: {history}\nTitle of the next choice:\n",
    "Guess from {history} what the user will want now, and write the product's name.\n",
)
_NEXT_DESCRIPTION = (
    "A customer took {history} in this order. Describe the next item.\n",
    "Order history: {history}\nDescription of the item that was ordered after that:\n",
    "Given the items {history}, oldest first, tell what the one that follows is like.\n",
    "Someone chose {history}. Describe what this person chooses next.\n",
    "After {history}, which product does the same user pick? Give the text of its page.\n",
    "The series {history} goes on. Write how the product that comes next is described.\n",
    "Past choices: {history}\nWhat the next choice is like:\n",
    "Guess from {history} what the user will want now, and describe that product.\n",
)
_FROM_TITLES = (
    "A customer took these products, oldest first:{titles}\nCode of the item that comes next:",
    "Order history by name:{titles}\nWhat was ordered after that, as an item code?",
    "Read this list of products that one person chose:{titles}\nGive the code of the next one.",
    "Someone bought, one after the other:{titles}\nAnswer with the code of the item to recommend now:",
    "The names below are a user's past choices.{titles}\nThe following choice has the code:",
    "Continue this list with one item, written as its code:{titles}\nNext:",
    "Past choices:{titles}\nCode of the next choice:",
    "Knowing that a user has taken{titles}\nwhich item does the user take next? Write its code.",
)
NEXT_TITLE = Kind(_NEXT_TITLE, ("history",), "{title}", ("title",))
NEXT_DESCRIPTION = Kind(_NEXT_DESCRIPTION, ("history",), "{description}", ("description",))
FROM_TITLES = Kind(_FROM_TITLES, ("titles",), "{codes}", ("codes",))


class NextTextSamples(TemplatedSamples):
    """Codes of a history in, a text of the next item out.

    Args:
        name: Of the kind.
        source: Items and histories.
        kind: Asks for one slot.
        texts: One text an item, or none: what fills that slot.

    Raises:
        SettingsError: No user has an item with such a text after another item.
    """

    def __init__(self, name: str, source: TaskSource, kind: Kind, texts: RowTexts):
        super().__init__(name, source.frame, [kind], seed=source.seed)
        self._source, self._texts, self._asked = source, texts, kind.asked[0]
        self._num_templates = len(kind.prompts)
        candidates = texts.counts[source.train.flat_items] > 0
        lacking = f"no second item with a {self._asked}"
        self._targets = OneTargetAUser(source, candidates, name=name, lacking=lacking)

    def __len__(self) -> int:
        return len(self._targets)

    def draw(self, epoch: int) -> Draw:
        """A target of each user, and a template."""
        starts, ends = self._targets.places(self.draw_among(self._targets.counts, epoch, "target"))
        numbers = self._texts.row_offsets[self._source.train.flat_items[ends]]
        slots: dict[str, Slot] = {
            "history": self._source.history_slot(starts, ends),
            self._asked: TextSlot(self._texts, numbers),
        }
        return Draw(self.draw_among(self._num_templates, epoch, "template"), slots)


class FromTitlesSamples(TemplatedSamples):
    """Titles of a history in, the codes of the next item out; items without a title are left out of the list.

    Args:
        source: Items and histories.
        titles: One title an item, or none.

    Raises:
        SettingsError: No user has an item after another one with a title.
    """

    def __init__(self, source: TaskSource, titles: RowTexts):
        super().__init__(f"{NAME} from titles", source.frame, [FROM_TITLES], seed=source.seed)
        self._source, self._titles = source, titles
        self._mark = list(source.frame.target("\n- ", (), is_text=False).pieces[0])
        self._targets = OneTargetAUser(
            source, self._shows_a_title(), name=self.name, lacking="no item after one with a title"
        )

    def __len__(self) -> int:
        return len(self._targets)

    def draw(self, epoch: int) -> Draw:
        """A target of each user, and a template."""
        starts, ends = self._targets.places(self.draw_among(self._targets.counts, epoch, "target"))
        train = self._source.train
        slots: dict[str, Slot] = {
            "titles": TitleHistorySlot(self._titles, self._mark, train.flat_items, starts, ends),
            "codes": self._source.item_slot(train.flat_items[ends]),
        }
        return Draw(self.draw_among(len(FROM_TITLES.prompts), epoch, "template"), slots)

    def _shows_a_title(self) -> np.ndarray:
        """Whether one of the items that would be shown before an item has a title: bool [interactions]."""
        train, max_history = self._source.train, self._source.task.max_history
        places = np.arange(train.num_interactions)
        first = np.maximum(np.repeat(train.offsets[:-1], np.diff(train.offsets)), places - max_history)
        titled = np.concatenate([[0], np.cumsum(self._titles.counts[train.flat_items] > 0)])
        return titled[places] > titled[first]


def fused_samples(source: TaskSource) -> TaskSamples:
    """All three kinds, as far as the catalogue has their texts.

    Raises:
        SettingsError: The catalogue has neither titles nor descriptions.
    """
    titles, descriptions = source.texts_of_items(NAME)
    parts: list[TaskSamples] = []
    if source.titles is None:
        logger.info("%s: the items have no column %r; descriptions only", NAME, source.columns.title)
    else:
        parts.append(NextTextSamples(f"{NAME} next title", source, NEXT_TITLE, titles))
        parts.append(FromTitlesSamples(source, titles))
    if source.descriptions is None:
        logger.info("%s: the items have no column %r; titles only", NAME, source.columns.description)
    else:
        parts.append(NextTextSamples(f"{NAME} next description", source, NEXT_DESCRIPTION, descriptions))
    return TaskMixture(parts, [1.0] * len(parts), seed=source.seed, name=NAME)
