"""The training loop of learned item tokenizers: epochs over items, measuring, the best state, resuming.

Knows modules, batches and files. Doesn't know any loss: the item tokenizer passes it in.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from llmrec.errors import DataError
from llmrec.files import atomic_file

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "fit_checkpoint.safetensors"
Schedule = Literal["constant", "cosine"]


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train; all from the item tokenizer's config."""

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    schedule: Schedule
    evaluate_every: int
    seed: int


@dataclass(frozen=True)
class FitState:
    """Where a fit stands.

    Attributes:
        epoch: Epochs done.
        best_epoch: The epoch whose weights are kept.
        best_collision_rate: Their collision rate, nearest codes, no repair.
    """

    epoch: int
    best_epoch: int
    best_collision_rate: float


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
    num_items: int,
    settings: LoopSettings,
    *,
    start_epoch: Callable[[int], None],
    batch_loss: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
    measure: Callable[[int], float],
    identity: str,
    description: str,
    progress: bool | None = None,
    checkpoint_folder: Path | None = None,
) -> FitState:
    """Trains a module and leaves it with the weights of the lowest collision rate (the latest of equal ones).

    The collision rate chooses, not the loss: RQ-VAE's loss may rise while its codes improve, and LETTER's authors
    choose so too.

    Args:
        module: Trained in place, on the device it is on.
        num_items: N.
        settings: See `LoopSettings`.
        start_epoch: Called with the epoch's number before it.
        batch_loss: From row numbers (int64 [B], CPU) and a generator for draws to a scalar.
        measure: Collision rate of the whole catalogue; called with the number of epochs done, and free to change the
            module (dead codes) after the weights to keep were copied: see `evaluate_every`.
        identity: What a checkpoint must be about to be used: settings and data.
        description: What the progress bar says.
        progress: Whether to show a bar; None: on a terminal.
        checkpoint_folder: Where to keep and look for a checkpoint, after every measuring.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    state = FitState(0, 0, math.inf)
    best: dict[str, torch.Tensor] = {}
    path = None if checkpoint_folder is None else checkpoint_folder / CHECKPOINT_NAME
    if path is not None and path.is_file():
        state, best = _load_checkpoint(path, module, optimizer, identity)
        logger.info("resuming after epoch %d from %s", state.epoch, path)
    batches = math.ceil(num_items / settings.batch_size)
    num_steps = settings.epochs * batches
    bar = tqdm(
        total=settings.epochs, initial=state.epoch, desc=description, unit="epoch",
        disable=None if progress is None else not progress,
    )  # fmt: skip
    with bar:
        for epoch in range(state.epoch, settings.epochs):
            module.train()
            start_epoch(epoch)
            draws, order = seeded(settings.seed, epoch, 1)
            rows = torch.from_numpy(order.permutation(num_items))
            total = torch.zeros((), device=next(module.parameters()).device)
            for step, batch in enumerate(rows.split(settings.batch_size), start=epoch * batches):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate_at(step, num_steps, settings)
                loss = batch_loss(batch, draws)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += loss.detach()
            bar.update()
            if (epoch + 1) % settings.evaluate_every and epoch + 1 != settings.epochs:
                continue
            module.eval()
            weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
            rate = measure(epoch + 1)
            mean_loss = float(total) / batches
            if not math.isfinite(mean_loss):
                raise DataError(
                    f"the loss became {mean_loss} in epoch {epoch + 1}: lower learning_rate, or standardize the inputs"
                )
            if rate <= state.best_collision_rate:
                state, best = FitState(epoch + 1, epoch + 1, rate), weights
            else:
                state = FitState(epoch + 1, state.best_epoch, state.best_collision_rate)
            bar.set_postfix(loss=f"{mean_loss:.4g}", collisions=f"{rate:.2%}", best=f"{state.best_collision_rate:.2%}")
            if 10 * (epoch + 1) // settings.epochs > 10 * (epoch + 1 - settings.evaluate_every) // settings.epochs:
                logger.info(
                    "%s: epoch %d of %d, loss %.4g, collision rate %.2f %%",
                    description, epoch + 1, settings.epochs, mean_loss, 100 * rate,
                )  # fmt: skip
            if path is not None:
                _save_checkpoint(path, module, optimizer, identity, state, best)
    module.load_state_dict(best)
    module.eval()
    return state


def identity_of(settings: dict[str, object], vectors: dict[str, np.ndarray]) -> str:
    """SHA-256 over settings and data: a checkpoint of another fit must not be resumed."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(vectors):
        digest.update(f"{name}{vectors[name].shape}".encode())
        digest.update(np.ascontiguousarray(vectors[name]).data)
    return digest.hexdigest()


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
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in moments.items()}
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
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        number, key = name.split(".")
        moments.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return FitState(**json.loads(metadata["state"])), parts["best"]
