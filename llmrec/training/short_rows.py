"""Attention within short rows on a CPU, as plain matrix products.

With a mask, SDPA's kernel for CPUs repeats the keys and values of grouped queries, and its backward is slow on rows of
a few dozen to a few hundred tokens, such as packed histories are cut to. There the scores of a row fit into the cache,
and two batched products with a softmax between them are faster: with the casts that the trainer leaves out besides, a
step learns 1.14 times as many targets a second (SmolLM2-135M, rows of 128 tokens, two cores of an AMD EPYC, torch
2.13: "history vs history plain step" of `eval/benchmarks/training.py`). Queries of a group stand in one head's place,
so nothing is repeated.

It is registered with transformers as an attention implementation, and a model has it within `short_rows` only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "llmrec_short_rows"
LONGEST = 256  # tokens of a row: beyond, the scores of all heads cost more memory than they save time
# Options of some models' attention that change its result: SDPA's own function knows them, or refuses them.
_LEFT_TO_SDPA = ("position_bias", "softcap", "s_aux")


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Output [B, T, H, D] of queries [B, H, T, D], keys and values [B, H / groups, S, D], mask [B, 1, T, S]."""
    if attention_mask is None or dropout or any(options.get(name) is not None for name in _LEFT_TO_SDPA):
        plain = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
        return plain[0], None
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(
            ~attention_mask, torch.finfo(query.dtype).min
        )
    grouped = (query * scale).reshape(batch, kv_heads, -1, width)  # [B, H / groups, groups * T, D]
    scores = grouped @ key.transpose(2, 3)
    scores = scores.view(batch, heads, length, -1) + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    output = weights.view(batch, kv_heads, heads // kv_heads * length, -1) @ value
    return output.view(batch, heads, length, value.shape[3]).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def short_rows(config: Any, input_ids: Tensor) -> Iterator[None]:
    """Within the block, a model that computes attention by SDPA does so by plain products, if that is the faster way.

    Args:
        config: The text config of the model.
        input_ids: [B, T], what it is about to read.
    """
    before = config._attn_implementation
    if before != "sdpa" or input_ids.device.type != "cpu" or input_ids.shape[1] > LONGEST:
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
