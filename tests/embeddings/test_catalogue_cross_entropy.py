import pytest
import torch
import torch.nn.functional as F

from llmrec.embeddings import catalogue_cross_entropy as module
from llmrec.embeddings.catalogue_cross_entropy import catalogue_cross_entropy


def case(positions: int = 7, items: int = 11, width: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(positions, width, generator=generator)
    table = torch.randn(items, width, generator=generator)
    targets = torch.randint(items, (positions,), generator=generator)
    targets[1] = targets[0]  # one item twice: its gradients must add up
    return states.requires_grad_(), table.requires_grad_(), targets


@pytest.mark.parametrize("block", [3, 7, 256])
def test_value_and_gradients_equal_the_plain_way(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK", block)
    states, table, targets = case()
    plain = F.cross_entropy(states @ table.T, targets)
    expected = torch.autograd.grad(3 * plain, (states, table))
    loss = catalogue_cross_entropy(states, table, targets)
    found = torch.autograd.grad(3 * loss, (states, table))
    torch.testing.assert_close(loss, plain)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_equal_scores_cost_the_logarithm_of_the_number_of_items():
    loss = catalogue_cross_entropy(torch.zeros(2, 3), torch.ones(8, 3), torch.tensor([0, 5]))
    assert loss.item() == pytest.approx(2.0794415)  # ln 8


def test_large_scores_stay_finite():
    states, table = torch.full((1, 1), 1e4), torch.tensor([[1.0], [-1.0]])
    assert catalogue_cross_entropy(states, table, torch.tensor([0])).item() == 0
    assert catalogue_cross_entropy(states, table, torch.tensor([1])).item() == pytest.approx(2e4)


def test_bfloat16_is_close_and_keeps_float32_gradients():
    states, table, targets = case(positions=64, items=100, width=16)
    expected = torch.autograd.grad(F.cross_entropy(states @ table.T, targets), (states, table))
    loss = catalogue_cross_entropy(states, table, targets, dtype=torch.bfloat16)
    found = torch.autograd.grad(loss, (states, table))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.999
