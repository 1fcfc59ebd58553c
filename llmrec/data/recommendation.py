"""What every recommender answers with, and how it reads the histories it is given.

`recommend` is one contract for all recommenders (the fine-tuned LLM, SASRec, popularity): one history or many, item
IDs oldest first; one list of `Recommendation` a history, best first. This module knows nothing of any of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llmrec.errors import DataError, SettingsError


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended item.

    Attributes:
        item_id: Outside ID of the item.
        score: Higher is better; comparable within one answer. Its unit is the recommender's: a sum of natural
            log-probabilities for an LLM, a number of interactions for popularity.
        title: Title of the item, "" where the catalogue has none.
    """

    item_id: str
    score: float
    title: str


def as_histories(history: Sequence[str] | Sequence[Sequence[str]]) -> tuple[list[list[str]], bool]:
    """Reads one history or many as a list of histories.

    Args:
        history: Item IDs oldest first, or a sequence of such sequences. `[]` is one empty history, `[[]]` is a list of
            one empty history.

    Returns:
        The histories, and whether a single one was given (then `recommend` answers with one list, not a list of
        lists).

    Raises:
        DataError: A single string, or something that is not an item ID, or IDs and lists side by side.

    Example:
        >>> as_histories(["a", "b"])
        ([['a', 'b']], True)
        >>> as_histories([["a", "b"], []])
        ([['a', 'b'], []], False)
    """
    entries = _as_list(history, "the history")
    if not any(_is_sequence(entry) for entry in entries):
        return [_item_ids(entries, "the history")], True
    histories = []
    for number, entry in enumerate(entries):
        if not _is_sequence(entry):
            raise DataError(
                f"the history mixes item IDs and lists: entry {number} is {entry!r}; give one list of item IDs, or a"
                " list of such lists"
            )
        histories.append(_item_ids(list(entry), f"history {number}"))
    return histories, False


def check_k(k: int) -> int:
    """Refuses a number of recommendations that is not a positive integer.

    Raises:
        SettingsError: `k` is below 1 or no integer.
    """
    if isinstance(k, bool) or not hasattr(k, "__index__") or int(k) < 1:
        raise SettingsError(f"k is {k!r}: the number of items to recommend must be an integer of at least 1")
    return int(k)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)


def _as_list(history: Any, what: str) -> list[Any]:
    if isinstance(history, str | bytes):
        raise DataError(f"{what} is the string {history!r}: pass a list of item IDs, for one item [{history!r}]")
    if not isinstance(history, Iterable):
        raise DataError(f"{what} is {history!r}: pass a list of item IDs (strings), oldest first")
    return list(history)


def _item_ids(entries: list[Any], what: str) -> list[str]:
    for position, entry in enumerate(entries):
        if not isinstance(entry, str):
            raise DataError(
                f"{what} has {entry!r} ({type(entry).__name__}) at position {position}: item IDs are strings, for a"
                f" number pass {str(entry)!r}"
            )
    return [str(entry) for entry in entries]  # numpy's strings become plain ones
