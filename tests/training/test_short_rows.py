import factories
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmrec.training import short_rows as module
from llmrec.training.short_rows import NAME, short_rows


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 9, 8, generator=generator).to(dtype).requires_grad_(True)
    key, value = (torch.randn(2, 3, 9, 8, generator=generator).to(dtype).requires_grad_(True) for _ in range(2))
    of_sample = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    mask = (of_sample[:, None] == of_sample) & torch.ones(9, 9, dtype=torch.bool).tril()
    return (query, key, value), mask.expand(2, 1, 9, 9)


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_as_sdpa_with_grouped_queries(additive, scaling):
    tensors, mask = inputs()
    expected = F.scaled_dot_product_attention(*tensors, mask, scale=scaling, enable_gqa=True).transpose(1, 2)
    given = torch.zeros(2, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    found, _ = module._forward(nn.Module(), *tensors, given, scaling=scaling)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.square().sum(), tensors)
    for gradient, other in zip(torch.autograd.grad(found.square().sum(), tensors), wanted, strict=True):
        torch.testing.assert_close(gradient, other)


def test_what_it_does_not_know_is_left_to_sdpa(monkeypatch):
    left = []
    monkeypatch.setattr(module, "sdpa_attention_forward", lambda *given, **options: left.append(options) or (None,))
    tensors, mask = inputs()
    module._forward(nn.Module(), *tensors, None)
    module._forward(nn.Module(), *tensors, mask, dropout=0.1)
    module._forward(nn.Module(), *tensors, mask, softcap=3.0)
    assert len(left) == 3
    module._forward(nn.Module(), *tensors, mask)
    assert len(left) == 3


def test_only_short_rows_on_a_cpu_with_sdpa():
    config = factories.make_tiny_model(attn_implementation="sdpa").config
    with short_rows(config, torch.zeros(2, module.LONGEST, dtype=torch.int64)):
        assert config._attn_implementation == NAME
    with short_rows(config, torch.zeros(2, module.LONGEST + 1, dtype=torch.int64)):
        assert config._attn_implementation == "sdpa"
    with short_rows(config, torch.zeros(2, 5, dtype=torch.int64, device="meta")):
        assert config._attn_implementation == "sdpa"
    eager = factories.make_tiny_model(attn_implementation="eager").config
    with short_rows(eager, torch.zeros(2, 5, dtype=torch.int64)):
        assert eager._attn_implementation == "eager"


def test_packed_training_takes_it_and_puts_sdpa_back(tmp_path, monkeypatch):
    seen = []
    forward = module._forward

    def watched(*given, **options):
        seen.append(given[4] is not None)
        return forward(*given, **options)

    monkeypatch.setitem(module.AttentionInterface._global_mapping, NAME, watched)
    trainer = factories.make_trainer(tmp_path, packing=True, row_length=64, max_steps=1)
    trainer.train()
    assert any(seen)
    assert trainer._unwrapped.config._attn_implementation == "sdpa"
