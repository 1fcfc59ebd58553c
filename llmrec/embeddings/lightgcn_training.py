"""Training of `LightGCN`: the graph, its layers, negatives, early stopping. The result is in `lightgcn.py`.

Order and negatives of an epoch come from the seed and the number of the epoch alone; that is why a resumed run ends in
the same vectors as one that was never interrupted.
"""

import copy
import logging
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from llmrec.data.filters import users_of
from llmrec.embeddings.epoch_checkpoint import EpochCheckpoint, Progress
from llmrec.errors import DataError, LlmrecError

if TYPE_CHECKING:
    from llmrec.data.interactions import InteractionDataset
    from llmrec.data.splits import EvaluationSet
    from llmrec.embeddings.lightgcn import LightGCN, LightGCNConfig

logger = logging.getLogger(__name__)

INITIAL_DEVIATION = 0.1  # of normal initial weights, as in the authors' code


class GraphNetwork(nn.Module):
    """What is trained: a vector for each user and item (layer 0), and the graph along which they spread.

    Args:
        config: Settings.
        pairs: int64 [E, 2], user and item of each edge, all different, sorted by user and then item.
        num_users: Users; those without an edge too.
        num_items: Items; likewise.
    """

    def __init__(self, config: "LightGCNConfig", pairs: np.ndarray, num_users: int, num_items: int):
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.user_table = nn.Embedding(num_users, config.width)
            self.item_table = nn.Embedding(num_items, config.width)
            nn.init.normal_(self.user_table.weight, std=INITIAL_DEVIATION)
            nn.init.normal_(self.item_table.weight, std=INITIAL_DEVIATION)
        self.register_buffer("adjacency", normalized_adjacency(pairs, num_users, num_items), persistent=False)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of all users and all items, the mean over layers 0 to K (equation 4), float32 [U, D] and [N, D]."""
        layer = torch.cat([self.user_table.weight, self.item_table.weight])
        total = layer
        for _ in range(self.config.num_layers):
            layer = _SymmetricProduct.apply(self.adjacency, layer)
            total = total + layer
        users, items = (total / (self.config.num_layers + 1)).split(
            [self.user_table.num_embeddings, self.item_table.num_embeddings]
        )
        return users, items

    def loss(self, users: torch.Tensor, items: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        """BPR with L2 on the layer-0 vectors of the batch (equation 15), both as means over the batch.

        Args:
            users: int64 [B].
            items: int64 [B], taken by them.
            negatives: int64 [B], not taken by them.

        Returns:
            Scalar: mean of -ln σ(score of item - score of negative), plus `l2_weight` times half the mean squared
            length of the three layer-0 vectors together.
        """
        user_vectors, item_vectors = self()
        chosen = user_vectors[users]
        margin = (chosen * (item_vectors[items] - item_vectors[negatives])).sum(dim=1)
        own = self.user_table(users).square().sum()
        own = own + self.item_table(items).square().sum() + self.item_table(negatives).square().sum()
        return F.softplus(-margin).mean() + self.config.l2_weight * 0.5 * own / len(users)


class _SymmetricProduct(torch.autograd.Function):
    """Sparse times dense; a symmetric matrix is its own transpose, which autograd would otherwise make each step."""

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix @ dense

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, ctx.matrix @ gradients[0]


def normalized_adjacency(pairs: np.ndarray, num_users: int, num_items: int) -> torch.Tensor:
    """D^-1/2 A D^-1/2 of the graph of users and items (equation 8), sparse CSR float32 [U + N, U + N].

    Args:
        pairs: int64 [E, 2], user and item of each edge, all different.
        num_users: U; users are the first rows.
        num_items: N.
    """
    users, items = pairs[:, 0], pairs[:, 1] + num_users
    size = num_users + num_items
    rows, columns = np.concatenate([users, items]), np.concatenate([items, users])
    order = np.lexsort((columns, rows))
    rows, columns = rows[order], columns[order]
    degrees = np.bincount(rows, minlength=size)
    values = 1 / np.sqrt(degrees[rows].astype(np.float64) * degrees[columns])
    starts = np.concatenate([[0], np.cumsum(degrees)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(
            torch.from_numpy(starts),
            torch.from_numpy(columns),
            torch.from_numpy(values.astype(np.float32)),
            (size, size),
            check_invariants=True,
        )


def train_lightgcn(
    model: "LightGCN",
    train: "InteractionDataset",
    validation: "EvaluationSet | None" = None,
    *,
    checkpoint_dir: str | Path | None = None,
) -> None:
    """Trains vectors and puts them into `model`, on its device; see `LightGCN.fit` for the arguments."""
    config, device = model.config, model.item_vectors.device
    pairs = distinct_pairs(train)
    network = GraphNetwork(config, pairs, train.num_users, train.num_items).to(device)
    examples = None if validation is None else known_examples(train, validation)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    progress, best = Progress(), copy.deepcopy(network.state_dict())
    checkpoint = None
    if checkpoint_dir is not None:
        checkpoint = EpochCheckpoint(Path(checkpoint_dir) / "lightgcn_last_epoch", config, train, validation)
        if checkpoint.exists():
            progress, best = checkpoint.load(network, optimizer)
            logger.info("LightGCN goes on after epoch %d, from %s", progress.epochs_done, checkpoint.folder)

    with tqdm(total=config.epochs, initial=progress.epochs_done, desc="LightGCN", unit="epoch", disable=None) as bar:
        while progress.epochs_done < config.epochs and progress.epochs_without_gain < config.patience:
            loss = _train_epoch(network, optimizer, pairs, epoch=progress.epochs_done)
            progress.epochs_done += 1
            ndcg = None if examples is None else validation_ndcg(network, pairs, *examples)
            if ndcg is None or ndcg > progress.best_ndcg:
                progress.best_ndcg = -1.0 if ndcg is None else ndcg
                progress.best_epoch, progress.epochs_without_gain = progress.epochs_done, 0
                best = copy.deepcopy(network.state_dict())
            else:
                progress.epochs_without_gain += 1
            shown = "" if ndcg is None else f", validation NDCG@10 {ndcg:.4f}"
            logger.info("LightGCN epoch %d of %d: loss %.4f%s", progress.epochs_done, config.epochs, loss, shown)
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if checkpoint is not None:
                checkpoint.save(network, optimizer, progress, best)
    network.load_state_dict(best)
    _keep_vectors(model, network, pairs)
    model.eval()
    model.training_facts["epochs"] = progress.epochs_done
    model.training_facts["best_epoch"] = progress.best_epoch
    if validation is not None:
        model.training_facts["validation_ndcg@10"] = progress.best_ndcg


def distinct_pairs(train: "InteractionDataset") -> np.ndarray:
    """User and item of each edge, int64 [E, 2], sorted; an item that a user took several times is one edge.

    Raises:
        DataError: There is no edge, or every user took every item.
    """
    keys = np.unique(users_of(train.offsets).astype(np.int64) * train.num_items + train.flat_items)
    if not len(keys) or len(keys) == train.num_users * train.num_items:
        what = "has no interactions" if not len(keys) else "has every user with every item"
        raise DataError(f"{train.name!r} {what}: LightGCN has nothing to learn from")
    return np.stack(np.divmod(keys, train.num_items), axis=1)


def draw_negatives(users: np.ndarray, keys: np.ndarray, num_items: int, generator: np.random.Generator) -> np.ndarray:
    """An item that each user didn't take, uniformly, int64 [B]; no user may have taken all.

    Args:
        users: int64 [B].
        keys: int64 [E], user * num_items + item of each edge, sorted.
        num_items: N.
        generator: Of the draws.
    """
    negatives = generator.integers(num_items, size=len(users))
    waiting = np.arange(len(users))
    while len(waiting):
        wanted = users[waiting] * num_items + negatives[waiting]
        places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        waiting = waiting[keys[places] == wanted]
        negatives[waiting] = generator.integers(num_items, size=len(waiting))
    return negatives


def known_examples(train: "InteractionDataset", examples: "EvaluationSet") -> tuple[np.ndarray, np.ndarray]:
    """Rows of the users that have training interactions, and their targets, both int64.

    Raises:
        DataError: There is no such example.
    """
    row_of = {user_id: row for row, user_id in enumerate(train.user_ids)}
    users = np.fromiter((row_of.get(user_id, -1) for user_id in examples.user_ids), np.int64, len(examples))
    lengths = np.append(np.diff(train.offsets), 0)  # of row -1, too
    known = lengths[users] > 0
    if not known.any():
        raise DataError(
            f"none of the {len(examples)} {examples.name} examples is of a user with training interactions, and"
            " LightGCN knows no others: pass None to train without early stopping"
        )
    if not known.all():
        logger.info("%d of %d examples are of users without training interactions", (~known).sum(), len(known))
    return users[known], examples.targets[known].astype(np.int64)


@torch.no_grad()
def validation_ndcg(
    network: GraphNetwork,
    pairs: np.ndarray,
    users: np.ndarray,
    targets: np.ndarray,
    *,
    k: int = 10,
    batch_size: int = 1024,
) -> float:
    """NDCG@k with one target: mean of 1 / log2(rank + 1) where the rank is at most k.

    Ranked are all items but those that the user took in training; a target that is one of these counts 0.
    """
    user_vectors, item_vectors = network()
    device = item_vectors.device
    starts = np.searchsorted(pairs[:, 0], np.arange(len(user_vectors) + 1))
    gain = 0.0
    for start in range(0, len(users), batch_size):
        rows = users[start : start + batch_size]
        scores = user_vectors[torch.from_numpy(rows).to(device)] @ item_vectors.T
        lengths = starts[rows + 1] - starts[rows]
        places = np.arange(lengths.sum()) + np.repeat(starts[rows] - np.cumsum(lengths) + lengths, lengths)
        taken = torch.from_numpy(pairs[places, 1]).to(device)
        scores[torch.from_numpy(np.repeat(np.arange(len(rows)), lengths)).to(device), taken] = -torch.inf
        wanted = scores.gather(1, torch.from_numpy(targets[start : start + batch_size]).to(device)[:, None])
        ranks = ((scores > wanted).sum(dim=1) + 1).double()
        found = (ranks <= k) & torch.isfinite(wanted[:, 0])
        gain += float((1 / (ranks[found] + 1).log2()).sum())
    return gain / len(users)


def _train_epoch(network: GraphNetwork, optimizer: torch.optim.Adam, pairs: np.ndarray, *, epoch: int) -> float:
    """One pass over all interactions in random order; returns the mean loss."""
    config, device = network.config, network.item_table.weight.device
    num_items = network.item_table.num_embeddings
    generator = np.random.default_rng([config.seed, epoch])
    learnable = np.bincount(pairs[:, 0], minlength=network.user_table.num_embeddings) < num_items
    order = generator.permutation(np.flatnonzero(learnable[pairs[:, 0]]))  # who took all items has no negative
    keys = pairs[:, 0] * num_items + pairs[:, 1]
    negatives = draw_negatives(pairs[order, 0], keys, num_items, generator)
    total = 0.0
    for start in range(0, len(order), config.batch_size):
        chosen = pairs[order[start : start + config.batch_size]]
        users, items = torch.from_numpy(chosen).to(device).T
        drawn = torch.from_numpy(negatives[start : start + config.batch_size]).to(device)
        loss = network.loss(users, items, drawn)
        value = loss.item()
        if not math.isfinite(value):
            raise LlmrecError(
                f"the LightGCN loss is {value} in epoch {epoch + 1}; lower learning_rate ({config.learning_rate})"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += value * len(chosen)
    return total / len(order)


@torch.no_grad()
def _keep_vectors(model: "LightGCN", network: GraphNetwork, pairs: np.ndarray) -> None:
    """The vectors after all layers, zeros for users and items without an edge: nothing was learnt of them."""
    users, items = network()
    for column, vectors, target in ((0, users, model.user_vectors), (1, items, model.item_vectors)):
        reached = np.zeros(len(vectors), bool)
        reached[pairs[:, column]] = True
        target.copy_(vectors * torch.from_numpy(reached).to(vectors.device)[:, None])
