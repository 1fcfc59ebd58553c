import copy
import json
import math

import numpy as np
import pytest
import torch
from factories import make_semantic_ids
from safetensors.torch import load_file

from llmrec.errors import SettingsError
from llmrec.tasks.base import TaskSamples, join
from llmrec.vocabulary import code_row_parameters

ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD_ROWS = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"


def scope_columns(trainer, scope, target, before):
    """Naive: the columns of the softmax of one target token, given the target's codes before it."""
    vocabulary = trainer.vocabulary
    codes = vocabulary.token_ids(make_semantic_ids().codes)  # [N, L]
    level = len(before)
    if scope == "vocabulary":
        return range(vocabulary.first_token_id + vocabulary.num_tokens)
    if scope == "codes":
        first = vocabulary.first_token_id + int(vocabulary.level_offsets[level])
        return range(first, first + vocabulary.codebook_sizes[level])
    columns = sorted({int(item[level]) for item in codes if item[:level].tolist() == before})
    assert target in columns
    return columns


def dense_losses(trainer, model, sample, scope, temperature):
    """Losses of one sample's targets out of the full logits, one target after the other."""
    logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0]
    losses, before = [], []
    for position, target in enumerate(sample["labels"]):
        if target == -100:
            continue
        columns = list(scope_columns(trainer, scope, target, before))
        scaled = logits[position - 1] / temperature
        losses.append(scaled[columns].logsumexp(0) - scaled[target])
        before = [*before, target] if len(before) + 1 < trainer.vocabulary.num_levels else []
    return losses


def dense_run(trainer, scope="vocabulary", temperature=1.0):
    """What the trainer should do, written out: plain SGD on the sum of losses over the number of targets."""
    model = copy.deepcopy(trainer.model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plan, log = trainer.plan, []
    for number in range(trainer.args.max_steps):
        epoch, step = divmod(number, plan.num_steps)
        losses = []
        for row in plan.rows(epoch)[step * plan.rows_per_step : (step + 1) * plan.rows_per_step]:
            for sample in row:
                losses += dense_losses(trainer, model, plan.samples.sample(sample, epoch), scope, temperature)
        loss = torch.stack(losses).sum() / len(losses)
        gradients = torch.autograd.grad(loss, trained)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        log.append({"loss": loss.item(), "grad_norm": norm.item()})
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= trainer.args.learning_rate * gradient
    return log


def assert_same_steps(found, expected, tolerance=1e-5):
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=tolerance)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=tolerance)


# Steps


@pytest.mark.parametrize(
    ("scope", "temperature", "tied", "family"),
    [
        ("vocabulary", 1.0, True, "llama"),
        ("vocabulary", 0.7, False, "qwen2"),
        ("codes", 1.2, True, "qwen3"),
        ("trie", 0.7, False, "llama"),
        ("vocabulary", 0.7, True, "cohere"),  # scales its logits, so losses can't be made in the head
        ("trie", 1.0, True, "cohere"),
    ],
)
def test_steps_equal_a_dense_reference(factories, tmp_path, scope, temperature, tied, family):
    trainer = factories.make_trainer(
        tmp_path, family=family, tied=tied, loss_scope=scope, ranking_temperature=temperature
    )
    expected = dense_run(trainer, scope, temperature)
    trainer.train()
    assert_same_steps(factories.step_log(trainer), expected)


PACKED = {"packing": True, "row_length": 40, "per_device_train_batch_size": 4, "train_sampling_strategy": "random"}


@pytest.mark.parametrize(
    ("scope", "family", "attention"),
    [
        ("trie", "llama", "sdpa"),
        ("vocabulary", "qwen2", "eager"),
        ("codes", "qwen3", "sdpa"),
        ("trie", "mistral", "sdpa"),
        ("trie", "gemma3_text", "sdpa"),
    ],
)
def test_packed_steps_equal_a_dense_reference(factories, tmp_path, scope, family, attention):
    """The reference runs each sample alone: a sample that saw its neighbours in the row would have another loss."""
    trainer = factories.make_trainer(
        tmp_path, family=family, tied=False, loss_scope=scope, attn_implementation=attention, **PACKED
    )
    assert max(map(len, trainer.plan.rows(0))) > 1
    expected = dense_run(trainer, scope)
    trainer.train()
    assert_same_steps(factories.step_log(trainer), expected)


def test_packed_rows_accumulated_and_uneven_equal_one_batch(factories, tmp_path):
    """The last rows of a step may be empty, and a micro-batch without a single target."""
    settings = {**PACKED, "row_length": 48, "max_steps": 4}
    whole = factories.make_trainer(tmp_path, **settings)
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    parts = factories.make_trainer(tmp_path, **{**settings, **single})
    assert any(len(row) == 0 for row in parts.plan.rows(0))
    whole.train()
    parts.train()
    assert_same_steps(factories.step_log(parts), factories.step_log(whole))


def test_packing_that_would_leak_is_refused(factories, tmp_path, monkeypatch):
    """A model that makes itself a cache doesn't look for packed samples (transformers' default out of a Trainer)."""
    from transformers.models.llama.modeling_llama import LlamaModel

    from llmrec.training.packing_check import why_no_packing

    model = factories.make_tiny_model()
    assert why_no_packing(model) is None
    forward = LlamaModel.forward
    monkeypatch.setattr(
        LlamaModel, "forward", lambda self, *args, **given: forward(self, *args, **{**given, "use_cache": True})
    )
    assert "see each other" in why_no_packing(model)
    with pytest.raises(SettingsError, match="set packing to false"):
        factories.make_trainer(tmp_path, **PACKED)


@pytest.mark.parametrize("bf16", [True, False])
def test_casts_are_left_out_only_where_autocast_undoes_them(factories, tmp_path, bf16):
    from peft.tuners.tuners_utils import BaseTunerLayer

    trainer = factories.make_trainer(tmp_path, bf16=bf16, max_steps=1)
    layers = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
    seen = []
    layers[0].register_forward_pre_hook(lambda layer, _: seen.append(layer.cast_input_dtype_enabled))
    trainer.train()
    assert seen == [not bf16]
    assert all(layer.cast_input_dtype_enabled for layer in layers)


def test_layers_that_carry_a_state_are_not_packed(factories):
    from llmrec.training.packing_check import why_no_packing

    model = factories.make_tiny_model("qwen3_next", head_dim=8, layer_types=["linear_attention", "full_attention"])
    assert "linear_attention" in why_no_packing(model)


class TextAndCodes(TaskSamples):
    """Samples of the small catalogue, and between them others whose target is text."""

    name = "mixed"
    has_text_targets = True
    num_targets = 24

    def __init__(self, samples):
        codes = [samples[index] for index in range(8)]
        texts = [join([4, 5, index + 4], [6, 7, 2][index % 2 :]) for index in range(8)]
        self.all = [sample for pair in zip(codes, texts, strict=True) for sample in pair]

    def __len__(self):
        return len(self.all)

    def lengths(self, epoch=0):
        return np.array([len(sample["input_ids"]) for sample in self.all])

    def sample(self, index, epoch=0):
        return self.all[index]


@pytest.mark.parametrize("scope", ["vocabulary", "codes", "trie"])
def test_text_targets_are_normalised_over_the_vocabulary(factories, tmp_path, scope):
    trainer = factories.make_trainer(
        tmp_path, loss_scope=scope, ranking_temperature=0.7, samples=TextAndCodes, per_device_train_batch_size=4
    )
    losses = []
    for sample in trainer.plan.samples:
        text = sample["labels"][-1] < trainer.vocabulary.first_token_id
        losses.append(dense_losses(trainer, trainer.model, sample, "vocabulary" if text else scope, 0.7))
    by_step = [sum(map(sum, losses[step * 4 :][:4])) / sum(map(len, losses[step * 4 :][:4])) for step in range(4)]
    trainer.args.learning_rate = 0.0
    trainer.train()
    for line, expected in zip(factories.step_log(trainer), by_step, strict=True):
        assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("scope", ["vocabulary", "trie"])
def test_accumulation_equals_one_batch(factories, tmp_path, scope):
    """Micro-batches hold different numbers of targets, so a mean of means would show."""
    whole = factories.make_trainer(tmp_path, loss_scope=scope)
    parts = factories.make_trainer(
        tmp_path, loss_scope=scope, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    whole.train()
    parts.train()
    assert_same_steps(factories.step_log(parts), factories.step_log(whole))
    for name, tensor in factories.trained_tensors(whole).items():
        torch.testing.assert_close(factories.trained_tensors(parts)[name], tensor, atol=1e-5, rtol=1e-4)


def test_only_lora_and_rows_move(factories, tmp_path):
    trainer = factories.make_trainer(tmp_path, tied=False, optim="adamw_torch", learning_rate=1e-2)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        is_trained = "lora_" in name or name.endswith(".new_rows")
        assert torch.equal(tensor, before[name]) is not is_trained, name


# The order of samples


def batches_of(trainer, epoch):
    """Histories are told apart by their tokens."""
    trainer.state.epoch = float(epoch)
    loader = trainer.get_train_dataloader()
    return [batch["input_ids"].tolist() for batch in loader]


def test_order_depends_on_seed_and_epoch_alone(factories, tmp_path):
    grouped = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4}
    one = factories.make_trainer(tmp_path, **grouped)
    first, second = batches_of(one, 0), batches_of(one, 1)
    assert first != second
    assert batches_of(factories.make_trainer(tmp_path, **grouped), 1) == second  # as after resuming there
    assert batches_of(factories.make_trainer(tmp_path, **grouped, data_seed=9), 0) != first
    halves = factories.make_trainer(tmp_path, train_sampling_strategy="group_by_length", gradient_accumulation_steps=2)
    eights = factories.make_trainer(
        tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=16
    )
    assert sum(len(batch) for batch in batches_of(halves, 0)) == len(batches_of(eights, 0)[0]) == 16


# Optimiser


def test_rows_have_a_learning_rate_of_their_own(factories, tmp_path):
    trainer = factories.make_trainer(
        tmp_path, tied=False, learning_rate=0.01, code_learning_rate_factor=5.0, weight_decay=0.1, max_steps=1
    )
    optimizer = trainer.create_optimizer()
    rows = {id(parameter) for parameter in code_row_parameters(trainer.model)}
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    seen = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(seen) == sorted(id(parameter) for parameter in trained)  # each once
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            expected = (0.05, 0.0) if id(parameter) in rows else (0.01, 0.1)
            assert (group["lr"], group["weight_decay"]) == pytest.approx(expected)

    before = factories.trained_tensors(trainer)
    gradients = {}
    hooks = [
        parameter.register_hook(lambda gradient, name=name: gradients.__setitem__(name, gradient.clone()))
        for name, parameter in trainer.model.named_parameters()
        if name.endswith("embed_tokens.new_rows")
    ]
    trainer.train()
    name = "base_model.model.model.embed_tokens.new_rows"
    moved = factories.trained_tensors(trainer)[name] - before[name]
    torch.testing.assert_close(moved, -0.05 * gradients[name], atol=1e-7, rtol=1e-4)
    assert len(hooks) == 1


# Evaluation


@pytest.mark.parametrize("scope", ["vocabulary", "trie"])
def test_evaluation_weighs_by_targets(factories, tmp_path, scope):
    trainer = factories.make_trainer(tmp_path, loss_scope=scope, ranking_temperature=0.7, evaluation=True)
    losses, plain = [], []
    with torch.no_grad():
        for sample in trainer.plan.samples:  # 1 to 8 targets a sample
            losses += dense_losses(trainer, trainer.model, sample, scope, 0.7)
            plain += dense_losses(trainer, trainer.model, sample, scope, 1.0)
    loss, perplexity = torch.stack(losses).mean().item(), math.exp(torch.stack(plain).mean().item())
    for batch_size in (1, 4, 5):
        other = factories.make_trainer(
            tmp_path, loss_scope=scope, ranking_temperature=0.7, per_device_eval_batch_size=batch_size
        )
        metrics = other.evaluate(trainer.plan.samples)
        assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-6)
        assert metrics["eval_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert {"held_out_loss", "held_out_perplexity"} <= trainer.evaluate(metric_key_prefix="held_out").keys()
    assert trainer.model.training is False
    with pytest.raises(SettingsError, match="one data set"):
        trainer.evaluate({"a": trainer.train_dataset})


@pytest.mark.parametrize(("lora", "tied"), [(True, True), (True, False), (False, True)])
def test_the_best_model_is_the_whole_best_model(factories, tmp_path, lora, tied):
    """The loss falls, and here the greatest is called the best: the best step is the first, not the last."""
    trainer = factories.make_trainer(
        tmp_path,
        lora=lora,
        tied=tied,
        evaluation=True,
        optim="adamw_torch",
        learning_rate=0.05,
        max_steps=12,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    evaluations = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert evaluations[-1] < max(evaluations) - 0.05, evaluations  # else this shows nothing
    assert trainer.state.best_metric == pytest.approx(max(evaluations), abs=1e-9)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-7)


# Checkpoints


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_holds_lora_rows_and_the_state(factories, tmp_path, tied):
    trainer = factories.make_trainer(tmp_path, tied=tied, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    tensors = load_file(folder / "adapter_model.safetensors")
    rows = {ROWS} if tied else {ROWS, HEAD_ROWS}
    assert {name for name in tensors if "lora_" not in name} == rows
    assert len(tensors) == 2 * 7 * 2 + len(rows)
    assert torch.equal(tensors[ROWS], trainer.model.get_input_embeddings().new_rows)
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < files
    assert "tokenizer.json" in files
    assert "training_args.bin" not in files
    assert not {name for name in files if name.startswith("model")}
    size = sum(4 * parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert (folder / "adapter_model.safetensors").stat().st_size < size + 5000
    assert sum(path.stat().st_size for path in folder.iterdir()) < size + 60_000  # SGD keeps no state
    words = json.loads((folder / "tokenizer.json").read_text())
    assert "<a_0>" in json.dumps(words)


def test_a_checkpoint_of_a_whole_model(factories, tmp_path):
    """Without LoRA all weights train; the rows are in the model's own file."""
    trainer = factories.make_trainer(tmp_path, lora=False, save_strategy="steps", save_steps=2, max_steps=4)
    trainer.train()
    tensors = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert "model.embed_tokens.new_rows" in tensors
    resumed = factories.make_trainer(tmp_path, lora=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in factories.trained_tensors(trainer).items():
        assert torch.equal(factories.trained_tensors(resumed)[name], tensor)


# What is refused


def test_models_and_settings_that_do_not_fit(factories, tiny_model, tmp_path):
    from llmrec.training.trainer import RankingTrainer

    trainer = factories.make_trainer(tmp_path)
    parts = {"vocabulary": trainer.vocabulary, "text_tokenizer": trainer.processing_class}
    with pytest.raises(SettingsError, match="no code rows to train"):
        RankingTrainer(tiny_model(), trainer.args, **parts)
    trainer.args.loss_scope = "trie"
    with pytest.raises(SettingsError, match="needs the trie"):
        RankingTrainer(trainer.model, trainer.args, **parts)
