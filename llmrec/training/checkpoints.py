"""Checkpoints of a training run: whole or not there, with the code rows in them, and resumed from exactly.

What the Trainer alone would do wrongly, without any error: write into the final folder, so that a kill or a full disk
leaves a half checkpoint which it resumes from; leave the code rows out, and write the whole embedding instead; go on
with other data than the run began with; train one more step when a run that had ended is resumed; forget how often
early stopping had been patient; return a model that is not the best where the best checkpoint is gone.

Nothing here knows losses, samples or batches: what must not differ between the run that is resumed and the one that
resumes it is handed over as `resume_identity`.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from accelerate.utils import gather_object, save_fsdp_optimizer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from llmrec.adapter import is_adapter, load_adapter_weights, read_adapter_weights, save_adapter
from llmrec.errors import DataError, SettingsError, WriteError
from llmrec.training.checkpoint_files import (
    check_whole,
    faults_of,
    find_whole,
    finish_checkpoint,
    is_write_error,
    partial_folder,
    remove_leftovers,
    step_of,
)
from llmrec.training.gathering import load_trained_parameters, trained_parameters

logger = logging.getLogger(__name__)

LATEST = "latest"
_STATE_NAME = "trainer_state.json"


class CheckpointMixin(Trainer):
    """Saving, loading and resuming of `RankingTrainer`.

    Attributes:
        resume_identity: What decides which samples stand in which step, JSON values by name. It is kept with every
            checkpoint, and a run in which any of it differs is not resumed.
    """

    resume_identity: Mapping[str, Any] = MappingProxyType({})
    _partial: Path | None = None  # while a checkpoint is written

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint's folder; or "latest" (or True) for the newest under `output_dir` that
                is whole: the log says which were passed over, and training starts anew where there is none.
            *args: The Trainer's.
            **kwargs: The Trainer's.

        Raises:
            MissingPartError: The checkpoint that is named isn't whole.
            SettingsError: It belongs to a run that saw other data, or was written under another engine.
            WriteError: A checkpoint can't be written; the one before is the newest then.
        """
        checkpoint = self._find_checkpoint(resume_from_checkpoint)
        if self.args.should_save:
            for name in remove_leftovers(Path(str(self.args.output_dir))):
                logger.info("removed %s, which a killed run has left", name)
        if checkpoint is not None:
            self._log("resuming from %s", checkpoint)
        return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def _log(self, message: str, *values: Any, level: int = logging.INFO) -> None:
        if self.is_world_process_zero():
            logger.log(level, message, *values)

    # Which checkpoint is resumed from

    def _find_checkpoint(self, wanted: str | bool | None) -> Path | None:
        if not wanted:
            return None
        output_folder = Path(str(self.args.output_dir))
        if wanted is True or wanted == LATEST:
            newest, skipped = find_whole(output_folder)
            for reason in skipped:
                self._log("%s", reason, level=logging.WARNING)
            # Where each machine has a disk of its own, the newest that all of them have.
            step = min(gather_object([-1 if newest is None else step_of(newest)]))
            if step < 0:
                self._log("there is no whole checkpoint under %s: training starts anew", output_folder)
                return None
            checkpoint = output_folder / f"checkpoint-{step}"
        else:
            checkpoint = Path(wanted)
        self._check_resumable(checkpoint, check_whole(checkpoint))
        return checkpoint

    def _check_resumable(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        if saved.get("save_only_model"):
            raise SettingsError(
                f"{checkpoint} was written with save_only_model: it holds no optimizer and no random state, so"
                " training can't go on from it; start anew"
            )
        before, now = saved.get("identity", {}), _as_json(self.resume_identity)
        differences = [
            f"{name} was {before[name]!r}, is {now[name]!r}"
            for name in before
            if name in now and before[name] != now[name]
        ]
        if differences:
            raise SettingsError(
                f"can't resume from {checkpoint}: the run would go on with other batches than it began with"
                f" ({'; '.join(differences)}); set these back, or start anew in another output_dir"
            )
        if saved["engine"] != self._engine:
            raise SettingsError(
                f"{checkpoint} was written under {saved['engine']}, this run is under {self._engine}, which can't read"
                f" its optimizer: launch with the same accelerate config, or start anew in another output_dir"
            )
        processes = (saved["num_processes"], self.args.world_size)
        if processes[0] != processes[1]:
            if self.is_deepspeed_enabled:
                raise SettingsError(
                    f"{checkpoint} was written by {processes[0]} processes of {self._engine}, which share the"
                    f" optimizer out; this run has {processes[1]}: launch as many as then"
                )
            self._log(
                "%s was written by %d processes, this run has %d: dropout draws otherwise than in a run that was never"
                " stopped",
                *(checkpoint, *processes),
                level=logging.WARNING,
            )

    @property
    def _engine(self) -> str:
        if self.is_deepspeed_enabled:
            return f"DeepSpeed ZeRO-{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "FSDP" if self.is_fsdp_enabled else "plain or DDP"

    # Resuming

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        trained = super()._init_training_state(*args, **kwargs)
        if self.state.global_step:
            self._restore_patience()
            self._find_best_again()
        return trained

    def _restore_patience(self) -> None:
        """Gives early stopping the count it had; the Trainer restores it only with all settings of all callbacks."""
        saved = cast(dict[str, Any], self.state.stateful_callbacks)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if not isinstance(callback, ExportableState):
                continue
            of_callback = saved.setdefault(type(callback).__name__, callback.state())  # new since: saving would fail
            if isinstance(callback, EarlyStoppingCallback) and isinstance(of_callback, dict):
                count = of_callback["attributes"]["early_stopping_patience_counter"]
                callback.early_stopping_patience_counter = count

    def _find_best_again(self) -> None:
        """Names the best checkpoint where it is now, or forgets it where it isn't whole anywhere."""
        state = self.state
        if not state.best_global_step or not self.args.load_best_model_at_end:
            return
        here = Path(str(self.args.output_dir)) / f"checkpoint-{state.best_global_step}"
        places = [here, *([Path(state.best_model_checkpoint)] if state.best_model_checkpoint else [])]
        found = next((place for place in places if not faults_of(place)), None)
        if found is not None:
            state.best_model_checkpoint = str(found)
            return
        self._log(
            "the best checkpoint so far, %s (%s %s), is not whole: the best is chosen among what follows",
            *(here, self.args.metric_for_best_model, state.best_metric),
            level=logging.WARNING,
        )
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's; nothing where the run had ended, which it would only notice after one more step."""
        if self._has_ended():
            self._log("the run had ended at step %d: nothing is left to train", self.state.global_step)
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _has_ended(self) -> bool:
        return bool(self.state.global_step) and (
            self.state.global_step >= self.state.max_steps or self._patience_is_over()
        )

    def _patience_is_over(self) -> bool:
        return any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )

    # Writing a checkpoint

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """The Trainer's, written aside by all processes and put in its place when it is whole."""
        run_folder = self._get_output_dir(trial)
        checkpoint = Path(run_folder) / f"checkpoint-{self.state.global_step}"
        partial = partial_folder(checkpoint)
        try:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / checkpoint.name).mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._write_checkpoint(model, trial, checkpoint, partial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                finish_checkpoint(checkpoint, self._description())
        except Exception as error:
            # The launcher ends the other processes, which wait here or in the save; what they leave goes at the start.
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
            if not is_write_error(error):
                raise
            raise WriteError(
                f"{checkpoint} can't be written ({type(error).__name__}: {error}); no part of it is resumed from, and"
                " older checkpoints are as they were. Make room (save_total_limit keeps fewer of them) or name another"
                " output_dir, and go on with resume_from_checkpoint: latest"
            ) from error
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_folder,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model: nn.Module, trial: Any, checkpoint: Path, partial: Path) -> None:
        self._partial = partial
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._partial = None
        if self.state.best_global_step == self.state.global_step:  # the Trainer knows it under its temporary name
            self.state.best_model_checkpoint = str(checkpoint)
            if self.args.should_save:
                self.state.save_to_json(str(partial / checkpoint.name / _STATE_NAME))

    def _description(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "engine": self._engine,
            "num_processes": self.args.world_size,
            "save_only_model": self.args.save_only_model,
            "identity": _as_json(self.resume_identity),
        }

    # The weights: the Trainer would leave the rows out, and write the whole embedding instead

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _is_adapter(self) -> bool:
        return is_adapter(self._unwrapped)

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what is trained, under any engine; of a base that is frozen, nothing. All processes call it."""
        if self._is_adapter:
            self._save(output_dir, trained_parameters(cast(nn.Module, self.model), self.accelerator))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self._is_adapter:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = output_dir if output_dir is not None else str(self.args.output_dir)
        os.makedirs(folder, exist_ok=True)
        # Nothing was gathered for the first process of another machine (save_on_each_node): it holds all by itself.
        save_adapter(self._unwrapped, folder, state_dict=state_dict or None)
        cast(PreTrainedTokenizerBase, self.processing_class).save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The Trainer's; under FSDP without the model, of which `_save` has written all that is trained.

        PEFT would have embedding and head written whole, and where there is no LoRA the base would be.
        """
        if not (self.is_fsdp_enabled and self._is_adapter):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, cast(nn.Module, self.model), output_dir)
        if self.args.should_save:
            torch.save(cast(Any, self.lr_scheduler).state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_adapter:
            self._load_adapter(resume_from_checkpoint)
        elif self._is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _load_whole(Path(resume_from_checkpoint), self._unwrapped)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self.is_deepspeed_enabled or (self._is_sharded and not self._is_adapter):
            # DeepSpeed reads all that is trained, the rows among it, from files of its own.
            super()._load_best_model()
            return
        self._log("loading the best model, of %s (%s)", best, self.state.best_metric)
        if self._is_adapter:
            self._load_adapter(best)
        else:
            _load_whole(Path(best), self._unwrapped)

    def _load_adapter(self, folder: str) -> None:
        if not self.is_fsdp_enabled:
            load_adapter_weights(self._unwrapped, folder)
            return
        tensors = read_adapter_weights(self._unwrapped, folder)
        load_trained_parameters(cast(nn.Module, self.model), tensors, self.accelerator)


def _load_whole(folder: Path, model: nn.Module) -> None:
    """Overwrites all weights of a model that was trained whole; tied ones are in the files once.

    Raises:
        DataError: They lack a parameter, which transformers would leave as it is, with a warning.
    """
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    missing = sorted({name for name, _ in model.named_parameters()} - tensors.keys())
    if missing:
        raise DataError(f"the weights in {folder} lack {len(missing)} tensor(s), first {missing[0]}")
    model.load_state_dict(tensors, strict=False)  # what is missing now is tied to what is there


def _as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """As it is read back from a file: tuples are lists there."""
    return dict(json.loads(json.dumps(dict(content))))
