import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from llmrec.errors import DataError, SettingsError
from llmrec.pretrained import load_base_model, load_text_tokenizer
from llmrec.tiny_model import LETTER_TIGER, TINY_LLAMA, build, is_built_in
from llmrec.vocabulary import CodeVocabulary

TITLES = ["Rose hand soap", "Lemon hand cream", "Green tea soap bar", "", "Rose water spray"]


def test_names():
    assert is_built_in(TINY_LLAMA)
    assert is_built_in("letter-tiger")
    assert not is_built_in("google/t5-small")
    assert not is_built_in(None)
    with pytest.raises(SettingsError, match="no built-in model 'tiny-t5'; there are tiny-llama, letter-tiger"):
        build("tiny-t5", TITLES, "unused")
    with pytest.raises(DataError, match="the catalogue has no titles"):
        build(TINY_LLAMA, ["", " "], "unused")


def test_letter_tiger_has_the_papers_shape(tmp_path):
    build(LETTER_TIGER, TITLES, tmp_path / "base", seed=3)
    model = load_base_model(str(tmp_path / "base"))
    assert type(model) is T5ForConditionalGeneration
    assert not model.training
    config = model.config
    assert (config.d_model, config.d_ff, config.num_heads, config.d_kv) == (128, 1024, 6, 64)
    assert (config.num_layers, config.num_decoder_layers, config.dropout_rate) == (4, 4, 0.1)
    assert (config.feed_forward_proj, config.relative_attention_num_buckets) == ("relu", 32)
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight
    assert config.scale_decoder_outputs
    assert float(model.shared.weight.detach().std()) == pytest.approx(1.0, abs=0.05)
    # Of a layer: q, k, v, o are 4 x 128 x 384, the feed-forward 2 x 128 x 1024, norms 128; position biases 32 x 6.
    attention, feed_forward = 4 * 128 * 384 + 128, 2 * 128 * 1024 + 128
    expected = 4 * (attention + feed_forward) + 4 * (2 * attention + feed_forward) + 2 * 128 + 2 * 32 * 6
    assert model.num_parameters() == expected + model.shared.weight.numel()


def test_letter_tigers_special_tokens(tmp_path):
    build(LETTER_TIGER, TITLES, tmp_path / "base")
    model, text_tokenizer = load_base_model(str(tmp_path / "base")), load_text_tokenizer(str(tmp_path / "base"))
    assert len(text_tokenizer) == model.shared.num_embeddings
    assert (text_tokenizer.eos_token, text_tokenizer.pad_token) == ("</s>", "<pad>")
    assert text_tokenizer("Rose soap").input_ids[0] != text_tokenizer.bos_token_id
    assert text_tokenizer.decode(text_tokenizer("Rose soap", add_special_tokens=False).input_ids) == "Rose soap"
    config = model.config
    assert config.decoder_start_token_id == config.pad_token_id == text_tokenizer.pad_token_id
    assert config.eos_token_id == text_tokenizer.eos_token_id
    assert model.generation_config.decoder_start_token_id == text_tokenizer.pad_token_id
    assert CodeVocabulary.add_to(text_tokenizer, (2, 3)).first_token_id == model.shared.num_embeddings


@pytest.mark.parametrize("name", [TINY_LLAMA, LETTER_TIGER])
def test_the_seed_says_the_weights(tmp_path, name):
    state = torch.get_rng_state()
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(name, TITLES, tmp_path / folder, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("a", "b", "c"))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_tiny_llama_is_a_decoder_with_a_start_token(tmp_path):
    build(TINY_LLAMA, TITLES, tmp_path / "base")
    assert type(load_base_model(str(tmp_path / "base"))) is LlamaForCausalLM
    text_tokenizer = load_text_tokenizer(str(tmp_path / "base"))
    assert text_tokenizer("Rose").input_ids[0] == text_tokenizer.bos_token_id
