"""What codes look like before any language model is trained: collisions and the use of each codebook.

Knows `SemanticIds` only. A uniqueness policy hides collisions, so diagnose with the policy "allow" to see them.
"""

import io
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from llmrec.item_tokenizers.semantic_ids import SemanticIds


@dataclass(frozen=True)
class LevelUsage:
    """How the items use the codes of one level.

    Attributes:
        codebook_size: K.
        used: Codes with at least one item.
        dead: Codes without: K - used.
        entropy: Of the share of items of each code, in bits; log2(K) at most.
        perplexity: 2 ** entropy: the number of codes that would be as spread if all were used alike.
        gini: Inequality of items per code over all K: 0 where all have equally many, towards 1 where one has all.
        largest: Items of the most used code.
    """

    codebook_size: int
    used: int
    dead: int
    entropy: float
    perplexity: float
    gini: float
    largest: int

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> "LevelUsage":
        """From the number of items of each code, int [K]; all zero for an empty catalogue."""
        total, size = int(counts.sum()), len(counts)
        shares = counts[counts > 0] / max(total, 1)
        entropy = float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0: never "-0.0"
        ascending = np.sort(counts)
        gini = float(((2 * np.arange(1, size + 1) - size - 1) * ascending).sum() / max(size * total, 1))
        used = int(np.count_nonzero(counts))
        return cls(size, used, size - used, entropy, 2.0**entropy, gini, int(counts.max(initial=0)))


@dataclass(frozen=True)
class CodeDiagnostics:
    """Collisions and code usage of a catalogue; `str()` is a table.

    Attributes:
        num_items: N.
        num_distinct: Different code tuples.
        collision_rate: (N - num_distinct) / N.
        items_in_collision: Items that share their tuple with another.
        group_sizes: Number of items that share one tuple -> number of such tuples, ascending.
        levels: Usage of each level.
        policy: Uniqueness policy of the codes.
    """

    num_items: int
    num_distinct: int
    collision_rate: float
    items_in_collision: int
    group_sizes: dict[int, int]
    levels: tuple[LevelUsage, ...]
    policy: str

    def to_table(self) -> Table:
        """One row a level."""
        table = Table(title=f"Codes of {self.num_items:,} items (policy {self.policy})", title_justify="left")
        for heading in ("level", "codes", "used", "dead", "entropy (bits)", "perplexity", "Gini", "largest"):
            table.add_column(heading, justify="left" if heading == "level" else "right")
        for number, level in enumerate(self.levels):
            table.add_row(
                chr(ord("a") + number), str(level.codebook_size), str(level.used), str(level.dead),
                f"{level.entropy:.2f}", f"{level.perplexity:.1f}", f"{level.gini:.3f}", f"{level.largest:,}",
            )  # fmt: skip
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100).print(self.to_table())
        return (
            f"{text.getvalue().rstrip()}\ncollision rate {self.collision_rate:.2%}: {self.num_distinct:,} different"
            f" tuples, {self.items_in_collision:,} items share one, largest group {max(self.group_sizes, default=0)}"
        )


def diagnose(semantic_ids: SemanticIds) -> CodeDiagnostics:
    """Measures the codes of a catalogue."""
    sizes, tuples = np.unique(semantic_ids.group_sizes(), return_counts=True)
    return CodeDiagnostics(
        num_items=semantic_ids.num_items,
        num_distinct=semantic_ids.num_distinct,
        collision_rate=semantic_ids.collision_rate,
        items_in_collision=int((sizes * tuples)[sizes > 1].sum()),
        group_sizes=dict(zip(sizes.tolist(), tuples.tolist(), strict=True)),
        levels=tuple(
            LevelUsage.of_counts(np.bincount(semantic_ids.codes[:, level], minlength=size))
            for level, size in enumerate(semantic_ids.codebook_sizes)
        ),
        policy=semantic_ids.policy,
    )
