import numpy as np
import pytest
import torch

from llmrec.errors import SettingsError
from llmrec.item_tokenizers.quantizers import (
    ResidualQuantizer,
    nearest_codes,
    revive_dead_codes,
    sinkhorn_codes,
    squared_distances,
    squared_error,
)


def tensors(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def quantizer(sizes=(5, 4, 3), width=6, **options):
    return ResidualQuantizer(sizes, width, generator=torch.Generator().manual_seed(1), **options)


def test_distances_and_nearest_codes_against_the_definition():
    vectors, codebook = tensors(7, 6), tensors(5, 6, seed=1)
    expected = (vectors[:, None] - codebook).square().sum(-1)
    torch.testing.assert_close(squared_distances(vectors, codebook), expected)
    assert nearest_codes(vectors, codebook).tolist() == expected.argmin(1).tolist()


def published_sinkhorn(distances, epsilon, iterations):
    """methods.md 1.3, step for step."""
    distances = distances.double()
    middle = (distances.max() + distances.min()) / 2
    amplitude = distances.max() - middle + 1e-5
    plan = torch.exp(-((distances - middle) / amplitude) / epsilon)
    rows, columns = plan.shape
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(1, keepdim=True)
        plan /= rows
        plan /= plan.sum(0, keepdim=True)
        plan /= columns
    return plan * rows


@pytest.mark.parametrize(("rows", "columns"), [(64, 16), (3, 16), (1024, 256)])
@pytest.mark.parametrize("epsilon", [0.003, 0.05])
def test_sinkhorn_gives_the_codes_of_the_published_routine(rows, columns, epsilon):
    distances = squared_distances(tensors(rows, 8), tensors(columns, 8, seed=1))
    codes, plan = sinkhorn_codes(distances, epsilon=epsilon), published_sinkhorn(distances, epsilon, 50)
    # With fewer rows than columns a row owns several columns whole: equal masses, told apart by rounding alone.
    torch.testing.assert_close(plan[torch.arange(rows), codes], plan.max(1).values, rtol=1e-9, atol=0)
    if rows >= columns:
        assert codes.tolist() == plan.argmax(1).tolist()


def test_sinkhorn_spreads_a_batch_over_the_codes():
    distances = squared_distances(tensors(256, 8), 3 * tensors(32, 8, seed=1))
    nearest = torch.bincount(distances.argmin(1), minlength=32)
    balanced = torch.bincount(sinkhorn_codes(distances), minlength=32)
    assert (nearest > 0).sum() < 32
    assert (balanced > 0).sum() == 32
    assert balanced.max() < nearest.max()


def test_residual_quantisation_by_hand():
    model = quantizer((2, 2), 1)
    with torch.no_grad():
        model.codebooks[0].copy_(torch.tensor([[0.0], [4.0]]))
        model.codebooks[1].copy_(torch.tensor([[-1.0], [1.0]]))
    out = model(torch.tensor([[3.5], [1.5]]))
    # 3.5 -> code 1 (4), left -.5 -> code 0 (-1), left .5;  1.5 -> code 0 (0), left 1.5 -> code 1 (1), left .5
    assert out.codes.tolist() == [[1, 0], [0, 1]]
    torch.testing.assert_close(out.vectors, torch.tensor([[3.0], [1.0]]))
    torch.testing.assert_close(out.commitment_losses, torch.tensor([(0.25 + 2.25) / 2, 0.25]))
    torch.testing.assert_close(out.codebook_losses, out.commitment_losses)
    assert model.encode(torch.tensor([[3.5], [1.5]])).tolist() == out.codes.tolist()


def test_both_residual_updates_have_the_same_values():
    latents = tensors(8, 6)
    outputs = [quantizer(residual_update=update)(latents) for update in ("straight_through", "codebook")]
    for name in ("codes", "vectors", "codebook_losses", "commitment_losses"):
        torch.testing.assert_close(getattr(outputs[0], name), getattr(outputs[1], name))


def gradient(value, of):
    return torch.autograd.grad(value, of, retain_graph=True, allow_unused=True)[0]


@pytest.mark.parametrize("update", ["straight_through", "codebook"])
def test_where_gradients_flow(update):
    """methods.md 1.2 and 12.3."""
    model, latents = quantizer(residual_update=update), tensors(8, 6).requires_grad_()
    out = model(latents)
    reaches = [gradient(loss, latents).abs().max() > 0 for loss in out.commitment_losses]
    assert reaches == [True, update == "codebook", update == "codebook"]
    # Any loss on the sum reaches the encoder unchanged and no codebook.
    torch.testing.assert_close(gradient(out.vectors.sum(), latents), torch.ones(8, 6))
    for level, codebook in enumerate(model.codebooks):
        on_sum = gradient(out.vectors.sum(), codebook)
        assert on_sum is None or on_sum.abs().max() == 0
        assert gradient(out.codebook_losses[level], codebook).abs().max() > 0
    encoder = gradient(out.codebook_losses.sum(), latents)
    assert encoder is None or encoder.abs().max() == 0


def test_reductions():
    left, right = tensors(4, 6), tensors(4, 6, seed=1)
    mean, total = squared_error(left, right, "mean"), squared_error(left, right, "sum")
    torch.testing.assert_close(mean, ((left - right) ** 2).mean())
    torch.testing.assert_close(total, ((left - right) ** 2).sum(1).mean())
    torch.testing.assert_close(
        quantizer(reduction="sum")(left).codebook_losses, 6 * quantizer(reduction="mean")(left).codebook_losses
    )


def test_balanced_only_when_asked_and_only_on_the_last_level():
    latents = tensors(64, 6)
    model = quantizer((4, 4), sinkhorn_epsilon=0.003)
    plain, balanced = model(latents).codes, model(latents, balanced=True).codes
    assert plain.tolist() == model.encode(latents).tolist()
    assert plain[:, 0].tolist() == balanced[:, 0].tolist()
    assert plain[:, 1].tolist() != balanced[:, 1].tolist()
    assert quantizer((4, 4))(latents, balanced=True).codes.tolist() == quantizer((4, 4))(latents).codes.tolist()


@pytest.mark.parametrize("method", ["kmeans", "constrained_kmeans", "random"])
@pytest.mark.parametrize("count", [1, 3, 200])
def test_initialise_from_any_number_of_items(method, count):
    model, latents = quantizer((8, 8)), tensors(count, 6)
    before = (latents - model(latents).vectors).square().mean()
    assert not model.initialised
    model.initialise(latents, method, np.random.default_rng(0))
    assert model.initialised
    assert model.state_dict()["initialised"]  # a buffer: loading for further training must not start again
    after = (latents - model(latents).vectors).square().mean()
    if method != "random":
        assert after < 0.6 * before
    else:
        assert torch.cdist(model.codebooks[0].detach(), latents).min(1).values.max() < 1e-5
    if count <= 8 and method == "kmeans":
        assert after < 1e-6
    again = quantizer((8, 8))
    again.initialise(latents, method, np.random.default_rng(0))
    for left, right in zip(model.codebooks, again.codebooks, strict=True):
        torch.testing.assert_close(left, right)


def test_revive_moves_dead_codes_only():
    model, latents = quantizer((16, 16)), tensors(100, 6)
    with torch.no_grad():
        model.codebooks[0][3:] = 100.0  # nearest to none
    codes = model.encode(latents)
    used = [set(level.tolist()) for level in codes.T]
    before = [codebook.detach().clone() for codebook in model.codebooks]
    books = list(model.codebooks)
    counts = revive_dead_codes(books, codes.numpy(), lambda rows: latents[rows], np.random.default_rng(0))
    assert counts == [16 - len(level) for level in used]
    assert counts[0] >= 13
    for code in used[0]:
        torch.testing.assert_close(model.codebooks[0][code], before[0][code])
    assert len(set(model.encode(latents)[:, 0].tolist())) > len(used[0])


def test_wrong_settings_are_refused():
    with pytest.raises(SettingsError, match="residual_update"):
        quantizer(residual_update="none")
    with pytest.raises(SettingsError, match="positive"):
        quantizer(())
    with pytest.raises(SettingsError, match="unknown initialisation"):
        quantizer().initialise(tensors(4, 6), "best", np.random.default_rng(0))
