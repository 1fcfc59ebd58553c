"""Item tokenizers as joint training takes them: the vectors that are aligned, and which ones can be trained on."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import SettingsError
from llmrec.item_tokenizers.base import ItemTokenizer, NotFittedError
from llmrec.item_tokenizers.given_codes import GivenCodesTokenizer
from llmrec.item_tokenizers.item_vectors import ItemVectors
from llmrec.item_tokenizers.rq_kmeans import RQKMeansConfig, RQKMeansTokenizer
from llmrec.item_tokenizers.rq_kmeans_plus import RQKMeansPlusTokenizer
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.trainable import trainable_tokenizer

spec = importlib.util.spec_from_file_location("small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)
MAKE, embeddings = small.MAKE, small.embeddings

NETWORKS = ["LetterTokenizer", "RQKMeansPlusTokenizer", "RQVAETokenizer", "SimCITTokenizer"]
WITH_DECODER = [name for name in NETWORKS if name != "SimCITTokenizer"]


def rows_of(count=20):
    return ItemVectors.of(embeddings()).rows(slice(0, count))


def quantised_by_hand(tokenizer, latents):
    """The nearest code vectors, one item and one level after the other, in double precision."""
    sums = np.zeros(latents.shape)
    for row, latent in enumerate(latents.astype(np.float64)):
        for codebook in tokenizer.code_vectors():
            left = latent - sums[row]
            sums[row] += codebook[((codebook - left) ** 2).sum(1).argmin()]
    return sums


def decoded_by_hand(module, vectors):
    linear = [layer for layer in module.decoder if isinstance(layer, torch.nn.Linear)]
    for number, layer in enumerate(linear):
        vectors = vectors @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        vectors = np.maximum(vectors, 0) if number + 1 < len(linear) else vectors
    return vectors


@pytest.mark.parametrize("name", NETWORKS)
def test_aligned_vectors_are_latents_and_what_their_nearest_codes_restore(name):
    tokenizer = MAKE[name]().fit(embeddings(), progress=False)
    module, items = tokenizer.module, rows_of()
    aligned = tokenizer.aligned_vectors(module, items)
    latents = aligned.latents.detach().numpy()
    if name in ("LetterTokenizer", "RQVAETokenizer"):
        text = embeddings()["text"].vectors
        scaled = (text[:20] - text.mean(0)) / np.sqrt(text.var(0).mean())
        expected = module.encoder(torch.from_numpy(scaled.astype(np.float32)))
        np.testing.assert_allclose(latents, expected.detach().numpy(), atol=1e-5)
    expected = quantised_by_hand(tokenizer, latents)
    if name in WITH_DECODER:
        expected = decoded_by_hand(module, expected)
    np.testing.assert_allclose(aligned.restored.detach().numpy(), expected, atol=1e-5)
    assert aligned.restored.shape == (20, 4 if name == "SimCITTokenizer" else 12)
    assert tokenizer.restored_width(module) == aligned.restored.shape[1]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("residual_update", ["straight_through", "codebook"])
def test_gradients_go_through_the_codes_and_past_the_codebooks(name, residual_update):
    settings = {} if name == "SimCITTokenizer" else {"residual_update": residual_update}
    tokenizer = MAKE[name](**settings).fit(embeddings(), progress=False)
    module, items = tokenizer.module, rows_of()
    aligned = tokenizer.aligned_vectors(module, items)
    weights = torch.randn(aligned.restored.shape, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad((aligned.restored * weights).sum(), aligned.latents, retain_graph=True)
    if name in WITH_DECODER:
        quantised = torch.from_numpy(quantised_by_hand(tokenizer, aligned.latents.detach().numpy())).float()
        quantised.requires_grad_()
        (expected,) = torch.autograd.grad((module.decoder(quantised) * weights).sum(), quantised)
    else:
        expected = weights
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    module.zero_grad()
    (aligned.restored * weights).sum().backward()
    assert all(codebook.grad is None for codebook in tokenizer.codebooks(module))
    reached = {name.split(".")[0] for name, of in module.named_parameters() if of.grad is not None and of.grad.any()}
    assert reached == ({"encoder", "decoder"} if name in WITH_DECODER else {"encoders", "attention"})
    module.zero_grad()
    tokenizer.aligned_vectors(module, items).latents.square().sum().backward()
    reached = {name.split(".")[0] for name, of in module.named_parameters() if of.grad is not None and of.grad.any()}
    assert reached == ({"encoder"} if name in WITH_DECODER else {"encoders", "attention"})


def test_codes_are_the_nearest_also_where_training_balances_them():
    tokenizer = MAKE["RQVAETokenizer"](sinkhorn_epsilon=0.003).fit(embeddings(), progress=False)
    module, items = tokenizer.module.train(), rows_of(150)
    balanced = module(items.vectors["text"])
    nearest = tokenizer.quantize(embeddings()).semantic_ids.codes
    module.train()
    assert (balanced.quantized.codes.numpy() != nearest).any()  # or this test could not fail
    restored = tokenizer.aligned_vectors(module, items).restored.detach().numpy()
    codes = sum(codebook[nearest[:, level]] for level, codebook in enumerate(tokenizer.code_vectors()))
    np.testing.assert_allclose(restored, decoded_by_hand(module, codes), atol=1e-5)


def random_items(count=500, width=12):
    vectors = np.random.default_rng(4).normal(size=(count, width)).astype(np.float32)
    return ItemEmbeddings(tuple(f"item-{row}" for row in range(count)), vectors)


@pytest.mark.parametrize("balance", ["none", "exact"])
def test_rq_kmeans_becomes_a_network_with_the_same_nearest_codes(balance, tmp_path):
    config = RQKMeansConfig(num_codebooks=3, codebook_size=16, balance=balance, seed=3)
    start = RQKMeansTokenizer(config).fit(random_items(), progress=False)
    tokenizer = trainable_tokenizer(start)
    assert isinstance(tokenizer, RQKMeansPlusTokenizer)
    assert tokenizer.codebook_sizes == start.codebook_sizes
    assert tokenizer.config.seed == 3
    expected = start.quantize(random_items()).semantic_ids.codes
    np.testing.assert_array_equal(tokenizer.quantize_catalogue(random_items()).semantic_ids.codes, expected)
    spread = start.quantize_catalogue(random_items()).semantic_ids.codes
    assert (spread == expected).all() == (balance == "none")

    tokenizer.save_pretrained(tmp_path)
    loaded = ItemTokenizer.from_pretrained(tmp_path)
    np.testing.assert_array_equal(loaded.quantize(random_items()).semantic_ids.codes, expected)
    assert bool(loaded.module.quantizer.initialised)

    items = ItemVectors.of({"text": random_items()}).rows(slice(0, 50))
    aligned = tokenizer.aligned_vectors(tokenizer.module, items)
    assert torch.equal(aligned.latents, items.vectors["text"])
    (aligned.restored - items.vectors["text"]).square().mean().backward()
    assert tokenizer.module.encoder.mlp[-1].weight.grad.any()
    with torch.no_grad():
        for codebook in tokenizer.codebooks(tokenizer.module):
            codebook.zero_()
    np.testing.assert_array_equal(start.quantize(random_items()).semantic_ids.codes, expected)  # copies


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_returned_as_they_are(name):
    tokenizer = MAKE[name](epochs=1).fit(embeddings(), progress=False)
    assert trainable_tokenizer(tokenizer) is tokenizer


def test_what_can_not_be_trained_says_what_to_do():
    for name in ("RQKMeansTokenizer", *NETWORKS):
        with pytest.raises(NotFittedError, match=rf"this {name} is not fitted: call fit\(\)"):
            trainable_tokenizer(MAKE[name]())
    given = GivenCodesTokenizer.from_semantic_ids(SemanticIds(("a", "b"), np.array([[0], [1]]), (2,)))
    with pytest.raises(SettingsError, match=r"a GivenCodesTokenizer has no code vectors.*fit an RQ-VAE"):
        trainable_tokenizer(given)
