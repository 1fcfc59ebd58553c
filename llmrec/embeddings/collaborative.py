"""Item vectors out of who took what: SASRec.

W.-C. Kang and J. McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018. SASRec is two things here: a
recommender to hold results against (`recommend`), and a teacher whose item table tells an item tokenizer which items
are taken together (`item_embeddings`). This module is the model; its layers and settings are in
`sasrec_layers.py`, its training in `sasrec_training.py`. It knows neither item text nor language models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from llmrec.data.item_order import ItemIndex
from llmrec.data.recommendation import Recommendation, as_histories, check_k
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.embeddings.sasrec_layers import CausalBlock, SASRecConfig, pad_right
from llmrec.embeddings.saved_models import WEIGHTS_NAME, SavedModel, read_model, save_model
from llmrec.embeddings.weights import load_exactly
from llmrec.errors import DataError, ItemOrderError

if TYPE_CHECKING:
    from llmrec.data.interactions import InteractionDataset
    from llmrec.data.splits import EvaluationSet

__all__ = ["SASRec", "SASRecConfig"]

RECOMMEND_BATCH = 256  # histories scored at once: [256, 12101] float32 is 12 MB


class SASRec(nn.Module):
    """Self-attentive sequential recommendation: causal self-attention over the items of a history.

    Departures from the paper: cross-entropy over the full catalogue instead of a binary loss with one sampled
    negative; layer norm before each sub-layer (pre-norm), and a GELU layer four times as wide in between; scores are
    cosines over a temperature unless `temperature` is None. The output table is the input table, as in the paper.

    Usually made by `fit` or `from_pretrained`.

    Args:
        config: Settings.
        item_ids: IDs of the catalogue in row order.
        titles: Titles in the same order, None for none.
        training: What is known of its training, for cards and `item_embeddings`; JSON values only.
    """

    item_counts: torch.Tensor

    def __init__(
        self,
        config: SASRecConfig,
        item_ids: Sequence[str],
        titles: Sequence[str] | None = None,
        training: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.config = config
        self.item_index = ItemIndex(item_ids)
        self.titles = tuple(titles) if titles is not None else ("",) * len(self.item_index)
        if len(self.titles) != len(self.item_index):
            raise ItemOrderError(f"{len(self.titles)} titles for {len(self.item_index)} items")
        if not len(self.item_index):
            raise DataError("the catalogue is empty: there is nothing to recommend")
        self.training_facts = dict(training or {})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.item_table = nn.Embedding(len(self.item_index), config.width)
            self.position_table = nn.Embedding(config.max_history, config.width)
            self.embedding_dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.num_layers))
            self.final_norm = nn.LayerNorm(config.width)
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
        self.register_buffer("item_counts", torch.zeros(len(self.item_index), dtype=torch.int64))

    @property
    def item_ids(self) -> tuple[str, ...]:
        """Outside IDs of the catalogue in row order."""
        return self.item_index.item_ids

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """State after each item; the inner product with a row of `output_table` is the score of that item coming next.

        Args:
            items: int64 [B, T], rows of the catalogue, oldest first, T at most `max_history`. Shorter histories are
                padded on the right with any row: a position only sees what stands left of it.

        Returns:
            float32 [B, T, D]. With a temperature these are unit vectors divided by it.
        """
        states = self.item_table(items) + self.position_table.weight[: items.shape[1]]
        states = self.embedding_dropout(states)
        for block in self.blocks:
            states = block(states)
        states = self.final_norm(states)
        if self.config.temperature is not None:
            states = F.normalize(states, dim=-1) / self.config.temperature
        return states

    def output_table(self) -> torch.Tensor:
        """The item table as scores use it, float32 [N, D]: rows of length 1 where there is a temperature."""
        if self.config.temperature is None:
            return self.item_table.weight
        return F.normalize(self.item_table.weight, dim=-1)

    @torch.no_grad()
    def log_probabilities(self, histories: Sequence[np.ndarray]) -> torch.Tensor:
        """Natural log-probability of every item coming next.

        Args:
            histories: Rows of the catalogue, oldest first; only the latest `max_history` are read. After an empty
                history the items have their share in the training part, (count + 1) / (total + N).

        Returns:
            float32 [len(histories), N], on the model's device; each row sums to 1 in probability.
        """
        was_training = self.training
        self.eval()
        device = self.item_table.weight.device
        smoothed = self.item_counts.double() + 1
        result = (smoothed / smoothed.sum()).log().float().repeat(len(histories), 1)
        filled = [number for number, history in enumerate(histories) if len(history)]
        if filled:
            items, lengths = pad_right([histories[number][-self.config.max_history :] for number in filled])
            states = self(items.to(device))
            last = states[torch.arange(len(filled), device=device), lengths.to(device) - 1]
            result[filled] = (last @ self.output_table().T).log_softmax(dim=-1)
        self.train(was_training)
        return result

    def recommend(
        self,
        history: Sequence[str] | Sequence[Sequence[str]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
    ) -> list[Recommendation] | list[list[Recommendation]]:
        """The `k` most probable next items, best first.

        Args:
            history: Item IDs oldest first, or a sequence of such sequences. `[]` is one empty history: it is answered
                by how often items were taken in the training part.
            k: Items wanted; fewer come back where the catalogue, less the seen items, holds fewer.
            exclude_seen: Leave out every item of the history, those older than `max_history` too.

        Returns:
            One list of recommendations, or one a history where a sequence of histories was given. The score is the
            natural log-probability over the full catalogue (seen items included, also where they are left out).

        Raises:
            UnknownItemError: A history holds an item that the catalogue doesn't.
            SettingsError: `k` is below 1.
        """
        histories, single = as_histories(history)
        k = check_k(k)
        rows = [self.item_index.rows(entry) for entry in histories]
        answers: list[list[Recommendation]] = [[] for _ in rows]
        by_length = sorted(range(len(rows)), key=lambda number: len(rows[number]))  # little padding in a batch
        for start in range(0, len(rows), RECOMMEND_BATCH):
            numbers = by_length[start : start + RECOMMEND_BATCH]
            scores = self.log_probabilities([rows[number] for number in numbers])
            if exclude_seen:
                for position, number in enumerate(numbers):
                    scores[position, torch.from_numpy(rows[number])] = -torch.inf
            best = scores.topk(min(k, scores.shape[1]), dim=1)
            for number, values, items in zip(numbers, best.values.tolist(), best.indices.tolist(), strict=True):
                ranked = sorted(zip(values, items, strict=True), key=lambda pair: (-pair[0], pair[1]))
                answers[number] = [
                    Recommendation(self.item_ids[item], value, self.titles[item])
                    for value, item in ranked
                    if value > -torch.inf
                ]
        return answers[0] if single else answers

    def item_embeddings(self) -> ItemEmbeddings:
        """The input table, float32 [N, D], row i = item i (there is no padding row); its source names what it saw."""
        source = {"kind": "collaborative", "model": "SASRec", "config": asdict(self.config), **self.training_facts}
        return ItemEmbeddings(self.item_ids, self.item_table.weight.detach().cpu().numpy(), source)

    @classmethod
    def fit(
        cls,
        train: "InteractionDataset",
        config: SASRecConfig | None = None,
        validation: "EvaluationSet | None" = None,
        *,
        checkpoint_dir: str | Path | None = None,
        device: str | None = None,
    ) -> "SASRec":
        """Trains a model on the training part of a data set.

        Args:
            train: Training interactions only (`DatasetSplits.train`): the model can't tell whether test items are in.
            config: Settings, None for the defaults.
            validation: Examples for early stopping: the weights of the epoch with the highest NDCG@10 (full ranking,
                seen items kept) are the result. None: all epochs are trained and the last weights are the result.
            checkpoint_dir: Folder for the state after each epoch. A later call with the same data and settings goes on
                from there and ends in the same weights as one that was never interrupted.
            device: A torch device, None for the first GPU or else the CPU.

        Raises:
            DataError: No user has two training interactions; the validation set is empty; the checkpoint is of other
                data or settings.
        """
        from llmrec.embeddings.sasrec_training import train_sasrec

        config = config or SASRecConfig()
        facts = {"dataset": train.name, "dataset_fingerprint": train.fingerprint, "part": "training part only"}
        model = cls(config, train.item_ids, train.titles, facts)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        train_sasrec(model, train, validation, checkpoint_dir=checkpoint_dir)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors and items.parquet; the folder appears whole or not at all.

        Raises:
            DataError: The folder holds something else than a saved SASRec, which would be lost.
        """
        items = pa.table({"item_id": list(self.item_ids), "title": list(self.titles)})
        save_model(folder, "SASRec", SavedModel(self.config, self.training_facts, items, self.state_dict()))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | None = None) -> "SASRec":
        """Reads what `save_pretrained` wrote.

        Args:
            folder: The folder.
            device: A torch device, None for the CPU.

        Raises:
            MissingPartError: A file or a tensor is missing.
            DataError: The folder holds another kind of model, a later format, or tensors of other shapes.
        """
        saved = read_model(folder, "SASRec", SASRecConfig)
        items = saved.items
        model = cls(saved.config, items["item_id"].to_pylist(), items["title"].to_pylist(), saved.training)
        load_exactly(model, saved.state, Path(folder) / WEIGHTS_NAME)
        return model.to(device or "cpu").eval()
