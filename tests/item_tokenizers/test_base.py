"""One contract over all item tokenizers."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, ItemOrderError, MissingPartError, SettingsError
from llmrec.item_tokenizers import fit_loop
from llmrec.item_tokenizers.base import ItemTokenizer, NotFittedError, item_tokenizer_classes
from llmrec.item_tokenizers.letter import LetterTokenizer
from llmrec.item_tokenizers.rq_vae import RQVAEConfig
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.trained import TrainedTokenizer

spec = importlib.util.spec_from_file_location("small", Path(__file__).with_name("small.py"))
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)
MAKE, embeddings = small.MAKE, small.embeddings


@pytest.fixture(scope="module", params=sorted(MAKE))
def make(request):
    return MAKE[request.param]


@pytest.fixture(scope="module")
def fitted(make):
    return make().fit(embeddings(), progress=False)


def test_every_class_is_in_the_contract():
    """Save for the one that has nothing to fit: test_given_codes.py."""
    assert sorted(item_tokenizer_classes()) == sorted([*MAKE, "GivenCodesTokenizer"])


def test_codes_are_unique_in_range_and_in_item_order(fitted):
    semantic_ids = fitted.encode(embeddings())
    assert semantic_ids.item_ids == embeddings()["text"].item_ids
    assert semantic_ids.codes.shape == (150, 3)
    assert semantic_ids.codebook_sizes == fitted.codebook_sizes == (16, 16, 16)
    assert semantic_ids.is_unique
    assert semantic_ids.policy == "min_cost"
    assert len({tuple(codes) for codes in semantic_ids.codes.tolist()}) == 150


def test_the_report_is_true(fitted):
    report = fitted.fit_report
    assert report["items"] == 150
    rate = report["best_collision_rate"] if isinstance(fitted, TrainedTokenizer) else report["collision_rate"]
    assert report.get("epoch", 6) == 6
    assert fitted.quantize_catalogue(embeddings()).semantic_ids.collision_rate == pytest.approx(rate)
    assert rate < 0.5


def test_the_seed_fixes_the_codes_and_global_generators_do_not_matter(make, fitted):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = make().fit(embeddings(), progress=False)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(again.encode(embeddings()).codes, fitted.encode(embeddings()).codes)
    other = make(seed=1).fit(embeddings(), progress=False)
    assert (other.encode(embeddings()).codes != fitted.encode(embeddings()).codes).any()


def test_codes_before_the_policy_do_not_depend_on_company(fitted):
    everything = embeddings()["text"]
    whole = fitted.encode(everything, policy="allow")
    part = ItemEmbeddings(everything.item_ids[40:43], everything.vectors[40:43])
    np.testing.assert_array_equal(fitted.encode(part, policy="allow").codes, whole.codes[40:43])
    new = fitted.encode(embeddings(20, seed=5)["text"])
    assert new.is_unique
    np.testing.assert_array_equal(fitted.encode(everything, policy="allow").codes, whole.codes)


def test_new_items_join_without_touching_the_others(fitted):
    everything = embeddings()
    old = {name: of.select(np.arange(100)) for name, of in everything.items()}
    new = {name: of.select(np.arange(100, 150)) for name, of in everything.items()}
    catalogue = fitted.encode(old)
    extended = fitted.extend(catalogue, new)
    assert extended.item_ids == everything["text"].item_ids
    np.testing.assert_array_equal(extended.codes[:100], catalogue.codes)
    assert extended.is_unique
    nearest = fitted.encode(new, policy="allow").codes
    assert (extended.codes[100:] == nearest).all(axis=1).mean() > 0.5  # only those that collide move
    assert (extended.codes[100:, 0] == nearest[:, 0]).all()
    with pytest.raises(DataError, match="item-100"):
        fitted.extend(extended, new)
    smaller = extended.remove(extended.item_ids[:10])
    assert smaller.item_ids == extended.item_ids[10:]
    np.testing.assert_array_equal(smaller.codes, extended.codes[10:])


def test_memory_mapped_vectors_give_the_same_codes(make, fitted, tmp_path):
    mapped = {}
    for name, of in embeddings().items():
        np.save(tmp_path / f"{name}.npy", of.vectors)
        mapped[name] = ItemEmbeddings.load(tmp_path / f"{name}.npy", item_ids=of.item_ids, memory_map=True)
        assert not mapped[name].vectors.flags.writeable
    again = make().fit(mapped, progress=False)
    np.testing.assert_array_equal(again.encode(mapped).codes, fitted.encode(embeddings()).codes)


def test_saved_and_loaded_equal(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "tokenizer")
    assert sorted(file.name for file in (tmp_path / "tokenizer").iterdir()) == ["config.json", "model.safetensors"]
    loaded = ItemTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert type(loaded) is type(fitted)
    assert (loaded.config, loaded.widths, loaded.fit_report) == (fitted.config, fitted.widths, fitted.fit_report)
    np.testing.assert_array_equal(loaded.encode(embeddings()).codes, fitted.encode(embeddings()).codes)


def test_loaded_in_a_fresh_process_the_codes_are_the_same(tmp_path):
    fitted = MAKE["LetterTokenizer"]().fit(embeddings(), progress=False)
    fitted.save_pretrained(tmp_path / "tokenizer")
    embeddings()["text"].save(tmp_path / "text.safetensors")
    script = (
        "import sys; from llmrec.embeddings.base import ItemEmbeddings;"
        "from llmrec.item_tokenizers.base import ItemTokenizer;"
        "tokenizer = ItemTokenizer.from_pretrained(sys.argv[1]);"
        "tokenizer.encode(ItemEmbeddings.load(sys.argv[2])).save(sys.argv[3])"
    )
    names = ("tokenizer", "text.safetensors", "ids.safetensors")
    subprocess.run([sys.executable, "-c", script, *(tmp_path / name for name in names)], check=True, timeout=120)
    found = SemanticIds.load(tmp_path / "ids.safetensors")
    np.testing.assert_array_equal(found.codes, fitted.encode(embeddings()).codes)


def test_broken_folders_are_refused(fitted, tmp_path):
    folder = tmp_path / "tokenizer"
    with pytest.raises(MissingPartError, match=r"config\.json"):
        ItemTokenizer.from_pretrained(folder)
    fitted.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())

    def with_config(**changes):
        (folder / "config.json").write_text(json.dumps(content | changes))
        return folder

    with pytest.raises(DataError, match="upgrade llmrec"):
        ItemTokenizer.from_pretrained(with_config(format_version=99))
    with pytest.raises(DataError, match="'Other', expected GivenCodesTokenizer, LetterTokenizer, RQK"):
        ItemTokenizer.from_pretrained(with_config(**{"class": "Other"}))
    with pytest.raises(DataError, match="settings"):
        ItemTokenizer.from_pretrained(with_config(settings={"colour": 1}))
    with pytest.raises(DataError, match="weights don't fit"):
        ItemTokenizer.from_pretrained(with_config(settings=content["settings"] | {"codebook_size": 32}))
    with_config()
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingPartError, match=r"model\.safetensors"):
        ItemTokenizer.from_pretrained(folder)


def test_a_letter_is_not_loaded_where_another_is_asked_for(tmp_path):
    MAKE["RQVAETokenizer"]().fit(embeddings()["text"], progress=False).save_pretrained(tmp_path / "rq_vae")
    with pytest.raises(DataError, match="expected LetterTokenizer"):
        LetterTokenizer.from_pretrained(tmp_path / "rq_vae")
    with pytest.raises(SettingsError, match="takes a LetterConfig"):
        LetterTokenizer(RQVAEConfig())


def test_unfitted_wrong_width_and_missing_modalities_are_clear_errors(make, fitted, tmp_path):
    with pytest.raises(NotFittedError, match="call fit"):
        make().encode(embeddings())
    with pytest.raises(NotFittedError, match="nothing to save"):
        make().save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(DataError, match=r"width 13, this .* was fitted with 12"):
        fitted.encode(embeddings(width=13)["text"])
    with pytest.raises(DataError, match="text is missing"):
        fitted.encode({"image": embeddings()["text"], "video": embeddings()["text"]})
    with pytest.raises(DataError, match="no items"):
        make().fit({name: ItemEmbeddings((), of.vectors[:0]) for name, of in embeddings().items()})


def test_letter_refuses_modalities_in_different_orders():
    both = embeddings()
    swapped = ItemEmbeddings(both["collaborative"].item_ids[::-1], both["collaborative"].vectors)
    with pytest.raises(ItemOrderError, match="collaborative"):
        MAKE["LetterTokenizer"]().fit({"text": both["text"], "collaborative": swapped})
    with pytest.raises(DataError, match="collaborative is missing"):
        MAKE["LetterTokenizer"]().fit(both["text"])


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_small_catalogues(make, count):
    semantic_ids = make(epochs=2).fit(embeddings(count), progress=False).encode(embeddings(count))
    assert semantic_ids.is_unique
    assert semantic_ids.num_items == count


def test_equal_items_still_get_codes_of_their_own(make):
    first = {name: np.repeat(of.vectors[:1], 40, axis=0) for name, of in embeddings(40).items()}
    same = {name: ItemEmbeddings(embeddings(40)["text"].item_ids, vectors) for name, vectors in first.items()}
    semantic_ids = make(epochs=2).fit(same, progress=False).encode(same)
    assert semantic_ids.is_unique
    assert semantic_ids.report.collisions_before == 39


class Killed(Exception):
    pass


def test_a_killed_fit_resumes_to_the_same_weights(make, fitted, tmp_path, monkeypatch):
    if not isinstance(fitted, TrainedTokenizer):
        pytest.skip("it has no epochs: its own tests kill it")
    seen = 0

    def killed_at_the_fifth_epoch(*arguments):
        nonlocal seen
        seen += arguments[0] == 42 and arguments[2:] == (1,)
        if seen == 5:
            raise Killed
        return original(*arguments)

    original = fit_loop.seeded
    monkeypatch.setattr(fit_loop, "seeded", killed_at_the_fifth_epoch)
    with pytest.raises(Killed):
        make().fit(embeddings(), progress=False, checkpoint_folder=tmp_path)
    resumed = make()
    seen = 10
    assert json.loads(fit_checkpoint_state(tmp_path))["epoch"] == 4
    resumed.fit(embeddings(), progress=False, checkpoint_folder=tmp_path)
    assert resumed.fit_report == fitted.fit_report
    for name, tensor in fitted._state().items():
        assert torch.equal(tensor, resumed._state()[name]), name
    with pytest.raises(DataError, match="other settings or other data"):
        make(learning_rate=0.5).fit(embeddings(), progress=False, checkpoint_folder=tmp_path)


def fit_checkpoint_state(folder):
    with safe_open(folder / fit_loop.CHECKPOINT_NAME, framework="pt") as file:
        return file.metadata()["state"]


def test_the_weights_that_are_kept_are_those_that_were_asked_for():
    def fit(**settings):
        tokenizer = MAKE["RQVAETokenizer"](epochs=8, evaluate_every=1, **settings).fit(embeddings(), progress=False)
        return tokenizer.fit_report, [figures["collision_rate"] for figures in tokenizer.fit_history]

    (lowest, rates), (last, same_rates) = fit(keep="lowest_collision_rate"), fit(keep="last")
    assert rates == same_rates
    assert lowest["best_collision_rate"] == min(rates) < rates[-1]  # or this says nothing
    assert lowest["best_epoch"] == max(epoch for epoch, rate in enumerate(rates, start=1) if rate == min(rates))
    assert (last["best_epoch"], last["best_collision_rate"]) == (8, rates[-1])


def test_training_trains_and_the_settings_are_checked():
    def error(epochs):
        tokenizer = MAKE["RQVAETokenizer"](epochs=epochs).fit(embeddings(), progress=False)
        inputs = torch.from_numpy(embeddings()["text"].vectors)
        with torch.no_grad():
            out = tokenizer.module(inputs)
        return float((out.reconstruction - out.inputs).square().mean())

    assert error(60) < 0.8 * error(1)
    for wrong in ({"epochs": 0}, {"commitment_weight": -1.0}, {"reduction": "max"}, {"codebook_size": 1}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            RQVAEConfig(**wrong)


def test_standardised_inputs_have_mean_variance_one():
    tokenizer = MAKE["RQVAETokenizer"]().fit(embeddings(), progress=False)
    inputs = tokenizer.module.standardized(torch.from_numpy(embeddings()["text"].vectors))
    torch.testing.assert_close(inputs.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    assert inputs.var(0, correction=0).mean().item() == pytest.approx(1.0, abs=1e-4)
    plain = MAKE["RQVAETokenizer"](standardize=False).fit(embeddings(), progress=False).module
    assert plain.input_scale.item() == 1.0


def test_collapse_is_warned_of_with_the_remedy(caplog):
    vectors = ItemEmbeddings(tuple(map(str, range(200))), np.ones((200, 6)))
    MAKE["RQVAETokenizer"](epochs=2, revive_until=0.0).fit(vectors, progress=False)
    assert "collapse" in caplog.text
    assert "revive_until" in caplog.text


def test_a_diverging_fit_is_an_error_not_a_folder_of_nan():
    with pytest.raises(DataError, match="lower learning_rate"):
        MAKE["RQVAETokenizer"](learning_rate=1e18, revive_until=0.0).fit(embeddings(), progress=False)
