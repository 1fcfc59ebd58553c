"""The two alignments against references that go item by item and code by code."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from llmrec.training.alignment import (
    Projections,
    code_log_probabilities,
    first_of_each,
    preference_semantic_losses,
    sequence_item_losses,
)

RECURSIONS = ("codebook", "straight_through")
SIGNS = ("negative", "positive")


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def make_codebooks(sizes=(4, 5, 3), width=6):
    return [draw(size, width, seed=10 + level) for level, size in enumerate(sizes)]


def slow_distributions(vector, codebooks, recursion, sign):
    """The distribution over codes of each level, one vector, one code after the other."""
    left, levels = vector, []
    for codebook in codebooks:
        distances = [sum((left[place] - code[place]) ** 2 for place in range(len(left))) for code in codebook]
        factor = 1 if sign == "positive" else -1
        levels.append(Categorical(logits=torch.stack([factor * distance for distance in distances])))
        nearest = min(range(len(codebook)), key=lambda code, of=distances: of[code].item())
        left = left - codebook[nearest]
        if recursion == "straight_through":  # value - (value with the gradient of value)
            left = left.detach()
    return levels


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("recursion", RECURSIONS)
def test_code_probabilities_equal_a_slow_reference(recursion, sign):
    vectors, codebooks = draw(7, 6, seed=1), make_codebooks()
    weights = [draw(7, len(codebook), seed=20 + level).detach() for level, codebook in enumerate(codebooks)]
    found = code_log_probabilities(vectors, codebooks, recursion=recursion, distance_sign=sign)
    slow = [slow_distributions(vector, codebooks, recursion, sign) for vector in vectors]
    expected = [torch.stack([of_vector[level].logits for of_vector in slow]) for level in range(3)]
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(left.exp().sum(dim=1), torch.ones(7))
    of_found, of_expected = (
        torch.autograd.grad(
            sum((level * weight).sum() for level, weight in zip(levels, weights, strict=True)), [vectors, *codebooks]
        )
        for levels in (found, expected)
    )
    for left, right in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sign", "most_likely"), [("negative", [1, 0, 2]), ("positive", [2, 2, 0])])
def test_signs(sign, most_likely):
    """On a line with codes at 0, 3 and 10, far and near are plain to see."""
    codebook = torch.tensor([[0.0], [3.0], [10.0]])
    vectors = torch.tensor([[2.9], [-1.0], [9.0]])
    (found,) = code_log_probabilities(vectors, [codebook], distance_sign=sign)
    assert found.argmax(dim=1).tolist() == most_likely


def test_next_level_sees_what_the_nearest_code_leaves_under_both_signs():
    codebooks = [torch.tensor([[0.0], [3.0], [10.0]]), torch.tensor([[-1.0], [0.5]])]
    for sign, factor in (("negative", -1), ("positive", 1)):
        _, found = code_log_probabilities(torch.tensor([[2.5]]), codebooks, distance_sign=sign)  # leaves -0.5
        assert (found[0, 0] - found[0, 1]).item() == pytest.approx(factor * (0.25 - 1.0), rel=1e-5)


@pytest.mark.parametrize("sign", SIGNS)
def test_only_the_first_level_reaches_the_vectors_straight_through(sign):
    vectors, codebooks = draw(7, 6, seed=1), make_codebooks()
    by_recursion = {
        recursion: code_log_probabilities(vectors, codebooks, recursion=recursion, distance_sign=sign)
        for recursion in RECURSIONS
    }
    for level in range(3):
        of_level = [by_recursion[recursion][level] for recursion in RECURSIONS]
        torch.testing.assert_close(*of_level, rtol=1e-5, atol=1e-5)
        with_codebook, straight = (
            torch.autograd.grad(of[:, 0].sum(), vectors, retain_graph=True)[0] for of in of_level
        )
        assert (with_codebook.abs().sum(dim=1) > 1e-3).all()
        if level == 0:
            assert torch.equal(straight, with_codebook)
        else:
            assert torch.equal(straight, torch.zeros(7, 6))
        # later levels move earlier codebooks in the paper's recursion alone
        for earlier in range(level):
            moved = torch.autograd.grad(of_level[0][:, 0].sum(), codebooks[earlier], retain_graph=True)[0]
            assert moved.abs().sum() > 1e-3
            unmoved = torch.autograd.grad(
                of_level[1][:, 0].sum(), codebooks[earlier], retain_graph=True, allow_unused=True
            )[0]
            assert unmoved is None or not unmoved.any()


def test_low_precision_is_computed_in_float32():
    vectors, codebooks = draw(7, 6, seed=1).detach(), [codebook.detach() for codebook in make_codebooks()]
    low = [codebook.bfloat16() for codebook in codebooks]
    found = code_log_probabilities(vectors.bfloat16(), low)
    expected = code_log_probabilities(vectors.bfloat16().float(), [codebook.float() for codebook in low])
    assert all(level.dtype == torch.float32 for level in found)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("recursion", RECURSIONS)
def test_sequence_item_losses_equal_a_slow_reference(recursion, sign):
    sequences, items, codebooks = draw(5, 6, seed=2), draw(5, 6, seed=3), make_codebooks()
    found = sequence_item_losses(sequences, items, codebooks, recursion=recursion, distance_sign=sign)
    expected = []
    for sequence, item in zip(sequences, items, strict=True):
        of_sequence, of_item = (slow_distributions(one, codebooks, recursion, sign) for one in (sequence, item))
        both = [
            kl_divergence(left, right) + kl_divergence(right, left)
            for left, right in zip(of_sequence, of_item, strict=True)
        ]
        expected.append(sum(both) / 3)  # a mean over levels
    expected = torch.stack(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    anchors = torch.arange(1.0, 6.0)  # so that no pair stands for another
    of_found, of_expected = (
        torch.autograd.grad((losses * anchors).sum(), [sequences, items, *codebooks]) for losses in (found, expected)
    )
    for left, right in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
        assert left.abs().sum() > 1e-3


def test_sequence_item_loss_is_a_mean_over_levels():
    """Levels that tell nothing apart count as 0 each: of equal codes each has the same probability for any vector."""
    sequences, items, codebooks = draw(5, 6, seed=2), draw(5, 6, seed=3), make_codebooks()
    one_level = sequence_item_losses(sequences, items, codebooks[:1])
    flat = torch.zeros(4, 6)
    torch.testing.assert_close(sequence_item_losses(sequences, items, [codebooks[0], flat, flat]), one_level / 3)


def test_sequence_item_loss_is_0_of_a_vector_and_itself_and_symmetric():
    sequences, items, codebooks = draw(5, 6, seed=2), draw(5, 6, seed=3), make_codebooks()
    assert torch.equal(sequence_item_losses(items, items, codebooks), torch.zeros(5))
    found = sequence_item_losses(sequences, items, codebooks)
    assert (found > 0).all()
    torch.testing.assert_close(sequence_item_losses(items, sequences, codebooks), found)


def slow_preference_losses(states, items, temperature):
    def cosine(left, right):
        return (left @ right) / (left.square().sum().sqrt() * right.square().sum().sqrt())

    losses = []
    for own in range(len(states)):
        loss = 0.0
        for anchor, others in ((states[own], items), (items[own], states)):
            exponentials = [(cosine(anchor, other) / temperature).exp() for other in others]
            loss = loss - (exponentials[own] / sum(exponentials)).log()
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_preference_semantic_losses_equal_a_slow_reference(temperature):
    states, items = draw(6, 5, seed=4), draw(6, 5, seed=5)
    found = preference_semantic_losses(states, items, temperature=temperature)
    expected = slow_preference_losses(states, items, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    anchors = torch.arange(1.0, 7.0)
    of_found, of_expected = (
        torch.autograd.grad((losses * anchors).sum(), [states, items]) for losses in (found, expected)
    )
    for left, right in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def test_preference_semantic_loss_of_alike_pairs():
    """Orthonormal states and items: the cosines are 1 with the own item and 0 with the others."""
    found = preference_semantic_losses(torch.eye(4) * 3, torch.eye(4) * 0.1, temperature=0.5)
    expected = 2 * math.log(1 + 3 * math.exp(-1 / 0.5))
    torch.testing.assert_close(found, torch.full((4,), expected))
    swapped = preference_semantic_losses(torch.eye(4), torch.eye(4).roll(1, 0), temperature=0.5)
    torch.testing.assert_close(swapped, torch.full((4,), expected + 2 / 0.5))


def test_parts_of_preference_semantic_losses_add_up():
    states, items = draw(7, 5, seed=4), draw(7, 5, seed=5)
    whole = preference_semantic_losses(states, items)
    parts = [preference_semantic_losses(states, items, rows=slice(*bounds)) for bounds in ((0, 3), (3, 3), (3, 7))]
    assert [len(part) for part in parts] == [3, 0, 4]
    torch.testing.assert_close(torch.cat(parts), whole)
    of_whole = torch.autograd.grad(whole.sum(), [states, items])
    of_parts = [torch.autograd.grad(part.sum(), [states, items]) for part in parts]
    for found, expected in zip(zip(*of_parts, strict=True), of_whole, strict=True):
        torch.testing.assert_close(sum(found), expected, rtol=1e-4, atol=1e-5)


def test_one_pair_has_nothing_to_be_told_from():
    states, items = draw(1, 5, seed=4), draw(1, 5, seed=5)
    found = preference_semantic_losses(states, items)
    assert found.tolist() == [0.0]
    assert not any(gradient.any() for gradient in torch.autograd.grad(found.sum(), [states, items]))


@pytest.mark.parametrize(
    ("items", "first"),
    [
        ([5, 3, 5, 5, 3, 9], [0, 1, 5]),
        ([2, 2, 2], [0]),
        ([9, 8, 7, 8], [0, 1, 2]),  # ascending places, whatever the items
        ([4], [0]),
        ([], []),
    ],
)
def test_first_of_each(items, first):
    found = first_of_each(torch.tensor(items, dtype=torch.int64))
    assert found.dtype == torch.int64
    assert found.tolist() == first


def test_first_of_each_equals_a_dictionary():
    items = torch.randint(0, 40, (200,), generator=torch.Generator().manual_seed(6))
    first = {}
    for place, item in enumerate(items.tolist()):
        first.setdefault(item, place)
    assert first_of_each(items).tolist() == list(first.values())


def test_projections_are_drawn_from_their_seed_alone():
    first, again, other = (
        Projections(64, 8, 12, seed=3),
        Projections(64, 8, 12, seed=3),
        Projections(64, 8, 12, seed=4),
    )
    assert torch.equal(first.to_codes.weight, again.to_codes.weight)
    assert torch.equal(first.to_items.weight, again.to_items.weight)
    assert not torch.equal(first.to_codes.weight, other.to_codes.weight)
    assert not torch.equal(first.to_items.weight[:8], first.to_codes.weight)
    assert first.to_codes(torch.zeros(2, 64)).shape == (2, 8)
    assert first.to_items(torch.zeros(2, 64)).shape == (2, 12)
    assert not first.to_codes.bias.any()
    assert not first.to_items.bias.any()
    wide = Projections(400, 100, 100, seed=0)
    assert wide.to_codes.weight.std().item() == pytest.approx(400**-0.5, rel=0.03)
    assert wide.to_items.weight.std().item() == pytest.approx(400**-0.5, rel=0.03)


@pytest.mark.parametrize("recursion", RECURSIONS)
def test_training_on_the_loss_brings_the_codes_of_sequences_to_those_of_items(recursion):
    """What the sign is about: minimising with the paper's sign gives sequences the codes of their items."""
    codebooks = [codebook.detach() for codebook in make_codebooks()]
    items = draw(12, 6, seed=7).detach()
    sequences = draw(12, 6, seed=8)
    optimizer = torch.optim.Adam([sequences], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        sequence_item_losses(sequences, items, codebooks, recursion=recursion).sum().backward()
        optimizer.step()
    first_of_items = torch.cdist(items, codebooks[0]).argmin(dim=1)
    assert torch.equal(torch.cdist(sequences.detach(), codebooks[0]).argmin(dim=1), first_of_items)
    assert F.mse_loss(sequences.detach(), items) < F.mse_loss(draw(12, 6, seed=8).detach(), items)
