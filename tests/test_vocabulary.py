import copy

import numpy as np
import pytest
import tiny_t5
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from llmrec.errors import SettingsError
from llmrec.vocabulary import (
    CodeEmbedding,
    CodeHead,
    CodeVocabulary,
    add_code_rows,
    code_row_parameters,
    find_code_head,
    has_code_rows,
    head_mode,
    merge_code_rows,
    output_width,
)

VOCABULARY = CodeVocabulary((3, 4, 3), 16)  # tokens 16 to 25
# Rows of the base matrix: as many as the text tokenizer has tokens; more, the codes partly inside (Qwen); far more.
MATRIX_SIZES = (16, 21, 64)
INPUT_IDS = torch.tensor([[0, 16, 19, 23, 25, 15, 4], [25, 24, 3, 17, 22, 18, 16]])


def logits(model, input_ids=INPUT_IDS):
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def resized_reference(base, with_rows):
    """A plain copy of `base`, resized by transformers, with the rows of `with_rows` written into its matrices."""
    reference = copy.deepcopy(base)
    width = max(reference.get_input_embeddings().weight.shape[0], 26)
    if reference.config.is_encoder_decoder and "lm_head.weight" not in reference.all_tied_weights_keys:
        keys = dict(reference._tied_weights_keys)  # resizing a T5 would tie a head that loading left untied
        reference._tied_weights_keys = {key: value for key, value in keys.items() if key != "lm_head.weight"}
    reference.resize_token_embeddings(width, mean_resizing=False)
    with torch.no_grad():
        reference.get_input_embeddings().weight[16:26] = with_rows.get_input_embeddings().new_rows
        reference.get_output_embeddings().weight[16:26] = with_rows.get_output_embeddings().new_rows
    return reference


def with_code_rows(base):
    model = copy.deepcopy(base)
    add_code_rows(model, VOCABULARY, seed=5)
    return model


# The tokens


def test_token_ids_by_hand():
    vocabulary = CodeVocabulary((2, 3), 100)
    assert vocabulary.tokens == ["<a_0>", "<a_1>", "<b_0>", "<b_1>", "<b_2>"]
    assert (vocabulary.num_levels, vocabulary.num_tokens) == (2, 5)
    ids = vocabulary.token_ids(np.array([[1, 2], [0, 0]]))
    assert ids.tolist() == [[101, 104], [100, 102]]
    assert ids.dtype == np.int64
    assert vocabulary.codes(ids).tolist() == [[1, 2], [0, 0]]


def test_add_to_and_from_tokenizer(text_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    vocabulary = CodeVocabulary.add_to(text_tokenizer, (3, 4, 3))
    assert vocabulary == VOCABULARY
    assert text_tokenizer.convert_tokens_to_ids(["<a_0>", "<b_3>", "<c_2>"]) == [16, 22, 25]
    text_tokenizer.save_pretrained(tmp_path)
    assert CodeVocabulary.from_tokenizer(AutoTokenizer.from_pretrained(tmp_path), (3, 4, 3)) == vocabulary


def test_tokenizers_that_do_not_fit_are_refused(text_tokenizer):
    with pytest.raises(SettingsError, match="holds no code token <a_0>"):
        CodeVocabulary.from_tokenizer(text_tokenizer, (3, 4, 3))
    CodeVocabulary.add_to(text_tokenizer, (3, 4, 3))
    with pytest.raises(SettingsError, match="already holds 10 of the 10 code tokens"):
        CodeVocabulary.add_to(text_tokenizer, (3, 4, 3))
    with pytest.raises(SettingsError, match="doesn't belong to codes of sizes"):
        CodeVocabulary.from_tokenizer(text_tokenizer, (4, 4, 3))


# The rows


@pytest.mark.parametrize("vocab_size", MATRIX_SIZES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_equal_a_resized_model(tiny_model, family, tied, vocab_size):
    base = tiny_model(family, tied=tied, vocab_size=vocab_size)
    model = with_code_rows(base)
    assert logits(model).shape[-1] == output_width(model) == max(vocab_size, 26) == model.config.vocab_size
    torch.testing.assert_close(logits(model), logits(resized_reference(base, model)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_scaled_embeddings_scale_the_rows_too(tiny_model, family):
    base = tiny_model(family, tied=True, vocab_size=21)
    model = with_code_rows(base)
    torch.testing.assert_close(logits(model), logits(resized_reference(base, model)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab_size", MATRIX_SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_row_gets_a_gradient_and_no_base_row_does(tiny_model, tied, vocab_size):
    model = with_code_rows(tiny_model("qwen2", tied=tied, vocab_size=vocab_size))
    model.requires_grad_(False)
    rows = code_row_parameters(model)
    assert len(rows) == (1 if tied else 2)
    for parameter in rows:
        parameter.requires_grad_(True)
    code_ids = torch.arange(16, 26).unsqueeze(0)
    out = model(input_ids=code_ids).logits
    torch.nn.functional.cross_entropy(out[0, :-1], code_ids[0, 1:]).backward()
    for parameter in rows:
        assert parameter.dtype == torch.float32
        assert (parameter.grad.abs().sum(dim=1) > 0)[:9].all()
    assert (find_code_head(model).new_rows.grad.abs().sum(dim=1) > 0).all()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "new_rows" not in name)


def test_names_of_base_parameters_stay(tiny_model):
    base = tiny_model(tied=False)
    model = with_code_rows(base)
    assert isinstance(model.get_input_embeddings(), CodeEmbedding)
    assert isinstance(model.get_output_embeddings(), CodeHead)
    added = set(model.state_dict()) - set(base.state_dict())
    assert added == {"model.embed_tokens.new_rows", "lm_head.new_rows"}
    assert set(base.state_dict()) < set(model.state_dict())
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_rows_start_like_base_rows(tiny_model):
    base = tiny_model(vocab_size=64)
    vocabulary = CodeVocabulary((400, 400), 16)
    text_rows = base.get_input_embeddings().weight.detach()[:16]  # rows of real tokens: padding rows don't count
    settings = {"mean": {"init_scale": 0.0}, "noise": {"seed": 3}, "again": {"seed": 3}, "other": {}}
    made = {}
    for name, options in settings.items():
        model = copy.deepcopy(base)
        add_code_rows(model, vocabulary, **options)
        made[name] = model.get_input_embeddings().new_rows.detach()
    torch.testing.assert_close(made["mean"], text_rows.mean(dim=0).expand(800, -1))
    assert torch.equal(made["noise"], made["again"])
    assert not torch.equal(made["noise"], made["other"])
    error_of_mean = text_rows.std(dim=0) / 800**0.5
    assert ((made["noise"].mean(dim=0) - text_rows.mean(dim=0)).abs() < 5 * error_of_mean).all()
    torch.testing.assert_close(made["noise"].std(dim=0), text_rows.std(dim=0), rtol=0.2, atol=0)
    assert len(made["noise"].unique(dim=0)) == 800


def test_adding_rows_leaves_the_global_generator_alone(tiny_model):
    model = tiny_model()
    before = torch.get_rng_state()
    add_code_rows(model, VOCABULARY)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recompute_mapping", [True, False])  # from the model's own list, or from the one kept
@pytest.mark.parametrize("tied", [True, False])
def test_tie_weights_keeps_sharing_and_logits(tiny_model, tied, recompute_mapping):
    model = with_code_rows(tiny_model(tied=tied, vocab_size=21))
    before = logits(model)
    model.tie_weights(recompute_mapping=recompute_mapping)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (head.new_rows is embedding.new_rows) is tied
    assert (head.weight is embedding.weight) is tied
    assert torch.equal(logits(model), before)

    model.to("meta")  # gives every name a parameter of its own
    model.tie_weights(recompute_mapping=recompute_mapping)
    assert (head.new_rows is embedding.new_rows) is tied
    assert (head.weight is embedding.weight) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_save_pretrained_writes_the_rows_once(tiny_model, tied, tmp_path):
    from safetensors import safe_open

    base = tiny_model(tied=tied)
    model = with_code_rows(base)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        found = set(file.keys())
        rows = file.get_tensor("model.embed_tokens.new_rows")
    expected = {name for name in model.state_dict() if not (tied and name.startswith("lm_head."))}
    assert found == expected
    assert torch.equal(rows, model.get_input_embeddings().new_rows)


# The head's modes


@pytest.mark.parametrize("vocab_size", MATRIX_SIZES)
def test_head_modes_are_slices_of_the_full_logits(tiny_model, vocab_size):
    model = with_code_rows(tiny_model(tied=False, vocab_size=vocab_size))
    full = logits(model)
    positions = torch.zeros_like(INPUT_IDS, dtype=torch.bool)
    positions[0, 2] = positions[0, 5] = positions[1, 0] = True
    with head_mode(model, positions=positions):
        torch.testing.assert_close(logits(model), full[positions])
        assert logits(model).shape == (3, max(vocab_size, 26))
    with head_mode(model, codes_only=True):
        torch.testing.assert_close(logits(model), full[..., 16:26])
    with head_mode(model, positions=positions, codes_only=True):
        torch.testing.assert_close(logits(model), full[positions][:, 16:26])
        with head_mode(model):
            assert torch.equal(logits(model), full)
        assert logits(model).shape == (3, 10)
    assert torch.equal(logits(model), full)


def test_head_mode_ends_with_an_error_too(tiny_model):
    model = with_code_rows(tiny_model())
    with pytest.raises(RuntimeError, match="out of here"), head_mode(model, codes_only=True):
        raise RuntimeError("out of here")
    assert logits(model).shape[-1] == 26


# What is refused


def test_models_that_cannot_take_rows_are_refused(tiny_model):
    class OwnEmbedding(nn.Embedding):
        pass

    model = tiny_model()
    with pytest.raises(SettingsError, match="no code rows"):
        find_code_head(model)
    with pytest.raises(SettingsError, match=r"first code token has ID 17, but LlamaForCausalLM has only 16 rows"):
        add_code_rows(model, CodeVocabulary((3,), 17))
    model.get_input_embeddings().__class__ = OwnEmbedding
    with pytest.raises(SettingsError, match="embedding of class OwnEmbedding"):
        add_code_rows(model, VOCABULARY)
    model = tiny_model(tied=False)
    model.set_output_embeddings(nn.Sequential(nn.Linear(32, 16)))
    with pytest.raises(SettingsError, match="head of class Sequential"):
        add_code_rows(model, VOCABULARY)
    assert not has_code_rows(model)  # nothing was changed half
    model = with_code_rows(tiny_model())
    with pytest.raises(SettingsError, match="has code rows already"):
        add_code_rows(model, VOCABULARY)


# Merging


@pytest.mark.parametrize("vocab_size", MATRIX_SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_merge_gives_a_plain_model_with_equal_logits(tiny_model, tied, vocab_size, tmp_path):
    model = with_code_rows(tiny_model("qwen2", tied=tied, vocab_size=vocab_size))
    before = logits(model)
    merge_code_rows(model)
    width = max(vocab_size, 26)  # grows to hold the codes, never shrinks
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is nn.Embedding
    assert type(head) is nn.Linear
    assert embedding.weight.shape == head.weight.shape == (width, 32)
    assert embedding.num_embeddings == head.out_features == model.config.vocab_size == width
    assert (head.weight is embedding.weight) is tied
    assert not has_code_rows(model)
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-6)

    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("new_rows" in name for name in loaded.state_dict())
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("vocab_size", MATRIX_SIZES)
def test_merge_of_a_head_with_bias(tiny_model, vocab_size):
    """The head of Phi has a bias, of text tokens only: a code column has none, merged or not."""
    model = tiny_model("phi", tied=False, vocab_size=vocab_size)
    nn.init.normal_(model.lm_head.bias)
    add_code_rows(model, VOCABULARY)
    before = logits(model)
    merge_code_rows(model)
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-6)


def test_merge_of_scaled_embeddings(tiny_model):
    base = tiny_model("gemma", vocab_size=21)
    model = with_code_rows(base)
    before = logits(model)
    merge_code_rows(model)
    assert type(model.get_input_embeddings()) is type(base.get_input_embeddings())
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_merge_of_a_model_without_rows_is_refused(tiny_model):
    with pytest.raises(SettingsError, match="no code rows"):
        merge_code_rows(tiny_model())


# An encoder and a decoder

EMBEDDINGS = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")


def t5(tied, tmp_path, **settings):
    model = tiny_t5.make_t5(**settings)
    return model if tied else tiny_t5.untied(model, tmp_path / "untied")


def t5_logits(model):
    return tiny_t5.logits(model, INPUT_IDS, INPUT_IDS.flip(1)[:, :5])


def sharing(model):
    """Which of the modules with code rows share them and their base rows with the embedding that owns them."""
    modules = [model.get_submodule(name) for name in (*EMBEDDINGS, "lm_head")]
    shared = modules[0]
    rows = [module.new_rows is shared.new_rows for module in modules]
    assert [module.weight is shared.weight for module in modules] == rows
    return rows


@pytest.mark.parametrize("vocab_size", MATRIX_SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_t5_logits_equal_a_resized_model(tied, vocab_size, tmp_path):
    base = t5(tied, tmp_path, vocab_size=vocab_size)
    assert (base.lm_head.weight is base.shared.weight) is tied
    model = with_code_rows(base)
    assert t5_logits(model).shape[-1] == output_width(model) == max(vocab_size, 26) == model.config.vocab_size
    reference = resized_reference(base, model)
    torch.testing.assert_close(t5_logits(model), t5_logits(reference), atol=1e-5, rtol=1e-5)
    assert sharing(model) == [True, True, True, tied]
    assert len(code_row_parameters(model)) == (1 if tied else 2)
    again = copy.deepcopy(base)
    again.set_input_embeddings(again.shared)  # one module under three names, as resizing leaves it
    torch.testing.assert_close(t5_logits(with_code_rows(again)), t5_logits(model))


@pytest.mark.parametrize("family", ["mt5", "umt5", "longt5"])
def test_relatives_of_t5(family):
    base = tiny_t5.make_t5(family)
    model = with_code_rows(base)
    torch.testing.assert_close(t5_logits(model), t5_logits(resized_reference(base, model)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute_mapping", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_t5_tie_weights_keeps_sharing_and_logits(tied, recompute_mapping, tmp_path):
    model = with_code_rows(t5(tied, tmp_path, vocab_size=21))
    before = t5_logits(model)
    model.tie_weights(recompute_mapping=recompute_mapping)
    assert sharing(model) == [True, True, True, tied]
    assert torch.equal(t5_logits(model), before)
    model.to("meta")
    model.tie_weights(recompute_mapping=recompute_mapping)
    assert sharing(model) == [True, True, True, tied]


@pytest.mark.parametrize("tied", [True, False])
def test_t5_rows_get_the_gradients_of_encoder_decoder_and_head(tied, tmp_path):
    model = with_code_rows(t5(tied, tmp_path))
    model.requires_grad_(False)
    rows = code_row_parameters(model)
    for parameter in rows:
        parameter.requires_grad_(True)
    read, written = torch.arange(16, 21).unsqueeze(0), torch.arange(20, 25).unsqueeze(0)
    out = model(input_ids=read, labels=written).logits
    (out[0, :, written[0]].diagonal().sum() - out.logsumexp(dim=2).sum()).backward()
    moved = (rows[0].grad.abs().sum(dim=1) > 0).tolist()
    # The encoder reads 0 to 4, the decoder 4 to 7 (its last target is not read); a tied head writes all.
    assert moved == ([True] * 10 if tied else [True] * 8 + [False] * 2)
    assert all((parameter.grad.abs().sum(dim=1) > 0).all() for parameter in rows[1:])
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "new_rows" not in name)


def test_t5_head_modes_read_positions_of_the_decoder():
    model = with_code_rows(tiny_t5.make_t5(vocab_size=21))
    full = t5_logits(model)
    positions = torch.zeros(2, 5, dtype=torch.bool)
    positions[0, 1] = positions[1, 0] = positions[1, 4] = True
    with head_mode(model, positions=positions, codes_only=True):
        torch.testing.assert_close(t5_logits(model), full[positions][:, 16:26])
    assert torch.equal(t5_logits(model), full)


@pytest.mark.parametrize("vocab_size", MATRIX_SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_t5_merge_gives_a_plain_model_with_equal_logits(tied, vocab_size, tmp_path):
    model = with_code_rows(t5(tied, tmp_path, vocab_size=vocab_size))
    before = t5_logits(model)
    merge_code_rows(model)
    modules = [model.get_submodule(name) for name in EMBEDDINGS]
    assert [type(module) for module in modules] == [nn.Embedding] * 3
    assert {module.num_embeddings for module in modules} == {model.lm_head.out_features} == {max(vocab_size, 26)}
    assert all(module.weight is model.shared.weight for module in modules)
    assert (model.lm_head.weight is model.shared.weight) is tied
    torch.testing.assert_close(t5_logits(model), before, atol=1e-5, rtol=1e-6)
    model.tie_weights()
    model.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert not any("new_rows" in name for name in loaded.state_dict())
    assert torch.equal(t5_logits(loaded), t5_logits(model))


@pytest.mark.parametrize("tied", [True, False])
def test_t5_save_pretrained_writes_the_rows_once(tied, tmp_path):
    from safetensors import safe_open

    model = with_code_rows(t5(tied, tmp_path))
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        names = {name for name in file.keys() if "new_rows" in name}  # noqa: SIM118 (not a dictionary)
    assert names == ({"shared.new_rows"} if tied else {"shared.new_rows", "lm_head.new_rows"})


def test_encoder_decoders_that_cannot_take_rows_are_refused():
    from transformers import BartConfig, BartForConditionalGeneration, MarianConfig, MarianMTModel

    layers = {f"{side}_{what}": 1 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 16, "pad_token_id": 3}
    with pytest.raises(SettingsError, match="BartForConditionalGeneration has an embedding of class BartScaled"):
        add_code_rows(BartForConditionalGeneration(BartConfig(**layers, **sizes)), VOCABULARY)
    with pytest.raises(SettingsError, match="MarianMTModel adds a bias to its logits outside the head"):
        add_code_rows(MarianMTModel(MarianConfig(**layers, **sizes)), VOCABULARY)
    with pytest.raises(SettingsError, match="no token that starts its decoder"):
        add_code_rows(tiny_t5.make_t5(decoder_start_token_id=None), VOCABULARY)
    model = tiny_t5.make_t5()
    model.decoder.embed_tokens = nn.Embedding(16, 32)
    with pytest.raises(SettingsError, match="encoder and decoder of T5ForConditionalGeneration have embeddings of"):
        add_code_rows(model, VOCABULARY)
    assert not has_code_rows(model)


# A base of 4 bits


def test_a_4_bit_base_trains(tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from peft import LoraConfig, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    from llmrec.adapter import add_lora, merge_adapter

    tiny_model(tied=True, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    add_code_rows(base, VOCABULARY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = add_lora(base, LoraConfig(r=4, target_modules="all-linear"))
    assert "4bit" in type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")).__name__
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = code_row_parameters(model)[0]
    start, weight = rows.detach().clone(), base.get_input_embeddings().weight.detach().clone()
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(8):
        out = model(input_ids=INPUT_IDS).logits
        loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), INPUT_IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert (rows - start).abs().sum(dim=1).gt(0).sum() >= 9
    assert torch.equal(base.get_input_embeddings().weight, weight)
    with pytest.raises(SettingsError, match="load the base in bfloat16 or float32"):
        merge_adapter(model)
