"""A synthetic catalogue with taste and order in it: made up, for trying llmrec out and for its tests.

Nothing measured on it says how good a method is on real data. What is in it, so that there is something to learn:

- *Titles* are brand, adjective, category and number from small vocabularies. Items of one brand, adjective and
  category are a series, numbered from 01.
- *Order*: after an item a user mostly takes the next number of its series, sometimes one of four related items (two of
  the same category, two of the same brand, at the same place of their series).
- *Taste*: the rest of the time, and at the start, a user takes what its preferred categories and brands suggest,
  weighted with a moderate skew of popularity.

No user takes an item twice. The generating process is kept as `SyntheticProcess`, so that the best possible
recommendations are known.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llmrec.data.interactions import InteractionDataset
from llmrec.errors import SettingsError

BRANDS = ("Alder", "Borea", "Cinder", "Dorado", "Ember", "Fjord", "Garnet", "Harbor", "Indigo", "Juniper")
ADJECTIVES = ("compact", "classic", "rugged", "silent", "bright", "woven", "folding", "polished")
CATEGORIES = (
    "backpack", "blender", "camera", "guitar", "headphones", "kettle",
    "keyboard", "lantern", "notebook", "puzzle", "teapot", "tent",
)  # fmt: skip
SERIES_LENGTH = 5
NUM_RELATED = 4
_RELATED_WEIGHTS = np.array([0.4, 0.3, 0.2, 0.1])
_START = 1_577_836_800  # 2020-01-01 UTC, seconds
_DAY = 86_400
_USERS_AT_ONCE = 2_048


@dataclass(frozen=True, eq=False)
class SyntheticProcess:
    """The process that made the histories: probabilities of the next item.

    Attributes:
        next_in_series: int64 [N], the item after each in its series, -1 after the last.
        related: int64 [N, 4], related items.
        taste: float64 [users, N], each user's own distribution over items; rows add up to 1.
        next_share: Share of steps to the next of the series.
        related_share: Share of steps to a related item.
    """

    next_in_series: np.ndarray
    related: np.ndarray
    taste: np.ndarray
    next_share: float
    related_share: float

    def probabilities(self, users: np.ndarray, last_items: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Distribution of the next item of each user, float64 [B, N].

        Args:
            users: int64 [B].
            last_items: int64 [B], -1 for a user who took none yet.
            seen: bool [B, N], items taken already; they are not taken again.
        """
        weights = self.taste[users] * (1.0 - self.next_share - self.related_share)
        started = np.flatnonzero(last_items >= 0)
        last = last_items[started]
        np.add.at(weights, (started[:, None], self.related[last]), self.related_share * _RELATED_WEIGHTS)
        follower = self.next_in_series[last]
        continues = follower >= 0
        weights[started[continues], follower[continues]] += self.next_share
        weights[seen] = 0.0
        return weights / weights.sum(axis=1, keepdims=True)


def synthetic_dataset(
    num_users: int = 2000,
    num_items: int = 400,
    seed: int = 0,
    *,
    min_length: int = 8,
    max_length: int = 15,
    next_share: float = 0.5,
    related_share: float = 0.25,
) -> InteractionDataset:
    """Makes the synthetic data set; the same arguments give the same one.

    Args:
        num_users: Users.
        num_items: Items of the catalogue.
        seed: Of every draw.
        min_length: Shortest history, interactions.
        max_length: Longest history.
        next_share: Share of steps to the next item of the series; 0 takes this order out.
        related_share: Share of steps to a related item.

    Returns:
        Data set "synthetic" with titles, brands, categories and timestamps.

    Raises:
        SettingsError: Sizes or shares that can't work.
    """
    return synthetic_with_process(
        num_users,
        num_items,
        seed,
        min_length=min_length,
        max_length=max_length,
        next_share=next_share,
        related_share=related_share,
    )[0]


def synthetic_with_process(
    num_users: int = 2000,
    num_items: int = 400,
    seed: int = 0,
    *,
    min_length: int = 8,
    max_length: int = 15,
    next_share: float = 0.5,
    related_share: float = 0.25,
) -> tuple[InteractionDataset, SyntheticProcess]:
    """`synthetic_dataset`, together with the process that made it, whose users are the rows of its histories."""
    if num_users < 1 or not 1 <= min_length <= max_length:
        raise SettingsError(
            f"num_users is {num_users} and the lengths are {min_length} to {max_length}: at least one user, and"
            " 1 <= min_length <= max_length, are needed"
        )
    if num_items < 2 * max_length:
        raise SettingsError(
            f"num_items is {num_items}, but histories of up to {max_length} different items need twice as many to"
            " choose from: raise num_items or lower max_length"
        )
    if min(next_share, related_share) < 0 or next_share + related_share >= 1:
        raise SettingsError(
            f"next_share ({next_share}) and related_share ({related_share}) must not be negative and add up to less"
            " than 1: the rest is taste"
        )
    generator = np.random.default_rng(seed)
    items, next_in_series, related = _make_items(num_items, generator)
    taste = _make_taste(items, num_users, generator)
    process = SyntheticProcess(next_in_series, related, taste, next_share, related_share)
    lengths = generator.integers(min_length, max_length + 1, size=num_users)
    taken = np.concatenate(
        [
            _walk(process, np.arange(start, min(start + _USERS_AT_ONCE, num_users)), max_length, generator)
            for start in range(0, num_users, _USERS_AT_ONCE)
        ]
    )
    start = _START + generator.integers(0, 365 * _DAY, size=(num_users, 1))
    gaps = 1 + generator.exponential(20 * _DAY, size=taken.shape).astype(np.int64)
    times = start + np.cumsum(gaps, axis=1)
    users, steps = np.nonzero(np.arange(max_length) < lengths[:, None])
    width = len(str(num_users - 1))
    user_names = pa.array([f"user-{user:0{width}}" for user in range(num_users)])
    dataset = InteractionDataset.from_columns(
        user_names.take(pa.array(users)),
        items["item_id"].take(pa.array(taken[users, steps])),
        times[users, steps],
        items=items,
        name="synthetic",
    )
    return dataset, process


def _make_items(num_items: int, generator: np.random.Generator) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Item table in random order, next of the series [N], related items [N, 4]."""
    number = np.arange(num_items) % SERIES_LENGTH
    series = np.arange(num_items) // SERIES_LENGTH
    num_series = int(series[-1]) + 1
    kinds = len(BRANDS) * len(ADJECTIVES) * len(CATEGORIES)
    kind = np.tile(generator.permutation(kinds), num_series // kinds + 1)[:num_series]
    brand, rest = np.divmod(kind, len(ADJECTIVES) * len(CATEGORIES))
    adjective, category = np.divmod(rest, len(CATEGORIES))
    edition = np.arange(num_series) // kinds  # catalogues with more series than kinds

    followers = np.where((number < SERIES_LENGTH - 1) & (np.arange(num_items) < num_items - 1), 1, 0)
    next_in_series = np.where(followers == 1, np.arange(num_items) + 1, -1)
    chosen = np.stack([_related_series(one, category, brand, generator) for one in range(num_series)])
    related = np.minimum(chosen[series] * SERIES_LENGTH + number[:, None], num_items - 1)

    row_of = generator.permutation(num_items)  # rows must not give the series away
    made = np.argsort(row_of)
    width = len(str(num_items - 1))
    titles = []
    for item in made:
        one = series[item]
        title = f"{BRANDS[brand[one]]} {ADJECTIVES[adjective[one]]} {CATEGORIES[category[one]]} {number[item] + 1:02}"
        titles.append(title if not edition[one] else f"{title} edition {edition[one] + 1}")
    table = pa.table(
        {
            "item_id": [f"item-{row:0{width}}" for row in range(num_items)],
            "title": titles,
            "brand": [BRANDS[brand[series[item]]] for item in made],
            "category": [CATEGORIES[category[series[item]]] for item in made],
        }
    )
    renumbered = np.where(next_in_series >= 0, row_of[next_in_series], -1)
    return table, renumbered[made], row_of[related][made]


def _related_series(one: int, category: np.ndarray, brand: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Two other series of the same category, then two of the same brand; any other where there are too few."""
    others = np.delete(np.arange(len(category)), one)
    groups = [others[category[others] == category[one]], others[brand[others] == brand[one]]]
    half = NUM_RELATED // 2
    return np.concatenate(
        [generator.choice(group if len(group) >= half else others, half, replace=False) for group in groups]
    )


def _make_taste(items: pa.Table, num_users: int, generator: np.random.Generator) -> np.ndarray:
    """Each user's distribution over items, float64 [users, N]."""
    categories = items["category"].combine_chunks().dictionary_encode()
    brands = items["brand"].combine_chunks().dictionary_encode()
    liked_categories = generator.dirichlet(np.full(len(categories.dictionary), 0.3), size=num_users) + 1e-3
    liked_brands = generator.dirichlet(np.full(len(brands.dictionary), 0.5), size=num_users) + 1e-3
    popularity = generator.permutation(np.arange(1, len(items) + 1) ** -0.5)
    taste = (
        liked_categories[:, categories.indices.to_numpy()] * liked_brands[:, brands.indices.to_numpy()] * popularity
    )
    return taste / taste.sum(axis=1, keepdims=True)


def _walk(process: SyntheticProcess, users: np.ndarray, length: int, generator: np.random.Generator) -> np.ndarray:
    """Items taken one after the other, int64 [users, length]."""
    num_items = process.taste.shape[1]
    seen = np.zeros((len(users), num_items), bool)
    taken = np.full((len(users), length), -1, np.int64)
    last = np.full(len(users), -1, np.int64)
    for step in range(length):
        cumulative = np.cumsum(process.probabilities(users, last, seen), axis=1)
        draws = generator.random((len(users), 1)) * cumulative[:, -1:]
        last = (cumulative <= draws).sum(axis=1)
        taken[:, step] = last
        seen[np.arange(len(users)), last] = True
    return taken
