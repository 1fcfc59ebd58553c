"""Beam search over the items through transformers' `generate`: for models that the tree search can't take.

Encoder-decoder models, recurrent and convolutional layers: whatever `generate` can decode. The same answers and scores
as the tree's, but slower (padding is computed, the prompt's keys and values are copied once per beam) and in more
memory (`generate` gives scores only if it may keep the log-probabilities [beams, V] of every step). The generation
defaults that come with a checkpoint (sampling, top-k, repetition penalty, forced tokens, ...) have no effect here.

This module knows tokens and leaves of the trie. It knows nothing of item IDs, prompts' texts or histories.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitNormalization, LogitsProcessor, LogitsProcessorList

from llmrec.errors import SettingsError
from llmrec.generation.item_sets import LeafSubset
from llmrec.generation.logits_process import TrieLogitsProcessor
from llmrec.generation.trie import ItemTrie
from llmrec.vocabulary import CodeVocabulary

# `generate` starts all beams but the first at -1e9, and fills up with them (or with -inf) where there are too few
# continuations: what scores below this is no answer.
_DEAD_SCORE = -1e8
# Padding, and the end of rows that no item is left for. No token's meaning matters there: padding is masked, and such
# rows are dropped whatever they end with.
_UNREAD_TOKEN = 0


@torch.no_grad()
def generate_search(
    model: Any,
    prompts: Sequence[Sequence[int]],
    trie: ItemTrie,
    vocabulary: CodeVocabulary,
    *,
    num_beams: int,
    scope: str = "vocabulary",
    subset: LeafSubset | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `beam_search`, by `generate`.

    Prompts are padded on the left. An encoder-decoder model takes them as input of its encoder, padded on the right,
    reads each once (not once per beam), and its decoder starts from the start token of its generation settings.

    Args:
        model: Any model of transformers that generates and knows the code tokens, in evaluation mode.
        prompts: Token IDs, one sequence a request, none empty.
        trie: The items, on the device of the model.
        vocabulary: Token IDs of the codes.
        num_beams: K, at least 1; 1 is greedy decoding.
        scope: As in `beam_search`: "vocabulary", "codes" or "trie".
        subset: Which leaves each request may be answered with, from `ItemTrie.subset`.

    Returns:
        Leaves int64 [B, K] and scores float32 [B, K], best first. Where a request has fewer than K items the rest is
        -1 and -inf.

    Raises:
        SettingsError: An unknown scope; no request, or one with an empty prompt; trie and vocabulary of different
            codes; a model without the code tokens, or on another device than the trie.
    """
    is_encoder_decoder = model.config.is_encoder_decoder
    input_ids, attention_mask = _padded(prompts, left=not is_encoder_decoder, device=trie.device)
    prompt_length = 1 if is_encoder_decoder else input_ids.shape[1]
    settings = GenerationConfig(
        max_new_tokens=trie.num_levels,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        early_stopping=False,
        length_penalty=0.0,  # the score is the sum, not a mean
        use_cache=True,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=_UNREAD_TOKEN,
        eos_token_id=None,  # all items have L codes: the length ends the search
    )
    with _no_generation_defaults(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=settings,
            logits_processor=_processors(trie, vocabulary, prompt_length, scope, subset),
            # Every search takes L steps, so processes that share a model out stay together by themselves. By default
            # all would be asked at each step, also about a model that one of them has whole.
            synced_gpus=False,
        )
    tokens = output.sequences[:, prompt_length:]  # [B * K, L]
    if num_beams == 1:  # greedy decoding, which tells the scores of each step and no sum
        steps = [step.gather(1, tokens[:, level, None]) for level, step in enumerate(output.scores)]
        scores = torch.cat(steps, dim=1).sum(dim=1)
    else:
        scores = output.sequences_scores
    first_tokens = torch.from_numpy(vocabulary.level_offsets + vocabulary.first_token_id).to(tokens.device)
    leaves, exists = trie.walk(tokens - first_tokens)
    dead = (scores < _DEAD_SCORE) | ~exists
    leaves, scores = leaves.masked_fill(dead, -1), scores.float().masked_fill(dead, -torch.inf)
    return leaves.view(-1, num_beams), scores.view(-1, num_beams)


def _padded(prompts: Sequence[Sequence[int]], *, left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token IDs and mask, both int64 [B, T]."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        what = f"the prompt of request {lengths.index(0)} is empty" if lengths else "there are no requests"
        raise SettingsError(f"{what}: the search needs at least one prompt, and each at least one token")
    side = "left" if left else "right"
    rows = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    seen = [torch.ones_like(row) for row in rows]
    input_ids, attention_mask = (
        nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=fill, padding_side=side)
        for part, fill in ((rows, _UNREAD_TOKEN), (seen, 0))
    )
    return input_ids.to(device), attention_mask.to(device)


def _processors(
    trie: ItemTrie, vocabulary: CodeVocabulary, prompt_length: int, scope: str, subset: LeafSubset | None
) -> LogitsProcessorList:
    """Log-probabilities in the scope, then the mask: the score of an item doesn't depend on the subset."""
    if scope == "codes":
        normalise: list[LogitsProcessor] = [_LevelLogSoftmax(vocabulary, prompt_length)]
    elif scope == "trie":
        of_all_items = TrieLogitsProcessor(trie, vocabulary, prompt_length, eos_token_id=_UNREAD_TOKEN)
        normalise = [of_all_items, LogitNormalization()]
    elif scope == "vocabulary":
        normalise = [LogitNormalization()]  # beam search has done it already, greedy decoding has not
    else:
        raise SettingsError(f"unknown scope {scope!r}; known: vocabulary, codes, trie")
    mask = TrieLogitsProcessor(trie, vocabulary, prompt_length, eos_token_id=_UNREAD_TOKEN, subset=subset)
    return LogitsProcessorList([*normalise, mask])


@contextmanager
def _no_generation_defaults(model: nn.Module) -> Iterator[None]:
    """Within the block the model has no generation defaults of its own, but the token that starts a decoder.

    transformers fills every setting that a given config leaves open from `model.generation_config`. Its argument
    against that, `use_model_defaults=False`, is gone in 5.x, so the defaults themselves are put aside.
    """
    holders: list[Any] = [module for module in model.modules() if vars(module).get("generation_config") is not None]
    before = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            plain = GenerationConfig()
            plain.decoder_start_token_id = holder.generation_config.decoder_start_token_id
            plain.bos_token_id = holder.generation_config.bos_token_id  # starts a decoder that has no token for that
            holder.generation_config = plain
        yield
    finally:
        for holder, config in zip(holders, before, strict=True):
            holder.generation_config = config


class _LevelLogSoftmax(LogitsProcessor):
    """Log-probabilities over the codes of the level that is next; -inf elsewhere."""

    def __init__(self, vocabulary: CodeVocabulary, prompt_length: int):
        self.vocabulary = vocabulary
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        level = input_ids.shape[1] - self.prompt_length
        first = self.vocabulary.first_token_id + int(self.vocabulary.level_offsets[level])
        end = first + self.vocabulary.codebook_sizes[level]
        normalised = torch.full_like(scores, -torch.inf)
        normalised[:, first:end] = scores[:, first:end].log_softmax(dim=1)
        return normalised
