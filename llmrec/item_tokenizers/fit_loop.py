"""The training loop of learned item tokenizers: epochs over items, measuring, the best state, resuming.

Knows modules, batches and files. Doesn't know any loss: the item tokenizer passes it in.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from llmrec.errors import DataError
from llmrec.files import atomic_file
from llmrec.item_tokenizers.base import Monitor
from llmrec.item_tokenizers.item_vectors import ItemBatch, ItemVectors
from llmrec.processes import Processes

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "fit_checkpoint.safetensors"
Schedule = Literal["constant", "cosine"]
Keep = Literal["lowest_collision_rate", "last"]


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train; all from the item tokenizer's config."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    schedule: Schedule
    evaluate_every: int
    keep: Keep
    seed: int

    @classmethod
    def of(cls, config: Any) -> "LoopSettings":
        """From a config that has fields of these names."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class FitState:
    """Where a fit stands.

    Attributes:
        epoch: Epochs done.
        best_epoch: The epoch whose weights are kept: of the lowest collision rate, or the last.
        best_collision_rate: Their collision rate, nearest codes, no repair.
        history: What was measured, oldest first: "epoch" and figures by name.
    """

    epoch: int
    best_epoch: int
    best_collision_rate: float
    history: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class TrainBatch:
    """One process's part of a batch.

    Attributes:
        items: The rows of this process, in the order of the whole batch.
        size: Items of the whole batch, over all processes.
        processes: Who else has a part.
        generator: On the CPU, in the same state on all processes.
    """

    items: ItemBatch
    size: int
    processes: Processes
    generator: torch.Generator

    def uniform(self, *shape: int) -> torch.Tensor:
        """Draws from [0, 1) for every item of the whole batch, so that they don't depend on how it is divided.

        Returns:
            This process's rows, float32 [len(items), *shape] on its device.
        """
        drawn = torch.rand(self.size, *shape, generator=self.generator)
        return drawn[self.processes.part(self.size)].to(self.processes.device)


def seeded(seed: int, *path: int) -> tuple[torch.Generator, np.random.Generator]:
    """Two generators that depend on the seed and the path (epoch, purpose) only, so that resuming needs no state."""
    generator = np.random.default_rng([seed, *path])
    return torch.Generator().manual_seed(int(generator.integers(2**62))), generator


def learning_rate_at(step: int, num_steps: int, settings: LoopSettings) -> float:
    """The rate of a step: constant, or a cosine from the full rate down to 1 % of it."""
    if settings.schedule == "constant":
        return settings.learning_rate
    share = (1 + math.cos(math.pi * step / max(num_steps - 1, 1))) / 2
    return settings.learning_rate * (0.01 + 0.99 * share)


def run_epochs(
    module: nn.Module,
    vectors: ItemVectors,
    settings: LoopSettings,
    *,
    start: Callable[[], None],
    start_epoch: Callable[[int], None],
    batch_losses: Callable[[TrainBatch], Mapping[str, torch.Tensor]],
    measure: Callable[[int], dict[str, float]],
    identity: Mapping[str, Any],
    description: str,
    processes: Processes,
    progress: bool | None = None,
    checkpoint_folder: Path | None = None,
    monitor: Monitor | None = None,
) -> FitState:
    """Trains a module and leaves it with the last weights, or those of the lowest collision rate, as `keep` says.

    Of equal rates the latest. Where something chooses it is the collision rate, not the loss: RQ-VAE's loss may rise
    while its codes improve, and LETTER's authors choose so too. Several processes have one module each, with the same
    weights: they divide every batch, and add their gradients.

    Args:
        module: Trained in place, on the device it is on.
        vectors: All items.
        settings: See `LoopSettings`; the batch is that of all processes together.
        start: Called before the first epoch, not where a checkpoint is resumed.
        start_epoch: Called with the epoch's number before it.
        batch_losses: From a batch to the terms of the loss, each this process's share of it; their sum is minimised.
        measure: Figures of the whole catalogue, "collision_rate" among them; called with the number of epochs done,
            and free to change the module (dead codes) after the weights to keep were copied: see `evaluate_every`.
        identity: Settings that a checkpoint must be about to be used; the data are added to them.
        description: What the progress bar says.
        processes: Who trains.
        progress: Whether to show a bar; None: on a terminal.
        checkpoint_folder: Where to keep and look for a checkpoint, after every measuring.
        monitor: Called with epochs done and figures after every measuring.
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    state = FitState(0, 0, math.inf)
    best: dict[str, torch.Tensor] = {}
    path = None if checkpoint_folder is None else checkpoint_folder / CHECKPOINT_NAME
    data = vectors.arrays | {f"present {name}": mask for name, mask in vectors.present.items()}
    fingerprint = "" if path is None else identity_of(dict(identity), data)
    if path is not None and path.is_file():
        state, best = _load_checkpoint(path, module, optimizer, fingerprint)
        logger.info("resuming after epoch %d from %s", state.epoch, path)
    else:
        start()
    processes.barrier()  # nobody writes a checkpoint before all have looked for one
    batches = math.ceil(len(vectors) / settings.batch_size)
    bar = tqdm(
        total=settings.epochs, initial=state.epoch, desc=description, unit="epoch",
        disable=None if progress is None else not progress,
    )  # fmt: skip
    with bar:
        for epoch in range(state.epoch, settings.epochs):
            module.train()
            start_epoch(epoch)
            losses = _train_epoch(module, vectors, settings, optimizer, epoch, batch_losses, processes)
            bar.update()
            if (epoch + 1) % settings.evaluate_every and epoch + 1 != settings.epochs:
                continue
            module.eval()
            weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
            figures = {f"loss_{name}": value / batches for name, value in losses.items()}
            figures = {"epoch": epoch + 1, "loss": sum(figures.values()), **figures}
            if not math.isfinite(figures["loss"]):
                raise DataError(
                    f"the loss became {figures['loss']} in epoch {epoch + 1}: lower learning_rate, or standardize the"
                    " inputs"
                )
            figures |= measure(epoch + 1)
            rate, history = figures["collision_rate"], (*state.history, figures)
            if settings.keep == "last" or rate <= state.best_collision_rate:
                state, best = FitState(epoch + 1, epoch + 1, rate, history), weights
            else:
                state = FitState(epoch + 1, state.best_epoch, state.best_collision_rate, history)
            _tell(bar, figures, state, settings, description, monitor if processes.is_main else None)
            if path is not None and processes.is_main:
                _save_checkpoint(path, module, optimizer, fingerprint, state, best)
    module.load_state_dict(best)
    module.eval()
    return state


def _train_epoch(
    module: nn.Module,
    vectors: ItemVectors,
    settings: LoopSettings,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    batch_losses: Callable[[TrainBatch], Mapping[str, torch.Tensor]],
    processes: Processes,
) -> dict[str, float]:
    """One pass over the items; each term of the loss, added over batches and processes."""
    draws, order = seeded(settings.seed, epoch, 1)
    rows = order.permutation(len(vectors))
    starts = range(0, len(rows), settings.batch_size)
    num_steps = settings.epochs * len(starts)
    totals: dict[str, torch.Tensor] = {}
    for step, first in enumerate(starts, start=epoch * len(starts)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, num_steps, settings)
        chosen = rows[first : first + settings.batch_size]
        items = vectors.rows(chosen[processes.part(len(chosen))], processes.device)
        losses = batch_losses(TrainBatch(items, len(chosen), processes, draws))
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        processes.sum_gradients(module)
        optimizer.step()
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0.0) + loss.detach()
    return {name: float(processes.sum(total)) for name, total in totals.items()}


def _tell(
    bar: tqdm,
    figures: dict[str, float],
    state: FitState,
    settings: LoopSettings,
    description: str,
    monitor: Monitor | None,
) -> None:
    epoch, rate, loss = state.epoch, figures["collision_rate"], figures["loss"]
    bar.set_postfix(loss=f"{loss:.4g}", collisions=f"{rate:.2%}", best=f"{state.best_collision_rate:.2%}")
    if monitor is not None:
        monitor(epoch, figures)
    if 10 * epoch // settings.epochs > 10 * (epoch - settings.evaluate_every) // settings.epochs:
        logger.info(
            "%s: epoch %d of %d, loss %.4g, collision rate %.2f %%",
            description, epoch, settings.epochs, loss, 100 * rate,
        )  # fmt: skip


def identity_of(settings: dict[str, object], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over settings and data: a checkpoint of another fit must not be resumed."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}".encode())
        for start in range(0, len(arrays[name]), 65_536):  # memory-mapped arrays may be larger than memory
            digest.update(np.ascontiguousarray(arrays[name][start : start + 65_536]).data)
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, torch.Tensor]:
    """What an optimiser keeps about its parameters, by `prefix`, number of the parameter and name."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}{number}.{name}": tensor for number, kept in state.items() for name, tensor in kept.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Takes what `optimizer_tensors` gave, without the prefix; rates and other settings stay as they are."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _save_checkpoint(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: str,
    state: FitState,
    best: dict[str, torch.Tensor],
) -> None:
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    tensors |= optimizer_tensors(optimizer, "optimizer.")
    metadata = {"identity": identity, "state": json.dumps(vars(state))}
    with atomic_file(path) as temporary:
        save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, temporary, metadata)


def _load_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, identity: str
) -> tuple[FitState, dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("identity") != identity:
            raise DataError(
                f"{path} is of a fit with other settings or other data: remove it, or choose another folder"
            )
        parts: dict[str, dict[str, torch.Tensor]] = {"module": {}, "best": {}, "optimizer": {}}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            part, rest = name.split(".", 1)
            parts[part][rest] = file.get_tensor(name)
    module.load_state_dict(parts["module"])
    load_optimizer_tensors(optimizer, parts["optimizer"])
    content = json.loads(metadata["state"])
    return FitState(**{**content, "history": tuple(content["history"])}), parts["best"]
