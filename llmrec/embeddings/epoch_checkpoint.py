"""The state of a training run after an epoch, of SASRec and LightGCN alike, so that a killed run can go on."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmrec.embeddings.weights import load_exactly
from llmrec.errors import DataError
from llmrec.files import atomic_folder, check_format, read_json, write_json

if TYPE_CHECKING:
    from llmrec.data.interactions import InteractionDataset
    from llmrec.data.splits import EvaluationSet

CHECKPOINT_VERSION = 1


@dataclass
class Progress:
    """What is known after an epoch; goes into the checkpoint as it is."""

    epochs_done: int = 0
    best_epoch: int = 0
    best_ndcg: float = -1.0  # NDCG@10 on the validation examples
    epochs_without_gain: int = 0


class EpochCheckpoint:
    """State after an epoch: safetensors for weights and the optimizer's tensors, JSON for the rest.

    Args:
        folder: Folder of its own, replaced whole by each `save`.
        config: Settings of the run, a dataclass.
        train: What it is trained on.
        validation: What stops it, or None.
    """

    def __init__(self, folder: Path, config: Any, train: "InteractionDataset", validation: "EvaluationSet | None"):
        self.folder = folder
        self._run = {
            "config": asdict(config),
            "dataset_fingerprint": train.fingerprint,
            "validation_fingerprint": None if validation is None else validation.fingerprint,
        }

    def exists(self) -> bool:
        """Whether there is something to go on from."""
        return self.folder.is_dir()

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, best: dict[str, torch.Tensor]
    ) -> None:
        """Writes the state, whole or not at all; `best` are the weights of the best epoch so far."""
        moments = {
            f"{number}.{name}": tensor.detach().cpu().contiguous()
            for number, tensors in optimizer.state_dict()["state"].items()
            for name, tensor in tensors.items()
        }
        with atomic_folder(self.folder) as temporary:
            save_file(
                {name: tensor.cpu() for name, tensor in model.state_dict().items()}, temporary / "last.safetensors"
            )
            save_file({name: tensor.cpu() for name, tensor in best.items()}, temporary / "best.safetensors")
            save_file(moments, temporary / "optimizer.safetensors")
            content = {"format_version": CHECKPOINT_VERSION, "run": self._run, "progress": asdict(progress)}
            write_json(temporary / "progress.json", content)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Progress, dict[str, torch.Tensor]]:
        """Puts weights and optimizer state back; gives the progress and the weights of the best epoch.

        Raises:
            DataError: The checkpoint is of other data or other settings.
            MissingPartError: One of its files is missing.
        """
        content = read_json(self.folder / "progress.json")
        check_format(content, CHECKPOINT_VERSION, self.folder / "progress.json")
        different = [name for name, value in self._run.items() if content["run"].get(name) != value]
        if different:
            raise DataError(
                f"the checkpoint in {self.folder} is of another run ({', '.join(different)} differ): remove it, or"
                " choose another checkpoint_dir"
            )
        device = str(next(model.parameters()).device)
        tensors = {}
        for name in ("last", "best", "optimizer"):
            tensors[name] = load_file(self.folder / f"{name}.safetensors", device=device)
        load_exactly(model, tensors["last"], self.folder / "last.safetensors")
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors["optimizer"].items():
            number, name = key.split(".", 1)
            state.setdefault(int(number), {})[name] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return Progress(**content["progress"]), tensors["best"]
