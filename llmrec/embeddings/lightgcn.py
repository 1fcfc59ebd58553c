"""Item vectors out of who took what: LightGCN.

X. He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation", SIGIR 2020
(arXiv 2002.02126). Order and time play no part: items are near each other where the same users took them. Here it is a
teacher for item tokenizers (`item_embeddings`), trained in `lightgcn_training.py`; it knows neither item text nor
language models, and recommends to nobody but the users it was trained on (`scores`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from llmrec.data.item_order import ItemIndex
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.embeddings.saved_models import WEIGHTS_NAME, SavedModel, read_model, save_model
from llmrec.embeddings.weights import load_exactly
from llmrec.errors import DataError, SettingsError

if TYPE_CHECKING:
    from llmrec.data.interactions import InteractionDataset
    from llmrec.data.splits import EvaluationSet


@dataclass(frozen=True)
class LightGCNConfig:
    """Settings of `LightGCN`.

    Defaults are the paper's (section 4.1.2) and those of its code, with the batch of the latter (2048; the paper says
    1024). The paper trains up to 1,000 epochs with embeddings of width 64.

    Raises:
        SettingsError: A value can't work.
    """

    width: int = field(default=64, metadata={"help": "Values in a vector."})
    num_layers: int = field(default=3, metadata={"help": "K, steps along the graph."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's, constant."})
    l2_weight: float = field(
        default=1e-4, metadata={"help": "Of the squared length of the batch's own (layer 0) vectors; not decoupled."}
    )
    batch_size: int = field(default=2048, metadata={"help": "Interactions a step, each with one negative."})
    epochs: int = field(default=1000, metadata={"help": "At most; each visits every interaction once."})
    patience: int = field(default=20, metadata={"help": "Epochs without a better validation NDCG@10 before stopping."})
    seed: int = field(default=0, metadata={"help": "Fixes initial weights, order and negatives on one machine."})

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "batch_size", "epochs", "patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingsError(f"{name} is {value!r}: it must be an integer of at least 1")
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate is {self.learning_rate!r}: it must be above 0")
        if not self.l2_weight >= 0:
            raise SettingsError(f"l2_weight is {self.l2_weight!r}: it must be at least 0")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise SettingsError(f"seed is {self.seed!r}: it must be an integer of at least 0")


class LightGCN(nn.Module):
    """The trained vectors of users and items, after the mean over all layers: their inner products are scores.

    Departures from the paper's code: an epoch visits every interaction once in random order, where the code draws
    users at random and one of their items each; early stopping by NDCG@10.

    Usually made by `fit` or `from_pretrained`.

    Args:
        config: Settings.
        item_ids: IDs of the catalogue in row order.
        num_users: Users of the training part, in its order.
        training: What is known of its training, for cards and `item_embeddings`; JSON values only.
    """

    user_vectors: torch.Tensor
    item_vectors: torch.Tensor

    def __init__(
        self,
        config: LightGCNConfig,
        item_ids: Sequence[str],
        num_users: int,
        training: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.config = config
        self.item_index = ItemIndex(item_ids)
        if not len(self.item_index):
            raise DataError("the catalogue is empty: there is nothing to learn vectors of")
        self.training_facts = dict(training or {})
        self.register_buffer("user_vectors", torch.zeros(num_users, config.width))
        self.register_buffer("item_vectors", torch.zeros(len(self.item_index), config.width))

    @property
    def item_ids(self) -> tuple[str, ...]:
        """Outside IDs of the catalogue in row order."""
        return self.item_index.item_ids

    def scores(self, users: np.ndarray) -> torch.Tensor:
        """Score of every item for users of the training part; only the order within a row means something.

        Args:
            users: int [B], rows of the training part's users.

        Returns:
            float32 [B, N] on the model's device, items that a user took already included.
        """
        rows = torch.from_numpy(np.asarray(users, dtype=np.int64)).to(self.user_vectors.device)
        return self.user_vectors[rows] @ self.item_vectors.T

    def item_embeddings(self) -> ItemEmbeddings:
        """Item vectors after the mean over all layers, float32 [N, D], row i = item i; the source names what they saw.

        Of items that nobody took in the training part nothing is known (their vectors were random, and pushed away as
        negatives): they get `present` False, and the mean of the others.
        """
        source = {"kind": "collaborative", "model": "LightGCN", "config": asdict(self.config), **self.training_facts}
        vectors = self.item_vectors.detach().cpu().numpy().copy()
        taken = np.asarray(vectors.any(axis=1))  # training leaves zeros where nothing is known
        vectors[~taken] = np.nan
        return ItemEmbeddings(self.item_ids, vectors, source, present=taken)

    @classmethod
    def fit(
        cls,
        train: "InteractionDataset",
        config: LightGCNConfig | None = None,
        validation: "EvaluationSet | None" = None,
        *,
        checkpoint_dir: str | Path | None = None,
        device: str | None = None,
    ) -> "LightGCN":
        """Trains a model on the training part of a data set.

        Args:
            train: Training interactions only (`DatasetSplits.train`): the model can't tell whether test items are in.
            config: Settings, None for the defaults.
            validation: Examples for early stopping: the vectors of the epoch with the highest NDCG@10 are the result.
                Ranked are all items that the user didn't take in `train`, as in the paper. Examples of users without
                training interactions are left out. None: all epochs are trained and the last vectors are the result.
            checkpoint_dir: Folder for the state after each epoch. A later call with the same data and settings goes on
                from there and ends in the same vectors as one that was never interrupted.
            device: A torch device, None for the first GPU or else the CPU.

        Raises:
            DataError: There is nothing to learn from; no validation example is of a user with training interactions;
                the checkpoint is of other data or settings.
        """
        from llmrec.embeddings.lightgcn_training import train_lightgcn

        config = config or LightGCNConfig()
        facts = {"dataset": train.name, "dataset_fingerprint": train.fingerprint, "part": "training part only"}
        model = cls(config, train.item_ids, train.num_users, facts)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        train_lightgcn(model, train, validation, checkpoint_dir=checkpoint_dir)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json, model.safetensors and items.parquet; the folder appears whole or not at all.

        Vectors of users are in it, their IDs are not.

        Raises:
            DataError: The folder holds something else than a saved model, which would be lost.
        """
        items = pa.table({"item_id": list(self.item_ids)})
        save_model(folder, "LightGCN", SavedModel(self.config, self.training_facts, items, self.state_dict()))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | None = None) -> "LightGCN":
        """Reads what `save_pretrained` wrote.

        Args:
            folder: The folder.
            device: A torch device, None for the CPU.

        Raises:
            MissingPartError: A file or a tensor is missing.
            DataError: The folder holds another kind of model, a later format, or tensors of other shapes.
        """
        saved = read_model(folder, "LightGCN", LightGCNConfig)
        num_users = len(saved.state["user_vectors"]) if "user_vectors" in saved.state else 0
        model = cls(saved.config, saved.items["item_id"].to_pylist(), num_users, saved.training)
        load_exactly(model, saved.state, Path(folder) / WEIGHTS_NAME)
        return model.to(device or "cpu").eval()
