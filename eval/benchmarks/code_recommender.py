"""A small recommender trained from scratch on the codes of items, to compare code sets with; for `codes.py` beside it.

An item is the sum of its codes' embeddings. A causal transformer reads a history of such sums, one position an item,
and a decoder of one layer writes the codes of the next item, level by level, from the state of the position. So a
history costs as many positions as it has items, and a data set of 150,000 interactions trains in minutes on one CPU
core. Items have nothing but their codes: whatever the recommender knows of one item it shares with those that have a
code in common, and that is what is measured.

Where the codes so far leave one item only, the next code is certain: its loss is exactly zero and nothing is computed.
Everywhere else the loss is normalised over the codes that some item has there, as the search is.

Knows nothing of command lines, tables or files. The settings, with their reasons, are in `RecommenderSettings`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import EvaluationSet
from llmrec.embeddings.sasrec_training import training_windows
from llmrec.errors import DataError
from llmrec.generation.trie import ItemTrie

VERSION = 1  # of what is computed; a new one makes earlier results of the benchmark stale
MASK_POOL = 1 << 22
ROUNDING = 64
IGNORED = -100


@dataclass(frozen=True)
class RecommenderSettings:
    """Settings of the recommender, the same for every code set: change one, and earlier figures can't be compared.

    About 0.86 million parameters with 4 x 256 codes, chosen for what a CPU core trains in minutes.

    Attributes:
        width: D of every layer; width, layers, dropout, epochs, batch and rates are those of the prototype.
        num_layers: Layers that read the history; the decoder has one.
        num_heads: Attention heads.
        feed_forward: Width of the feed-forward layers, 4 times D as usual.
        max_history: Items of a history that are read, its last ones; longer ones train in windows of this length.
        dropout: On the item sums and after every attention and feed-forward layer, the decoder's too.
        epochs: Passes over all training histories, without early stopping: which epoch is best on a few thousand
            users is noise, and looking for it would cost as much as training.
        batch_size: Windows of a history in a step.
        learning_rate: Peak; linear warm-up over `warmup_share` of the steps, times half a cosine that reaches 0.
        code_learning_rate: Peak of the code tables, 4 times the others'. A code's row has a gradient only where the
            code occurs; tables as slow as the rest are far from done (in a prototype Recall@10 .0420, not .0502).
        warmup_share: Share of the steps.
        code_scale: Standard deviation that the code tables start with.
        weight_decay: AdamW's, on matrices; not on the code tables, whose rows of rare codes would shrink between
            their few gradients, nor on vectors.
        num_beams: Beams of the search; twice the 10 answers that are counted.
    """

    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    feed_forward: int = 512
    max_history: int = 50
    dropout: float = 0.2
    epochs: int = 15
    batch_size: int = 256
    learning_rate: float = 2e-3
    code_learning_rate: float = 8e-3
    warmup_share: float = 0.05
    code_scale: float = 0.1
    weight_decay: float = 0.01
    num_beams: int = 20


class PooledDropout(nn.Module):
    """Dropout whose masks are cut from a pool at random places.

    Drawing a mask for every layer and step took a third of a step on a CPU. The pool of 4 million draws is made
    once, by the generator that is current; a mask is the run of it that begins at a random place.

    Args:
        share: Share of values set to zero; the others are divided by 1 - share.
    """

    def __init__(self, share: float):
        super().__init__()
        self.share = share
        self._pool: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape, unchanged while evaluating."""
        if not self.training or self.share == 0.0:
            return values
        size = values.numel()
        if self._pool is None or len(self._pool) <= size:
            draws = torch.rand(max(MASK_POOL, 2 * size), device=values.device)
            self._pool = (draws >= self.share).to(torch.bfloat16) / (1.0 - self.share)
        start = int(torch.randint(len(self._pool) - size, ()))
        return values * self._pool[start : start + size].view_as(values)


class Tokens(NamedTuple):
    """Tokens of the decoder: embeddings float32 [R, D], and their query, key and value, float32 [R, 3 D]."""

    embeddings: Tensor
    projected: Tensor

    def rows(self, rows: Tensor) -> "Tokens":
        """Some of them, int64 [R']."""
        return Tokens(self.embeddings[rows], self.projected[rows])


class FeedForward(nn.Module):
    """Norm, widen, rectify, narrow: what is added to the states."""

    def __init__(self, settings: RecommenderSettings):
        super().__init__()
        self.norm = nn.LayerNorm(settings.width)
        self.widen = nn.Linear(settings.width, settings.feed_forward)
        self.narrow = nn.Linear(settings.feed_forward, settings.width)

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] to the same."""
        return self.narrow(F.relu(self.widen(self.norm(states))))


class HistoryLayer(nn.Module):
    """Pre-norm self-attention under a mask, and a feed-forward layer; both are added.

    Attention is written out as matrix products: for rows of 50 positions on a CPU twice as fast as the fused kernel.
    """

    def __init__(self, settings: RecommenderSettings, dropout: PooledDropout):
        super().__init__()
        self.num_heads = settings.num_heads
        self.norm = nn.LayerNorm(settings.width)
        self.query_key_value = nn.Linear(settings.width, 3 * settings.width)
        self.output = nn.Linear(settings.width, settings.width)
        self.feed_forward = FeedForward(settings)
        self.dropout = dropout

    def forward(self, states: Tensor, hidden: Tensor) -> Tensor:
        """States [R, T, D]; `hidden` bool [R, 1, T, T] is True where a position may not look."""
        rows, length, width = states.shape
        projected = self.query_key_value(self.norm(states))
        query, key, value = projected.view(rows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [R, H, T, d]
        scores = (query @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5
        attention = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1).to(value.dtype)
        mixed = (attention @ value).transpose(1, 2).reshape(rows, length, width)
        states = states + self.dropout(self.output(mixed))
        return states + self.dropout(self.feed_forward(states))


class CodeRecommender(nn.Module):
    """Reads histories of items and scores the codes of the next one.

    Args:
        codes: Integers [N, L], the tuple of each item; equal ones are allowed.
        codebook_sizes: K of each level.
        settings: Sizes and rates.
    """

    codes: Tensor
    levels_after: Tensor

    def __init__(self, codes: np.ndarray, codebook_sizes: tuple[int, ...], settings: RecommenderSettings):
        super().__init__()
        self.settings = settings
        self.codebook_sizes = codebook_sizes
        self.offsets = [0, *np.cumsum(codebook_sizes).tolist()]  # where a level begins in the tables
        rows = torch.from_numpy(np.asarray(codes, np.int64) + np.asarray(self.offsets[:-1]))
        self.register_buffer("codes", rows, persistent=False)  # [N, L] rows of the tables
        # A code of level l is the token that level l + 1 is predicted from; those of the last level are never one.
        levels_after = torch.arange(1, len(codebook_sizes) + 1).clamp(max=len(codebook_sizes) - 1)
        self.register_buffer(
            "levels_after", levels_after.repeat_interleave(torch.tensor(codebook_sizes)), persistent=False
        )
        width, total = settings.width, self.offsets[-1]
        self.code_table = nn.Parameter(settings.code_scale * torch.randn(total, width))
        self.output_table = nn.Parameter(settings.code_scale * torch.randn(total, width))
        self.positions = nn.Parameter(0.02 * torch.randn(settings.max_history, width))
        self.dropout = PooledDropout(settings.dropout)
        self.layers = nn.ModuleList(HistoryLayer(settings, self.dropout) for _ in range(settings.num_layers))
        self.history_norm = nn.LayerNorm(width)
        self.level_table = nn.Parameter(0.02 * torch.randn(len(codebook_sizes), width))
        self.token_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward = FeedForward(settings)
        self.output_norm = nn.LayerNorm(width)

    def read(self, items: Tensor, starts: Tensor) -> Tensor:
        """States after each item of packed histories.

        Args:
            items: int64 [R, T], rows of items; several histories may stand in a row, one after the other.
            starts: int64 [R, T], the position in the row at which the history of each position begins.

        Returns:
            float32 [R, T, D].
        """
        places = torch.arange(items.shape[1], device=items.device)
        states = F.embedding(self.codes[items], self.code_table).sum(dim=2) + self.positions[places - starts]
        hidden = (places[:, None] < places) | (places < starts[:, :, None])  # later ones, and those of other histories
        states = self.dropout(states)
        for layer in self.layers:
            states = layer(states, hidden[:, None])
        return self.history_norm(states)

    def tokens(self) -> Tokens:
        """Every code as an input token of the decoder, a row a code of any level.

        The decoder has one layer, so a token's query, key and value depend on the code alone and are computed once
        a code rather than once a prediction.
        """
        embeddings = self.code_table + self.level_table[self.levels_after]
        return Tokens(embeddings, self.query_key_value(self.token_norm(embeddings)).float())

    def start_tokens(self, states: Tensor) -> Tokens:
        """The states, float32 [R, D], as first tokens of the decoder."""
        embeddings = states + self.level_table[0]
        return Tokens(embeddings, self.query_key_value(self.token_norm(embeddings)).float())

    def level_logits(self, start: Tokens, tokens: Tokens, prefixes: Tensor) -> Tensor:
        """Scores of all codes of a level.

        The token of the last code (at the first level: the state) attends to the state and to all codes before it.

        Args:
            start: Of `start_tokens`, R of them.
            tokens: Of `tokens`.
            prefixes: int64 [R, l], table rows of the codes of the levels before level l.

        Returns:
            float32 [R, K].
        """
        level, rows, heads = prefixes.shape[1], len(prefixes), self.settings.num_heads
        own, sequence = start.embeddings, start.projected[:, None]
        if level > 0:
            own = tokens.embeddings[prefixes[:, -1]]
            sequence = torch.cat([sequence, F.embedding(prefixes, tokens.projected)], dim=1)  # [R, l + 1, 3 D]
        query, key, value = sequence.view(rows, level + 1, 3, heads, -1).unbind(dim=2)  # [R, l + 1, H, d]
        scores = (query[:, -1:] * key).sum(dim=-1, keepdim=True) / key.shape[-1] ** 0.5
        mixed = (scores.softmax(dim=1) * value).sum(dim=1).view(rows, -1)
        own = own + self.dropout(self.attention_output(mixed))
        own = own + self.dropout(self.feed_forward(own))
        first, end = self.offsets[level], self.offsets[level + 1]
        return F.linear(self.output_norm(own), self.output_table[first:end]).float()

    def loss(self, states: Tensor, positions: Tensor, targets: Tensor, trie: ItemTrie) -> Tensor:
        """Negative log-likelihood of the targets' codes among the codes that are valid at their trie nodes.

        Args:
            states: float32 [S, D].
            positions: int64 [P], the state that each target follows.
            targets: int64 [P], rows of items.
            trie: Of the same codes.

        Returns:
            Mean over the targets of the sum over levels, in nats; zero for a target that is the only leaf.
        """
        leaves = trie.leaf_of_item[targets]
        start, tokens = self.start_tokens(states), self.tokens()
        total = 0.0 * states.sum()  # has a gradient even where no target leaves a choice
        for level, first in enumerate(self.offsets[:-1]):
            # Leaves below a node are one run, so the node of a leaf is found by its number.
            nodes = torch.searchsorted(trie.leaf_starts[level], leaves, right=True) - 1
            open_rows = (trie.starts[level][nodes + 1] - trie.starts[level][nodes] > 1).nonzero()[:, 0]
            if len(open_rows) == 0:
                continue
            # Rounded up, for products of ever new sizes are slow in bfloat16 on a CPU: each size compiles its own.
            padded = F.pad(open_rows, (0, -len(open_rows) % ROUNDING))
            codes, nodes = self.codes[targets[padded]], nodes[padded]
            logits = self.level_logits(start.rows(positions[padded]), tokens, codes[:, :level])
            # A run that is padded repeats its last child, so all that is written is valid.
            valid = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            valid.scatter_(1, trie.children(level, nodes).codes, True)
            logits = logits.masked_fill(~valid, -torch.inf)
            correct = codes[:, level] - first
            correct[len(open_rows) :] = IGNORED
            total = total + F.cross_entropy(logits, correct, ignore_index=IGNORED, reduction="sum")
        return total / len(targets)

    @torch.no_grad()
    def search(self, states: Tensor, tokens: Tokens, trie: ItemTrie, num_beams: int) -> Tensor:
        """The best leaves of the trie, by beam search over the levels.

        Args:
            states: float32 [B, D], after the last item of each history.
            tokens: Of `tokens`.
            trie: Of the same codes.
            num_beams: Beams kept at every level.

        Returns:
            int64 [B, num_beams], best first; -1 where the trie has fewer leaves than beams.
        """
        batch = len(states)
        start = self.start_tokens(states)
        nodes = torch.zeros(batch, 1, dtype=torch.int64, device=states.device)
        scores = torch.zeros(batch, 1, device=states.device)
        prefixes = torch.zeros(batch, 1, 0, dtype=torch.int64, device=states.device)
        for level in range(trie.num_levels):
            beams = nodes.shape[1]
            repeated = torch.arange(batch, device=states.device).repeat_interleave(beams)
            logits = self.level_logits(start.rows(repeated), tokens, prefixes.flatten(0, 1))
            children = trie.children(level, nodes.flatten())
            chosen = logits.gather(1, children.codes).masked_fill(~children.valid, -torch.inf)
            found = (scores.view(-1, 1) + chosen.log_softmax(dim=1)).view(batch, -1)
            scores, places = found.topk(min(num_beams, found.shape[1]), dim=1)
            parents = places // children.codes.shape[1]
            nodes = children.nodes.view(batch, -1).gather(1, places)
            codes = children.codes.view(batch, -1).gather(1, places) + self.offsets[level]
            prefixes = torch.cat([prefixes.gather(1, parents[..., None].expand(-1, -1, level)), codes[..., None]], 2)
        return F.pad(nodes.masked_fill(scores == -torch.inf, -1), (0, num_beams - nodes.shape[1]), value=-1)


def train_recommender(
    train: InteractionDataset,
    codes: np.ndarray,
    codebook_sizes: tuple[int, ...],
    *,
    settings: RecommenderSettings,
    seed: int,
    device: torch.device | str = "cpu",
    description: str = "training",
) -> CodeRecommender:
    """Trains a recommender: weights, order and dropout from the seed.

    Args:
        train: Training interactions.
        codes: Integers [N, L] of the items of its catalogue.
        codebook_sizes: K of each level.
        settings: The same for every code set that is compared.
        seed: From 0.
        device: Where to train.
        description: Of the progress bar.

    Raises:
        DataError: No user has two training interactions.
    """
    windows = training_windows(train, settings.max_history)
    if not windows:
        raise DataError(f"no user of {train.name!r} has two training interactions: there is no next item to learn")
    device = torch.device(device)
    trie = ItemTrie.from_codes(codes, codebook_sizes).to(device)
    order = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = CodeRecommender(codes, codebook_sizes, settings).to(device).train()
        optimizer = _optimizer(model)
        peaks = [group["lr"] for group in optimizer.param_groups]
        steps = math.ceil(len(windows) / settings.batch_size)
        total = steps * settings.epochs
        with tqdm(total=total, desc=description, unit="step", disable=None) as bar:
            for step, batch in enumerate(_batches(windows, settings, order)):
                rate = _rate(step, total, settings.warmup_share)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = rate * peak
                items, starts, filled, targets = (part.to(device) for part in pack(batch, settings.max_history))
                with torch.autocast(device.type, torch.bfloat16):
                    loss = model.loss(model.read(items, starts).flatten(0, 1), filled, targets, trie)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                bar.update()
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def target_ranks(
    model: CodeRecommender,
    trie: ItemTrie,
    examples: EvaluationSet,
    *,
    seed: int,
    batch_size: int = 128,
    description: str = "evaluating",
) -> np.ndarray:
    """Ranks of the targets among all items, seen ones kept: int64 [E], from 1; 0 where the target was not found.

    A leaf stands for all items that share its codes. They are ranked one after the other in an order that is drawn
    once for the catalogue from `seed`, not in the order of the catalogue, which can follow popularity: equal codes
    get the credit of a guess, and the items behind a shared leaf move down by its whole size. In float32, unlike
    training: bfloat16 would tie scores that differ by less than a hundredth.
    """
    device = model.code_table.device
    sizes = trie.item_starts.diff().long()
    places = places_in_leaves(trie, seed)
    lengths = np.minimum(np.diff(examples.offsets), model.settings.max_history)
    by_length = np.argsort(lengths, kind="stable")  # little padding in a batch
    ranks = np.zeros(len(examples), np.int64)
    tokens = model.tokens()
    for start in tqdm(range(0, len(by_length), batch_size), desc=description, unit="batch", disable=None):
        numbers = by_length[start : start + batch_size]
        items, last = (part.to(device) for part in _last_items(examples, numbers, lengths[numbers]))
        targets = torch.from_numpy(examples.targets[numbers].astype(np.int64)).to(device)
        states = model.read(items, torch.zeros_like(items))[torch.arange(len(items), device=device), last]
        leaves = model.search(states, tokens, trie, model.settings.num_beams)
        before = F.pad(torch.where(leaves >= 0, sizes[leaves.clamp(min=0)], 0).cumsum(dim=1), (1, -1))
        hits = leaves == trie.leaf_of_item[targets].long()[:, None]
        found = (hits * (before + 1)).sum(dim=1)
        ranks[numbers] = torch.where(found > 0, found + places[targets], 0).cpu().numpy()
    return ranks


def places_in_leaves(trie: ItemTrie, seed: int) -> Tensor:
    """Place of every item among those that share its codes, from 0, in an order drawn by lot: int64 [N]."""
    drawn = torch.randperm(trie.num_items, generator=torch.Generator().manual_seed(seed)).to(trie.device)
    by_leaf = drawn[trie.leaf_of_item[drawn].argsort(stable=True)]
    firsts = trie.item_starts[:-1].long().repeat_interleave(trie.item_starts.diff().long())
    places = torch.empty_like(by_leaf)
    places[by_leaf] = torch.arange(trie.num_items, device=trie.device) - firsts
    return places


def pack(windows: list[np.ndarray], length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Puts windows one after the other into rows, so that little is padded.

    Args:
        windows: Runs of 2 to `length` + 1 items; every item after the first is a target.
        length: T, positions of a row.

    Returns:
        Items int64 [R, T] and starts int64 [R, T] for `CodeRecommender.read`, R a multiple of 4; the filled positions,
        int64 [P], counted through the rows; and the target of each, int64 [P].
    """
    rows, columns = [], []
    row, column = 0, 0
    for window in windows:
        if column + len(window) - 1 > length:
            row, column = row + 1, 0
        rows.append(row)
        columns.append(column)
        column += len(window) - 1
    sizes = np.array([len(window) - 1 for window in windows])
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    begins = np.repeat(columns, sizes)
    places = np.repeat(rows, sizes) * length + begins + within
    num_rows = -(-(row + 1) // 4) * 4  # few different sizes, as in `CodeRecommender.loss`
    items = np.zeros(num_rows * length, np.int64)
    starts = np.tile(np.arange(length), num_rows)  # an empty position sees itself
    items[places] = np.concatenate([window[:-1] for window in windows])
    starts[places] = begins
    targets = np.concatenate([window[1:] for window in windows]).astype(np.int64)
    shape = (num_rows, length)
    return (
        torch.from_numpy(items.reshape(shape)),
        torch.from_numpy(starts.reshape(shape)),
        torch.from_numpy(places),
        torch.from_numpy(targets),
    )


def _batches(
    windows: list[np.ndarray], settings: RecommenderSettings, order: np.random.Generator
) -> Iterator[list[np.ndarray]]:
    for _ in range(settings.epochs):
        shuffled = order.permutation(len(windows))
        for start in range(0, len(windows), settings.batch_size):
            yield [windows[number] for number in shuffled[start : start + settings.batch_size]]


def _rate(step: int, total: int, warmup_share: float) -> float:
    """Linear warm-up times half a cosine that reaches 0 at the end; a share of the peak."""
    return min(1.0, (step + 1) / max(1.0, warmup_share * total)) * 0.5 * (1 + math.cos(math.pi * step / total))


def _optimizer(model: CodeRecommender) -> torch.optim.AdamW:
    settings = model.settings
    tables = [model.code_table, model.output_table]
    known = {id(table) for table in tables}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [
        {"params": tables, "lr": settings.code_learning_rate, "weight_decay": 0.0},
        {"params": [one for one in others if one.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [one for one in others if one.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def _last_items(examples: EvaluationSet, numbers: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
    """The last items of histories, int64 [B, T], filled with row 0 on the right, and where the last one stands."""
    places = (examples.offsets[numbers + 1] - lengths)[:, None] + np.arange(lengths.max())
    inside = np.arange(lengths.max()) < lengths[:, None]
    items = np.where(inside, examples.flat_histories[np.minimum(places, len(examples.flat_histories) - 1)], 0)
    return torch.from_numpy(items.astype(np.int64)), torch.from_numpy(lengths - 1)
