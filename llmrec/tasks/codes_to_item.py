"""Codes of an item in, its text out: LC-Rec's second half of mutual alignment ("index2item"), in our own words.

One sample an item and epoch. What it asks for, title, description or both, is drawn with the template, among what the
catalogue has of the item. A text is followed by the end-of-sequence token, one that was cut as well: the model then
learns to stop there.
"""

from llmrec.tasks.item_to_codes import ItemTextSamples
from llmrec.tasks.source import TaskSource
from llmrec.tasks.templated import Kind

_TITLE = (
    "What is the item {codes} called?\n",
    "Item code: {codes}\nName of the item:\n",
    "Write the name under which the catalogue lists {codes}.\n",
    "Somebody took {codes}. Say by name what that is.\n",
    "Translate the item code {codes} into the name of the product.\n",
    "Look up {codes} and give its title.\n",
    "The code {codes} stands for the item with this name:\n",
    "Which product name belongs to {codes}?\n",
)
_DESCRIPTION = (
    "Describe the item {codes}.\n",
    "Item code: {codes}\nDescription of the item:\n",
    "What does the product page of {codes} say?\n",
    "A customer wants to know more about {codes}. Tell what it is like.\n",
    "Translate the item code {codes} into a description of the product.\n",
    "Look up {codes} and give the text that describes it.\n",
    "The code {codes} stands for an item of this description:\n",
    "Which description belongs to {codes}?\n",
)
_BOTH = (
    "Give name and description of the item {codes}.\n",
    "Item code: {codes}\nName of the item, and below it the description:\n",
    "Write the catalogue entry of {codes}: first its title, then what it is like.\n",
    "What is {codes} called, and how is it described?\n",
    "Translate the item code {codes} into a product name and a description.\n",
    "Look up {codes} and give its title and its text.\n",
    "The code {codes} stands for the item with this name and description:\n",
    "Introduce {codes} to a customer: its name, and on the next line what it is.\n",
)
KINDS = (
    Kind(_TITLE, ("codes",), "{title}", ("title",)),
    Kind(_BOTH, ("codes",), "{title}\n{description}", ("title", "description")),
    Kind(_DESCRIPTION, ("codes",), "{description}", ("description",)),
)


def codes_to_item_samples(source: TaskSource) -> ItemTextSamples:
    """One sample for each item that has a title or a description."""
    return ItemTextSamples("codes_to_item", source, KINDS)
