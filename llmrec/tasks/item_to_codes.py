"""Text of an item in, its codes out: LC-Rec's first half of mutual alignment ("item2index"), in our own words.

One sample an item and epoch. What it shows, title, description or both, is drawn with the template, among what the
catalogue has of the item.
"""

import numpy as np

from llmrec.tasks.slots import Slot, TextSlot
from llmrec.tasks.source import TaskSource
from llmrec.tasks.templated import Draw, Kind, TemplatedSamples

_FROM_TITLE = (
    'Our catalogue lists an item under the name "{title}". Its code is:',
    'Name of the item: "{title}"\nCode of the item:',
    'Give the code that stands for "{title}".',
    'Look up "{title}" in the catalogue and write down its code.',
    'A customer asks for "{title}" by name. Answer with the code of that item:',
    'Translate this product name into its item code: "{title}"',
    'How do we write "{title}" as an item code?',
    '"{title}" is one of our items. Which code belongs to it?',
)
_FROM_DESCRIPTION = (
    'This is how an item is described: "{description}" Its code is:',
    'Description of the item: "{description}"\nCode of the item:',
    'Find the item to which this text belongs and give its code: "{description}"',
    'A product page says: "{description}" Which item code is it the page of?',
    'Read the description and name the item by its code.\n"{description}"\n',
    'Translate this product description into its item code: "{description}"',
    'Somebody tells us about an item: "{description}" Answer with its code:',
    'Which of our items fits the words "{description}"? Give its code.',
)
_FROM_BOTH = (
    'An item is called "{title}" and described so: "{description}" Its code is:',
    'Name: "{title}"\nDescription: "{description}"\nCode:',
    'Give the code of the item "{title}", of which the catalogue says: "{description}"',
    'On the page of "{title}" we read: "{description}" Which item code is that?',
    'Name and description of a product follow. Write its item code.\n"{title}"\n"{description}"\n',
    'The catalogue entry "{title}" comes with the text "{description}". Its item code:',
    'Turn this entry into an item code: "{title}", that is, "{description}"',
    'Which code stands for the item named "{title}" with the description "{description}"?',
)
KINDS = (
    Kind(_FROM_TITLE, ("title",), "{codes}", ("codes",)),
    Kind(_FROM_BOTH, ("title", "description"), "{codes}", ("codes",)),
    Kind(_FROM_DESCRIPTION, ("description",), "{codes}", ("codes",)),
)


class ItemTextSamples(TemplatedSamples):
    """Samples that join the text of an item to its codes, in either direction.

    Args:
        name: Of the task.
        source: Items and texts.
        kinds: Templates that show or ask for the title, both, and the description, in this order.

    Raises:
        SettingsError: The catalogue has neither titles nor descriptions.
    """

    def __init__(self, name: str, source: TaskSource, kinds: tuple[Kind, Kind, Kind]):
        titles, descriptions = source.texts_of_items(name)
        has_title, has_description = titles.counts > 0, descriptions.counts > 0
        super().__init__(name, source.frame, kinds, seed=source.seed)
        self._items = source.keep(has_title | has_description, name, "items", "no title and no description")
        self._slots: dict[str, Slot] = {
            "codes": source.item_slot(self._items),
            "title": TextSlot(titles, _first_text(titles.row_offsets, has_title)[self._items]),
            "description": TextSlot(descriptions, _first_text(descriptions.row_offsets, has_description)[self._items]),
        }
        # Title, both, description: what an item has the text for is one run of the templates.
        title, both, description = (len(kind.prompts) for kind in kinds)
        with_title, with_description = has_title[self._items], has_description[self._items]
        self._first = np.where(with_title, 0, title + both)
        self._num_choices = np.where(with_title & with_description, title + both + description, 0)
        self._num_choices += np.where(with_title & ~with_description, title, 0)
        self._num_choices += np.where(~with_title, description, 0)

    def __len__(self) -> int:
        return len(self._items)

    def draw(self, epoch: int) -> Draw:
        """A template of each item."""
        return Draw(self._first + self.draw_among(self._num_choices, epoch, "template"), self._slots)


def item_to_codes_samples(source: TaskSource) -> ItemTextSamples:
    """One sample for each item that has a title or a description."""
    return ItemTextSamples("item_to_codes", source, KINDS)


def _first_text(row_offsets: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Number of the text of each row, -1 where it has none."""
    return np.where(present, row_offsets[:-1], -1)
