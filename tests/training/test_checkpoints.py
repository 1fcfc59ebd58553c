"""Checkpoints: whole or not there, told apart, and refused where they don't belong to the run."""

import errno
import json
import logging
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from llmrec.errors import DataError, MissingPartError, SettingsError, WriteError
from llmrec.training.checkpoint_files import MANIFEST_NAME, check_whole, faults_of, newest_whole_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
WEIGHTS = "adapter_model.safetensors"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def finished_run(factories, tmp_path_factory):
    """A folder with the whole checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    factories.make_trainer(folder, **SAVING).train()
    return folder


@pytest.fixture
def run_folder(finished_run, tmp_path):
    """A copy, to do damage to."""
    return shutil.copytree(finished_run, tmp_path / "run")


def change_manifest(folder, **entries):
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def list_files_again(folder):
    """Makes a changed checkpoint whole, as its list of files goes."""
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST_NAME}
    change_manifest(folder, files=files)


# Writing


def test_nothing_stands_in_its_place_before_it_is_whole(factories, tmp_path, monkeypatch):
    trainer = factories.make_trainer(tmp_path, **SAVING)
    seen = []
    save_scaler = Trainer._save_scaler  # by then weights and optimizer are written

    def look(self, output_dir):
        seen.append((names_in(tmp_path), names_in(tmp_path / f".checkpoint-{self.state.global_step}.partial")))
        save_scaler(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_scaler", look)
    trainer.train()
    assert seen == [
        ([".checkpoint-2.partial"], ["checkpoint-2"]),
        ([".checkpoint-4.partial", "checkpoint-2"], ["checkpoint-4"]),
    ]
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        kept = check_whole(folder)
        assert sorted([*kept["files"], MANIFEST_NAME]) == names_in(folder)
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", WEIGHTS} < kept["files"].keys()
        assert kept["files"][WEIGHTS] == (folder / WEIGHTS).stat().st_size
        assert (kept["step"], kept["num_processes"], kept["engine"]) == (step, 1, "plain or DDP")


def test_the_best_checkpoint_is_named_where_it_ends_up(factories, tmp_path):
    settings = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = factories.make_trainer(tmp_path, evaluation=True, **settings)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    for step in (2, 4):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{state['best_global_step']}")


def test_older_checkpoints_go_but_the_best_stays(factories, tmp_path):
    """The loss falls, and here the greatest is called the best: that is the first."""
    settings = {**SAVING, "max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "loss", "greater_is_better": True, "save_total_limit": 1}
    trainer = factories.make_trainer(tmp_path, evaluation=True, **settings)
    left = []
    on_save = trainer.callback_handler.on_save

    def look(args, state, control):
        left.append(names_in(tmp_path))
        return on_save(args, state, control)

    trainer.callback_handler.on_save = look
    trainer.train()
    assert left == [
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-2", "checkpoint-6"],
        ["checkpoint-2", "checkpoint-8"],
    ]
    assert names_in(tmp_path) == ["checkpoint-2"]


def test_a_checkpoint_that_stands_there_is_replaced(factories, run_folder):
    (run_folder / "checkpoint-4" / "stale.txt").write_text("of an earlier run")
    factories.make_trainer(run_folder, **SAVING).train(str(run_folder / "checkpoint-2"))
    assert names_in(run_folder) == ["checkpoint-2", "checkpoint-4"]
    assert "stale.txt" not in names_in(run_folder / "checkpoint-4")
    check_whole(run_folder / "checkpoint-4")


# What can't be written


def fail_at_step_4(monkeypatch, error):
    save = Trainer._save_rng_state

    def fail(self, output_dir):
        if self.state.global_step == 4:
            raise error
        save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_rng_state", fail)


def test_a_full_disk_leaves_the_older_checkpoint(factories, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at_step_4(patch, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(WriteError, match=r"checkpoint-4 can't be written .*No space left.*Make room.*latest"):
            factories.make_trainer(tmp_path, **SAVING).train()
    assert names_in(tmp_path) == ["checkpoint-2"]
    resumed = factories.make_trainer(tmp_path, **SAVING)
    resumed.train("latest")
    assert resumed.state.global_step == 4
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_other_errors_keep_their_class(factories, tmp_path, monkeypatch):
    fail_at_step_4(monkeypatch, RuntimeError("of a collective"))
    with pytest.raises(RuntimeError, match="of a collective"):
        factories.make_trainer(tmp_path, **SAVING).train()
    assert names_in(tmp_path) == ["checkpoint-2"]


@contextmanager
def files_of_at_most(num_bytes):
    """As on a full disk, but by the kernel's own limit: whatever writes a longer file fails in its own way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("num_bytes", "lora", "cause"),
    [
        (300, False, "OSError"),  # the model's settings come first
        (10_000, True, "SafetensorError"),  # the adapter has 20 kB
        (30_000, True, "RuntimeError"),  # AdamW's state 50 kB
    ],
)
def test_a_file_that_fails_halfway(factories, tmp_path, num_bytes, lora, cause):
    trainer = factories.make_trainer(tmp_path, lora=lora, **SAVING, optim="adamw_torch")
    with files_of_at_most(num_bytes), pytest.raises(WriteError, match=rf"checkpoint-2 can't be written \({cause}"):
        trainer.train()
    assert names_in(tmp_path) == []


# Which checkpoint is whole


def test_the_newest_whole_one_is_found(run_folder, tmp_path):
    assert newest_whole_checkpoint(run_folder) == run_folder / "checkpoint-4"
    shutil.copytree(run_folder / "checkpoint-4", run_folder / ".checkpoint-6.partial" / "checkpoint-6")
    (run_folder / "checkpoint-x").mkdir()
    assert newest_whole_checkpoint(run_folder) == run_folder / "checkpoint-4"
    shutil.copytree(run_folder / "checkpoint-4", run_folder / "checkpoint-10")  # by number, not by name
    assert newest_whole_checkpoint(run_folder) == run_folder / "checkpoint-10"
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None


def test_without_any_of_its_files_the_older_one_is_taken(run_folder, caplog):
    newest = run_folder / "checkpoint-4"
    names = names_in(newest)
    assert len(names) >= 9
    for name in names:
        content = (newest / name).read_bytes()
        for damage in ("missing", "shorter"):
            (newest / name).unlink() if damage == "missing" else (newest / name).write_bytes(content[:-1])
            if damage == "shorter" and name == MANIFEST_NAME:
                (newest / name).write_bytes(content[: len(content) // 2])
            caplog.clear()
            assert newest_whole_checkpoint(run_folder) == run_folder / "checkpoint-2", (name, damage)
            assert name in caplog.text
            with pytest.raises(MissingPartError, match=rf"not a whole checkpoint: .*{name}.*'latest'"):
                check_whole(newest)
            (newest / name).write_bytes(content)
    assert faults_of(newest) == []


def test_resuming_says_what_it_skips(factories, run_folder, caplog):
    (run_folder / "checkpoint-4" / "scheduler.pt").unlink()
    trainer = factories.make_trainer(run_folder, **SAVING)
    with caplog.at_level(logging.INFO, "llmrec"):
        trainer.train("latest")
    assert "checkpoint-4 is not whole: scheduler.pt is missing" in caplog.text
    assert f"resuming from {run_folder / 'checkpoint-2'}" in caplog.text
    assert len(factories.step_log(trainer)) == 4
    check_whole(run_folder / "checkpoint-4")  # written anew

    (run_folder / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(MissingPartError, match=r"optimizer\.pt is missing"):
        trainer.train(str(run_folder / "checkpoint-4"))


def test_without_a_whole_one_training_starts_anew(factories, tmp_path, caplog):
    (tmp_path / "checkpoint-4").mkdir()  # such as the Trainer alone would have left
    trainer = factories.make_trainer(tmp_path, **SAVING)
    with caplog.at_level(logging.INFO, "llmrec"):
        trainer.train("latest")
    assert "checkpoint-4 is not whole" in caplog.text
    assert "training starts anew" in caplog.text
    assert len(factories.step_log(trainer)) == 4


def test_leftovers_go_when_training_starts(factories, run_folder):
    (run_folder / ".checkpoint-6.partial" / "checkpoint-6").mkdir(parents=True)
    (run_folder / ".checkpoint-4.replaced").mkdir()
    (run_folder / "recommender").mkdir()
    factories.make_trainer(run_folder, **SAVING).train("latest")
    assert names_in(run_folder) == ["checkpoint-2", "checkpoint-4", "recommender"]


# What is refused


@pytest.mark.parametrize(
    ("settings", "differences"),
    [
        ({"seed": 7}, ["seed was 1, is 7"]),
        ({"per_device_train_batch_size": 4}, ["rows_per_step was 8, is 4", "steps_per_epoch was 2, is 4"]),
        ({"gradient_accumulation_steps": 2}, ["rows_per_step was 8, is 16"]),
        ({"packing": True}, ["packing was False, is True"]),
        ({"train_sampling_strategy": "random"}, ["order was 'sequential', is 'random'"]),
        ({"form": "prefix"}, ["samples was 16"]),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_another_order_of_data_is_refused(factories, run_folder, settings, differences, named):
    trainer = factories.make_trainer(run_folder, **{**SAVING, **settings})
    with pytest.raises(SettingsError, match="other batches than it began with") as caught:
        trainer.train(str(run_folder / "checkpoint-2") if named else "latest")
    for difference in differences:
        assert difference in str(caught.value)


def test_the_same_batches_in_other_parts_are_the_same(factories, run_folder):
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = factories.make_trainer(run_folder, **{**SAVING, **halves})
    trainer.train(str(run_folder / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_other_engines_and_weights_alone_are_refused(factories, run_folder):
    trainer = factories.make_trainer(run_folder, **SAVING)
    change_manifest(run_folder / "checkpoint-4", engine="DeepSpeed ZeRO-3")
    with pytest.raises(SettingsError, match=r"written under DeepSpeed ZeRO-3, this run is under plain or DDP"):
        trainer.train("latest")
    change_manifest(run_folder / "checkpoint-4", engine="plain or DDP", save_only_model=True)
    with pytest.raises(SettingsError, match="save_only_model: it holds no optimizer"):
        trainer.train("latest")


def test_another_number_of_processes_is_said(factories, run_folder, caplog):
    change_manifest(run_folder / "checkpoint-4", num_processes=2)
    factories.make_trainer(run_folder, **SAVING).train("latest")
    assert "written by 2 processes, this run has 1: dropout" in caplog.text


def test_a_tensor_that_is_missing_is_an_error(factories, run_folder, tmp_path):
    folder = run_folder / "checkpoint-4"
    tensors = load_file(folder / WEIGHTS)
    rows = [name for name in tensors if name.endswith("trainable_tokens_delta")]
    assert len(rows) == 1
    save_file({name: tensor for name, tensor in tensors.items() if name not in rows}, folder / WEIGHTS)
    list_files_again(folder)
    with pytest.raises(DataError, match=r"1 tensor\(s\) missing"):
        factories.make_trainer(run_folder, **SAVING).train("latest")

    whole = tmp_path / "whole"
    factories.make_trainer(whole, lora=False, **SAVING).train()
    path = whole / "checkpoint-4" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.embed_tokens.new_rows"]
    save_file(tensors, path, metadata={"format": "pt"})
    list_files_again(whole / "checkpoint-4")
    with pytest.raises(DataError, match=r"lack 1 tensor\(s\), first model.embed_tokens.new_rows"):
        factories.make_trainer(whole, lora=False, **SAVING).train("latest")


# What a checkpoint holds


def test_rows_alone_are_written_without_the_base(factories, tmp_path):
    from llmrec.adapter import freeze_base

    trainer = factories.make_trainer(tmp_path, lora=False, tied=False, **SAVING)
    freeze_base(trainer.model)
    trainer.train()
    folder = tmp_path / "checkpoint-4"
    tensors = load_file(folder / WEIGHTS)
    trained = factories.trained_tensors(trainer)
    assert sorted(tensor.shape for tensor in tensors.values()) == sorted(rows.shape for rows in trained.values())
    assert not [name for name in names_in(folder) if name.startswith("model")]
    assert torch.equal(tensors["base_model.model.lm_head.trainable_tokens_delta"], trained["lm_head.new_rows"])
