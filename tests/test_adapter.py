import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from llmrec.adapter import add_lora, load_adapter, load_adapter_weights, merge_adapter, save_adapter
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
