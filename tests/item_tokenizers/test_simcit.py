import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, SettingsError
from llmrec.item_tokenizers.base import ItemTokenizer
from llmrec.item_tokenizers.fit_loop import TrainBatch
from llmrec.item_tokenizers.item_vectors import ItemBatch, ItemVectors
from llmrec.item_tokenizers.quantizers import residual_codes
from llmrec.item_tokenizers.simcit import (
    SimCIT,
    SimCITConfig,
    SimCITTokenizer,
    codeword_similarity,
    contrastive_losses,
    soft_quantize,
)
from llmrec.processes import Processes

WIDTHS = {"text": 10, "image": 6, "collaborative": 4}
SMALL = {"num_codebooks": 3, "codebook_size": 16, "codebook_dim": 8, "hidden_sizes": (16,), "epochs": 6,
         "batch_size": 64, "evaluate_every": 2}  # fmt: skip


def tensors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(count, seed=0):
    """Each item has the text or the image, most have both; a third lacks the collaborative vector."""
    draws = np.random.default_rng(seed).random((2, count))
    return {"text": draws[0] > 0.2, "image": draws[0] < 0.8, "collaborative": draws[1] > 0.3}


def embeddings(count=150, seed=0, gaps=True, names=tuple(WIDTHS)):
    ids = tuple(f"item-{row}" for row in range(count))
    draws = np.random.default_rng(seed)
    arrays = {name: draws.normal(1.0, 2.0, size=(count, width)) for name, width in WIDTHS.items()}
    present = masks(count) if gaps else dict.fromkeys(WIDTHS)
    return {name: ItemEmbeddings(ids, arrays[name], present=present[name]) for name in names}


def step(tokenizer, module, vectors, epoch=0):
    """Losses of one batch of all items, gradients in the module."""
    generator = torch.Generator().manual_seed(0)
    tokenizer.start_epoch(module, epoch)
    batch = TrainBatch(vectors.rows(slice(None)), len(vectors), Processes.alone("cpu"), generator)
    losses = tokenizer.batch_losses(module, batch)
    module.zero_grad()
    sum(losses.values()).backward()
    return losses


def looped_losses(quantized, views, present, temperature):
    """Section 5.2 of the notes item by item, and what is masked left out."""

    def cosine(left, right):
        return functional.cosine_similarity(left, right, dim=0) / temperature

    losses = []
    for view, has_view in zip(views, present.tolist(), strict=True):
        terms = []
        for i in range(len(quantized)):
            if not has_view[i]:
                continue
            below = sum(cosine(quantized[i], view[j]).exp() for j in range(len(quantized)) if has_view[j])
            below += sum(cosine(quantized[i], quantized[j]).exp() for j in range(len(quantized)) if j != i)
            terms.append(below.log() - cosine(quantized[i], view[i]))
        losses.append(torch.stack(terms).mean() if terms else torch.zeros(()))
    return torch.stack(losses)


@pytest.mark.parametrize("gaps", [False, True])
def test_contrastive_losses_and_their_gradients_equal_the_loops(gaps):
    quantized, views = tensors(9, 5).requires_grad_(), tensors(3, 9, 5, seed=1).requires_grad_()
    present = torch.ones(3, 9, dtype=torch.bool)
    if gaps:
        present = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0, 0], [0] * 9]).bool()
    fast = contrastive_losses(quantized, views, present, temperature=0.3)
    slow = looped_losses(quantized, views, present, 0.3)
    torch.testing.assert_close(fast, slow)
    weights = torch.tensor([1.0, 2.0, 3.0])
    for left, right in zip(
        torch.autograd.grad(fast @ weights, (quantized, views)),
        torch.autograd.grad(slow @ weights, (quantized, views)),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_contrastive_losses_at_their_limits():
    present = torch.ones(1, 6, dtype=torch.bool)
    equal = contrastive_losses(torch.ones(6, 3), torch.ones(1, 6, 3), present, temperature=0.07)
    assert equal.item() == pytest.approx(math.log(11))
    alone = tensors(1, 3).requires_grad_()
    loss = contrastive_losses(alone, tensors(1, 1, 3, seed=1), present[:, :1], temperature=0.07)
    assert loss.item() == 0
    assert torch.autograd.grad(loss.sum(), alone)[0].abs().max() == 0
    whole = contrastive_losses(tensors(6, 3), tensors(1, 6, 3, seed=1), present, temperature=0.07)
    parts = [
        contrastive_losses(tensors(6, 3), tensors(1, 6, 3, seed=1), present, temperature=0.07, rows=rows)
        for rows in (slice(0, 2), slice(2, 6), slice(6, 6))
    ]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole)


def test_codeword_similarity_is_the_mean_cosine_of_all_pairs():
    by_hand = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # cosines 1, 0, 0, 1
    assert codeword_similarity([by_hand]).item() == pytest.approx(0.5)
    assert codeword_similarity([by_hand, torch.ones(4, 2)]).item() == pytest.approx(0.75)
    codebook = tensors(7, 5)
    pairs = functional.cosine_similarity(codebook[:, None], codebook[None], dim=2)
    assert codeword_similarity([codebook]).item() == pytest.approx(pairs.mean().item(), rel=1e-5)


def test_codeword_similarity_does_not_see_collapse_into_two_opposite_bundles():
    bundle = tensors(1, 4)
    assert codeword_similarity([torch.cat([bundle.expand(8, 4), -bundle.expand(8, 4)])]).item() < 1e-12
    start = SimCIT({"text": 4}, SimCITConfig()).quantizer.codebooks
    assert codeword_similarity(list(start)).item() == pytest.approx(0.75, abs=0.02)


def test_soft_codes_become_hard_ones_as_the_temperature_falls():
    latents, codebooks = tensors(40, 5), [tensors(8, 5, seed=level) for level in (1, 2, 3)]
    codes = residual_codes(latents, codebooks)
    hard = sum(codebook[level] for codebook, level in zip(codebooks, codes.T, strict=True))
    distances = [(soft_quantize(latents, codebooks, None, temperature=t).vectors - hard).norm() for t in (10, 1, 1e-6)]
    assert distances[0] > distances[1] > distances[2]
    torch.testing.assert_close(soft_quantize(latents, codebooks, None, temperature=1e-6).vectors, hard)
    assert soft_quantize(latents, codebooks, None, temperature=1e-6).max_probabilities.min() == 1
    even = soft_quantize(latents, codebooks, None, temperature=1e9).max_probabilities
    torch.testing.assert_close(even, torch.full((40, 3), 1 / 8))


def test_noise_draws_codes_with_the_probabilities_of_the_softmax():
    """One item, codes at squared distances 0 and 1: Gumbel noise picks the first with probability 1/(1 + 1/e)."""
    latents, codebook = torch.zeros(20_000, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    uniform = torch.rand(20_000, 1, 2, generator=torch.Generator().manual_seed(0))
    uniform[0] = torch.tensor([0.0, 0.5])  # a draw of exactly 0 is possible, and loses
    drawn = soft_quantize(latents, [codebook], uniform, temperature=1e-4).vectors[:, 0]
    assert drawn[0] == 1
    assert 1 - drawn.mean().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)


def test_soft_quantisation_by_hand():
    """T 0.5, D = (0, 4): p = (1, e^-8) / (1 + e^-8); the mixture leaves the residual for level 2."""
    soft = soft_quantize(
        torch.tensor([[1.0]]), [torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [2.0]])], None, temperature=0.5
    )
    share = 1 / (1 + math.exp(-8))
    assert soft.max_probabilities.tolist()[0] == pytest.approx([share, 0.5])
    assert soft.vectors.item() == pytest.approx(share + 3 * (1 - share) + 2)


def test_gradients_reach_everything_through_all_levels():
    tokenizer = SimCITTokenizer(SimCITConfig(**SMALL, codeword_weight=0.0))
    module = tokenizer.new_module(WIDTHS)
    losses = step(tokenizer, module, ItemVectors.of(embeddings()))
    assert sorted(losses) == ["contrastive_collaborative", "contrastive_image", "contrastive_text"]
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    # The latents get gradient from every level's mixture, not from the first alone as with a straight-through.
    latents = tensors(20, 5).requires_grad_()
    codebooks = [tensors(8, 5, seed=level).requires_grad_() for level in (1, 2)]
    first_alone = soft_quantize(latents, codebooks[:1], None, temperature=1.0).vectors.square().sum()
    both = soft_quantize(latents, codebooks, None, temperature=1.0).vectors
    second = both - soft_quantize(latents, codebooks[:1], None, temperature=1.0).vectors
    assert torch.autograd.grad(first_alone, latents)[0].abs().max() > 0
    for gradient in torch.autograd.grad(second.square().sum(), (latents, codebooks[0])):
        assert gradient.abs().max() > 1e-3


def test_biases_are_where_the_published_code_has_them():
    module = SimCIT(WIDTHS, SimCITConfig(**SMALL))
    biases = [name for name, _ in module.named_parameters() if name.endswith("bias")]
    assert biases == ["attention.0.bias", "projection.bias"]


def test_what_an_item_lacks_changes_nothing():
    tokenizer = SimCITTokenizer(SimCITConfig(**SMALL))
    module = tokenizer.new_module(WIDTHS)
    vectors = ItemVectors.of(embeddings())
    other = ItemVectors(vectors.item_ids, {name: array.copy() for name, array in vectors.arrays.items()}, masks(150))
    for name, present in masks(150).items():
        other.arrays[name][~present] = 1e3 * np.random.default_rng(9).normal(size=other.arrays[name][~present].shape)
    assert (other.arrays["text"] != vectors.arrays["text"]).any()
    losses, gradients = step(tokenizer, module, vectors), [p.grad.clone() for p in module.parameters()]
    changed = step(tokenizer, module, other)
    for name, loss in losses.items():
        assert torch.equal(loss, changed[name]), name
    assert all(torch.equal(left, right.grad) for left, right in zip(gradients, module.parameters(), strict=True))


def test_attention_is_over_the_modalities_that_an_item_has():
    module = SimCIT(WIDTHS, SimCITConfig(**SMALL))
    items = ItemVectors.of(embeddings()).rows(slice(None))
    fused = module(items)
    torch.testing.assert_close(fused.attention.sum(0), torch.ones(150))
    assert (fused.attention[~fused.present] == 0).all()
    assert (fused.attention[fused.present] > 0).all()
    assert (fused.views[~fused.present] == 0).all()
    # Names are in alphabetical order: collaborative, image, text. Items with text alone are their text's view.
    text_alone = fused.present.t().eq(torch.tensor([False, False, True])).all(1)
    assert text_alone.any()
    torch.testing.assert_close(fused.latents[text_alone], fused.views[2, text_alone])
    # A modality that isn't there at all is one that nobody has.
    absent = ItemBatch(items.vectors, {**items.present, "image": torch.zeros(150, dtype=torch.bool)})
    without = ItemBatch(*({name: of[name] for name in ("text", "collaborative")} for of in vars(items).values()))
    rows = items.present["text"] | items.present["collaborative"]
    assert torch.equal(module(absent).latents[rows], module(without).latents[rows])
    assert not torch.equal(module(items).latents[rows], module(without).latents[rows])


def test_scaling_is_that_of_the_items_which_have_the_modality():
    both = embeddings()
    module = SimCITTokenizer(SimCITConfig(**SMALL | {"epochs": 1})).fit(both, progress=False).module
    image = both["image"].vectors[masks(150)["image"]].astype(np.float64)
    encoder = module.encoders["image"]
    np.testing.assert_allclose(encoder.input_mean.numpy(), image.mean(0), rtol=1e-5)
    assert encoder.input_scale.item() == pytest.approx(math.sqrt(image.var(0).mean()), rel=1e-5)
    plain = SimCITTokenizer(SimCITConfig(**SMALL | {"epochs": 1, "standardize": False})).fit(both, progress=False)
    assert plain.module.encoders["image"].input_mean.abs().max() == 0


TWO_PROCESSES = """
import json, sys
import numpy as np, torch
import torch.distributed as distributed
from safetensors.torch import save_file
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.item_tokenizers.fit_loop import TrainBatch
from llmrec.item_tokenizers.item_vectors import ItemVectors
from llmrec.item_tokenizers.simcit import SimCITConfig, SimCITTokenizer
from llmrec.processes import Processes

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
processes = Processes(rank, 2, "cpu")
settings = json.load(open(f"{folder}/settings.json"))
names = ("text", "image", "collaborative")
embeddings = {name: ItemEmbeddings.load(f"{folder}/{name}.safetensors") for name in names}
tokenizer = SimCITTokenizer(SimCITConfig(**settings))
vectors = ItemVectors.of(embeddings)
module = tokenizer.new_module(vectors.widths)
tokenizer.start_epoch(module, 0)
rows = np.arange(len(vectors))[processes.part(len(vectors))]
batch = TrainBatch(vectors.rows(rows), len(vectors), processes, torch.Generator().manual_seed(0))
losses = tokenizer.batch_losses(module, batch)
sum(losses.values()).backward()
processes.sum_gradients(module)
found = {f"loss.{name}": processes.sum(loss) for name, loss in losses.items()}
found |= {f"gradient.{name}": parameter.grad for name, parameter in module.named_parameters()}
save_file(found, f"{folder}/rank{rank}.safetensors")
distributed.destroy_process_group()
"""


def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path):
    """Negatives of all processes, parts of 76 and 75 items, gaps that are spread unevenly."""
    (tmp_path / "settings.json").write_text(json.dumps(SMALL))
    items = embeddings(151)
    for name, of_name in items.items():
        of_name.save(tmp_path / f"{name}.safetensors")
    started = [subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path)]) for rank in range(2)]
    tokenizer = SimCITTokenizer(SimCITConfig(**SMALL))
    module = tokenizer.new_module(WIDTHS)
    losses = step(tokenizer, module, ItemVectors.of(items))
    try:
        for process in started:
            process.wait(timeout=200)  # gloo may abort at exit, so what counts is what was written
    finally:
        for process in started:
            process.kill()
    for rank in range(2):
        found = load_file(tmp_path / f"rank{rank}.safetensors")
        for name, loss in losses.items():
            torch.testing.assert_close(found[f"loss.{name}"], loss.detach(), atol=1e-5, rtol=1e-5)
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(found[f"gradient.{name}"], parameter.grad, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_encodes_the_same_with_gaps_and_with_modalities_missing(tmp_path):
    both = embeddings()
    tokenizer = SimCITTokenizer(SimCITConfig(**SMALL)).fit(both, progress=False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = SimCITTokenizer.from_pretrained(tmp_path / "tokenizer")
    new = embeddings(20, seed=5, gaps=False)
    for given in (both, new, {"text": new["text"]}, {name: new[name] for name in ("image", "collaborative")}):
        np.testing.assert_array_equal(
            loaded.quantize(given).semantic_ids.codes, tokenizer.quantize(given).semantic_ids.codes
        )
    extended = loaded.extend(loaded.encode(both), {"text": renamed(new["text"])})
    assert extended.is_unique
    assert extended.num_items == 170


def renamed(of):
    return ItemEmbeddings(tuple(f"new-{item_id}" for item_id in of.item_ids), of.vectors)


def test_new_items_may_lack_a_whole_modality():
    tokenizer = SimCITTokenizer(SimCITConfig(**SMALL)).fit(embeddings(), progress=False)
    new = embeddings(20, seed=5, gaps=False)
    nobody = ItemEmbeddings(new["text"].item_ids, new["collaborative"].vectors, present=np.zeros(20, dtype=bool))
    left_out = tokenizer.quantize({name: new[name] for name in ("text", "image")})
    masked = tokenizer.quantize({**new, "collaborative": nobody})
    np.testing.assert_array_equal(left_out.geometry.latents, masked.geometry.latents)
    np.testing.assert_array_equal(left_out.semantic_ids.codes, masked.semantic_ids.codes)
    assert (tokenizer.quantize(new).geometry.latents != masked.geometry.latents).any()
    np.testing.assert_array_equal(
        tokenizer.quantize(new["text"]).semantic_ids.codes,
        tokenizer.quantize({"text": new["text"]}).semantic_ids.codes,
    )


def test_items_without_any_modality_and_wrong_names_are_clear_errors():
    both = embeddings(names=("text", "collaborative"))
    bare = {name: ItemEmbeddings(of.item_ids, of.vectors, present=np.arange(150) != 7) for name, of in both.items()}
    tokenizer = SimCITTokenizer(SimCITConfig(**SMALL | {"epochs": 1}))
    with pytest.raises(DataError, match=r"1 item\(s\) have none of .*'item-7' \(row 7\)"):
        tokenizer.fit(bare)
    for name in ("a.b", "title text", "", "values", "type"):
        with pytest.raises(DataError, match=f"'{name}' can't name a modality"):
            tokenizer.fit({"text": both["text"], name: both["text"]})
    with pytest.raises(DataError, match="no modality"):
        tokenizer.fit({})
    tokenizer.fit(embeddings(names=("text", "collaborative"), gaps=False), progress=False)
    with pytest.raises(DataError, match="'item-7'"):
        tokenizer.encode(bare)
    with pytest.raises(DataError, match="'item-7'"):
        tokenizer.encode(bare["text"])
    with pytest.raises(DataError, match="fitted with collaborative, text; img is none of them"):
        tokenizer.encode({"text": both["text"], "img": both["text"]})
    with pytest.raises(DataError, match="text is missing"):
        tokenizer.encode({})


def test_one_modality_is_fitted_too_and_the_order_of_modalities_does_not_matter():
    whole = embeddings(gaps=False)
    alone = SimCITTokenizer(SimCITConfig(**SMALL)).fit(whole["text"], progress=False)
    assert alone.widths == {"text": 10}
    assert alone.encode(whole["text"]).is_unique
    module = alone.module(ItemVectors.of({"text": whole["text"]}).rows(slice(None)))
    torch.testing.assert_close(module.latents, module.views[0])
    image = SimCITTokenizer(SimCITConfig(**SMALL | {"epochs": 1})).fit({"image": whole["image"]}, progress=False)
    assert image.encode(whole["image"]).num_items == 150
    first = SimCITTokenizer(SimCITConfig(**SMALL)).fit(whole, progress=False)
    turned = SimCITTokenizer(SimCITConfig(**SMALL)).fit({name: whole[name] for name in sorted(WIDTHS)}, progress=False)
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(tensor, turned.module.state_dict()[name]), name


class Killed(Exception):
    pass


def test_a_killed_fit_resumes_with_its_codebooks_and_its_temperature(tmp_path):
    config = SimCITConfig(**SMALL | {"initialisation": "kmeans", "annealing_rate": 0.3})
    seen = []

    def killed_after_the_fourth_epoch(epoch, figures):
        seen.append(figures)
        if epoch == 4:
            raise Killed

    whole = SimCITTokenizer(config).fit(embeddings(), progress=False)
    with pytest.raises(Killed):
        SimCITTokenizer(config).fit(
            embeddings(), progress=False, checkpoint_folder=tmp_path, monitor=killed_after_the_fourth_epoch
        )
    resumed = SimCITTokenizer(config).fit(embeddings(), progress=False, checkpoint_folder=tmp_path)
    assert len(seen) == 2
    assert bool(resumed.module.quantizer.initialised)
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, resumed.module.state_dict()[name]), name


def test_the_gap_between_training_and_export_is_logged():
    figures = []
    tokenizer = SimCITTokenizer(SimCITConfig(**SMALL))
    tokenizer.fit(embeddings(), progress=False, monitor=lambda epoch, found: figures.append(found))
    assert len(figures) == 3
    names = ["max_probability_1", "max_probability_2", "max_probability_3"]
    for found in figures:
        assert all(1 / 16 < found[name] <= 1 for name in names)
        assert -1 <= found["soft_hard_cosine"] <= 1
    vectors = ItemVectors.of(embeddings())
    tokenizer._temperature = 1e-6
    assert tokenizer.measurements(tokenizer.module, vectors, Processes.alone("cpu"))["max_probability_3"] > 0.999
    for codebook in tokenizer.module.quantizer.codebooks:
        codebook.data *= 100  # noise is small against such distances, so that training sees the codes of export
    measured = tokenizer.measurements(tokenizer.module, vectors, Processes.alone("cpu"))
    assert measured["soft_hard_cosine"] > 0.999


def test_temperature_is_constant_or_falls_to_its_floor():
    assert {SimCITConfig(gumbel_temperature=0.2).temperature_at(epoch) for epoch in (0, 10, 1000)} == {0.2}
    config = SimCITConfig(annealing_rate=0.1, annealing_start=2.0, gumbel_temperature=0.5)
    assert config.temperature_at(0) == 2.0
    assert config.temperature_at(10) == pytest.approx(2 / math.e)
    assert config.temperature_at(100) == 0.5
    tokenizer, items = SimCITTokenizer(SimCITConfig(**SMALL, annealing_rate=0.1)), ItemVectors.of(embeddings())
    module = tokenizer.new_module(WIDTHS)
    early, late, later = (step(tokenizer, module, items, epoch=epoch)["contrastive_text"] for epoch in (0, 50, 60))
    assert early != late
    assert late == later


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"contrastive_temperature": 0.0}, "contrastive_temperature=0.0"),
        ({"gumbel_temperature": -1.0}, "gumbel_temperature"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"codebook_size": 1}, "codebook_size"),
        ({"initialisation": "random"}, "uniform, kmeans"),
        ({"annealing_rate": 0.1, "annealing_start": 0.1}, r"annealing_start is 0\.1"),
    ],
)
def test_settings_that_cannot_work(wrong, message):
    with pytest.raises(SettingsError, match=message):
        SimCITConfig(**wrong)


def test_a_loaded_simcit_is_found_by_its_class(tmp_path):
    SimCITTokenizer(SimCITConfig(**SMALL | {"epochs": 1})).fit(embeddings(), progress=False).save_pretrained(tmp_path)
    assert type(ItemTokenizer.from_pretrained(tmp_path)) is SimCITTokenizer


def test_modalities_start_alike_whatever_their_width():
    """With Xavier's rule the wider one is several times longer, and takes the attention."""
    draws = torch.Generator().manual_seed(0)
    vectors = {"text": torch.randn(200, 384, generator=draws), "collaborative": torch.randn(200, 32, generator=draws)}
    items = ItemBatch(vectors, {name: torch.ones(200, dtype=torch.bool) for name in vectors})
    fused = SimCIT({name: of.shape[1] for name, of in vectors.items()}, SimCITConfig())(items)
    lengths = fused.views.norm(dim=2).mean(1)
    assert 0.8 < (lengths[0] / lengths[1]).item() < 1.25


def test_codes_learn_what_both_modalities_know():
    """Four groups, hidden in noise in the text and plain in the collaborative vectors, show in the first codes."""
    draws = np.random.default_rng(0)
    ids = tuple(map(str, range(400)))
    groups = draws.integers(4, size=400)
    items = {
        "text": ItemEmbeddings(ids, draws.normal(size=(400, 24)) + 1.5 * np.eye(4, 24)[groups]),
        "collaborative": ItemEmbeddings(ids, 3 * np.eye(4, 8)[groups] + 0.5 * draws.normal(size=(400, 8))),
    }
    history = []
    tokenizer = SimCITTokenizer(SimCITConfig(
        num_codebooks=2, codebook_size=32, codebook_dim=16, hidden_sizes=(32,), epochs=30, batch_size=200,
        evaluate_every=1, learning_rate=5e-3, contrastive_temperature=0.07, keep="lowest_collision_rate",
    ))  # fmt: skip
    tokenizer.fit(items, progress=False, monitor=lambda epoch, found: history.append(found))
    assert history[-1]["loss_contrastive_text"] < 0.8 * history[0]["loss_contrastive_text"]
    assert history[-1]["loss_contrastive_collaborative"] < 0.8 * history[0]["loss_contrastive_collaborative"]
    assert tokenizer.fit_report["best_collision_rate"] < 0.3
    first = tokenizer.quantize(items).semantic_ids.codes[:, 0]
    majority = sum(np.bincount(groups[first == code]).max() for code in np.unique(first)) / 400
    assert majority > 0.8  # 0.25 would know nothing, and 32 codes for 400 items by chance about 0.45
