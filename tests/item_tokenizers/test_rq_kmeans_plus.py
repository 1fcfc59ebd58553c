import numpy as np
import pytest
import torch

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import SettingsError
from llmrec.item_tokenizers.item_vectors import ItemVectors
from llmrec.item_tokenizers.quantizers import residual_codes
from llmrec.item_tokenizers.rq_kmeans import RQKMeansTokenizer
from llmrec.item_tokenizers.rq_kmeans_plus import RQKMeansPlusConfig, RQKMeansPlusTokenizer
from llmrec.processes import Processes

SMALL = {"num_codebooks": 3, "codebook_size": 16, "hidden_sizes": (16,), "epochs": 6, "batch_size": 64,
         "evaluate_every": 2}  # fmt: skip


def embeddings(count=300, width=12):
    vectors = np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)
    return ItemEmbeddings(tuple(f"item-{row}" for row in range(count)), vectors)


def started(**settings):
    """The network before its first step."""
    tokenizer = RQKMeansPlusTokenizer(RQKMeansPlusConfig(**SMALL | settings))
    vectors = ItemVectors.of({"text": embeddings()})
    module = tokenizer.new_module(vectors.widths)
    tokenizer.start(module, vectors, Processes.alone("cpu"))
    return tokenizer, module, vectors.rows(slice(None))


@pytest.mark.parametrize("balance", ["exact", "greedy", "none"])
def test_it_starts_with_the_codes_of_rq_kmeans(balance):
    tokenizer, module, items = started(balance=balance)
    kmeans = RQKMeansTokenizer(tokenizer.config.rq_kmeans()).fit(embeddings(), progress=False)
    assert kmeans.config.balance == balance
    with torch.no_grad():
        latents = tokenizer.latents(module, items)
    assert torch.equal(latents, items.vectors["text"])
    codes = residual_codes(latents, tokenizer.codebooks(module)).numpy()
    np.testing.assert_array_equal(codes, kmeans.quantize(embeddings()).semantic_ids.codes)
    assert module.quantizer.initialised


def test_only_the_last_layer_is_zero_and_it_learns_first():
    _, module, items = started()
    assert [bool((parameter == 0).all()) for parameter in module.encoder.mlp[-1].parameters()] == [True, True]
    assert (module.encoder.mlp[0].weight != 0).all()
    output = module(items.vectors["text"])
    (output.reconstruction - output.inputs).square().mean().backward()
    assert (module.encoder.mlp[-1].weight.grad != 0).any()
    assert (module.encoder.mlp[0].weight.grad == 0).all()  # behind a layer of zeros


def test_training_moves_vectors_and_codes_and_reconstructs_better():
    def error(epochs):
        settings = SMALL | {"epochs": epochs, "evaluate_every": epochs, "learning_rate": 1e-2}
        tokenizer = RQKMeansPlusTokenizer(RQKMeansPlusConfig(**settings)).fit(embeddings(), progress=False)
        with torch.no_grad():
            output = tokenizer.module(torch.from_numpy(embeddings().vectors))
        return float((output.reconstruction - output.inputs).square().mean()), tokenizer.module

    before, (after, module) = error(1)[0], error(60)
    assert after < 0.7 * before
    assert (module.encoder.mlp[-1].weight != 0).any()
    start = started()[1].quantizer.codebooks
    for codebook, centres in zip(module.quantizer.codebooks, start, strict=True):
        assert (codebook != centres).any()


def test_codes_are_as_wide_as_inputs_and_settings_are_checked():
    assert [tuple(codebook.shape) for codebook in started()[1].quantizer.codebooks] == [(16, 12)] * 3
    for wrong in ({"epochs": 0}, {"balance": "even"}, {"reduction": "max"}, {"size_slack": -1.0}):
        with pytest.raises(SettingsError, match=f"RQKMeansPlusConfig: .*{next(iter(wrong))}"):
            RQKMeansPlusConfig(**wrong)
