"""How the items of a recommendation are found: the k most likely, drawn by lot, or spread over groups.

Checks the settings against each other before any work, and chooses the width of the search. Knows no model and no
catalogue; the searches themselves are in `generation/beam_search.py`.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmrec.data.recommendation import Recommendation, check_k
from llmrec.errors import SettingsError
from llmrec.generation.selection import Diversity, Sampling


@dataclass(frozen=True)
class SearchSettings:
    """What `Recommender.recommend` was asked for; its docstring describes the settings.

    Attributes:
        k: Number of items wanted.
        num_beams: Width of the search; None: chosen from the others.
        temperature: None for the k best; above 0 for k items drawn.
        top_k: Draw only among so many of the best items.
        seed: Of what is drawn.
        num_groups: Groups of beams that avoid each other's codes.
        diversity_penalty: What a code costs per beam of an earlier group that took it.

    Raises:
        SettingsError: One of them makes no sense, or two contradict each other.
    """

    k: int
    num_beams: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    seed: int = 0
    num_groups: int = 1
    diversity_penalty: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_k(self.k))
        if self.num_beams is not None and self.num_beams < self.k:
            raise SettingsError(
                f"num_beams is {self.num_beams}, k is {self.k}: a search of {self.num_beams} beams can't give"
                f" {self.k} items"
            )
        self._check_draw()
        self._check_groups()

    def _check_draw(self) -> None:
        if not _is_integer(self.seed) or self.seed < 0:
            raise SettingsError(f"seed is {self.seed!r}; it must be an integer of at least 0")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise SettingsError(
                f"temperature is {self.temperature}; it must be above 0, or None for the k most likely items"
            )
        if self.top_k is None:
            return
        if self.temperature is None:
            raise SettingsError(
                f"top_k is {self.top_k} without a temperature, so nothing is drawn: set one, or leave out top_k"
            )
        if self.top_k < self.k or (self.num_beams is not None and self.num_beams < self.top_k):
            beams = "" if self.num_beams is None else f", num_beams is {self.num_beams}"
            raise SettingsError(
                f"top_k is {self.top_k}, k is {self.k}{beams}: k items are drawn out of the top_k that the beams find"
            )

    def _check_groups(self) -> None:
        if self.num_groups < 1 or not 0 <= self.diversity_penalty < math.inf:
            raise SettingsError(
                f"num_groups is {self.num_groups} (at least 1), diversity_penalty is {self.diversity_penalty} (at"
                " least 0)"
            )
        if self.num_groups == 1:
            if self.diversity_penalty:
                raise SettingsError(
                    f"diversity_penalty is {self.diversity_penalty} with one group, which nothing is compared with:"
                    " set num_groups above 1"
                )
            return
        if self.temperature is not None:
            raise SettingsError(
                f"temperature is {self.temperature}, num_groups is {self.num_groups}: items are either drawn or spread"
                " over groups; leave out one of them"
            )
        if self.num_beams is not None and self.num_beams < self.num_groups:
            raise SettingsError(
                f"num_beams is {self.num_beams}, num_groups is {self.num_groups}: every group needs a beam"
            )

    @property
    def num_wanted(self) -> int:
        """Items of the search's answer that are looked at: k, or those that k are drawn out of."""
        return self.k if self.top_k is None else self.top_k

    def width(self, num_leaves: int) -> int:
        """Beams of the search, never more than there are code tuples, but at least one a group."""
        width = self.num_beams
        if width is None and self.temperature is not None:
            width = self.num_wanted
        if width is None:
            width = max(20, 2 * self.k)
        return max(min(width, num_leaves), self.num_groups)

    def sampling(self, seeds: Sequence[int]) -> Sampling | None:
        """How the search draws, one seed a request; None where it finds the best."""
        if self.temperature is None or self.top_k is not None:
            return None
        return Sampling(self.temperature, list(seeds))

    @property
    def diversity(self) -> Diversity | None:
        """How the search spreads over groups; None where it doesn't."""
        return None if self.num_groups == 1 else Diversity(self.num_groups, self.diversity_penalty)

    def seed_of(self, history: Sequence[str]) -> int:
        """The seed of one request: by its own history, so that it draws alone what it draws among others."""
        text = json.dumps([int(self.seed), *history])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def choose(self, answer: list[Recommendation], seed: int) -> list[Recommendation]:
        """The k items of a request out of those that the search found.

        With `top_k` they are drawn without replacement, in proportion to exp(score / temperature), in the order in
        which they are drawn: the k largest of scores / temperature plus Gumbel noise (Kool et al. 2019, "Stochastic
        Beams and Where to Find Them", arXiv 1903.06059, section 2.3).
        """
        if self.top_k is None or self.temperature is None:
            return answer[: self.k]
        candidates = answer[: self.top_k]
        scores = np.array([entry.score for entry in candidates], dtype=np.float64)
        perturbed = scores / self.temperature + np.random.default_rng(seed).gumbel(size=len(candidates))
        return [candidates[place] for place in np.argsort(-perturbed, kind="stable")[: self.k]]


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
