"""Beam search over the items: the K most likely code tuples for each prompt, every one of them an item.

Hugging Face's `generate` copies the prompt, with its keys and values, once per beam. Here the beams of a request are a
tree: the prompt is read once, then all beams of a request are fed as one short query, and a 4-D mask lets each beam
    see
the prompt and its own ancestors. Keys and values are never reordered; L codes take L - 1 forwards after the prompt,
and no end-of-sequence step. Models and attention kernels that don't take such a mask go through `generate` instead
(`generate_search.py`): slower, the same answers.

This module knows tokens and leaves of the trie. It knows nothing of item IDs, prompts' text or histories.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from llmrec.errors import SettingsError
from llmrec.generation.generate_search import generate_search
from llmrec.generation.logits_process import check_same_codes
from llmrec.generation.trie import ItemTrie
from llmrec.vocabulary import CodeVocabulary, has_code_rows, head_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

SCOPES = ("vocabulary", "codes", "trie")
# Architectures whose beams were compared with those of `generate`; others may ignore a 4-D mask without an error, as
# Qwen3.5, Qwen3-Next and LFM2 do.
_TREE_MODEL_TYPES = frozenset({"gemma", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"})


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
    input_ids: Tensor,
    attention_mask: Tensor,
    trie: ItemTrie,
    vocabulary: CodeVocabulary,
    *,
    num_beams: int,
    scope: str = "vocabulary",
    denied: Tensor | None = None,
) -> BeamSearchOutput:
    """Finds the most likely items for a batch of prompts.

    With at least as many beams as items the answer is exhaustive: all items in the order of their scores. With K beams
    a request gets K leaves wherever K are left to it, also where the first level has fewer codes than K.

    Args:
        model: A causal language model with the code tokens, in evaluation mode: plain, wrapped by PEFT, or with rows
            of its own from `add_code_rows`.
        input_ids: int64 [B, T], prompts padded on the left.
        attention_mask: [B, T], 0 at padding; every row has at least one token.
        trie: The items, on the device of the model.
        vocabulary: Token IDs of the codes.
        num_beams: K, at least 1.
        scope: Over what a code's probability is normalised. "vocabulary": all tokens, the scores that `generate`
            gives; "codes": the codes of its level; "trie": the codes that lead to an item. An item's score doesn't
            depend on which others are denied.
        denied: Leaves to keep out of each request's answer, from `ItemTrie.denied_leaves`.

    Returns:
        Leaves and scores [B, K].

    Raises:
        SettingsError: An unknown scope, fewer than 1 beam, or a trie of other codes than the vocabulary's.
    """
    if scope not in SCOPES:
        raise SettingsError(f"unknown scope {scope!r}; known: {', '.join(SCOPES)}")
    if num_beams < 1:
        raise SettingsError(f"num_beams is {num_beams}; at least 1 is needed")
    check_same_codes(trie, vocabulary)
    reason = why_no_tree(model)
    if reason is not None:
        _log_once(f"beam search through transformers' generate, which is slower: {reason}")
        leaves, scores = generate_search(
            model, input_ids, attention_mask, trie, vocabulary, num_beams=num_beams, scope=scope, denied=denied
        )
    else:
        leaves, scores = _tree_search(model, input_ids, attention_mask, trie, vocabulary, num_beams, scope, denied)
    dead = scores.isneginf()
    leaves = leaves.masked_fill(dead, -1)
    missing = (0, num_beams - leaves.shape[1])
    return BeamSearchOutput(
        nn.functional.pad(leaves, missing, value=-1), nn.functional.pad(scores, missing, value=-torch.inf)
    )


def why_no_tree(model: nn.Module) -> str | None:
    """Why the tree search can't be used with a model; None where it can.

    It needs plain causal attention in every layer, through SDPA or eager: windows, chunks, recurrent and convolutional
    layers ignore a 4-D mask or read it otherwise, most of them without an error.
    """
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return f"{type(model).__name__} is not a decoder-only model of transformers"
    config = config.get_text_config()
    if config.model_type not in _TREE_MODEL_TYPES:
        return f"models of type {config.model_type!r} were not tried with a tree of beams"
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        others = sorted(set(layer_types) - {"full_attention"})
        if others:
            return f"the model has layers of type {', '.join(others)}"
    elif getattr(config, "sliding_window", None) is not None:
        return f"the model attends within a window of {config.sliding_window} tokens"
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return f"the attention implementation {implementation!r} takes no 4-D mask; load the model with 'sdpa'"
    return None


def _tree_search(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    trie: ItemTrie,
    vocabulary: CodeVocabulary,
    num_beams: int,
    scope: str,
    denied: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Leaves and scores [B, K], K at most `num_beams`; a score of -inf marks a dead beam.

    All shapes follow from the prompts, the trie and `num_beams` alone, so nothing is ever read back from the device:
    a request with fewer live beams than the shapes have room for carries dead ones.
    """
    batch = len(input_ids)
    present = attention_mask.bool()
    lengths = present.sum(dim=1, keepdim=True)  # [B, 1]
    head, log_probabilities = _scoring(model, vocabulary, scope)
    cache = DynamicCache()  # without the config: with it, some models' layers drop keys that the tree still needs
    nodes = torch.zeros(batch, 1, dtype=torch.int64, device=input_ids.device)
    scores = torch.zeros(batch, 1, dtype=torch.float32, device=input_ids.device)
    visible = present.unsqueeze(1)  # [B, K, S]: which cached positions each beam sees
    with head():
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.long().cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1:]

    for level in range(trie.num_levels):
        beams = nodes.shape[1]
        codes, child, valid = (part.view(batch, beams, -1) for part in trie.children(level, nodes.flatten()))
        step = log_probabilities(logits, level, codes, valid)
        if denied is not None:
            valid = valid & trie.has_items_left(level, nodes.flatten(), denied).view_as(valid)
        candidates = (scores.unsqueeze(2) + step).masked_fill(~valid, -torch.inf).flatten(1)
        kept = min(num_beams, candidates.shape[1], trie.num_nodes(level + 1))
        scores, best = candidates.topk(kept, dim=1)
        parent = torch.div(best, codes.shape[2], rounding_mode="floor")
        nodes = child.flatten(1).gather(1, best)
        if level == trie.num_levels - 1:
            break

        first = vocabulary.first_token_id + int(vocabulary.level_offsets[level])
        tokens = codes.flatten(1).gather(1, best) + first
        ancestors = visible.gather(1, parent.unsqueeze(2).expand(-1, -1, visible.shape[2]))
        itself = torch.eye(kept, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        visible = torch.cat([ancestors, itself], dim=2)
        with head():
            logits = model(
                input_ids=tokens,
                attention_mask=_additive_mask(visible, _compute_dtype(model)),
                position_ids=(lengths + level).expand(-1, kept),
                past_key_values=cache,
                use_cache=True,
            ).logits
    return nodes, scores


_LogProbabilities = Callable[[Tensor, int, Tensor, Tensor], Tensor]


def _scoring(
    model: nn.Module, vocabulary: CodeVocabulary, scope: str
) -> tuple[Callable[[], AbstractContextManager[None]], _LogProbabilities]:
    """How the head is evaluated, and the log-probabilities of children from its logits.

    In the scopes "codes" and "trie" a head with code rows of its own is evaluated on these rows only. The function
    takes logits [B, K, V], the level, and codes and validity of the children, [B, K, C], and gives [B, K, C] float32.
    """
    codes_only = scope != "vocabulary" and has_code_rows(model)
    first = 0 if codes_only else vocabulary.first_token_id

    def head() -> AbstractContextManager[None]:
        return head_mode(model, codes_only=True) if codes_only else nullcontext()

    def log_probabilities(logits: Tensor, level: int, codes: Tensor, valid: Tensor) -> Tensor:
        start = first + int(vocabulary.level_offsets[level])
        of_level = logits[..., start : start + vocabulary.codebook_sizes[level]].float()
        of_children = of_level.gather(2, codes)
        if scope == "vocabulary":
            return of_children - logits.float().logsumexp(dim=2, keepdim=True)
        if scope == "codes":
            return of_children - of_level.logsumexp(dim=2, keepdim=True)
        return of_children.masked_fill(~valid, -torch.inf).log_softmax(dim=2)

    return head, log_probabilities


def _additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, K, S] of 0 and the type's smallest number: eager attention adds the mask, so it can't be boolean."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The type of the queries: the autocast type where that is on, else the one of the embeddings."""
    embedding = cast(nn.Embedding, cast("PreTrainedModel", model).get_input_embeddings()).weight
    if torch.is_autocast_enabled(embedding.device.type):
        return torch.get_autocast_dtype(embedding.device.type)
    return embedding.dtype


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)
