"""The settings and the attention block of SASRec; nothing here knows item IDs, data sets or training."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llmrec.errors import SettingsError


@dataclass(frozen=True)
class SASRecConfig:
    """Settings of `SASRec`.

    The defaults are the best of a few runs of 16 epochs, compared by validation NDCG@10 on Amazon Beauty (5-core):
    dropout 0.3 and 0.5, learning rate 1e-3 and 2e-3, temperature 0.05, 0.07 and 0.1.

    Raises:
        SettingsError: A value can't work, or two contradict each other.
    """

    width: int = field(default=64, metadata={"help": "Values in an item's vector."})
    num_layers: int = field(default=2, metadata={"help": "Self-attention blocks."})
    num_heads: int = field(default=2, metadata={"help": "Attention heads; must divide the width."})
    dropout: float = field(default=0.3, metadata={"help": "On embeddings, attention weights and block outputs."})
    max_history: int = field(default=50, metadata={"help": "Latest items of a history that are read."})
    temperature: float | None = field(
        default=0.07,
        metadata={"help": "Scores are cosines divided by it; None for plain inner products, as in the paper."},
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak, after 5 % of warm-up; then a half cosine."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's, on matrices only."})
    batch_size: int = field(default=256, metadata={"help": "Users a step."})
    epochs: int = field(default=20, metadata={"help": "At most; the learning rate reaches 0 at their end."})
    patience: int = field(default=5, metadata={"help": "Epochs without a better validation NDCG@10 before stopping."})
    loss_dtype: str = field(
        default="bfloat16",
        metadata={"help": "Of the products over the catalogue: bfloat16, or float32 where a CPU lacks bfloat16."},
    )
    seed: int = field(default=0, metadata={"help": "Fixes initial weights, order and dropout on one machine."})

    def __post_init__(self) -> None:
        positive = ("width", "num_layers", "num_heads", "max_history", "batch_size", "epochs", "patience")
        for name in positive:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingsError(f"{name} is {value!r}: it must be an integer of at least 1")
        if self.width % self.num_heads:
            raise SettingsError(f"width is {self.width}, which {self.num_heads} heads (num_heads) don't divide")
        if not 0 <= self.dropout < 1:
            raise SettingsError(f"dropout is {self.dropout!r}: it must be at least 0 and below 1")
        if self.temperature is not None and not self.temperature > 0:
            raise SettingsError(f"temperature is {self.temperature!r}: it must be above 0, or None for inner products")
        if not self.learning_rate > 0:
            raise SettingsError(f"learning_rate is {self.learning_rate!r}: it must be above 0")
        if self.weight_decay < 0:
            raise SettingsError(f"weight_decay is {self.weight_decay!r}: it must be at least 0")
        if self.loss_dtype not in ("bfloat16", "float32"):
            raise SettingsError(f"loss_dtype is {self.loss_dtype!r}: choose bfloat16 or float32")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise SettingsError(f"seed is {self.seed!r}: it must be an integer of at least 0")


class CausalBlock(nn.Module):
    """Pre-norm causal self-attention and a feed-forward layer, float32 [B, T, D] to the same.

    Attention is written out: for histories of a few items on a CPU that is faster than the fused kernel.
    """

    def __init__(self, config: SASRecConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.attention_output = nn.Linear(config.width, config.width)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.widen = nn.Linear(config.width, 4 * config.width)
        self.narrow = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Attention over what stands at or left of each position, then the feed-forward layer; both are added."""
        batch, length, width = states.shape
        projected = self.query_key_value(self.attention_norm(states))
        query, key, value = projected.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, T, d]
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool, device=states.device).triu(1)
        attention = self.dropout(scores.masked_fill(future, -torch.inf).softmax(dim=-1))
        mixed = (attention @ value).transpose(1, 2).reshape(batch, length, width)
        states = states + self.dropout(self.attention_output(mixed))
        return states + self.dropout(self.narrow(F.gelu(self.widen(self.feed_forward_norm(states)))))


def pad_right(histories: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Histories as int64 [B, T], filled with row 0 on the right, and their lengths, int64 [B]."""
    lengths = np.asarray([len(history) for history in histories])
    padded = np.zeros((len(histories), lengths.max()), dtype=np.int64)
    for row, history in enumerate(histories):
        padded[row, : len(history)] = history
    return torch.from_numpy(padded), torch.from_numpy(lengths)
