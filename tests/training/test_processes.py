"""Training in processes of its own: killed and resumed, and spread over several."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Subset

SCRIPT = Path(__file__).with_name("train_in_processes.py")


def start(folder, plan, *, config_file=None, **environment):
    """Runs the script on a plan, with accelerate where a settings file is given."""
    plan_file = folder / "plan.json"
    plan_file.write_text(json.dumps({"output_dir": str(folder), **plan}))
    command = [sys.executable, str(SCRIPT), str(plan_file)]
    if config_file is not None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config_file)]
        command[1:1] = [*launcher, "--main_process_port", str(port)]
    return subprocess.run(
        command,
        # The package that stands beside these tests, whatever is installed.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2]), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,  # the first ZeRO-2 run compiles an extension
    )


def results_of(folder, process, num_processes=2):
    """What each process wrote. Judged by files: gloo sometimes aborts at exit, after all work is done."""
    files = [folder / f"result-{rank}.json" for rank in range(num_processes)]
    missing = [file.name for file in files if not file.is_file()]
    assert not missing, f"{missing} not written; the end of stderr:\n{process.stderr[-3000:]}"
    return [json.loads(file.read_text()) for file in files]


def assert_same_steps(found, expected, tolerance=1e-5):
    assert len(found) == len(expected) > 0
    for left, right in zip(found, expected, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=tolerance)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=tolerance)


def test_killed_and_resumed_ends_in_the_same_weights(factories, tmp_path):
    """Killed in the second epoch, with dropout and AdamW; the order of samples differs from epoch to epoch."""
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 12,  # 4 an epoch
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "lora_dropout": 0.1,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "steps",
        "save_steps": 3,
    }
    process = start(tmp_path, {"settings": settings, "kill_at_step": 8})
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    checkpoints = {path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint-")}
    assert checkpoints == {"checkpoint-3", "checkpoint-6"}

    resumed = factories.make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    whole = factories.make_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert factories.step_log(resumed) == factories.step_log(whole)
    found, expected = factories.trained_tensors(resumed), factories.trained_tensors(whole)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# 16 samples and steps of 8: both divide by the number of processes, or accelerate would fill up with samples seen.
SETTINGS = {"max_steps": 6, "train_sampling_strategy": "group_by_length", "loss_scope": "trie", "tied": False}
NUM_EVALUATED = 13  # no multiple of the number of processes


@pytest.fixture
def one_process(factories, tmp_path):
    """Steps and evaluation of one process with batches of 8."""
    trainer = factories.make_trainer(tmp_path / "one", **SETTINGS)
    trainer.train()
    evaluation = trainer.evaluate(Subset(trainer.train_dataset, range(NUM_EVALUATED)))
    return factories.step_log(trainer), evaluation, factories.trained_tensors(trainer)


def test_two_processes_equal_one(one_process, repository, tmp_path):
    """DDP, with a resume in the middle of the second epoch."""
    saving = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    plan = {
        "settings": {**SETTINGS, **saving, "per_device_eval_batch_size": 2},
        "resume_from": "checkpoint-3",
        "num_evaluated": NUM_EVALUATED,
    }
    process = start(tmp_path, plan, config_file=repository / "accelerate_configs" / "ddp.yaml")
    log, evaluation, tensors = one_process
    for result in results_of(tmp_path, process):
        assert (result["num_processes"], result["distributed_type"]) == (2, "MULTI_CPU")
        assert result["wrapped_by"] == "DistributedDataParallel"
        assert_same_steps(result["log"], log)
        assert_same_steps(result["resumed_log"], log)
        assert result["evaluation"]["eval_loss"] == pytest.approx(evaluation["eval_loss"], rel=1e-5)
        for name, checksum in result["checksums"].items():
            assert checksum == pytest.approx(tensors[name].double().sum().item(), abs=1e-3)
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    name = "base_model.model.lm_head."
    rows = saved[f"{name}token_adapter.trainable_tokens_delta"]
    torch.testing.assert_close(rows, tensors[f"{name}new_rows"], atol=1e-5, rtol=1e-4)


def test_zero_2_equals_one_process(one_process, repository, tmp_path):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    plan = {
        "settings": {
            **SETTINGS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "save_strategy": "steps",
            "save_steps": 6,
        },
        "num_evaluated": NUM_EVALUATED,
    }
    config_file = repository / "accelerate_configs" / "deepspeed_zero2.yaml"
    process = start(tmp_path, plan, config_file=config_file, DS_ACCELERATOR="cpu")
    log, evaluation, tensors = one_process
    for result in results_of(tmp_path, process):
        assert (result["num_processes"], result["distributed_type"]) == (2, "DEEPSPEED")
        assert result["wrapped_by"] == "DeepSpeedEngine"
        assert_same_steps(result["log"], log)
        assert result["evaluation"]["eval_loss"] == pytest.approx(evaluation["eval_loss"], rel=1e-5)
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    assert len(saved) == len(tensors)
    name = "base_model.model.lm_head."
    rows = saved[f"{name}token_adapter.trainable_tokens_delta"]
    torch.testing.assert_close(rows, tensors[f"{name}new_rows"], atol=1e-5, rtol=1e-4)
