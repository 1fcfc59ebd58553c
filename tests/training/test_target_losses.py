import factories
import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from llmrec.training import target_losses
from llmrec.training.target_losses import TargetLosses, hands_on_head_output
from llmrec.vocabulary import CodeVocabulary, add_code_rows, find_code_head

SIZES = (4, 6, 5)
CODES, TRIE, _ = tiny.random_catalogue(1, sizes=SIZES)


def make_head(first=40, num_base=40, *, bias=True):
    """A head whose base matrix ends at the codes, goes on after them, or (Qwen) has them inside."""
    vocabulary = CodeVocabulary(SIZES, first)
    model = factories.make_tiny_model("llama", tied=False, vocab_size=num_base)
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(num_base, generator=torch.Generator().manual_seed(3)))
    add_code_rows(model, vocabulary, seed=1)
    return find_code_head(model), vocabulary


def make_targets(vocabulary, *, text):
    """Three items and, between them, text."""
    items = torch.from_numpy(vocabulary.token_ids(CODES[[3, 0, 29]]))
    if not text:
        return items.flatten()
    return torch.cat(
        [items[0], torch.tensor([0, vocabulary.first_token_id - 1]), items[1], items[2], torch.tensor([7])]
    )


def dense(logits, targets, vocabulary, scope, temperature):
    """Target after target, out of all logits."""
    losses, before = [], []
    for row, target in zip(logits / temperature, targets.tolist(), strict=True):
        first, level = vocabulary.first_token_id, len(before)
        columns = list(range(logits.shape[1]))
        if target >= first and scope != "vocabulary":
            start = first + int(vocabulary.level_offsets[level])
            columns = list(range(start, start + SIZES[level]))
            if scope == "trie":
                tokens = vocabulary.token_ids(CODES).tolist()
                columns = sorted({item[level] for item in tokens if item[:level] == before})
        losses.append(row[columns].logsumexp(0) - row[target])
        before = [*before, target] if target >= first and level < 2 else []
    return torch.stack(losses)


@pytest.mark.parametrize("elements", [2**24, 150])  # all targets at once; two at a time
@pytest.mark.parametrize(("first", "num_base"), [(40, 40), (40, 80), (40, 45)])
@pytest.mark.parametrize("scope", ["vocabulary", "codes", "trie"])
@pytest.mark.parametrize("text", [True, False])
def test_in_the_head_as_from_all_logits(monkeypatch, scope, text, first, num_base, elements):
    monkeypatch.setattr(target_losses, "_ELEMENTS", elements)
    head, vocabulary = make_head(first, num_base)
    targets = make_targets(vocabulary, text=text)
    hidden = torch.randn(len(targets), 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    losses = TargetLosses(vocabulary, scope, TRIE, temperature=0.7)
    inputs = [hidden, head.weight, head.bias, head.new_rows]

    expected = dense(head(hidden), targets, vocabulary, scope, 0.7)
    torch.testing.assert_close(losses.from_logits(head(hidden), targets), expected)
    total = losses.sum_in_head(targets, only_codes=not text)(head, hidden)
    torch.testing.assert_close(total, expected.sum()[None])
    found = torch.autograd.grad(2.5 * total.sum(), inputs, allow_unused=True)
    for gradient, wanted in zip(found, torch.autograd.grad(2.5 * expected.sum(), inputs), strict=True):
        if gradient is None:  # neither weight nor bias is read where no target is text
            assert (scope, text, bool(wanted.any())) in (("codes", False, False), ("trie", False, False))
        else:
            torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


def test_no_gradient_is_made_for_what_is_frozen():
    head, vocabulary = make_head()
    head.requires_grad_(False)
    head.new_rows.requires_grad_(True)
    targets = make_targets(vocabulary, text=True)
    hidden = torch.randn(len(targets), 32, requires_grad=True)
    TargetLosses(vocabulary, "vocabulary", None, 1.0).sum_in_head(targets, only_codes=False)(head, hidden).backward()
    assert head.weight.grad is None
    assert head.new_rows.grad is not None


def test_in_half_precision_the_softmax_is_not():
    head, vocabulary = make_head(bias=False)
    head.weight.data = head.weight.data.bfloat16()
    targets = make_targets(vocabulary, text=True)
    hidden = torch.randn(len(targets), 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = TargetLosses(vocabulary, "vocabulary", None, 1.0).sum_in_head(targets, only_codes=False)(head, hidden)
    assert total.dtype == torch.float32
    expected = F.cross_entropy(head(hidden).float(), targets, reduction="sum")
    torch.testing.assert_close(total[0], expected, rtol=1e-5, atol=0)


def test_no_target_at_all():
    head, vocabulary = make_head()
    hidden = torch.randn(0, 32, requires_grad=True)
    for scope in ("vocabulary", "trie"):
        nothing = torch.zeros(0, dtype=torch.int64)
        total = TargetLosses(vocabulary, scope, TRIE, 1.0).sum_in_head(nothing, only_codes=False)(head, hidden)
        assert total.tolist() == [0.0]
        total.sum().backward()
        assert hidden.grad.shape == (0, 32)


def test_models_that_change_their_logits_are_found_out():
    for family, expected in (("llama", True), ("qwen3", True), ("granite", False), ("cohere", False)):
        settings = {"logits_scaling": 3.0} if family == "granite" else {}
        model = factories.make_tiny_model(family, **settings)
        add_code_rows(model, CodeVocabulary(SIZES, 16))
        assert hands_on_head_output(model.train()) is expected, family
        assert model.training
