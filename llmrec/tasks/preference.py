"""A history in, what its user likes out: LC-Rec's preference inference, in our own words.

One sample for each user who has a preference text and a training history; which of several texts is drawn with the
template. The history is the latest `max_history` items of the user's training part: validation and test items are not
in it. The texts come from the user of the library, and must be written from the training part too (LC-Rec's were made
of the titles before its held-out items).
"""

import numpy as np

from llmrec.tasks.slots import TextSlot
from llmrec.tasks.source import TaskSource
from llmrec.tasks.templated import Draw, Kind, TemplatedSamples

NAME = "preference"
_TEMPLATES = (
    "A customer took {history}, oldest first. What does this customer like?\n",
    "Order history: {history}\nTaste of the person behind it:\n",
    "Tell from the items {history} what kind of things their user prefers.\n",
    "Someone chose {history}. Sum up this person's preferences.\n",
    "Write a short profile of the user who picked {history}.\n",
    "Past choices: {history}\nWhat matters to this user:\n",
    "Read the history {history} and put the user's interests into words.\n",
    "What can be said about the taste of a person with the items {history}?\n",
)
PREFERENCE = Kind(_TEMPLATES, ("history",), "{preference}", ("preference",))


class PreferenceSamples(TemplatedSamples):
    """Codes of a history in, a preference text of its user out.

    Args:
        source: Histories, and the preferences of users.

    Raises:
        SettingsError: The users have no column of preferences, or none has both a text and a training history.
    """

    def __init__(self, source: TaskSource):
        super().__init__(NAME, source.frame, [PREFERENCE], seed=source.seed)
        self._preferences = source.preferences
        offsets = source.train.offsets
        usable = (self._preferences.counts > 0) & (np.diff(offsets) > 0)
        self._users = source.keep(usable, NAME, "users", "no preference text or no training history")
        ends = offsets[1:][self._users]
        starts = np.maximum(offsets[:-1][self._users], ends - source.task.max_history)
        self._history = source.history_slot(starts, ends)

    def __len__(self) -> int:
        return len(self._users)

    def draw(self, epoch: int) -> Draw:
        """A text of each user, and a template."""
        drawn = self.draw_among(self._preferences.counts[self._users], epoch, "text")
        texts = TextSlot(self._preferences, self._preferences.row_offsets[self._users] + drawn)
        templates = self.draw_among(len(PREFERENCE.prompts), epoch, "template")
        return Draw(templates, {"history": self._history, "preference": texts})
