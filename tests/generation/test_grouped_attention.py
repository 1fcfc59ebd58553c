from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmrec.generation import grouped_attention as module
from llmrec.generation.grouped_attention import NAME, grouped_attention


def _inputs():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 11, 8, generator=generator)
    visible = torch.rand(2, 1, 5, 11, generator=generator) > 0.4
    visible[..., 0] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return query, key, value, mask


@pytest.mark.parametrize("way", ["cpu", "packed"])
def test_grouped_queries_get_what_repeated_keys_give(way, monkeypatch):
    query, key, value, mask = _inputs()
    attention = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    expected, _ = sdpa_attention_forward(attention, query, key, value, mask, scaling=0.3)
    if way == "packed":  # the way of accelerators
        found = module._packed(query, key, value, mask, 0.3).transpose(1, 2)
    else:
        found, _ = module._forward(attention, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(found, expected)


def test_what_changes_the_result_is_left_to_sdpa():
    query, key, value, mask = _inputs()
    attention = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    with pytest.raises(ValueError, match="softcap"):
        module._forward(attention, query, key, value, mask, scaling=0.3, softcap=20.0)


def test_a_model_has_it_within_the_block_only():
    config = SimpleNamespace(_attn_implementation="sdpa")
    with grouped_attention(config):
        assert config._attn_implementation == NAME
    assert config._attn_implementation == "sdpa"
    eager = SimpleNamespace(_attn_implementation="eager")
    with grouped_attention(eager):
        assert eager._attn_implementation == "eager"
