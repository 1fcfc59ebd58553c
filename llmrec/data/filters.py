"""k-core and repeats as masks over flat histories. Pure functions on arrays.

Everywhere `flat_items` is int32 [interactions], users one after the other, and `offsets` int64 [users + 1].
"""

import numpy as np

from llmrec.errors import SettingsError


def users_of(offsets: np.ndarray) -> np.ndarray:
    """User of each interaction, int64 [interactions]."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def gather_users(interactions: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """How many of the interactions marked True each user has, int64 [users]."""
    return np.diff(np.concatenate([[0], np.cumsum(interactions, dtype=np.int64)])[offsets])


def positions(offsets: np.ndarray) -> np.ndarray:
    """Place of each interaction in its user's history, int64 [interactions], 0 for the oldest."""
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))


def k_core_masks(
    flat_items: np.ndarray, offsets: np.ndarray, num_items: int, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest part in which every user and every item has at least `k` interactions.

    Returns:
        Masks of interactions, users and items, bool.
    """
    users = users_of(offsets)
    left = np.arange(len(flat_items))
    while True:
        user_counts = np.bincount(users[left], minlength=len(offsets) - 1)
        item_counts = np.bincount(flat_items[left], minlength=num_items)
        stays = (user_counts[users[left]] >= k) & (item_counts[flat_items[left]] >= k)
        if stays.all():
            keep = np.zeros(len(flat_items), bool)
            keep[left] = True
            return keep, user_counts >= k, item_counts >= k
        left = left[stays]


def repeats_mask(flat_items: np.ndarray, offsets: np.ndarray, num_items: int, policy: str) -> np.ndarray:
    """Marks the interactions that repeat an earlier one of the same user.

    Args:
        flat_items: Items of all histories.
        offsets: Where each history begins.
        num_items: Size of the catalogue.
        policy: "drop_later" marks every repeat, "drop_consecutive" only one directly after the same item.

    Raises:
        SettingsError: Another policy.
    """
    pairs = users_of(offsets) * np.int64(max(num_items, 1)) + flat_items
    if policy == "drop_later":
        repeat = np.ones(len(pairs), bool)
        repeat[np.unique(pairs, return_index=True)[1]] = False
        return repeat
    if policy == "drop_consecutive":
        return np.concatenate([[False], pairs[1:] == pairs[:-1]])[: len(pairs)]
    raise SettingsError(f"the repeats policy is {policy!r}: choose 'keep', 'drop_later' or 'drop_consecutive'")
