"""Which items each request may be answered with: the seen ones, and what callers pass as `allow` and `deny`.

A set of items is given as item IDs, as a mask over the catalogue, or prepared once as an `ItemSet`; one for all
requests, or one a request. Here they become what the trie's search takes. Items that share their codes are one leaf
to the search, and are told apart here. Knows no model.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from llmrec.data.item_order import ItemIndex
from llmrec.data.recommendation import Recommendation
from llmrec.errors import DataError, SettingsError
from llmrec.generation.item_sets import ItemSet, LeafSubset
from llmrec.recommendation.catalogue import Catalogue

logger = logging.getLogger(__name__)

SomeItems = ItemSet | np.ndarray
"""A prepared set, bool [N] over the catalogue rows, or the rows themselves, int64 [n]."""

# A list of IDs that all requests share becomes a mask above this: it is then made once, not sorted anew a request.
_MOST_SHARED_ROWS = 256


def read_items(given: Any, catalogue: Catalogue, what: str, *, skip_unknown: bool = False) -> SomeItems:
    """Reads one set of items.

    Args:
        given: An `ItemSet` of this catalogue, a bool mask [N] over its rows (array, tensor, column or list), or a
            collection of item IDs.
        catalogue: Whose items they are.
        what: What the set is, for messages: "allow".
        skip_unknown: Leave out IDs that the catalogue doesn't hold; the log counts them.

    Raises:
        SettingsError: The set was made for another catalogue.
        DataError: A string, a mask of another length, or something other than IDs.
        UnknownItemError: An unknown ID, unless they are skipped.
    """
    if isinstance(given, ItemSet):
        catalogue.check_item_set(given)
        return given
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise DataError(f"{what} is {given!r}: pass a list of item IDs, a mask over the catalogue, or an ItemSet")
    array = np.asarray(given) if hasattr(given, "__array__") else None
    entries = list(given) if array is None else [] if array.dtype == bool else array.tolist()
    if entries and all(isinstance(entry, bool | np.bool_) for entry in entries):
        array = np.array(entries, dtype=bool)
    if array is not None and array.dtype == bool:
        if array.shape != (len(catalogue),):
            raise DataError(
                f"{what} is a mask of shape {array.shape}, the catalogue has {len(catalogue)} items: make it from the"
                " items as they are now"
            )
        return array
    for entry in entries:
        if not isinstance(entry, str):
            raise DataError(
                f"{what} holds {entry!r} ({type(entry).__name__}): pass item IDs, which are strings, or a mask of"
                f" {len(catalogue)} bools"
            )
    return known_rows([entries], catalogue.item_index, what, skip_unknown=skip_unknown)[0]


def known_rows(lists: list[list[str]], item_index: ItemIndex, what: str, *, skip_unknown: bool) -> list[np.ndarray]:
    """Catalogue rows of item IDs, int64 each.

    Args:
        lists: Item IDs.
        item_index: Of the catalogue.
        what: What they are, for the log: "3 histories".
        skip_unknown: Leave out those that the catalogue doesn't hold; the log counts them.

    Raises:
        UnknownItemError: An unknown ID, unless they are skipped.
    """
    if skip_unknown:
        known = [[item_id for item_id in item_ids if item_id in item_index] for item_ids in lists]
        num_skipped = sum(map(len, lists)) - sum(map(len, known))
        if num_skipped:
            logger.warning("skipped %d unknown item IDs in %s", num_skipped, what)
        lists = known
    return [item_index.rows(item_ids) for item_ids in lists]


class ItemFilters:
    """What each of B requests may be answered with.

    Args:
        catalogue: Whose items they are.
        device: Where the search runs.
        seen: int64 rows of each request that are left out of its answer; any order, repeats allowed.
        allow: One set for all requests, a list with one (or None: everything) a request, or None. See `read_items`.
        deny: The same, of what is left out.
        single: There is one request, which was given outside a list: then `allow` and `deny` are one set.
        skip_unknown: See `read_items`.

    Raises:
        SettingsError: A list of another length than there are requests, or a list for a single request.
        DataError, UnknownItemError: See `read_items`.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        device: torch.device,
        seen: Sequence[np.ndarray],
        *,
        allow: Any = None,
        deny: Any = None,
        single: bool = False,
        skip_unknown: bool = False,
    ):
        self._catalogue, self._device, self._seen = catalogue, device, seen
        count = None if single else len(seen)
        self._allow, self._shares_allow = _read(allow, catalogue, "allow", count, skip_unknown)
        self._deny, self._shares_deny = _read(deny, catalogue, "deny", count, skip_unknown)
        if self._shares_deny and _is_rows(self._deny[0]) and len(self._deny[0]) > _MOST_SHARED_ROWS:
            self._deny = [_mask(self._deny[0], len(catalogue))]
        if self._shares_allow and self._shares_deny:
            self._allow = [self._allowed(self._allow[0], self._deny[0])]
            self._deny = [self._deny[0] if _is_rows(self._deny[0]) else None]

    def subset(self, requests: Sequence[int]) -> LeafSubset | None:
        """What the search of some requests takes, on its device; None where nothing is left out of any.

        Sets that only one request has are made here, for these requests: a call of many holds few at once.
        """
        made: dict[tuple[int, int], ItemSet | None] = {}
        allow, deny = [], []
        for request in requests:
            allowed, denied = self._of(request)
            key = (id(allowed), id(denied))
            if key not in made:
                made[key] = self._allowed(allowed, denied)
            allow.append(made[key])
            deny.append(self._denied_rows(request))
        shared = len(made) == 1
        return self._catalogue.trie_on(self._device).subset(allow=allow[0] if shared else allow, deny=deny)

    def answer(self, request: int, leaves: np.ndarray, scores: np.ndarray, most: int) -> list[Recommendation]:
        """The items of a search's leaves, in its order, those of one leaf in catalogue order.

        Args:
            request: Its number.
            leaves: int64 [K]; -1 where there is none.
            scores: float32 [K].
            most: Number of items at which to stop.
        """
        answer: list[Recommendation] = []
        item_ids = self._catalogue.semantic_ids.item_ids
        for leaf, score in zip(leaves.tolist(), scores.tolist(), strict=True):
            rows = self._permitted(request, self._catalogue.trie.items_of(leaf)) if leaf >= 0 else ()
            for row in rows[: most - len(answer)]:
                answer.append(Recommendation(item_ids[row], score, self._catalogue.title(int(row))))
            if len(answer) == most:
                break
        return answer

    def _of(self, request: int) -> tuple[SomeItems | None, SomeItems | None]:
        return (
            self._allow[0 if self._shares_allow else request],
            self._deny[0 if self._shares_deny else request],
        )

    def _allowed(self, allow: SomeItems | None, deny: SomeItems | None) -> ItemSet | None:
        """What is allowed without all that is denied as a set; denied rows go to the search beside it."""
        if deny is None or _is_rows(deny):
            if allow is None or isinstance(allow, ItemSet):
                return allow
            return self._catalogue.item_set(allow, self._device)
        count = len(self._catalogue)
        left = ~_mask(deny, count)
        return self._catalogue.item_set(left if allow is None else left & _mask(allow, count), self._device)

    def _denied_rows(self, request: int) -> np.ndarray:
        denied = self._of(request)[1]
        if denied is None or not _is_rows(denied):
            return self._seen[request]
        return np.concatenate([self._seen[request], denied])

    def _permitted(self, request: int, rows: np.ndarray) -> np.ndarray:
        """Those of the items of one leaf that the request may be answered with."""
        if len(rows) == 1:  # the search left out all others
            return rows
        allow, deny = self._of(request)
        kept = ~np.isin(rows, self._seen[request])
        if allow is not None:
            kept &= _contains(allow, rows)
        if deny is not None:
            kept &= ~_contains(deny, rows)
        return rows[kept]


def _read(
    given: Any, catalogue: Catalogue, what: str, count: int | None, skip_unknown: bool
) -> tuple[list[Any], bool]:
    """The sets of one argument, and whether it is one for all requests; `count` is None for a single request."""
    if given is None:
        return [None], True
    if not isinstance(given, ItemSet | str | bytes | np.ndarray) and isinstance(given, Sequence):
        of_requests = any(_is_set(entry) for entry in given)
    else:
        of_requests = isinstance(given, np.ndarray) and given.ndim == 2
    if not of_requests:
        return [read_items(given, catalogue, what, skip_unknown=skip_unknown)], True
    if count is None or len(given) != count:
        histories = "one history" if count is None else f"{count} histories"
        raise SettingsError(
            f"{what} is a list of {len(given)} sets for {histories}: pass one set for all, or a list of histories with"
            " a list of as many sets"
        )
    made = {id(entry): _read_or_none(entry, catalogue, what, skip_unknown) for entry in given}
    return [made[id(entry)] for entry in given], False


def _read_or_none(given: Any, catalogue: Catalogue, what: str, skip_unknown: bool) -> SomeItems | None:
    return None if given is None else read_items(given, catalogue, what, skip_unknown=skip_unknown)


def _is_set(entry: Any) -> bool:
    """Whether an entry of a list is itself a set, so that the list has one a request."""
    return entry is None or isinstance(entry, ItemSet) or (isinstance(entry, Iterable) and not isinstance(entry, str))


def _is_rows(items: SomeItems | None) -> bool:
    return isinstance(items, np.ndarray) and items.dtype != bool


def _mask(items: SomeItems, count: int) -> np.ndarray:
    """As bool [N], not to be changed."""
    if isinstance(items, ItemSet):
        return items.rows
    if items.dtype == bool:
        return items
    mask = np.zeros(count, dtype=bool)
    mask[items] = True
    return mask


def _contains(items: SomeItems, rows: np.ndarray) -> np.ndarray:
    """Whether each of a few rows is in the set: bool [n]."""
    if isinstance(items, ItemSet):
        return items.rows[rows]
    return items[rows] if items.dtype == bool else np.isin(rows, items)
