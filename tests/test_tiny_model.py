import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, T5ForConditionalGeneration

from llmrec.errors import DataError, SettingsError
from llmrec.pretrained import load_base_model, load_text_tokenizer
from llmrec.tiny_model import ETEGREC, LETTER_TIGER, TINY_LLAMA, build, is_built_in
from llmrec.vocabulary import CodeVocabulary, add_code_rows, code_row_parameters

TITLES = ["Rose hand soap", "Lemon hand cream", "Green tea soap bar", "", "Rose water spray"]


def test_names():
    assert is_built_in(TINY_LLAMA)
    assert is_built_in("letter-tiger")
    assert is_built_in("etegrec")
    assert not is_built_in("google/t5-small")
    assert not is_built_in(None)
    with pytest.raises(
        SettingsError, match="no built-in model 'tiny-t5'; there are tiny-llama, letter-tiger, etegrec"
    ):
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


def test_etegrec_has_the_papers_shape(tmp_path):
    build(ETEGREC, TITLES, tmp_path / "base", seed=3)
    model = load_base_model(str(tmp_path / "base"))
    assert type(model) is T5ForConditionalGeneration
    config = model.config
    assert (config.d_model, config.d_ff, config.num_heads, config.d_kv) == (128, 512, 4, 64)
    assert (config.num_layers, config.num_decoder_layers, config.dropout_rate) == (6, 6, 0.1)
    assert (config.feed_forward_proj, config.relative_attention_num_buckets) == ("relu", 32)
    assert model.lm_head.weight is model.shared.weight is model.encoder.embed_tokens.weight
    # Of a layer: q, k, v, o are 4 x 128 x 256, the feed-forward 2 x 128 x 512, norms 128; position biases 32 x 4.
    attention, feed_forward = 4 * 128 * 256 + 128, 2 * 128 * 512 + 128
    expected = 6 * (attention + feed_forward) + 6 * (2 * attention + feed_forward) + 2 * 128 + 2 * 32 * 4
    assert model.num_parameters() == expected + model.shared.weight.numel()


def test_etegrecs_weights_start_as_in_the_paper(tmp_path):
    build(ETEGREC, TITLES, tmp_path / "base", seed=3)
    model = load_base_model(str(tmp_path / "base"))
    assert {parameter.dim() for parameter in model.parameters()} == {1, 2}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert name.endswith("layer_norm.weight")
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:  # 128 to 65,536 values: four standard errors of mean and deviation
            error = 4 * 0.02 / parameter.numel() ** 0.5
            assert float(parameter.detach().mean()) == pytest.approx(0.0, abs=error), name
            assert float(parameter.detach().std()) == pytest.approx(0.02, abs=error / 2**0.5), name
    # The rows of the codes, which are drawn after the others.
    text_tokenizer = load_text_tokenizer(str(tmp_path / "base"))
    add_code_rows(model, CodeVocabulary.add_to(text_tokenizer, (256, 256, 256, 256)))
    (rows,) = code_row_parameters(model)
    assert rows.shape == (1024, 128)
    assert float(rows.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(rows.detach().mean()) == pytest.approx(0.0, abs=0.001)


def test_etegrecs_logits_are_not_scaled(tmp_path):
    """Also after the model is saved again: nothing but the config says so."""
    build(ETEGREC, TITLES, tmp_path / "base")
    history, start = torch.tensor([[9, 12, 7, 2]]), torch.tensor([[3, 11]])
    for folder in ("base", "again"):
        model = load_base_model(str(tmp_path / folder))
        with torch.no_grad():
            found = model(input_ids=history, decoder_input_ids=start, output_hidden_states=True)
        states = found.decoder_hidden_states[-1]
        assert torch.allclose(found.logits, states @ model.shared.weight.T, atol=1e-5)
        assert float(found.logits.std()) > 0.1  # scaled ones are less than a tenth of it
        model.save_pretrained(tmp_path / "again")
    build(LETTER_TIGER, TITLES, tmp_path / "tiger")
    model = load_base_model(str(tmp_path / "tiger"))
    with torch.no_grad():
        found = model(input_ids=history, decoder_input_ids=start, output_hidden_states=True)
    scaled = found.decoder_hidden_states[-1] @ model.shared.weight.T / 128**0.5
    assert torch.allclose(found.logits, scaled, atol=1e-5)


@pytest.mark.parametrize("name", [LETTER_TIGER, ETEGREC])
def test_special_tokens_of_an_encoder_decoder(tmp_path, name):
    build(name, TITLES, tmp_path / "base")
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


@pytest.mark.parametrize("name", [TINY_LLAMA, LETTER_TIGER, ETEGREC])
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
