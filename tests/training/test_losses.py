import pytest
import tiny
import torch
from torch.nn import functional as F

from llmrec.training.losses import code_losses, ranking_guided_loss, target_positions, target_tokens


def random_logits(rows=5, columns=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, columns, generator=generator), torch.tensor([0, 6, 3, 3, 1])


def test_at_temperature_1_it_is_cross_entropy():
    logits, targets = random_logits()
    losses = ranking_guided_loss(logits, targets)
    assert torch.equal(losses, F.cross_entropy(logits, targets, reduction="none"))
    assert losses.shape == (5,)


def test_by_hand():
    # P(0) = e^(2/2) / (e^(2/2) + e^(0/2)) = e / (e + 1)
    losses = ranking_guided_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), temperature=2.0)
    assert losses.item() == pytest.approx(0.3132617, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.2])
def test_gradient_is_that_of_the_formula(temperature):
    """dL/dp(v) = P_tau(v) / tau for v != y, and (P_tau(y) - 1) / tau for y (methods 2.6)."""
    logits, targets = random_logits()
    logits.requires_grad_(True)
    ranking_guided_loss(logits, targets, temperature=temperature).sum().backward()
    probabilities = torch.softmax(logits.detach() / temperature, dim=1)
    expected = (probabilities - F.one_hot(targets, 7)) / temperature
    torch.testing.assert_close(logits.grad, expected)


def test_a_lower_temperature_weighs_hard_negatives_more():
    logits, targets = torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([0])
    shares = []
    for temperature in (0.5, 1.0):
        leaf = logits.clone().requires_grad_(True)
        ranking_guided_loss(leaf, targets, temperature=temperature).sum().backward()
        shares.append((leaf.grad[0, 1] / (leaf.grad[0, 1] + leaf.grad[0, 2])).item())
    assert shares[0] > shares[1]


def test_columns_outside_the_scope_count_for_nothing():
    logits, targets = random_logits()
    allowed = torch.zeros(5, 7, dtype=torch.bool)
    allowed[torch.arange(5), targets] = True
    allowed[:, 2] = True
    logits.requires_grad_(True)
    losses = ranking_guided_loss(logits, targets, temperature=0.8, allowed=allowed)
    for row in range(5):
        columns = sorted({2, int(targets[row])})
        scaled = logits[row, columns] / 0.8
        expected = scaled.logsumexp(0) - logits[row, targets[row]] / 0.8
        assert losses[row].item() == pytest.approx(expected.item(), abs=1e-5)
    losses.sum().backward()
    assert (logits.grad[~allowed] == 0).all()
    assert (logits.grad[allowed] != 0).all()


def test_the_softmax_is_in_float32():
    logits, targets = random_logits()
    losses = ranking_guided_loss(logits.bfloat16(), targets, temperature=0.7)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, ranking_guided_loss(logits.bfloat16().float(), targets, temperature=0.7))


def test_positions_and_tokens_of_targets():
    labels = torch.tensor([[-100, -100, 7, 8, -100], [5, -100, -100, -100, 9]])
    assert target_positions(labels).int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert target_tokens(labels).tolist() == [7, 8, 9]  # the 5 has nothing before it


def test_targets_of_a_decoder_stand_at_their_own_place():
    labels = torch.tensor([[5, 6, -100], [7, 8, 9]])
    assert target_positions(labels, encoder_decoder=True).int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert target_tokens(labels, encoder_decoder=True).tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("scope", ["codes", "trie"])
def test_codes_of_whole_items(scope):
    """Against a loop over targets that looks through all items. Levels of other sizes, nodes of other branching."""
    sizes, tau = (3, 5, 4), 0.7
    codes, trie, _ = tiny.random_catalogue(3, num_items=14, sizes=sizes)
    items = torch.from_numpy(codes[[0, 5, 13, 5]])
    offsets = torch.tensor([0, 3, 8])
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(12, 12, generator=generator)).requires_grad_(True)
    by_level = [of_level[:, level] for level, of_level in enumerate(logits.view(4, 3, 12).split(sizes, dim=2))]
    losses = code_losses(by_level, items, temperature=tau, trie=trie if scope == "trie" else None).flatten()
    expected, sizes_seen = [], set()
    for number, item in enumerate(items.tolist()):
        for level, code in enumerate(item):
            columns = range(sizes[level])
            if scope == "trie":
                columns = sorted({int(other[level]) for other in codes if other[:level].tolist() == item[:level]})
            sizes_seen.add(len(columns))
            row = logits[3 * number + level, int(offsets[level]) :] / tau
            expected.append(row[list(columns)].logsumexp(0) - row[code])
    assert len(sizes_seen) >= 3
    torch.testing.assert_close(losses, torch.stack(expected))
    found = torch.autograd.grad(losses.sum(), logits)[0]
    torch.testing.assert_close(found, torch.autograd.grad(torch.stack(expected).sum(), logits)[0])


def test_no_target_has_no_loss_and_a_gradient_of_zero():
    logits = torch.zeros(0, 12, requires_grad=True)
    losses = code_losses(logits.split((3, 5, 4), dim=1), torch.zeros(0, 3, dtype=torch.int64))
    assert losses.shape == (0, 3)
    losses.sum().backward()
