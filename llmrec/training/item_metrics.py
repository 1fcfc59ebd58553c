"""Recall and NDCG of the model as it is during training: real constrained decoding, item by item.

The validation loss and the items that are recommended don't turn at the same step: the loss may grow while the ranking
still improves. What is reported in the end can be chosen by as well: `metric_for_best_model: ndcg@10`.

This module knows a recommender and examples. It knows no trainer, and works under every engine of accelerate.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, reduce
from torch import Tensor, nn

from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import EvaluationSet
from llmrec.errors import SettingsError
from llmrec.evaluation.evaluator import evaluate
from llmrec.recommender import Recommender


class ItemMetrics:
    """What a recommender reaches on some examples with the model of the moment.

    Called by `RankingTrainer.evaluate` on all processes, which share the examples out. The recommender keeps the model
    it was called with last; the mode of the model, and everything else that training goes on with, is as it was.

    Args:
        recommender: Made of the model before it is trained; its model is the one that `RankingTrainer` is given.
        examples: Histories and the items that came next; a sample of the validation part.
        dataset: Their catalogue.
        ks: Where the answers are cut; the longest is asked for.
        num_beams: Width of the search; by default the recommender's own.
        exclude_seen: Whether items of a history are left out of its answer; the papers keep them.
        batch_size: Histories searched at once.

    Raises:
        SettingsError: There are no examples, or a k below 1.

    Example:
        >>> metrics = ItemMetrics(recommender, splits.validation.sample(1000), splits.dataset)  # doctest: +SKIP
        >>> metrics(recommender.model)  # doctest: +SKIP
        {'ndcg@10': 0.0312, 'recall@10': 0.0566}
    """

    def __init__(
        self,
        recommender: Recommender,
        examples: EvaluationSet,
        dataset: InteractionDataset,
        *,
        ks: Sequence[int] = (10,),
        num_beams: int | None = None,
        exclude_seen: bool = False,
        batch_size: int = 16,
    ):
        if not len(examples) or not ks or min(ks) < 1:
            raise SettingsError(
                f"item metrics need examples and ks of at least 1: there are {len(examples)} examples, ks is {ks}"
            )
        self.recommender = recommender
        self.examples = examples
        self.dataset = dataset
        self.ks = tuple(ks)
        self.num_beams = num_beams
        self.exclude_seen = exclude_seen
        self.batch_size = batch_size

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics: "ndcg@10", "recall@10"."""
        return tuple(f"{name}@{k}" for k in self.ks for name in ("ndcg", "recall"))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The metrics by name, the same on every process.

        Args:
            model: As the engine has wrapped it, or plain.

        Raises:
            DataError: The model computes NaN.
        """
        self.recommender.model = extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)
        result = evaluate(
            self,
            self.dataset,
            self.examples,
            ks=self.ks,
            exclude_seen=self.exclude_seen,
            name="llmrec",
            accelerator=cast(Any, _AllProcesses()),
        )
        return {name: result.metrics[name] for name in self.names}

    def recommend(self, history: Any, k: int = 10, *, exclude_seen: bool = True) -> Any:
        """The recommender's, in batches of `batch_size` and without a progress bar of its own."""
        return self.recommender.recommend(
            history,
            k,
            exclude_seen=exclude_seen,
            num_beams=self.num_beams,
            batch_size=self.batch_size,
            progress=False,
        )


class _AllProcesses:
    """What `evaluate` asks of an accelerator, of the processes that run: the trainer's comes after these metrics."""

    def __init__(self) -> None:
        state: Any = PartialState()
        self.process_index: int = state.process_index
        self.num_processes: int = state.num_processes
        self.device: torch.device = state.device

    def reduce(self, tensor: Tensor, *, reduction: str) -> Tensor:
        return cast(Tensor, reduce(tensor, reduction=reduction))
