"""Killed anywhere and resumed, a run ends in the weights of one that was never killed, bit for bit.

What is killed runs in a forked process, so that only the SIGKILL needs one of its own.
"""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from llmrec.training.checkpoint_files import newest_whole_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

# Four steps an epoch in an order that differs from epoch to epoch; dropout and AdamW have states to lose.
SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 12,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "lr_scheduler_type": "linear",
    "lora_dropout": 0.1,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "steps",
    "save_steps": 3,
}
ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
EVALUATED = {"evaluation": True, "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}


class Killer(TrainerCallback):
    """Ends this process by SIGKILL at an event of a step (the number of the step that is under way, from 0)."""

    def __init__(self, step, event="on_step_end"):
        self.step = step
        setattr(self, event, self.kill)

    def kill(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def dies(function):
    """Runs a function in a forked process, which must end by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL


def make(factories, folder, *, rows_alone=False, callbacks=(), **settings):
    trainer = factories.make_trainer(folder, callbacks=list(callbacks), **{**SETTINGS, **settings})
    if rows_alone:
        from llmrec.adapter import freeze_base

        freeze_base(trainer.model)
    return trainer


def outcome(factories, trainer):
    """Loss and gradient norm of every step, the best metric, and all that was trained."""
    return factories.step_log(trainer), trainer.state.best_metric, factories.trained_tensors(trainer)


def assert_alike(found, expected):
    assert found[:2] == expected[:2]
    assert found[2].keys() == expected[2].keys()
    for name, tensor in expected[2].items():
        assert torch.equal(found[2][name], tensor), name


@pytest.fixture(scope="module")
def never_stopped(factories, tmp_path_factory):
    """`never_stopped(**settings)`: the outcome of a run that was never killed, made once."""
    made = {}

    def outcome_of(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            saving = {} if "evaluation" in settings else {"save_strategy": "no"}  # which must make no difference
            trainer = make(factories, tmp_path_factory.mktemp("whole"), **{**settings, **saving})
            trainer.train()
            made[key] = outcome(factories, trainer)
        return made[key]

    return outcome_of


@pytest.mark.parametrize(
    ("step", "event", "settings", "resumed_at"),
    [
        pytest.param(7, "on_step_end", {}, 6, id="in-the-second-epoch"),
        pytest.param(4, "on_epoch_begin", {}, 3, id="between-two-epochs"),
        pytest.param(5, "on_step_end", {"save_steps": 4}, 4, id="checkpoint-at-the-end-of-an-epoch"),
        pytest.param(11, "on_step_begin", {}, 9, id="in-the-last-step"),
        pytest.param(12, "on_step_end", {}, 9, id="before-the-last-checkpoint"),
        pytest.param(2, "on_step_end", {}, None, id="before-the-first-checkpoint"),
        pytest.param(7, "on_substep_end", ACCUMULATED, 6, id="within-an-accumulation"),
        pytest.param(7, "on_pre_optimizer_step", ACCUMULATED, 6, id="before-the-optimizer"),
        pytest.param(7, "on_step_end", {"dataloader_num_workers": 2}, 6, id="two-workers"),
        pytest.param(7, "on_step_end", {"packing": True, "row_length": 30}, 6, id="packed"),
        pytest.param(7, "on_step_end", {"lora": False}, 6, id="whole-model"),
        pytest.param(7, "on_step_end", {"lora": False, "rows_alone": True, "tied": False}, 6, id="rows-alone"),
        pytest.param(7, "on_step_end", {"bf16": True}, 6, id="bf16"),
        pytest.param(7, "on_step_end", {"form": "prefix"}, 6, id="prefix-form"),
        pytest.param(7, "on_step_end", EVALUATED, 6, id="with-evaluation"),
    ],
)
def test_killed_and_resumed(factories, never_stopped, tmp_path, step, event, settings, resumed_at):
    dies(lambda: make(factories, tmp_path, callbacks=[Killer(step, event)], **settings).train())
    newest = newest_whole_checkpoint(tmp_path)
    assert (newest and newest.name) == (resumed_at and f"checkpoint-{resumed_at}")
    resumed = make(factories, tmp_path, **settings)
    resumed.train("latest")
    assert resumed.state.global_step == 12
    assert_alike(outcome(factories, resumed), never_stopped(**settings))


def test_killed_inside_a_save(factories, never_stopped, tmp_path, monkeypatch):
    """After weights, optimizer and schedule are written: what the Trainer would resume from without an error."""
    save_rng_state = Trainer._save_rng_state

    def kill(self, output_dir):
        if self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        save_rng_state(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", kill)
        dies(lambda: make(factories, tmp_path).train())
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", ".checkpoint-6.partial"}
    written = {path.name for path in (tmp_path / ".checkpoint-6.partial" / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt"} < written
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    resumed = make(factories, tmp_path)
    resumed.train("latest")
    assert_alike(outcome(factories, resumed), never_stopped())
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (3, 6, 9, 12)}


def test_killed_twice(factories, never_stopped, tmp_path):
    dies(lambda: make(factories, tmp_path, callbacks=[Killer(4)]).train("latest"))
    dies(lambda: make(factories, tmp_path, callbacks=[Killer(10)]).train("latest"))
    resumed = make(factories, tmp_path)
    resumed.train("latest")
    assert_alike(outcome(factories, resumed), never_stopped())


def test_a_run_that_had_ended_trains_no_further_step(factories, tmp_path):
    """Ten steps of four an epoch: the Trainer alone would take an eleventh, at learning rate 0."""
    first = make(factories, tmp_path, max_steps=10)
    first.train()
    again = make(factories, tmp_path, max_steps=10)
    again.train("latest")
    assert again.state.global_step == 10
    assert_alike(outcome(factories, again), outcome(factories, first))
    longer = make(factories, tmp_path, max_steps=11)
    longer.train("latest")
    assert longer.state.global_step == 11


# Early stopping and the best checkpoint


def stopping(factories, folder, *, callbacks=(), **settings):
    """The loss falls, and here the greatest is called the best: no evaluation but the first is an improvement."""
    settings = {**EVALUATED, "metric_for_best_model": "loss", "greater_is_better": True, **settings}
    return make(factories, folder, callbacks=[EarlyStoppingCallback(2), *callbacks], **settings)


def test_early_stopping_keeps_its_count(factories, tmp_path):
    """Evaluated at 3, 6 and 9, it stops at 9; resumed from 6, it has been patient once already."""
    whole = stopping(factories, tmp_path / "whole")
    whole.train()
    assert whole.state.global_step == 9
    folder = tmp_path / "killed"
    dies(lambda: stopping(factories, folder, callbacks=[Killer(8)]).train())
    for _ in range(2):  # the second time the run had ended
        resumed = stopping(factories, folder)
        resumed.train("latest")
        assert resumed.state.global_step == 9
        assert resumed.state.best_global_step == 3
        assert_alike(outcome(factories, resumed), outcome(factories, whole))


def test_early_stopping_can_be_added_on_resuming(factories, tmp_path):
    settings = {**EVALUATED, "metric_for_best_model": "loss", "greater_is_better": True}
    make(factories, tmp_path, **settings, save_total_limit=None).train()
    (tmp_path / "checkpoint-12" / "optimizer.pt").unlink()
    resumed = stopping(factories, tmp_path)
    resumed.train("latest")  # from 9, with no patience used up
    assert resumed.state.global_step == 12


def test_the_best_checkpoint_moves_with_its_folder(factories, tmp_path):
    settings = {**EVALUATED, "metric_for_best_model": "loss", "greater_is_better": True, "max_steps": 9}
    first = make(factories, tmp_path / "first", **settings)
    first.train()
    (tmp_path / "first").rename(tmp_path / "moved")
    resumed = make(factories, tmp_path / "moved", **{**settings, "max_steps": 12})
    resumed.train("latest")
    assert resumed.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-3")
    assert resumed.evaluate()["eval_loss"] == pytest.approx(resumed.state.best_metric, abs=1e-7)


def test_a_best_checkpoint_that_is_gone_is_not_the_best_any_more(factories, tmp_path, caplog):
    settings = {**EVALUATED, "metric_for_best_model": "loss", "greater_is_better": True, "max_steps": 6}
    make(factories, tmp_path, **settings).train()
    (tmp_path / "checkpoint-3" / "adapter_model.safetensors").unlink()
    resumed = make(factories, tmp_path, **{**settings, "max_steps": 12})
    resumed.train("latest")
    assert "checkpoint-3 (loss" in caplog.text
    assert resumed.state.best_global_step == 9  # the first that was evaluated since
    assert resumed.evaluate()["eval_loss"] == pytest.approx(resumed.state.best_metric, abs=1e-7)
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-9")
