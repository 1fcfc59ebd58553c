"""Beam search over the items: the K most likely code tuples for each prompt, every one of them an item.

The prompts are read once and the beams of each grow as a tree behind it (`prompt_tree.py`): L codes take L - 1
forwards after the prompts, and no end-of-sequence step. Models and attention kernels that don't take a tree go
through transformers' `generate` instead (`generate_search.py`): slower, the same answers.

This module knows prompts as token IDs, and leaves of the trie. It knows nothing of item IDs or histories.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmrec.errors import SettingsError
from llmrec.generation.generate_search import generate_search
from llmrec.generation.item_sets import LeafSubset
from llmrec.generation.logits_process import check_same_codes
from llmrec.generation.packing import PackedPrompts, pack_prompts
from llmrec.generation.prompt_tree import prompt_tree
from llmrec.generation.selection import Candidates, Diversity, Sampling, Selection, selection
from llmrec.generation.tree_models import why_no_tree
from llmrec.generation.trie import Children, ItemTrie
from llmrec.processes import device_of
from llmrec.vocabulary import CodeVocabulary

logger = logging.getLogger(__name__)

SCOPES = ("vocabulary", "codes", "trie")


@dataclass(frozen=True)
class BeamSearchOutput:
    """The best leaves of each request, best first.

    Attributes:
        leaves: int64 [B, K], leaves of the trie; -1 where a request has fewer than K.
        scores: float32 [B, K], sums of the natural log-probabilities of the L code tokens; -inf where a request has
            fewer than K leaves.
    """

    leaves: Tensor
    scores: Tensor


@torch.no_grad()
def beam_search(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    trie: ItemTrie,
    vocabulary: CodeVocabulary,
    *,
    num_beams: int,
    scope: str = "vocabulary",
    subset: LeafSubset | None = None,
    sampling: Sampling | None = None,
    diversity: Diversity | None = None,
) -> BeamSearchOutput:
    """Finds the most likely items for a batch of prompts.

    With at least as many beams as items the answer is exhaustive: all items in the order of their scores. With K beams
    a request gets K leaves wherever K are left to it, also where the first level has fewer codes than K.

    Args:
        model: A causal language model with the code tokens, in evaluation mode: plain, wrapped by PEFT, or with rows
            of its own from `add_code_rows`.
        prompts: B lists of token IDs, of any lengths from 1; no padding.
        trie: The items, on the device of the model.
        vocabulary: Token IDs of the codes.
        num_beams: K, at least 1.
        scope: Over what a code's probability is normalised. "vocabulary": all tokens, the scores that `generate`
            gives; "codes": the codes of its level; "trie": the codes that lead to an item. An item's score doesn't
            depend on which others are left out. The last two need no product with the rest of the vocabulary.
        subset: What each request may be answered with, from `ItemTrie.subset`, on the device of the model.
        sampling: Draw K different items instead of taking the best; they come in the order of the draw.
        diversity: Keep groups of beams apart. Fewer than K leaves may come then, though more are left.

    Returns:
        Leaves and scores [B, K].

    Raises:
        SettingsError: An unknown scope, fewer than 1 beam, an empty prompt, a trie of other codes than the
            vocabulary's; sampling or diversity with a model that can't take a tree.
    """
    check_search(prompts, trie, vocabulary, scope)
    if num_beams < 1:
        raise SettingsError(f"num_beams is {num_beams}; at least 1 is needed")
    reason = why_no_tree(model, vocabulary)
    if reason is None:
        packed = pack_for(model, prompts)
        chooses = selection(num_beams, len(prompts), sampling=sampling, diversity=diversity, device=packed.device)
        leaves, scores = search_tree(model, packed, trie, vocabulary, chooses, scope, subset)
    elif sampling is not None or diversity is not None:
        raise SettingsError(f"sampled and diverse searches need a model that takes a tree of beams, but {reason}")
    else:
        log_once(f"beam search through transformers' generate, which is slower: {reason}")
        leaves, scores = generate_search(
            model, prompts, trie, vocabulary, num_beams=num_beams, scope=scope, subset=subset
        )
    dead = scores.isneginf()
    leaves, scores = leaves.masked_fill(dead, -1)[:, :num_beams], scores[:, :num_beams]
    missing = (0, num_beams - leaves.shape[1])
    return BeamSearchOutput(
        nn.functional.pad(leaves, missing, value=-1), nn.functional.pad(scores, missing, value=-torch.inf)
    )


def check_scope(scope: str) -> None:
    """Refuses an unknown scope.

    Raises:
        SettingsError: It is none of `SCOPES`.
    """
    if scope not in SCOPES:
        raise SettingsError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")


def check_search(prompts: Sequence[Sequence[int]], trie: ItemTrie, vocabulary: CodeVocabulary, scope: str) -> None:
    """Refuses what can't be searched.

    Raises:
        SettingsError: An unknown scope, no prompt or an empty one, or a trie of other codes than the vocabulary's.
    """
    check_scope(scope)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise SettingsError("there must be at least one prompt, and at least one token in each")
    check_same_codes(trie, vocabulary)


def pack_for(model: Any, prompts: Sequence[Sequence[int]]) -> PackedPrompts:
    """Prompts in rows, on the model's device."""
    # A layer has about 12 D^2 weights, and attention takes 2 D products for each pair of tokens: as much as the
    # weights in a row of 6 D tokens.
    hidden_size = model.get_input_embeddings().embedding_dim  # ZeRO-3 leaves an empty weight outside of forwards
    return pack_prompts(prompts, attention_scale=6 * hidden_size).to(device_of(model))


def search_tree(
    model: nn.Module,
    prompts: PackedPrompts,
    trie: ItemTrie,
    vocabulary: CodeVocabulary,
    chooses: Selection,
    scope: str,
    subset: LeafSubset | None,
) -> tuple[Tensor, Tensor]:
    """Leaves and scores [B, K], for any K that the selection keeps; a score of -inf marks a dead beam.

    All shapes follow from the prompts, the trie and the selection alone, and nothing is read back from the device: a
    request with fewer live beams than the shapes have room for carries dead ones.
    """
    batch, last = prompts.num_requests, trie.num_levels - 1
    widths = [
        chooses.width(level, trie.branching[level], trie.num_nodes(level + 1)) for level in range(trie.num_levels)
    ]
    nodes = torch.zeros(batch, 1, dtype=torch.int64, device=prompts.device)
    scores = torch.zeros(batch, 1, device=prompts.device)
    with prompt_tree(model, prompts, vocabulary, scope=scope, num_slots=sum(widths[: last - 1])) as tree:
        of_codes = tree.read_prompts()
        for level in range(trie.num_levels):
            children = trie.children(level, nodes.flatten())
            children = Children(*(part.view(batch, nodes.shape[1], -1) for part in children))
            steps = child_scores(of_codes, children, scope)
            left = children.valid
            if subset is not None:
                left = left & trie.has_items_left(level, nodes.flatten(), subset).view_as(left)
            paths = (scores.unsqueeze(2) + steps).masked_fill(~left, -torch.inf)
            chosen = chooses.choose(level, Candidates(children.codes, children.nodes, paths, steps))
            nodes, scores = chosen.nodes, chosen.scores
            if level < last:
                of_codes = tree.write(level, chosen.codes, chosen.parents, is_last=level == last - 1)
    return nodes, scores


def child_scores(of_codes: Tensor, children: Children, scope: str) -> Tensor:
    """Log-probability float32 [B, K, C] of each child after its node.

    Args:
        of_codes: [B, K, codes of the level], from `PromptTree`.
        children: Of [B, K] nodes.
        scope: What the probabilities are normalised over.
    """
    of_children = of_codes.gather(2, children.codes)
    if scope == "vocabulary":
        return of_children
    if scope == "codes":
        return of_children - of_codes.logsumexp(dim=2, keepdim=True)
    return of_children.masked_fill(~children.valid, -torch.inf).log_softmax(dim=2)


_logged: set[str] = set()


def log_once(message: str) -> None:
    """Logs a message the first time it comes."""
    if message not in _logged:
        _logged.add(message)
        logger.info(message)
