"""Attention that doesn't repeat the keys and values of grouped queries.

With a mask, transformers repeats keys and values for every query head of a group before it calls SDPA. In a search the
keys are many and the queries few, so the copies cost more than the attention. Here the heads of a group stand in one
head's queries instead (or SDPA's own grouped kernel takes them, on CPUs), with the same result.

It is registered with transformers as an attention implementation, and a model has it within `grouped_attention` only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "llmrec_grouped"
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
    """Output [B, K, H, D] of queries [B, H, K, D], keys and values [B, H / groups, S, D], mask [B, 1, K, S]."""
    groups = query.shape[1] // key.shape[1]
    if attention_mask is None or groups == 1 or any(options.get(name) is not None for name in _LEFT_TO_SDPA):
        plain = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
        return plain[0], None
    if query.device.type == "cpu":
        output = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
    else:
        output = _packed(query, key, value, attention_mask, scaling)
    return output.transpose(1, 2).contiguous(), None


def _packed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    """Output [B, H, K, D]: the queries of a group's heads are one head's, groups times as many."""
    batch, heads, num_queries, width = query.shape
    groups = heads // key.shape[1]
    packed = query.reshape(batch, heads // groups, groups * num_queries, width)
    output = F.scaled_dot_product_attention(packed, key, value, mask.repeat(1, 1, groups, 1), scale=scaling)
    return output.reshape(batch, heads, num_queries, value.shape[3])


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def grouped_attention(config: Any) -> Iterator[None]:
    """Within the block, a model that computes attention by SDPA does so without repeating keys and values.

    Args:
        config: The text config of the model.
    """
    before = config._attn_implementation
    if before != "sdpa":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
