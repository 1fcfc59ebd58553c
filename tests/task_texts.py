"""A catalogue of five items with texts, some of them missing, and the histories and preferences of five users."""

import numpy as np

CODES = np.array([[0, 2], [1, 0], [1, 1], [0, 0], [0, 1]])
ITEMS = {
    "item_id": list("abcde"),
    "title": ["Red pen.", "Blue pen", None, "Tent, ", "..."],
    "description": ["It writes red.", None, ["A desk.", "Of  wood."], None, " "],
    "queries": [["red ink", "write red"], "blue ink", None, [], ["a big <b_1> lamp"]],
}
# What a prompt or a target shows of the items.
CODE_TEXTS = ["<a_0><b_2>", "<a_1><b_0>", "<a_1><b_1>", "<a_0><b_0>", "<a_0><b_1>"]
TITLES = ["Red pen", "Blue pen", None, "Tent", None]
DESCRIPTIONS = ["It writes red.", None, "A desk. Of wood.", None, None]
QUERIES = [["red ink", "write red"], ["blue ink"], [], [], ["a big  lamp"]]
HISTORIES = [[0, 1, 2, 3, 0], [2, 3], [4], [2, 2, 1], [3, 0]]
USERS = {"user_id": list("uvwxy"), "preferences": [["likes pens", "writes"], None, "camps", [" "], "tea"]}


def fillings(kinds, **slots):
    """All prompts that templates give with their slots filled, without those that show something missing (None)."""
    shown = [(kind, text) for kind in kinds for text in kind.prompts]
    return {text.format(**slots) for kind, text in shown if all(slots[name] is not None for name in kind.shown)}
