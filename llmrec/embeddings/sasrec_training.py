"""Training of `SASRec`: batches, schedule, early stopping, checkpoints. The model itself is in `collaborative.py`.

Every position of a history predicts the item after it, so one pass over a history trains on all its prefixes. Dropout
and order of an epoch come from the seed and the number of the epoch alone; that is why a resumed run ends in the same
weights as one that was never interrupted.
"""

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from llmrec.embeddings.catalogue_cross_entropy import catalogue_cross_entropy
from llmrec.embeddings.epoch_checkpoint import EpochCheckpoint, Progress
from llmrec.embeddings.sasrec_layers import pad_right
from llmrec.errors import DataError, LlmrecError

if TYPE_CHECKING:
    from llmrec.data.interactions import InteractionDataset
    from llmrec.data.splits import EvaluationSet
    from llmrec.embeddings.collaborative import SASRec

logger = logging.getLogger(__name__)

WARMUP_SHARE = 0.05
LENGTH_GROUPS = 6  # parts of a batch, by length, that pass the blocks one after the other: little padding


def train_sasrec(
    model: "SASRec",
    train: "InteractionDataset",
    validation: "EvaluationSet | None" = None,
    *,
    checkpoint_dir: str | Path | None = None,
) -> None:
    """Trains `model` in place on its device; see `SASRec.fit` for the arguments.

    Histories longer than `max_history` are cut from their end into windows of that many predictions.
    """
    config = model.config
    windows = training_windows(train, config.max_history)
    if not windows:
        raise DataError(
            f"no user of {train.name!r} has two training interactions: there is no next item to learn from"
        )
    if validation is not None and not len(validation):
        raise DataError("the validation set is empty: pass None to train without early stopping")
    model.item_counts.copy_(torch.from_numpy(np.bincount(train.flat_items, minlength=train.num_items)))

    optimizer = _optimizer(model)
    progress, best = Progress(), copy.deepcopy(model.state_dict())
    checkpoint = None
    if checkpoint_dir is not None:
        checkpoint = EpochCheckpoint(Path(checkpoint_dir) / "sasrec_last_epoch", config, train, validation)
    if checkpoint is not None and checkpoint.exists():
        progress, best = checkpoint.load(model, optimizer)
        logger.info("SASRec goes on after epoch %d, from %s", progress.epochs_done, checkpoint.folder)

    steps = math.ceil(len(windows) / config.batch_size)
    total = steps * config.epochs
    with tqdm(total=total, initial=progress.epochs_done * steps, desc="SASRec", unit="step", disable=None) as bar:
        while progress.epochs_done < config.epochs and progress.epochs_without_gain < config.patience:
            loss = _train_epoch(model, optimizer, windows, epoch=progress.epochs_done, total_steps=total, bar=bar)
            progress.epochs_done += 1
            ndcg = None if validation is None else validation_ndcg(model, validation)
            if ndcg is None or ndcg > progress.best_ndcg:
                progress.best_ndcg = -1.0 if ndcg is None else ndcg
                progress.best_epoch, progress.epochs_without_gain = progress.epochs_done, 0
                best = copy.deepcopy(model.state_dict())
            else:
                progress.epochs_without_gain += 1
            shown = "" if ndcg is None else f", validation NDCG@10 {ndcg:.4f}"
            logger.info("SASRec epoch %d of %d: loss %.4f%s", progress.epochs_done, config.epochs, loss, shown)
            if checkpoint is not None:
                checkpoint.save(model, optimizer, progress, best)
    model.load_state_dict(best)
    model.eval()
    model.training_facts["epochs"] = progress.epochs_done
    model.training_facts["best_epoch"] = progress.best_epoch
    if validation is not None:
        model.training_facts["validation_ndcg@10"] = progress.best_ndcg


def training_windows(train: "InteractionDataset", max_history: int) -> list[np.ndarray]:
    """Runs of 2 to `max_history` + 1 items, int32; each item after the first of a run is predicted.

    A longer history is cut from its end; consecutive runs share one item, so no prediction is lost.
    """
    windows = []
    for user in range(train.num_users):
        history = train.history(user)
        for end in range(len(history), 1, -max_history):
            windows.append(history[max(0, end - max_history - 1) : end])
    return windows


def validation_ndcg(model: "SASRec", examples: "EvaluationSet", *, k: int = 10, batch_size: int = 256) -> float:
    """NDCG@k with one target: mean of 1 / log2(rank + 1) where the rank is at most k. Full ranking, seen kept."""
    lengths = np.diff(examples.offsets)
    order = np.argsort(lengths, kind="stable")  # little padding in a batch
    gain = 0.0
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        scores = model.log_probabilities([examples.history(number) for number in numbers])
        targets = torch.from_numpy(examples.targets[numbers].astype(np.int64)).to(scores.device)[:, None]
        ranks = (scores > scores.gather(1, targets)).sum(dim=1) + 1
        gain += float((1 / (ranks[ranks <= k] + 1).double().log2()).sum())
    return gain / len(examples)


def _optimizer(model: "SASRec") -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": model.config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=model.config.learning_rate)


def _learning_rate(step: int, total_steps: int, peak: float) -> float:
    """Linear warm-up times a half cosine that reaches 0 at the end."""
    warmup = min(1.0, (step + 1) / max(1.0, WARMUP_SHARE * total_steps))
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def _train_epoch(
    model: "SASRec",
    optimizer: torch.optim.AdamW,
    windows: list[np.ndarray],
    *,
    epoch: int,
    total_steps: int,
    bar: "tqdm[Any]",
) -> float:
    """One pass over all windows; returns the mean loss a prediction, in nats."""
    config, device = model.config, model.item_table.weight.device
    order_seed, dropout_seed = np.random.SeedSequence([config.seed, epoch]).generate_state(2)
    order = np.random.default_rng(order_seed).permutation(len(windows))
    step = epoch * math.ceil(len(windows) / config.batch_size)
    total_loss, predictions = 0.0, 0
    model.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(dropout_seed))
        for start in range(0, len(order), config.batch_size):
            batch = [windows[number] for number in order[start : start + config.batch_size]]
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, total_steps, config.learning_rate)
            states, targets = _states_and_targets(model, batch)
            loss = catalogue_cross_entropy(
                states, model.output_table(), targets, dtype=getattr(torch, config.loss_dtype)
            )
            value = loss.item()
            if not math.isfinite(value):
                raise LlmrecError(
                    f"the SASRec loss is {value} in epoch {epoch + 1}; lower learning_rate ({config.learning_rate}) or"
                    f" raise temperature ({config.temperature})"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            total_loss += value * len(targets)
            predictions += len(targets)
            bar.update()
            bar.set_postfix(loss=f"{value:.3f}", epoch=epoch + 1, refresh=False)
    return total_loss / predictions


def _states_and_targets(model: "SASRec", batch: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """States of all positions that predict, float32 [M, D], and the items they should predict, int64 [M]."""
    device = model.item_table.weight.device
    states: list[torch.Tensor] = []
    targets: list[np.ndarray] = []
    for windows in _length_groups(batch):
        items, lengths = pad_right([window[:-1] for window in windows])
        filled = torch.arange(items.shape[1]) < lengths[:, None]
        states.append(model(items.to(device))[filled.to(device)])
        targets.extend(window[1:] for window in windows)
    return torch.cat(states), torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device)


def _length_groups(batch: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    by_length = sorted(batch, key=len)
    size = math.ceil(len(batch) / LENGTH_GROUPS)
    for start in range(0, len(by_length), size):
        yield by_length[start : start + size]
