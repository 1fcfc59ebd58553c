"""How a search chooses, at each level, which nodes of the trie it goes on with.

The best ones (beam search); a draw without repeats (stochastic beam search); or groups of beams that keep away from
each other's codes (diverse beam search). Each gives nodes, their parents among the beams, and their scores. This
module knows scores and nodes. It knows nothing of models or tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llmrec.errors import SettingsError


class Candidates(NamedTuple):
    """What K beams of B requests may go on with: C children each.

    Attributes:
        codes: int64 [B, K, C], the code that leads to each child.
        nodes: int64 [B, K, C], nodes of the trie.
        scores: float32 [B, K, C], log-probability of the whole path to the child; -inf where there is no such child
            or no item is left below it.
        steps: float32 [B, K, C], that of its last code alone, in the same places.
    """

    codes: Tensor
    nodes: Tensor
    scores: Tensor
    steps: Tensor


class Chosen(NamedTuple):
    """The beams that a level goes on with, all [B, K].

    Attributes:
        codes: int64.
        nodes: int64, nodes of the trie.
        parents: int64, the beam of the level before.
        scores: float32, log-probabilities of the paths; -inf at a dead beam.
    """

    codes: Tensor
    nodes: Tensor
    parents: Tensor
    scores: Tensor


class Selection(Protocol):
    """Chooses at each level; made anew for every search."""

    def width(self, level: int, num_children: int, num_nodes: int) -> int:
        """Beams that will be kept of a level; called once for each, from the first.

        Args:
            level: From 0.
            num_children: Most children that a beam has there.
            num_nodes: Nodes of the trie at that depth.
        """

    def choose(self, level: int, candidates: Candidates) -> Chosen:
        """The beams to go on with, of the last level in the order of the answer: dead ones at the end."""


@dataclass(frozen=True)
class Sampling:
    """Draws items instead of taking the best: K different ones, likelier ones earlier.

    Stochastic beam search (Kool, van Hoof and Welling, ICML 2019, arXiv 1903.06059, algorithm 1): Gumbel noise is put
    on the log-probabilities of whole paths from the top down, so that the K best noisy paths are a sample without
    replacement. What is drawn from is the distribution that sampling code by code with the trie's mask has: at each
    level the model's probabilities of the codes that lead to an item, to the power 1 / temperature and normalised.

    Attributes:
        temperature: Above 0; below 1 sharper, above 1 flatter than the model.
        seed: One number, or one a request. A request with its number draws the same whatever else is in the batch.
    """

    temperature: float = 1.0
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SettingsError(
                f"temperature is {self.temperature}, it must be above 0; for the best items, don't sample"
            )


@dataclass(frozen=True)
class Diversity:
    """Keeps groups of beams away from each other's codes, so that an answer covers more of the catalogue.

    Diverse beam search with Hamming diversity (Vijayakumar et al., AAAI 2018, arXiv 1610.02424): the groups choose one
    after the other, and a code that n beams of earlier groups chose at this level loses n times the penalty. Where we
    depart from it: the penalty decides what is chosen but is not carried along, so scores stay log-probabilities; no
    two groups end in the same item; and the answer takes turns between the groups.

    Attributes:
        num_groups: G, at least 1, at most the number of beams.
        penalty: At least 0, in natural log-probability.
    """

    num_groups: int = 1
    penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.num_groups < 1 or not self.penalty >= 0:
            raise SettingsError(
                f"num_groups is {self.num_groups} (at least 1), the penalty is {self.penalty} (at least 0)"
            )


def selection(
    num_beams: int, num_requests: int, *, sampling: Sampling | None, diversity: Diversity | None, device: torch.device
) -> Selection:
    """What a search of `num_beams` beams chooses with.

    Raises:
        SettingsError: Sampling and diversity both, more groups than beams, or a wrong number of seeds.
    """
    if sampling is not None and diversity is not None:
        raise SettingsError("sampling and diversity can't be combined: a draw is diverse by its temperature")
    if sampling is not None:
        return Drawn(num_beams, sampling, num_requests, device)
    if diversity is not None and diversity.num_groups > 1:
        return InGroups(num_beams, diversity)
    return Best(num_beams)


class Best:
    """The best candidates.

    Attributes:
        widths: Beams of each level so far.
    """

    def __init__(self, num_beams: int):
        self.num_beams = num_beams
        self.widths: list[int] = []

    def width(self, level: int, num_children: int, num_nodes: int) -> int:
        """See `Selection`."""
        before = self.widths[-1] if self.widths else 1
        self.widths.append(min(self.num_beams, before * num_children, num_nodes))
        return self.widths[-1]

    def choose(self, level: int, candidates: Candidates) -> Chosen:
        """See `Selection`."""
        scores, places = candidates.scores.flatten(1).topk(self.widths[level], dim=1)
        return _at(candidates, places, scores)


class Drawn(Best):
    """Stochastic beam search."""

    def __init__(self, num_beams: int, sampling: Sampling, num_requests: int, device: torch.device):
        super().__init__(num_beams)
        self.temperature = sampling.temperature
        seeds = [sampling.seed] * num_requests if isinstance(sampling.seed, int) else list(sampling.seed)
        if len(seeds) != num_requests:
            raise SettingsError(f"{len(seeds)} seeds for {num_requests} requests: give one number, or one a request")
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same everywhere
        self._paths = torch.zeros(num_requests, 1, device=device)  # of the beams, in the distribution drawn from
        self._noisy = torch.zeros(num_requests, 1, device=device)

    def choose(self, level: int, candidates: Candidates) -> Chosen:
        """See `Selection`."""
        alive = ~candidates.scores.isneginf()
        steps = (candidates.steps / self.temperature).masked_fill(~alive, -torch.inf).log_softmax(dim=2)
        paths = self._paths.unsqueeze(2) + steps
        uniform = torch.stack([torch.rand(paths.shape[1:], generator=each) for each in self._generators])
        gumbel = -(-uniform.to(paths.device).clamp(1e-20, 1 - 1e-7).log()).log()
        noisy = _with_highest(paths + gumbel, self._noisy.unsqueeze(2)).masked_fill(~alive, -torch.inf)
        self._noisy, places = noisy.flatten(1).topk(self.widths[level], dim=1)
        self._paths = paths.flatten(1).gather(1, places)
        return _at(candidates, places, candidates.scores.flatten(1).gather(1, places))


def _with_highest(values: Tensor, highest: Tensor) -> Tensor:
    """Gumbel variables of the last axis, given that their maximum is `highest` (Kool et al., appendix B.3)."""
    over = highest - values + torch.log1p(-(values - values.amax(dim=-1, keepdim=True)).exp())
    return highest - over.clamp(min=0) - torch.log1p((-over.abs()).exp())


class InGroups:
    """Diverse beam search. The beams of a group stand side by side, group after group."""

    def __init__(self, num_beams: int, diversity: Diversity):
        if diversity.num_groups > num_beams:
            raise SettingsError(f"{num_beams} beams can't be divided into {diversity.num_groups} groups")
        self.num_groups, self.penalty = diversity.num_groups, diversity.penalty
        self._of_group = Best(-(-num_beams // diversity.num_groups))
        self._num_levels = 0

    def width(self, level: int, num_children: int, num_nodes: int) -> int:
        """See `Selection`."""
        self._num_levels += 1
        return self.num_groups * self._of_group.width(level, num_children, num_nodes)

    def choose(self, level: int, candidates: Candidates) -> Chosen:
        """See `Selection`. Groups may share nodes, but no leaf."""
        is_last = level == self._num_levels - 1
        num_beams = candidates.scores.shape[1]
        size = num_beams if level == 0 else num_beams // self.num_groups  # all groups start at the one root
        groups: list[Chosen] = []
        for group in range(self.num_groups):
            first = 0 if level == 0 else group * size
            own = Candidates(*(part[:, first : first + size] for part in candidates))
            scores = own.scores
            if groups:
                scores = scores - self.penalty * _times_chosen(own.codes, groups, "codes")
                if is_last:
                    scores = scores.masked_fill(_times_chosen(own.nodes, groups, "nodes") > 0, -torch.inf)
            penalised, places = scores.flatten(1).topk(self._of_group.widths[level], dim=1)
            chosen = _at(own, places, own.scores.flatten(1).gather(1, places))
            alive = ~penalised.isneginf()
            scores = chosen.scores.masked_fill(~alive, -torch.inf)
            groups.append(chosen._replace(scores=scores, parents=chosen.parents + first))
        if not is_last:
            return Chosen(*(torch.cat(parts, dim=1) for parts in zip(*groups, strict=True)))
        in_turns = Chosen(*(torch.stack(parts, dim=2).flatten(1) for parts in zip(*groups, strict=True)))
        order = in_turns.scores.isneginf().int().sort(dim=1, stable=True).indices
        return Chosen(*(part.gather(1, order) for part in in_turns))


def _times_chosen(values: Tensor, groups: Sequence[Chosen], name: str) -> Tensor:
    """How many live beams of the groups have each of the codes or nodes [B, K, C]: int64 [B, K, C]."""
    taken = torch.cat([getattr(group, name).masked_fill(group.scores.isneginf(), -1) for group in groups], dim=1)
    ordered, wanted = taken.sort(dim=1).values, values.flatten(1).contiguous()
    below = torch.searchsorted(ordered, wanted)
    return (torch.searchsorted(ordered, wanted, right=True) - below).view_as(values)


def _at(candidates: Candidates, places: Tensor, scores: Tensor) -> Chosen:
    """The candidates at places [B, K] of the flattened ones."""
    num_children = candidates.codes.shape[2]
    return Chosen(
        candidates.codes.flatten(1).gather(1, places),
        candidates.nodes.flatten(1).gather(1, places),
        torch.div(places, num_children, rounding_mode="floor"),
        scores,
    )
