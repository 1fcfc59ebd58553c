import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from llmrec.adapter import (
    add_lora,
    freeze_base,
    is_adapter,
    load_adapter,
    load_adapter_weights,
    merge_adapter,
    merge_quantized,
    parameter_names,
    read_adapter_weights,
    save_adapter,
)
from llmrec.errors import DataError, MissingPartError, SettingsError
from llmrec.vocabulary import CodeVocabulary, add_code_rows, code_row_parameters, has_code_rows

VOCABULARY = CodeVocabulary((3, 4, 3), 16)  # tokens 16 to 25
INPUT_IDS = torch.tensor([[0, 16, 19, 23, 25, 15, 4], [25, 14, 3, 17, 22, 18, 16]])
EMBEDDING_ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD_ROWS = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"


def logits(model):
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits


def with_adapter(base, *, target_modules=("q_proj", "v_proj"), seed=1, **settings):
    """LoRA of random weights, not zero, and random rows, on a copy of `base`."""
    model = copy.deepcopy(base)
    add_code_rows(model, VOCABULARY, seed=seed)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    return add_lora(model, config, seed=seed).eval()


def test_the_seed_alone_fixes_the_initial_weights(tiny_model):
    def initial_weights(seed, global_seed):
        torch.manual_seed(global_seed)
        model = tiny_model("llama", tied=True, vocab_size=16)
        add_code_rows(model, VOCABULARY)
        lora = add_lora(model, LoraConfig(r=2, target_modules="all-linear"), seed=seed)
        return torch.cat([value.flatten() for name, value in lora.named_parameters() if "lora_A" in name])

    first = initial_weights(seed=5, global_seed=1)
    assert torch.equal(first, initial_weights(seed=5, global_seed=2))
    assert not torch.equal(first, initial_weights(seed=6, global_seed=1))


def with_rows_alone(base, *, seed=1):
    """Random rows on a copy of `base`, which is frozen."""
    model = copy.deepcopy(base)
    add_code_rows(model, VOCABULARY, seed=seed)
    freeze_base(model)
    return model.eval()


def resized(base):
    """A copy of `base` whose own matrices have rows, of random values, for the code tokens."""
    model = copy.deepcopy(base)
    model.resize_token_embeddings(max(base.get_input_embeddings().weight.shape[0], 26), mean_resizing=False)
    return model


VARIANTS = {
    "lora": lambda base: with_adapter(base, target_modules="all-linear"),
    "rsLoRA": lambda base: with_adapter(base, use_rslora=True, lora_alpha=7),
    "DoRA": lambda base: with_adapter(base, target_modules="all-linear", use_dora=True),
    "rows": with_rows_alone,
}


def expected_keys(tied):
    parts = [
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{side}.weight"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
        for side in "AB"
    ]
    return {*parts, EMBEDDING_ROWS} | (set() if tied else {HEAD_ROWS})


def change_file(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# Adding


def test_lora_and_rows_are_all_that_trains(tiny_model):
    for tied, family in ((True, "llama"), (False, "qwen2")):
        model = with_adapter(tiny_model(family, tied=tied), target_modules="all-linear")
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name for name in trained if "lora_" not in name} == (
            {"base_model.model.model.embed_tokens.new_rows"}
            | (set() if tied else {"base_model.model.lm_head.new_rows"})
        )
        assert len({name.split(".lora_")[0] for name in trained if "lora_" in name}) == 14  # 7 linear layers twice
        assert not any("lm_head" in name for name in trained if "lora_" in name)


def test_settings_that_would_train_rows_twice_are_refused(tiny_model):
    base = tiny_model(tied=False)
    with pytest.raises(SettingsError, match="add code rows before LoRA"):
        add_lora(base, LoraConfig(target_modules="all-linear"))
    for target in ("embed_tokens", "lm_head"):
        with pytest.raises(SettingsError, match=rf"LoRA on \S*{target}\S* is not supported"):
            with_adapter(base, target_modules=["q_proj", target])
    with pytest.raises(SettingsError, match="modules_to_save must stay empty"):
        with_adapter(base, modules_to_save=["lm_head"])
    with pytest.raises(SettingsError, match="trainable_token_indices and"):
        with_adapter(base, trainable_token_indices=[16])


# The file


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_holds_lora_and_rows_and_nothing_else(tiny_model, tied, tmp_path):
    model = with_adapter(tiny_model(tied=tied, vocab_size=64))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == expected_keys(tied)
    assert torch.equal(tensors[EMBEDDING_ROWS], model.get_input_embeddings().new_rows)  # values, not differences
    if not tied:
        assert torch.equal(tensors[HEAD_ROWS], model.get_output_embeddings().new_rows)
        assert not torch.equal(tensors[HEAD_ROWS], tensors[EMBEDDING_ROWS])
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * numbers + 3000  # and a header
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    modules = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    assert settings["trainable_token_indices"] == {module: list(range(16, 26)) for module in modules}
    assert settings["peft_type"] == "LORA"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("vocab_size", [16, 21, 64])
@pytest.mark.parametrize("tied", [True, False])
def test_loading_gives_equal_logits(tiny_model, tied, vocab_size, tmp_path):
    base = tiny_model("qwen2", tied=tied, vocab_size=vocab_size)
    model = with_adapter(base, target_modules="all-linear", use_rslora=True, lora_alpha=7)
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = load_adapter(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert [rows.requires_grad for rows in code_row_parameters(trainable)] == [True] * (1 if tied else 2)
    assert any(parameter.requires_grad for name, parameter in trainable.named_parameters() if "lora_" in name)

    second = tmp_path / "second"
    save_adapter(loaded, second)  # what was loaded saves the same again
    first = load_file(tmp_path / "adapter_model.safetensors")
    again = load_file(second / "adapter_model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("vocab_size", [16, 64])
@pytest.mark.parametrize("tied", [True, False])
def test_plain_peft_on_a_resized_base_gives_equal_logits(tiny_model, tied, vocab_size, tmp_path):
    base = tiny_model(tied=tied, vocab_size=vocab_size)
    model = with_adapter(base)
    save_adapter(model, tmp_path)
    base.resize_token_embeddings(max(vocab_size, 26), mean_resizing=False)
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
    merged = plain.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_variant_gives_equal_logits_in_either_order(tiny_model, tied, variant, tmp_path):
    """On the base as it is, on one that was resized before, and by plain PEFT on the resized one."""
    base = tiny_model(tied=tied, vocab_size=21)
    model = VARIANTS[variant](base)
    assert is_adapter(model)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(copy.deepcopy(base), tmp_path)), logits(model))
    assert torch.equal(logits(load_adapter(resized(base), tmp_path)), logits(model))
    plain = PeftModel.from_pretrained(resized(base), tmp_path).eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(plain.merge_and_unload()), logits(model), atol=1e-4, rtol=1e-4)

    other = VARIANTS[variant](tiny_model(tied=tied, vocab_size=21))
    with torch.no_grad():
        for name in parameter_names(other).values():
            other.get_parameter(name).zero_()
    load_adapter_weights(other, tmp_path)  # into a model that has an adapter already, as a resumed run does
    assert torch.equal(logits(other), logits(model))


# Rows alone


@pytest.mark.parametrize("tied", [True, False])
def test_rows_alone_are_an_adapter_of_trainable_tokens(tiny_model, tied, tmp_path):
    base = tiny_model(tied=tied)
    model = with_rows_alone(base)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    modules = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    key = "base_model.model.model.embed_tokens.trainable_tokens_delta"
    assert set(tensors) == {key} | (set() if tied else {"base_model.model.lm_head.trainable_tokens_delta"})
    assert torch.equal(tensors[key], model.get_input_embeddings().new_rows)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "TRAINABLE_TOKENS"
    assert settings["token_indices"] == list(range(16, 26))
    assert settings["target_modules"] == modules

    loaded = load_adapter(copy.deepcopy(base), tmp_path)
    assert is_adapter(loaded)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = load_adapter(copy.deepcopy(base), tmp_path, is_trainable=True)
    trained = {name for name, parameter in trainable.named_parameters() if parameter.requires_grad}
    assert trained == {"model.embed_tokens.new_rows"} | (set() if tied else {"lm_head.new_rows"})
    assert read_adapter_weights(trainable, tmp_path).keys() == trained


def test_a_model_that_is_trained_whole_is_no_adapter(tiny_model, tmp_path):
    """Its base has changed: rows alone, on the base as it was, would be another model."""
    model = tiny_model()
    with pytest.raises(SettingsError, match="add code rows before freezing"):
        freeze_base(model)
    add_code_rows(model, VOCABULARY)
    assert not is_adapter(model)
    with pytest.raises(SettingsError, match="trained whole: there is no adapter"):
        save_adapter(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SettingsError, match="has LoRA layers"):
        freeze_base(with_adapter(tiny_model()))


def test_a_recommender_of_rows_alone_saves_them_and_no_more(tmp_path):
    import tiny

    from llmrec.recommender import Recommender

    recommender = tiny.recommender(tmp_path, kind="rows")
    freeze_base(recommender.model)
    recommender.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    loaded = Recommender.from_pretrained(tmp_path / "saved")
    assert loaded.is_adapter
    history = tiny.histories(0, [4])[0]
    expected = [item.item_id for item in recommender.recommend(history, k=5)]
    assert [item.item_id for item in loaded.recommend(history, k=5)] == expected
    merged = loaded.merge()
    assert not merged.is_adapter
    assert [item.item_id for item in merged.recommend(history, k=5)] == expected


# Files that don't fit


def test_a_missing_file_is_an_error(tiny_model, tmp_path):
    base = tiny_model()
    with pytest.raises(MissingPartError, match=r"adapter_config\.json"):
        load_adapter(base, tmp_path)
    save_adapter(with_adapter(base), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingPartError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_missing_rows_are_an_error(tiny_model, tied, tmp_path):
    base = tiny_model(tied=tied)
    for key in (EMBEDDING_ROWS,) if tied else (EMBEDDING_ROWS, HEAD_ROWS):
        save_adapter(with_adapter(base), tmp_path)
        change_file(tmp_path, lambda tensors, key=key: tensors.pop(key))
        with pytest.raises(DataError, match=r"1 tensor\(s\) missing.*trainable_tokens_delta"):
            load_adapter(copy.deepcopy(base), tmp_path)


def test_an_adapter_of_others_is_refused(tiny_model, tmp_path):
    """An adapter without rows loads in plain PEFT without complaint, into a model that knows no codes."""
    base = tiny_model()
    save_adapter(with_adapter(base), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "trainable_token_indices": None}))
    with pytest.raises(DataError, match="names no trained tokens"):
        load_adapter(base, tmp_path)


def test_tensors_of_another_shape_or_name_are_an_error(tiny_model, tmp_path):
    base = tiny_model()
    model = with_adapter(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    save_adapter(with_adapter(base, seed=9), tmp_path)
    change_file(tmp_path, lambda tensors: tensors.update({EMBEDDING_ROWS: torch.zeros(9, 32)}))
    with pytest.raises(DataError, match=r"shape \[9, 32\], the model's \[10, 32\]"):
        load_adapter_weights(model, tmp_path)

    save_adapter(with_adapter(base, seed=9), tmp_path)
    change_file(tmp_path, lambda tensors: tensors.update({"base_model.model.surprise.weight": torch.zeros(1)}))
    with pytest.raises(DataError, match=r"1 unknown \(first \['base_model.model.surprise.weight'\]"):
        load_adapter_weights(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_state_without_rows_is_not_saved(tiny_model, tmp_path):
    model = with_adapter(tiny_model())
    state = {name: tensor for name, tensor in model.state_dict().items() if "new_rows" not in name}
    with pytest.raises(DataError, match=r"has no .*embed_tokens\.new_rows"):
        save_adapter(model, tmp_path, state_dict=state)
    assert list(tmp_path.iterdir()) == []


# Merging


@pytest.mark.parametrize("tied", [True, False])
def test_merge_keeps_the_logits(tiny_model, tied):
    model = with_adapter(tiny_model("qwen3", tied=tied, vocab_size=21), target_modules="all-linear")
    before = logits(model)
    merged = merge_adapter(model)
    assert not has_code_rows(merged)
    assert not any("lora" in name or "new_rows" in name for name in merged.state_dict())
    assert merged.get_input_embeddings().weight.shape == (26, 32)
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)


def test_merging_into_a_quantised_base_is_refused(tiny_model):
    model = with_adapter(tiny_model())
    model.get_base_model().is_quantized = True
    with pytest.raises(SettingsError, match="bfloat16 or float32"):
        merge_adapter(model)
    assert has_code_rows(model)


@pytest.mark.parametrize("tied", [True, False])
def test_merge_of_rows_alone(tiny_model, tied):
    model = with_rows_alone(tiny_model("qwen2", tied=tied, vocab_size=21))
    before = logits(model)
    merged = merge_adapter(model)
    assert not has_code_rows(merged)
    assert not is_adapter(merged)
    torch.testing.assert_close(logits(merged), before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("variant", ["lora", "rows"])
def test_merging_a_4_bit_run_takes_the_base_in_full(tiny_model, variant, tmp_path, caplog):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tiny_model(tied=True, hidden_size=64, intermediate_size=128)
    base.save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    save_adapter(VARIANTS[variant](base), tmp_path)
    run = load_adapter(quantized, tmp_path)
    expected = logits(load_adapter(copy.deepcopy(base), tmp_path))
    difference = (logits(run) - expected).abs().max()
    assert difference > 1e-2  # 4 bits are another model
    with caplog.at_level("INFO", "llmrec"):
        merged = merge_quantized(run, copy.deepcopy(base), INPUT_IDS)
    assert not has_code_rows(merged)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert f"logits differ from those on the quantised base by {difference:.3g} at most" in caplog.text
    assert has_code_rows(run)
    with pytest.raises(SettingsError, match="without quantisation"):
        merge_quantized(run, run, INPUT_IDS)


def test_a_recommender_of_a_4_bit_run_merges_into_its_base(tmp_path, caplog):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    import tiny
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    recommender = tiny.recommender(tmp_path, hidden_size=64)
    recommender.save_pretrained(tmp_path / "saved")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    expected = recommender.merge()
    recommender.model = load_adapter(quantized, tmp_path / "saved")
    with caplog.at_level("INFO", "llmrec"):
        merged = recommender.merge()
    assert "merging into the base in float32: logits differ" in caplog.text
    input_ids = torch.arange(30)[None] % 20
    torch.testing.assert_close(
        merged.model(input_ids=input_ids).logits, expected.model(input_ids=input_ids).logits, atol=1e-4, rtol=1e-4
    )
