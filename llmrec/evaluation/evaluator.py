"""Evaluates anything that recommends: full ranking, item level, one process or several.

An answer counts where the target's *item ID* is in it, never where only its semantic ID is: colliding codes earn
nothing. The recommender ranks the whole catalogue; there are no sampled negatives. This module knows no recommender,
and of a data set only its item IDs.
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from tqdm.auto import tqdm

from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import EvaluationSet
from llmrec.errors import DataError, SettingsError
from llmrec.evaluation.metrics import all_metrics
from llmrec.files import check_format, read_json, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT_VERSION = 1
SEEN_KEPT = "seen items kept"
SEEN_LEFT_OUT = "seen items left out"


class CanRecommend(Protocol):
    """What `evaluate` needs of a recommender; `llmrec.data.recommendation` describes the contract."""

    def recommend(self, history: Any, k: int = 10, *, exclude_seen: bool = True) -> Any:
        """One list of recommendations a history, best first, each with `item_id`."""


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """What one recommender reached under one protocol.

    Attributes:
        name: The recommender, as in the rows of a results table.
        metrics: Name such as "recall@10" to its mean over examples.
        num_examples: Examples, each counted once.
        exclude_seen: Whether items of the history were left out of the answers.
        ranks: int64 [num_examples], 1-based rank of each target, 0 where it was not among the first `max(ks)`.
        seconds: Wall time, of all processes together where there are several.
        dataset: Name of the data set.
        split: "validation" or "test".
        examples: Fingerprint of the examples; only results on equal ones are comparable.
    """

    name: str
    metrics: dict[str, float]
    num_examples: int
    exclude_seen: bool
    ranks: np.ndarray = field(repr=False)
    seconds: float
    dataset: str = ""
    split: str = ""
    examples: str = ""

    @property
    def protocol(self) -> str:
        """How items of the history were treated, in words."""
        return SEEN_LEFT_OUT if self.exclude_seen else SEEN_KEPT

    def to_json(self, *, with_ranks: bool = True) -> dict[str, Any]:
        """A dict that `json` can write and `from_json` reads.

        Args:
            with_ranks: Whether the ranks of the examples go along; significance tests need them.
        """
        content: dict[str, Any] = {
            "name": self.name,
            "dataset": self.dataset,
            "split": self.split,
            "protocol": self.protocol,
            "exclude_seen": self.exclude_seen,
            "num_examples": self.num_examples,
            "metrics": self.metrics,
            "seconds": self.seconds,
            "examples": self.examples,
        }
        return content | {"ranks": self.ranks.tolist()} if with_ranks else content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Reads what `to_json` gave; without ranks the result can be shown but not tested for significance."""
        known = {key: content[key] for key in content if key not in ("protocol", "ranks")}
        return cls(**known, ranks=np.asarray(content.get("ranks", []), np.int64))

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"{self.name} ({self.protocol}, {self.num_examples} examples): {figures}"


def evaluate(
    recommender: CanRecommend,
    dataset: InteractionDataset,
    examples: EvaluationSet,
    *,
    ks: Sequence[int] = (5, 10),
    exclude_seen: bool = False,
    batch_size: int = 256,
    name: str | None = None,
    accelerator: "Accelerator | None" = None,
) -> EvaluationResult:
    """Asks for recommendations for every example and looks where the target stands.

    With several processes each takes every `num_processes`-th example; every example is counted exactly once, and all
    processes return the same result as a single one would. All call `recommend` equally often, repeating an example
    where they have none left, because a sharded model needs every process in each forward.

    A target that stands in its own history (a repeated interaction) can't be found with `exclude_seen`, and counts as
    missed.

    Args:
        recommender: Has `recommend(histories, k, exclude_seen=...)`.
        dataset: Its catalogue gives the item IDs of the rows in `examples`.
        examples: What to evaluate on.
        ks: Where to cut the answers; the longest is asked for.
        exclude_seen: False keeps items of the history among the answers, the protocol of the papers; True leaves them
            out, as in use. Say which beside every figure.
        batch_size: Histories per call of `recommend`.
        name: Of the recommender, in tables; its `name` or class by default.
        accelerator: Of the running processes; None: this process does all.

    Raises:
        SettingsError: No examples, or k or batch size below 1.
        DataError: The recommender gave another number of answers than it got histories, or more than k items.
    """
    if not len(examples):
        raise SettingsError(f"the examples {examples.name!r} are empty: evaluate on at least one")
    if not ks or min(ks) < 1 or batch_size < 1:
        raise SettingsError(f"ks is {ks} and batch_size {batch_size}: all must be at least 1")
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    started = time.perf_counter()
    ranks = np.zeros(len(examples), np.int64)
    counted = np.zeros(len(examples), np.int64)
    for batch, is_filler in tqdm(
        list(_batches(len(examples), batch_size, rank, world)),
        desc=f"evaluating on {examples.name}",
        unit="batch",
        disable=None if rank == 0 else True,
    ):
        found = _ranks_of_batch(recommender, dataset, examples, batch, max(ks), exclude_seen)
        if not is_filler:
            ranks[batch] = found
            counted[batch] += 1
    if accelerator is not None and world > 1:
        ranks, counted = _sum_over_processes(accelerator, ranks), _sum_over_processes(accelerator, counted)
    if not (counted == 1).all():
        raise DataError(f"{int((counted != 1).sum())} examples were not evaluated exactly once: a process was lost")
    return EvaluationResult(
        name=name or str(getattr(recommender, "name", None) or type(recommender).__name__),
        metrics=all_metrics(ranks, ks),
        num_examples=len(examples),
        exclude_seen=exclude_seen,
        ranks=ranks,
        seconds=time.perf_counter() - started,
        dataset=dataset.name,
        split=examples.name,
        examples=examples.fingerprint,
    )


def evaluate_both(
    recommender: CanRecommend, dataset: InteractionDataset, examples: EvaluationSet, **options: Any
) -> list[EvaluationResult]:
    """`evaluate` under both protocols, seen items kept and left out; what every results table needs."""
    return [evaluate(recommender, dataset, examples, exclude_seen=seen, **options) for seen in (False, True)]


def save_results(path: str | os.PathLike[str], results: Iterable[EvaluationResult]) -> None:
    """Writes results with their ranks as JSON, whole or not at all."""
    write_json(path, {"format_version": FORMAT_VERSION, "results": [result.to_json() for result in results]})


def load_results(path: str | os.PathLike[str]) -> list[EvaluationResult]:
    """Reads what `save_results` wrote.

    Raises:
        MissingPartError: There is no such file.
        DataError: It is something else, or of a later llmrec.
    """
    content = read_json(path)
    check_format(content if isinstance(content, dict) else {}, FORMAT_VERSION, path)
    return [EvaluationResult.from_json(result) for result in content["results"]]


def _batches(num_examples: int, batch_size: int, rank: int, world: int) -> Iterable[tuple[np.ndarray, bool]]:
    """This process's batches; as many as the first process has, the missing ones as fillers."""
    mine = np.arange(rank, num_examples, world)
    most = -(-num_examples // world)
    for start in range(0, most, batch_size):
        batch = mine[start : start + batch_size]
        yield (batch, False) if len(batch) else (mine[:1] if len(mine) else np.zeros(1, np.int64), True)


def _ranks_of_batch(
    recommender: CanRecommend,
    dataset: InteractionDataset,
    examples: EvaluationSet,
    batch: np.ndarray,
    k: int,
    exclude_seen: bool,
) -> np.ndarray:
    """Ranks of the targets of some examples, int64 [B]."""
    item_ids = dataset.item_ids
    histories = [[item_ids[row] for row in examples.history(example)] for example in batch]
    answers = recommender.recommend(histories, k, exclude_seen=exclude_seen)
    if len(answers) != len(histories):
        raise DataError(
            f"{type(recommender).__name__}.recommend gave {len(answers)} answers to {len(histories)} histories: it"
            " must give one list a history"
        )
    ranks = np.zeros(len(batch), np.int64)
    for number, (example, answer) in enumerate(zip(batch, answers, strict=True)):
        if len(answer) > k:
            raise DataError(
                f"{type(recommender).__name__}.recommend gave {len(answer)} items where {k} were asked for"
            )
        target = item_ids[examples.targets[example]]
        ranks[number] = next((place for place, item in enumerate(answer, start=1) if item.item_id == target), 0)
    return ranks


def _sum_over_processes(accelerator: "Accelerator", values: np.ndarray) -> np.ndarray:
    import torch

    tensor = torch.from_numpy(values).to(accelerator.device)
    return accelerator.reduce(tensor, reduction="sum").cpu().numpy()
