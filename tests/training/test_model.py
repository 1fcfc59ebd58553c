import copy

import factories
import pytest
import torch

from llmrec.adapter import add_lora, freeze_base, is_adapter
from llmrec.errors import SettingsError
from llmrec.generation.trie import ItemTrie
from llmrec.tasks.next_item import NextItemTask, training_samples
from llmrec.training.arguments import ModelArguments
from llmrec.training.config import RecFinetuneConfig
from llmrec.training.model import base_dtype, check_precision, describe_trained, prepare_model
from llmrec.training.trainer import RankingTrainer
from llmrec.vocabulary import CodeVocabulary, add_code_rows, code_row_parameters

CODES = factories.make_semantic_ids()
INPUT_IDS = torch.tensor([[4, 16, 19, 23, 25, 15, 4], [25, 14, 3, 17, 22, 18, 16]])
QUANTIZED = {
    "4 bits": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "8 bits": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def base_folders(tmp_path_factory):
    """A tied and an untied base model with its text tokenizer."""
    folders = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("base")
        factories.make_tiny_model(tied=tied, hidden_size=64, intermediate_size=128).save_pretrained(folder)
        factories.make_text_tokenizer().save_pretrained(folder)
        folders[tied] = folder
    return folders


def prepared(folder, training=None, **settings):
    """Model, text tokenizer, vocabulary."""
    arguments = ModelArguments(
        model_name_or_path=str(folder), **{"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **settings}
    )
    training = training or RecFinetuneConfig(output_dir=str(folder / "run"), seed=1)
    titles = [f"chosen by person {row}" for row in range(CODES.num_items)]
    return prepare_model(arguments, training, CODES, titles=titles)


def trained(folder, output_dir, *, model_settings=None, **settings):
    """A trainer after six steps with weight decay, and copies of all parameters from before."""
    defaults = {
        "loss_scope": "vocabulary",
        "code_learning_rate_factor": 1.0,
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "weight_decay": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "packing": False,
        "train_sampling_strategy": "sequential",
        "seed": 1,
    }
    training = RecFinetuneConfig(output_dir=str(output_dir), **{**defaults, **settings})
    model, tokenizer, vocabulary = prepared(folder, training, **(model_settings or {}))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    task = NextItemTask(tokenizer, vocabulary, CODES, template="Items chosen : {history}", max_history=8)
    trainer = RankingTrainer(
        model,
        training,
        vocabulary=vocabulary,
        text_tokenizer=tokenizer,
        train_dataset=training_samples(task, factories.make_dataset(), form="history"),
        trie=ItemTrie.from_semantic_ids(CODES),
    )
    trainer.train()
    return trainer, before


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def gradients(model, input_ids=INPUT_IDS):
    """Gradient of every trained parameter, of a plain loss over all positions."""
    model.zero_grad()
    out = model(input_ids=input_ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# Settings


def test_trained_and_use_peft_must_agree():
    assert ModelArguments().trained == "lora"
    assert [ModelArguments(trained=name).use_peft for name in ("lora", "rows", "full")] == [True, False, False]
    assert ModelArguments(use_peft=True).trained == "lora"
    assert ModelArguments(use_peft=False, trained="rows").trained == "rows"
    with pytest.raises(SettingsError, match="use_peft is False but trained is 'lora'"):
        ModelArguments(use_peft=False)
    with pytest.raises(SettingsError, match="use_peft is True but trained is 'full'"):
        ModelArguments(use_peft=True, trained="full")
    with pytest.raises(SettingsError, match="trained is 'head'; choose one of"):
        ModelArguments(trained="head")
    with pytest.raises(SettingsError, match="code_init is 'zero'; choose one of"):
        ModelArguments(code_init="zero")


def test_precisions_that_cannot_train_are_refused(tmp_path):
    training = RecFinetuneConfig(output_dir=str(tmp_path))
    compiled = RecFinetuneConfig(output_dir=str(tmp_path), torch_compile=True, torch_compile_backend="aot_eager")
    with pytest.raises(SettingsError, match="4 or 8 bits can't be trained whole: set trained to 'lora' or 'rows'"):
        ModelArguments(load_in_4bit=True, trained="full")
    with pytest.raises(SettingsError, match="load_in_4bit and load_in_8bit are both set"):
        ModelArguments(load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(SettingsError, match=r"dtype 'bfloat16'.*set bf16: true"):
        check_precision(ModelArguments(trained="full", dtype="bfloat16"), training)
    with pytest.raises(SettingsError, match="torch_compile can't go with load_in_4bit"):
        check_precision(ModelArguments(load_in_4bit=True), compiled)
    check_precision(ModelArguments(trained="rows", dtype="bfloat16"), training)


def test_a_frozen_base_is_loaded_in_the_type_it_computes_in(tmp_path):
    float32 = RecFinetuneConfig(output_dir=str(tmp_path))
    bfloat16 = RecFinetuneConfig(output_dir=str(tmp_path), bf16=True)
    assert base_dtype(ModelArguments(), float32) == "float32"
    assert base_dtype(ModelArguments(), bfloat16) == "bfloat16"
    assert base_dtype(ModelArguments(trained="rows"), bfloat16) == "bfloat16"
    assert base_dtype(ModelArguments(trained="full"), bfloat16) == "float32"
    assert base_dtype(ModelArguments(dtype="float32"), bfloat16) == "float32"


# What trains


@pytest.mark.parametrize("tied", [True, False])
def test_what_each_mode_trains(base_folders, tied):
    rows = {"model.embed_tokens.new_rows"} | (set() if tied else {"lm_head.new_rows"})
    made = {name: prepared(base_folders[tied], trained=name)[0] for name in ("lora", "rows", "full")}
    names = {
        mode: {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for mode, model in made.items()
    }
    assert names["rows"] == rows
    assert {name for name in names["lora"] if "lora_" not in name} == {f"base_model.model.{name}" for name in rows}
    assert len({name for name in names["lora"] if "lora_A" in name}) == 14  # 7 linear layers twice, not the head
    assert names["full"] == {name for name, _ in made["full"].named_parameters()}
    assert [is_adapter(made[mode]) for mode in ("lora", "rows", "full")] == [True, True, False]
    start = {mode: code_row_parameters(model)[0].detach() for mode, model in made.items()}
    assert torch.equal(start["lora"], start["rows"])
    assert torch.equal(start["lora"], start["full"])


def test_what_is_trained_is_described_by_hand(base_folders):
    model, *_ = prepared(base_folders[False], trained="rows")
    total = sum(parameter.numel() for parameter in model.parameters())
    trained_count = 2 * 10 * 64  # rows of 10 codes, in embedding and head; AdamW keeps two float32 about each
    share = 100 * trained_count / total
    assert describe_trained(model) == (f"1,280 of {total:,} parameters ({share:.2f} %), AdamW keeps 0.0 MB about them")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantized, *_ = prepared(base_folders[False], trained="rows", load_in_4bit=True)
    assert describe_trained(quantized) == describe_trained(model)  # two weights lie in a byte, and count as two


def test_variants_of_lora_reach_peft(base_folders):
    model, *_ = prepared(base_folders[True], use_dora=True, use_rslora=True, lora_target_modules=["q_proj"])
    config = model.peft_config["default"]
    assert (config.use_dora, config.use_rslora, config.r, config.lora_alpha) == (True, True, 4, 8)
    assert config.target_modules == {"q_proj"}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum("lora_magnitude_vector" in name for name in names) == 2


def test_rows_start_at_titles(base_folders):
    model, *_ = prepared(base_folders[True], trained="rows", code_init="titles")
    embedding = model.get_input_embeddings()
    words = embedding.weight[[5, 6, 8, 0]].detach().mean(dim=0)  # chosen by person <unk>: every title is the same
    used = torch.unique(torch.from_numpy(CODES.codes + CodeVocabulary(CODES.codebook_sizes, 0).level_offsets))
    noise = (embedding.new_rows[used] - words) / embedding.weight[:16].std(dim=0)
    assert 0.05 < noise.std() < 0.2
    with pytest.raises(SettingsError, match="no item tokenizer is known"):
        prepared(base_folders[True], code_init="codebook")


# Training


@pytest.mark.parametrize("name", ["lora", "rows", "4 bits", "8 bits", "rows on 4 bits", "rows on 8 bits"])
def test_the_base_does_not_move_by_a_bit(base_folders, tmp_path, name):
    """Weight decay is on: it would move whatever the optimiser holds, gradient or not."""
    bits = name.removeprefix("rows on ")
    if bits in QUANTIZED:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    settings = {"trained": "rows" if name.startswith("rows") else "lora", **QUANTIZED.get(bits, {})}
    trainer, before = trained(base_folders[False], tmp_path, model_settings=settings, loss_scope="vocabulary")
    moved = {
        parameter_name
        for parameter_name, parameter in trainer.model.named_parameters()
        if not torch.equal(parameter, before[parameter_name])
    }
    rows = {parameter_name for parameter_name in before if parameter_name.endswith("new_rows")}
    lora = {parameter_name for parameter_name in before if "lora_" in parameter_name}
    assert len(rows) == 2
    assert moved == rows | lora
    assert losses(trainer)[-1] < losses(trainer)[0] - (0.5 if lora else 0.3)
    types = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    assert types == {torch.float32}


def test_a_base_of_bfloat16_trains_as_one_of_float32(base_folders, tmp_path):
    """LoRA and rows stay float32; the frozen weights needn't be cast again in every forward."""
    runs = {
        dtype: trained(base_folders[True], tmp_path, model_settings={"dtype": dtype}, bf16=True)[0]
        for dtype in ("float32", "bfloat16")
    }
    parameters = list(runs["bfloat16"].model.named_parameters())
    assert {parameter.dtype for _, parameter in parameters if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for _, parameter in parameters if not parameter.requires_grad} == {torch.bfloat16}
    assert losses(runs["bfloat16"]) == pytest.approx(losses(runs["float32"]), rel=0.02)
    assert losses(runs["bfloat16"])[-1] < losses(runs["bfloat16"])[0] - 1
    plain, _ = trained(base_folders[True], tmp_path, model_settings={"dtype": "bfloat16"})  # and without autocast
    assert losses(plain) == pytest.approx(losses(runs["float32"]), rel=0.02)


def test_rows_train_in_whatever_order_peft_prepares(tiny_model):
    from peft import LoraConfig, prepare_model_for_kbit_training

    for rows_first in (True, False):
        model = tiny_model(tied=False)
        if rows_first:
            add_code_rows(model, CodeVocabulary((3, 4, 3), 16))
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if not rows_first:
            add_code_rows(model, CodeVocabulary((3, 4, 3), 16))
        rows_alone = copy.deepcopy(model)
        freeze_base(rows_alone)
        adapted = add_lora(model, LoraConfig(r=2, target_modules="all-linear"))
        assert all(rows.requires_grad for rows in (*code_row_parameters(adapted), *code_row_parameters(rows_alone)))


@pytest.mark.parametrize("settings", [{"trained": "lora"}, {"trained": "rows"}, {"load_in_4bit": True}])
def test_gradient_checkpointing_gives_the_same_gradients(base_folders, settings):
    """Also with reentrant checkpoints, whose inputs must require a gradient: those of trained rows do."""
    if "load_in_4bit" in settings:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, *_ = prepared(base_folders[True], **settings)
    model.train()
    expected = gradients(model)
    assert any(name.endswith("new_rows") for name in expected)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-7, rtol=1e-5)


def test_a_4_bit_base_passes_gradients_after_an_evaluation(base_folders):
    """On a CPU with AVX512-BF16, bitsandbytes packs weights in the first evaluation, and no gradient passes then."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, *_ = prepared(base_folders[True], load_in_4bit=True)
    model.train()
    expected = gradients(model)
    with torch.no_grad():
        model.eval()(input_ids=INPUT_IDS)
    found = gradients(model.train())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)

    packed, *_ = prepared(base_folders[True], load_in_4bit=True, trained="rows")
    layer = packed.model.layers[0].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes marks it
    with pytest.raises(SettingsError, match=r"up_proj were used before and are packed"):
        freeze_base(packed)


@pytest.mark.parametrize("mode", ["rows", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_compiled_step_gives_the_same_losses(tmp_path, mode):
    """One layer, for tracing takes a second a layer, anew for the second shape."""
    base = tmp_path / "base"
    factories.make_tiny_model(num_hidden_layers=1).save_pretrained(base)
    factories.make_text_tokenizer().save_pretrained(base)
    settings = {"trained": mode, "lora_target_modules": ["q_proj"]}
    eager, _ = trained(base, tmp_path, max_steps=2, model_settings=settings)
    compiled, _ = trained(
        base, tmp_path, max_steps=2, model_settings=settings, torch_compile=True, torch_compile_backend="aot_eager"
    )
    assert hasattr(compiled.model_wrapped, "_orig_mod")  # it did compile
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
