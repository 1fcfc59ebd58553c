"""Every combination of settings that can't work is refused before anything is loaded, by a message that helps."""

import importlib.util
import json

import pytest

from llmrec.errors import MissingPartError, SettingsError
from llmrec.training.arguments import FinetuneArguments, ModelArguments
from llmrec.training.checks import check_settings, is_item_metric
from llmrec.training.config import RecFinetuneConfig

CHOOSES = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5, "save_steps": 5}
CHOOSES |= {"load_best_model_at_end": True}


@pytest.fixture(autouse=True)
def bitsandbytes_is_installed(monkeypatch):
    """What is checked here doesn't depend on which extras are."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "bitsandbytes" or find(name))


def check(folder, *, arguments=None, training=None, model=None):
    arguments = FinetuneArguments(**{"item_tokenizer": "letter.yaml", **(arguments or {})})
    training = RecFinetuneConfig(output_dir=str(folder), **(training or {}))
    check_settings(arguments, training, ModelArguments(**(model or {})))


def test_the_defaults_and_usual_settings_pass(tmp_path):
    check(tmp_path)
    check(tmp_path, training={"bf16": True, "max_steps": 10, "row_length": 256, "report_to": "tensorboard"})
    check(tmp_path, training={"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "optim": "adamw_torch"})
    scheduler = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    check(tmp_path, training={**scheduler, "num_train_epochs": 5})
    check(tmp_path, training=CHOOSES, arguments={"early_stopping_patience": 3})
    best = {**CHOOSES, "metric_for_best_model": "ndcg@10"}
    check(tmp_path, training=best, arguments={"validation_recommendations": 100})
    check(tmp_path, training={**CHOOSES, "metric_for_best_model": "perplexity"})
    check(tmp_path, training={**CHOOSES, "save_strategy": "best", "save_steps": 500})
    check(tmp_path, model={"load_in_4bit": True})
    check(tmp_path, arguments={"chat": True, "tasks": ["item_to_codes"]})
    check(tmp_path, arguments={"sample_form": "prefix", "template": "Items : {history} Next :"})


# What is set, and what the message must name: the settings, and what to do.
REFUSED = {
    "fp16 on a CPU": ({"training": {"fp16": True, "use_cpu": True}}, ["fp16", "use_cpu", "set bf16: true"]),
    "half evaluation": ({"training": {"bf16_full_eval": True}}, ["bf16_full_eval", "bf16: true for both"]),
    "two half types": (
        {"training": {"bf16": True}, "model": {"dtype": "float16"}},
        ["bf16 is true", "dtype is 'float16'", "leave it out"],
    ),
    "the other two": (
        {"training": {"fp16": True, "use_cpu": False}, "model": {"dtype": "bfloat16"}},
        ["fp16 is true", "dtype is 'bfloat16'", "set bf16: true"],
    ),
    "a batch size that is found": (
        {"training": {"auto_find_batch_size": True}},
        ["auto_find_batch_size", "per_device_train_batch_size", "double gradient_accumulation_steps"],
    ),
    "batches dropped": ({"training": {"dataloader_drop_last": True}}, ["dataloader_drop_last", "set it to false"]),
    "data not skipped": ({"training": {"ignore_data_skip": True}}, ["ignore_data_skip", "set it to false"]),
    "batches split": (
        {"training": {"accelerator_config": {"split_batches": True}}},
        ["accelerator_config", "split_batches", "leave it out"],
    ),
    "batches dispatched": (
        {"training": {"accelerator_config": {"dispatch_batches": True}}},
        ["accelerator_config", "dispatch_batches"],
    ),
    "history form in a chat": (
        {"arguments": {"chat": True, "sample_form": "history"}},
        ["sample_form is 'history'", "chat is true", "set sample_form: prefix"],
    ),
    "text after the history": (
        {"arguments": {"template": "Items : {history} Next :", "sample_form": "history"}},
        ["sample_form is 'history'", "{history} Next", "set sample_form: prefix"],
    ),
    "a schedule without its settings": (
        {"training": {"lr_scheduler_type": "cosine_with_min_lr"}},
        ["cosine_with_min_lr", "lr_scheduler_kwargs", "min_lr"],
    ),
    "a schedule with those of another": (
        {"training": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"min_lr": 0.1}}},
        ["polynomial", "lr_scheduler_kwargs", "min_lr"],
    ),
    "patience without evaluations": (
        {"arguments": {"early_stopping_patience": 3}},
        ["early_stopping_patience is 3", "eval_strategy 'no'", "load_best_model_at_end: true"],
    ),
    "patience without the best": (
        {"arguments": {"early_stopping_patience": 3}, "training": {**CHOOSES, "load_best_model_at_end": False}},
        ["early_stopping_patience is 3", "load_best_model_at_end False", "load_best_model_at_end: true"],
    ),
    "negative": ({"arguments": {"validation_recommendations": -1}}, ["validation_recommendations is -1"]),
    "a best that may not be saved": (
        {"training": {**CHOOSES, "save_steps": 10}},
        ["eval_steps 5", "save_steps 10", "set them equal"],
    ),
    "the best by what is not computed": (
        {"training": {**CHOOSES, "metric_for_best_model": "ndcg@10"}, "arguments": {"validation_recommendations": 0}},
        ["metric_for_best_model is 'ndcg@10'", "validation_recommendations is 0", "(1000)"],
    ),
    "the best by what there is not": (
        {"training": {**CHOOSES, "metric_for_best_model": "eval_accuracy"}},
        ["eval_accuracy", "choose one of loss, perplexity, ndcg@10, recall@10"],
    ),
    "the worst ranking": (
        {
            "training": {**CHOOSES, "metric_for_best_model": "eval_ndcg@10", "greater_is_better": False},
            "arguments": {"validation_recommendations": 9},
        },
        ["metric_for_best_model is 'eval_ndcg@10'", "greater_is_better is False", "leave greater_is_better out"],
    ),
    "the worst loss": (
        {"training": {**CHOOSES, "greater_is_better": True}},
        ["metric_for_best_model is 'loss'", "greater_is_better is True", "a smaller loss is better"],
    ),
    "no such tracker": ({"training": {"report_to": "notebook"}}, ["report_to is 'notebook'", "tensorboard"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(tmp_path, case):
    settings, names = REFUSED[case]
    with pytest.raises(SettingsError) as caught:
        check(tmp_path, **settings)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize("engine", ["FSDP", "ZeRO-3"])
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"model": {"load_in_8bit": True}}, ["load_in_8bit", "bnb_4bit_quant_storage: bfloat16", "ddp.yaml"]),
        ({"model": {"load_in_4bit": True}}, ["load_in_4bit", "bnb_4bit_quant_storage is uint8"]),
        ({"training": {"save_on_each_node": True}}, ["save_on_each_node", "disk that all machines share"]),
    ],
)
def test_what_cannot_be_shared_out(tmp_path, monkeypatch, engine, settings, names):
    check(tmp_path, **settings)  # alone, or under DDP
    training = RecFinetuneConfig(output_dir=str(tmp_path), **settings.get("training", {}))
    if engine == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` does
    else:  # what the settings hold under such a launch
        training.deepspeed_plugin = type("Plugin", (), {"zero_stage": 3})()
    arguments = FinetuneArguments(item_tokenizer="letter.yaml", **settings.get("arguments", {}))
    with pytest.raises(SettingsError, match=f"under {engine}") as caught:
        check_settings(arguments, training, ModelArguments(**settings.get("model", {})))
    for name in names:
        assert name in str(caught.value)
    training.save_on_each_node = False
    stored = ModelArguments(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16")
    check_settings(FinetuneArguments(item_tokenizer="letter.yaml"), training, stored)


def test_several_gpus_in_one_process(tmp_path):
    training = RecFinetuneConfig(output_dir=str(tmp_path))
    training._n_gpu = 2
    with pytest.raises(SettingsError, match=r"sees 2 GPUs.*accelerate launch.*CUDA_VISIBLE_DEVICES"):
        check_settings(FinetuneArguments(item_tokenizer="letter.yaml"), training, ModelArguments())


@pytest.mark.parametrize(
    ("tracker", "package"), [("wandb", "wandb"), ("trackio", "trackio"), ("comet_ml", "comet-ml")]
)
def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch, tracker, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == tracker else find(name))
    with pytest.raises(
        SettingsError, match=rf"report_to is '{tracker}', which is not installed: pip install {package}"
    ):
        check(tmp_path, training={"report_to": ["tensorboard", tracker]})


def test_a_missing_engine(tmp_path, monkeypatch):
    training = RecFinetuneConfig(output_dir=str(tmp_path))
    training.deepspeed = "zero3.json"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'llmrec\[deepspeed\]'"):
        check_settings(FinetuneArguments(item_tokenizer="letter.yaml"), training, ModelArguments())


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_missing_bitsandbytes(tmp_path, monkeypatch, bits):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(SettingsError, match=rf"{bits} is set.*pip install 'llmrec\[quantization\]'"):
        check(tmp_path, model={bits: True})


def test_all_problems_are_named_at_once(tmp_path):
    with pytest.raises(SettingsError) as caught:
        check(tmp_path, training={"dataloader_drop_last": True, "ignore_data_skip": True})
    assert len(str(caught.value).splitlines()) == 2


def test_a_checkpoint_that_is_not_whole(tmp_path):
    check(tmp_path, training={"resume_from_checkpoint": "latest"})
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "checkpoint_files.json").write_text(json.dumps({"format_version": 1, "files": {"optimizer.pt": 7}}))
    with pytest.raises(MissingPartError, match=r"not a whole checkpoint: optimizer\.pt is missing"):
        check(tmp_path, training={"resume_from_checkpoint": str(folder)})


def test_item_metrics_by_name():
    assert is_item_metric("ndcg@10")
    assert is_item_metric("eval_recall@10")
    assert not is_item_metric("eval_loss")
    assert not is_item_metric(None)
