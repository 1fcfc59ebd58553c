"""Log-probabilities of given items.

The items asked for after a prompt are a small trie of their own: each of its nodes is written once, after the prompt
that is read once, whatever the number of items below it. The scores are those that the search gives to the same items.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmrec.errors import SettingsError
from llmrec.generation.beam_search import check_search, child_scores, log_once, pack_for
from llmrec.generation.head import level_columns
from llmrec.generation.prompt_tree import PromptTree, prompt_tree
from llmrec.generation.tree_models import why_no_tree
from llmrec.generation.trie import Children, ItemTrie
from llmrec.vocabulary import CodeVocabulary

MAX_LEAVES = 256  # written after a prompt at once


@torch.no_grad()
def score_leaves(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    leaves: Sequence[np.ndarray],
    trie: ItemTrie,
    vocabulary: CodeVocabulary,
    *,
    scope: str = "vocabulary",
) -> list[np.ndarray]:
    """Scores given leaves of the trie after each prompt.

    Args:
        model: As for `beam_search`; one that can't take a tree is asked leaf by leaf.
        prompts: B lists of token IDs.
        leaves: For each prompt int [M], leaves of the trie; M may differ, repeats are fine.
        trie: The items, on the device of the model.
        vocabulary: Token IDs of the codes.
        scope: Over what a code's probability is normalised, see `beam_search`.

    Returns:
        For each prompt float32 [M], sums of the natural log-probabilities of the L codes.

    Raises:
        SettingsError: As `beam_search`; another number of leaf arrays than prompts, or a leaf that isn't there.
    """
    check_search(prompts, trie, vocabulary, scope)
    if len(leaves) != len(prompts):
        raise SettingsError(f"{len(leaves)} arrays of leaves for {len(prompts)} prompts: give one a prompt")
    wanted = [np.unique(np.asarray(of_one, dtype=np.int64)) for of_one in leaves]
    if any(len(of_one) and not 0 <= of_one[0] <= of_one[-1] < trie.num_leaves for of_one in wanted):
        raise SettingsError(f"a leaf is outside the trie, which has {trie.num_leaves}")
    reason = why_no_tree(model, vocabulary)
    if reason is not None:
        log_once(f"items are scored one by one, which is slower: {reason}")
        scores = [
            _score_plainly(model, prompt, of_one, trie, vocabulary, scope)
            for prompt, of_one in zip(prompts, wanted, strict=True)
        ]
    else:
        scores = _score_trees(model, prompts, wanted, trie, vocabulary, scope)
    return [
        of_one[np.searchsorted(distinct, np.asarray(asked))].astype(np.float32)
        for of_one, distinct, asked in zip(scores, wanted, leaves, strict=True)
    ]


def _score_trees(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    wanted: list[np.ndarray],
    trie: ItemTrie,
    vocabulary: CodeVocabulary,
    scope: str,
) -> list[np.ndarray]:
    packed = pack_for(model, prompts)
    scores = [np.zeros(len(of_one), dtype=np.float32) for of_one in wanted]
    most = max(map(len, wanted))
    slots = min(most, MAX_LEAVES) * max(trie.num_levels - 2, 0)
    with prompt_tree(model, packed, vocabulary, scope=scope, num_slots=slots) as tree:
        after_prompts = tree.read_prompts()
        for start in range(0, most, MAX_LEAVES):  # neighbouring leaves have most of their nodes in common
            part = [of_one[start : start + MAX_LEAVES] for of_one in wanted]
            found = _score_part(tree, after_prompts, part, trie, scope).cpu().numpy()
            for request, of_one in enumerate(part):
                scores[request][start : start + len(of_one)] = found[request, : len(of_one)]
            tree.rewind()
    return scores


def _score_part(tree: PromptTree, of_codes: Tensor, leaves: list[np.ndarray], trie: ItemTrie, scope: str) -> Tensor:
    """Scores float32 [B, M] of up to `MAX_LEAVES` leaves a request, ascending; shorter requests are padded."""
    longest = max(1, *map(len, leaves))
    padded = np.zeros((len(leaves), longest), dtype=np.int64)
    for request, of_one in enumerate(leaves):
        if len(of_one):
            padded[request] = np.pad(of_one, (0, longest - len(of_one)), mode="edge")
    flat = torch.from_numpy(padded.ravel()).to(of_codes.device)
    paths, codes = (part.view(*padded.shape, -1) for part in (trie.nodes_of(flat), trie.codes_of(flat)))

    total = torch.zeros(padded.shape, device=flat.device)
    nodes = torch.zeros(len(leaves), 1, dtype=torch.int64, device=flat.device)
    place = torch.zeros_like(paths[:, :, 0])  # [B, M]: of each leaf's node among `nodes`
    for level in range(trie.num_levels):
        children = Children(*(part.view(*nodes.shape, -1) for part in trie.children(level, nodes.flatten())))
        steps = child_scores(of_codes, children, scope)  # [B, K, C]
        child = paths[:, :, level + 1] - children.nodes[:, :, 0].gather(1, place)  # they are numbered one by one
        total += steps.flatten(1).gather(1, place * steps.shape[2] + child)
        if level < trie.num_levels - 1:
            nodes, next_place, leaf = _distinct(paths[:, :, level + 1])
            parents = place.gather(1, leaf)
            is_last = level == trie.num_levels - 2
            of_codes = tree.write(level, codes[:, :, level].gather(1, leaf), parents, is_last=is_last)
            place = next_place
    return total


def _distinct(nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ascending nodes [B, M]: the distinct ones [B, K], where each stands among them [B, M], and one of each."""
    is_new = torch.ones_like(nodes)
    is_new[:, 1:] = (nodes[:, 1:] != nodes[:, :-1]).long()
    place = is_new.cumsum(dim=1) - 1
    wanted = torch.arange(int(place.max()) + 1, device=nodes.device).expand(len(nodes), -1)
    first = torch.searchsorted(place, wanted.contiguous()).clamp(max=nodes.shape[1] - 1)
    return nodes.gather(1, first), place, first


def _score_plainly(
    model: Any,
    prompt: Sequence[int],
    leaves: np.ndarray,
    trie: ItemTrie,
    vocabulary: CodeVocabulary,
    scope: str,
) -> np.ndarray:
    """Scores of leaves after one prompt, by forwards over the prompt and all codes of each."""
    scores = np.zeros(len(leaves), dtype=np.float32)
    for start in range(0, len(leaves), MAX_LEAVES // 8):
        part = torch.from_numpy(leaves[start : start + MAX_LEAVES // 8]).to(model.device)
        paths, codes = trie.nodes_of(part), trie.codes_of(part)
        offsets = torch.from_numpy(vocabulary.level_offsets + vocabulary.first_token_id).to(model.device)
        tokens, given = (
            (codes + offsets)[:, :-1],
            torch.tensor(list(prompt), device=model.device).expand(len(part), -1),
        )
        if model.config.is_encoder_decoder:
            start_id = model.generation_config.decoder_start_token_id
            begin = torch.full_like(
                tokens[:, :1], model.config.decoder_start_token_id if start_id is None else start_id
            )
            output = model(input_ids=given, decoder_input_ids=torch.cat([begin, tokens], dim=1))
        else:
            output = model(input_ids=torch.cat([given, tokens], dim=1))
        logits = output.logits[:, -trie.num_levels :].float()
        for level in range(trie.num_levels):
            first, end = level_columns(vocabulary, level)
            of_codes = logits[:, level : level + 1, first:end]
            if scope == "vocabulary":
                of_codes = of_codes - logits[:, level : level + 1].logsumexp(dim=2, keepdim=True)
            children = Children(*(each.unsqueeze(1) for each in trie.children(level, paths[:, level])))
            steps = child_scores(of_codes, children, scope)[:, 0]
            child = paths[:, level + 1] - children.nodes[:, 0, 0]
            scores[start : start + len(part)] += steps.gather(1, child.unsqueeze(1))[:, 0].cpu().numpy()
    return scores
