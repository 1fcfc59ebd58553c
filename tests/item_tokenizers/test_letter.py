import math

import numpy as np
import pytest
import torch

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, SettingsError
from llmrec.item_tokenizers.fit_loop import TrainBatch
from llmrec.item_tokenizers.item_vectors import ItemBatch
from llmrec.item_tokenizers.letter import (
    CodeClusters,
    LetterConfig,
    LetterTokenizer,
    collaborative_loss,
    diversity_loss,
)
from llmrec.item_tokenizers.rq_vae import RQVAE, rq_vae_losses
from llmrec.processes import Processes


def tensors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokenizer_and_module(**settings):
    config = LetterConfig(codebook_size=16, codebook_dim=4, hidden_sizes=(8,), num_clusters=4, **settings)
    tokenizer, module = LetterTokenizer(config), RQVAE(10, config).train()
    module.quantizer.initialise(module.latents(tensors(50, 10)), "kmeans", np.random.default_rng(0))
    tokenizer.start_epoch(module, 0)
    return tokenizer, module


def test_collaborative_loss_by_hand():
    quantized = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    collaborative = torch.tensor([[1.0, 1.0], [0.0, 3.0]])
    # logits [[1, 0], [2, 6]]
    expected = (math.log(math.e + 1) - 1 + math.log(math.e**2 + math.e**6) - 6) / 2
    assert collaborative_loss(quantized, collaborative).item() == pytest.approx(expected, rel=1e-5)
    assert collaborative_loss(torch.ones(5, 2), torch.ones(5, 2)).item() == pytest.approx(math.log(5))


def looped_diversity(codes, partners, codebook):
    """LETTER's L_Div item by item, as methods.md 2.3 has it."""
    losses = []
    for code, partner in zip(codes.tolist(), partners.tolist(), strict=True):
        others = [j for j in range(len(codebook)) if j != code]
        products = torch.stack([codebook[code] @ codebook[j] for j in others])
        losses.append(torch.logsumexp(products, 0) - codebook[code] @ codebook[partner])
    return torch.stack(losses).mean()


def test_diversity_loss_and_gradient_equal_the_loop():
    codebook = tensors(8, 3).requires_grad_()
    codes, partners = torch.tensor([0, 3, 3, 7, 0, 5]), torch.tensor([1, 2, 6, 4, 2, 0])
    fast, slow = diversity_loss(codes, partners, codebook), looped_diversity(codes, partners, codebook)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(torch.autograd.grad(fast, codebook)[0], torch.autograd.grad(slow, codebook)[0])


def test_codes_alone_in_their_cluster_are_left_out():
    codebook = tensors(8, 3).requires_grad_()
    pair = diversity_loss(torch.tensor([2]), torch.tensor([4]), codebook)
    torch.testing.assert_close(diversity_loss(torch.tensor([2, 5]), torch.tensor([4, 5]), codebook), pair)
    alone = diversity_loss(torch.tensor([5]), torch.tensor([5]), codebook)
    assert alone.item() == 0
    assert torch.autograd.grad(alone, codebook)[0].abs().max() == 0


def test_partners_are_the_other_members_evenly():
    labels = np.array([2, 0, 1, 0, 2, 0, 2, 2])  # 0: 1 3 5, 1: 2, 2: 0 4 6 7
    clusters = CodeClusters.from_labels(labels)
    codes = torch.tensor([0, 1, 2]).repeat_interleave(3000)
    partners = clusters.draw_partners(codes, torch.rand(9000, generator=torch.Generator().manual_seed(0)))
    counts = [torch.bincount(part, minlength=8).tolist() for part in partners.split(3000)]
    assert [code for code, count in enumerate(counts[0]) if count] == [4, 6, 7]
    assert [code for code, count in enumerate(counts[1]) if count] == [3, 5]
    assert counts[2][2] == 3000
    assert min(counts[0][code] for code in (4, 6, 7)) > 900
    assert min(counts[1][code] for code in (3, 5)) > 1400


def whole_batch(vectors):
    present = {name: torch.ones(len(tensor), dtype=torch.bool) for name, tensor in vectors.items()}
    size, draws = len(vectors["text"]), torch.Generator().manual_seed(0)
    return TrainBatch(ItemBatch(vectors, present), size, Processes.alone("cpu"), draws)


def gradients(tokenizer, module, vectors):
    module.zero_grad()
    sum(tokenizer.batch_losses(module, whole_batch(vectors)).values()).backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def test_collaborative_term_moves_the_encoder_and_diversity_the_codebooks():
    """methods.md 1.2: the collaborative loss gives no gradient to a codebook, the diversity loss none to the rest."""
    vectors = {"text": tensors(30, 10), "collaborative": tensors(30, 4, seed=1)}
    found = {
        name: gradients(*tokenizer_and_module(sinkhorn_epsilon=0.0, **weights), vectors)
        for name, weights in {
            "neither": {"collaborative_weight": 0.0, "diversity_weight": 0.0},
            "collaborative": {"collaborative_weight": 1.0, "diversity_weight": 0.0},
            "diversity": {"collaborative_weight": 0.0, "diversity_weight": 1.0},
        }.items()
    }
    for name, plain in found["neither"].items():
        is_codebook = "codebooks" in name
        assert torch.equal(plain, found["collaborative"][name]) == (is_codebook or name.startswith("decoder"))
        assert torch.equal(plain, found["diversity"][name]) != is_codebook


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_whole_loss_is_the_sum_of_its_terms(reduction):
    settings = {"reduction": reduction, "collaborative_weight": 0.3, "diversity_weight": 0.2, "sinkhorn_epsilon": 0.0}
    tokenizer, module = tokenizer_and_module(**settings)
    vectors = {"text": tensors(30, 10), "collaborative": tensors(30, 4, seed=1)}
    losses = tokenizer.batch_losses(module, whole_batch(vectors))
    assert list(losses) == ["reconstruction", "quantization", "collaborative", "diversity"]
    out, draws = module(vectors["text"]), whole_batch(vectors).uniform(4)
    quantized = out.quantized
    diversity = [
        looped_diversity(codes, clusters.draw_partners(codes, of_level), codebook)
        for codes, clusters, of_level, codebook in zip(
            quantized.codes.T, tokenizer._clusters, draws.T, module.quantizer.codebooks, strict=True
        )
    ]
    levels = quantized.codebook_losses + 0.25 * quantized.commitment_losses + 0.2 * torch.stack(diversity)
    if reduction == "sum":
        expected = (out.reconstruction - out.inputs).square().sum(1).mean() + levels.sum()
    else:
        expected = (out.reconstruction - out.inputs).square().mean() + levels.sum() / 4
    expected = expected + 0.3 * collaborative_loss(quantized.vectors, vectors["collaborative"])
    torch.testing.assert_close(sum(losses.values()), expected)


def test_sinkhorn_is_on_in_training_and_off_in_evaluation():
    _, module = tokenizer_and_module()
    inputs = tensors(60, 10)
    training, evaluation = module(inputs).quantized.codes, module.eval()(inputs).quantized.codes
    assert evaluation.tolist() == module.quantizer.encode(module.latents(inputs)).tolist()
    assert training[:, :3].tolist() == evaluation[:, :3].tolist()
    assert training[:, 3].tolist() != evaluation[:, 3].tolist()
    assert min(rq_vae_losses(module(inputs), LetterConfig()).values()) > 0


def test_collaborative_vectors_of_another_width_name_the_remedy():
    ids = tuple(map(str, range(20)))
    text = ItemEmbeddings(ids, tensors(20, 10).numpy())
    wide = ItemEmbeddings(ids, tensors(20, 8).numpy())
    tokenizer, _ = tokenizer_and_module(epochs=1)
    with pytest.raises(DataError, match=r"ItemEmbeddings\.reduce\(4\)"):
        tokenizer.fit({"text": text, "collaborative": wide})
    with pytest.raises(SettingsError, match="num_clusters is 10"):
        LetterConfig(codebook_size=16)


def test_alignment_brings_codes_to_the_collaborative_signal():
    """Text with a trace of four groups, which the collaborative vectors know well: alignment brings it out."""
    draws = np.random.default_rng(0)
    ids = tuple(map(str, range(400)))
    groups = draws.integers(4, size=400)
    text = ItemEmbeddings(ids, draws.normal(size=(400, 24)) + 1.5 * np.eye(4, 24)[groups])
    collaborative = ItemEmbeddings(ids, 3 * np.eye(4, 8)[groups] + 0.1 * draws.normal(size=(400, 8)))

    def loss_of_codes(weight):
        config = LetterConfig(
            num_codebooks=2, codebook_size=16, codebook_dim=8, hidden_sizes=(32,), num_clusters=4, epochs=40,
            batch_size=200, evaluate_every=40, collaborative_weight=weight,
        )  # fmt: skip
        tokenizer = LetterTokenizer(config).fit({"text": text, "collaborative": collaborative}, progress=False)
        with torch.no_grad():
            quantized = tokenizer.module(torch.from_numpy(text.vectors)).quantized.vectors
        return collaborative_loss(quantized, torch.from_numpy(collaborative.vectors)).item()

    # log(400) = 5.99 tells nothing apart, log(100) = 4.61 would know all groups.
    assert loss_of_codes(0.0) > 5.9
    assert loss_of_codes(1.0) < 5.8
