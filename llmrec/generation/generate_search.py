"""Beam search over the items through transformers' `generate`: for models that the tree search can't take.

Slower than the tree (the prompt is copied once per beam), the same answers and scores. The generation defaults that
come with a checkpoint (sampling, top-k, repetition penalty, ...) have no effect here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from llmrec.generation.logits_process import TrieLogitsProcessor
from llmrec.generation.trie import ItemTrie
from llmrec.vocabulary import CodeVocabulary

# `generate` starts all beams but the first at -1e9, and fills up with them (or with -inf) where there are too few
# continuations: what scores below this is no answer.
_DEAD_SCORE = -1e8


@torch.no_grad()
def generate_search(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    trie: ItemTrie,
    vocabulary: CodeVocabulary,
    *,
    num_beams: int,
    scope: str = "vocabulary",
    denied: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as `beam_search`, by `generate`.

    Returns:
        Leaves int64 [B, K] and scores float32 [B, K], best first. Where a request has fewer than K items the rest is
        -1 and -inf.
    """
    prompt_length = 1 if model.config.is_encoder_decoder else input_ids.shape[1]
    eos_token_id = 0  # for rows that no item is left for: they are dropped, whatever they end with
    processors = LogitsProcessorList()
    if scope == "codes":
        processors.append(_LevelLogSoftmax(vocabulary, prompt_length))
    if scope == "trie":
        processors.append(TrieLogitsProcessor(trie, vocabulary, prompt_length, eos_token_id=eos_token_id))
        processors.append(_LogSoftmax())
    processors.append(TrieLogitsProcessor(trie, vocabulary, prompt_length, eos_token_id=eos_token_id, denied=denied))
    width = max(num_beams, 2)  # with a single one `generate` decodes greedily and gives no scores
    settings = GenerationConfig(
        max_new_tokens=trie.num_levels,
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        early_stopping=False,
        length_penalty=0.0,  # the score is the sum, not a mean
        use_cache=True,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
        eos_token_id=None,  # all items have L codes: the length ends the search
    )
    with _no_generation_defaults(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=settings,
            logits_processor=processors,
        )
    first_tokens = torch.from_numpy(vocabulary.level_offsets + vocabulary.first_token_id).to(input_ids.device)
    tokens = output.sequences[:, prompt_length:]
    leaves, exists = trie.walk(tokens - first_tokens)
    scores = output.sequences_scores.float()
    dead = (scores < _DEAD_SCORE) | ~exists
    leaves, scores = leaves.masked_fill(dead, -1), scores.masked_fill(dead, -torch.inf)
    return leaves.view(-1, width)[:, :num_beams], scores.view(-1, width)[:, :num_beams]


@contextmanager
def _no_generation_defaults(model: nn.Module) -> Iterator[None]:
    """Within the block the model has no generation defaults of its own.

    transformers fills every setting that a given config leaves open from `model.generation_config`. Its argument
    against that, `use_model_defaults=False`, is gone from 5.23, so the defaults themselves are put aside.
    """
    holders: list[Any] = [
        module for module in model.modules() if getattr(module, "generation_config", None) is not None
    ]
    before = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            plain = GenerationConfig()
            plain.decoder_start_token_id = holder.generation_config.decoder_start_token_id
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


class _LogSoftmax(LogitsProcessor):
    """Log-probabilities over what the processors before left; a row without any stays at -inf."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.log_softmax(dim=1).masked_fill(scores.isneginf(), -torch.inf)
