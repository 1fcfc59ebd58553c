"""What codes look like before any language model is trained: collisions, use of each codebook, what they keep.

A uniqueness policy hides collisions, so diagnose with the policy "allow" to see them. Neighbours are measured in
`neighbours.py`, two code sets compared in `code_agreement.py`; `report/` draws all of it.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError
from llmrec.item_tokenizers.neighbours import NeighbourAgreement, neighbour_agreement
from llmrec.item_tokenizers.prefixes import PrefixUsage, count_distinct, prefix_usage
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.uniqueness import CodeGeometry

LATENT_BLOCK = 16_384  # rows of the latents that are read at a time
COLLAPSE_SHARE = 0.1


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
class Reconstruction:
    """How much of the latents the codes keep.

    Attributes:
        squared_error: After 1 to L levels: mean over items of the squared distance between a latent and the sum of its
            first code vectors.
        relative_error: The same divided by `variance`: 1 where the codes tell no more than the mean does, 0 where they
            tell all. Above 1 is possible. All 0 where the variance is.
        variance: Mean squared distance of the latents from their mean.
    """

    squared_error: tuple[float, ...]
    relative_error: tuple[float, ...]
    variance: float

    @classmethod
    def measure(cls, codes: np.ndarray, geometry: CodeGeometry) -> "Reconstruction":
        """Reads the latents once, a block of rows at a time; adds up in float64.

        Args:
            codes: int [N, at least as many levels as there are codebooks]; a counter level after them is left out.
            geometry: Latents float32 [N, d] (may be memory-mapped) and codebooks.

        Raises:
            DataError: Latents of another number of items, or fewer levels than codebooks.
        """
        count, levels = len(codes), len(geometry.codebooks)
        if len(geometry.latents) != count or codes.shape[1] < levels:
            raise DataError(
                f"the geometry has latents of {len(geometry.latents)} items and {levels} codebooks, the codes"
                f" {count} items and {codes.shape[1]} levels: give the geometry these codes were made with"
            )
        errors, squares = np.zeros(levels), 0.0
        centre = np.asarray(geometry.latents[:LATENT_BLOCK], dtype=np.float64).mean(axis=0) if count else 0.0
        sums = np.zeros(geometry.latents.shape[1])
        for start in range(0, count, LATENT_BLOCK):
            rows = slice(start, start + LATENT_BLOCK)
            left = np.array(geometry.latents[rows], dtype=np.float64)
            centred = left - centre  # near the mean, so that the difference of squares below loses no digits
            sums += centred.sum(axis=0)
            squares += float(np.square(centred).sum())
            for level, codebook in enumerate(geometry.codebooks):
                left -= codebook[codes[rows, level]]
                errors[level] += np.square(left).sum()
        errors /= max(count, 1)
        variance = max(squares / max(count, 1) - float(np.square(sums / max(count, 1)).sum()), 0.0)
        relative = errors / variance if variance > 0 else np.zeros(levels)
        return cls(tuple(errors.tolist()), tuple(relative.tolist()), variance)


@dataclass(frozen=True)
class CodeDiagnostics:
    """Collisions, code usage and what the codes keep, of a catalogue; `str()` is a table.

    Attributes:
        num_items: N.
        num_distinct: Different code tuples.
        collision_rate: (N - num_distinct) / N.
        items_in_collision: Items that share their tuple with another.
        group_sizes: Number of items that share one tuple -> number of such tuples, ascending.
        levels: Usage of each level.
        policy: Uniqueness policy of the codes.
        prefixes: Prefixes of each depth.
        reconstruction: Error against the latents; None where they weren't given.
        neighbours: Agreement of nearest neighbours by the name of the embedding space.
    """

    num_items: int
    num_distinct: int
    collision_rate: float
    items_in_collision: int
    group_sizes: dict[int, int]
    levels: tuple[LevelUsage, ...]
    policy: str
    prefixes: tuple[PrefixUsage, ...] = ()
    reconstruction: Reconstruction | None = None
    neighbours: Mapping[str, NeighbourAgreement] = field(default_factory=dict)

    def to_table(self) -> Table:
        """One row a level."""
        table = Table(title=f"Codes of {self.num_items:,} items (policy {self.policy})", title_justify="left")
        headings = ["level", "codes", "used", "dead", "entropy (bits)", "perplexity", "Gini", "largest"]
        headings += ["prefixes"] if self.prefixes else []
        headings += ["error left"] if self.reconstruction else []
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "level" else "right")
        errors = self.reconstruction.relative_error if self.reconstruction else ()
        for number, level in enumerate(self.levels):
            row = [
                chr(ord("a") + number), str(level.codebook_size), str(level.used), str(level.dead),
                f"{level.entropy:.2f}", f"{level.perplexity:.1f}", f"{level.gini:.3f}", f"{level.largest:,}",
            ]  # fmt: skip
            row += [f"{self.prefixes[number].distinct:,}"] if self.prefixes else []
            row += [f"{errors[number]:.1%}"] if number < len(errors) else []
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=100)
        console.print(self.to_table())
        text.write(
            f"collision rate {self.collision_rate:.2%}: {self.num_distinct:,} different tuples,"
            f" {self.items_in_collision:,} items share one, largest group {max(self.group_sizes, default=0)}\n"
        )
        for space, agreement in self.neighbours.items():
            text.write("\n")
            console.print(agreement.to_table(space))
            text.write(f"equal codes in the mean over levels (code overlap): {agreement.code_overlap:.4f}\n")
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "CodeDiagnostics":
        """Builds it from what `dataclasses.asdict` and JSON made of one, also of an earlier llmrec.

        Raises:
            DataError: A field is missing or unknown.
        """
        values = dict(content)
        try:
            values["group_sizes"] = {int(size): count for size, count in values["group_sizes"].items()}
            values["levels"] = tuple(LevelUsage(**level) for level in values["levels"])
            values["prefixes"] = tuple(PrefixUsage(**prefix) for prefix in values.get("prefixes", ()))
            if values.get("reconstruction") is not None:
                values["reconstruction"] = Reconstruction(**_with_tuples(values["reconstruction"]))
            values["neighbours"] = {
                space: NeighbourAgreement(**_with_tuples(found))
                for space, found in values.get("neighbours", {}).items()
            }
            return cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"these are no diagnostics of codes: {type(error).__name__}: {error}") from error


def diagnose(
    semantic_ids: SemanticIds,
    *,
    geometry: CodeGeometry | None = None,
    neighbours: Mapping[str, ItemEmbeddings] | None = None,
) -> CodeDiagnostics:
    """Measures the codes of a catalogue.

    Args:
        semantic_ids: The codes.
        geometry: Latents and codebooks, for the reconstruction error.
        neighbours: Embedding spaces by name ("text", "collaborative"), for the agreement of nearest neighbours.

    Raises:
        DataError: The geometry doesn't fit the codes.
        ItemOrderError: Embeddings of other items, or in another order.
    """
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
        prefixes=prefix_usage(semantic_ids.codes, semantic_ids.codebook_sizes),
        reconstruction=None if geometry is None else Reconstruction.measure(semantic_ids.codes, geometry),
        neighbours={
            space: neighbour_agreement(semantic_ids, embeddings, what=f"the {space} embeddings")
            for space, embeddings in (neighbours or {}).items()
        },
    )


def monitored_figures(codes: np.ndarray, sizes: Sequence[int]) -> dict[str, float]:
    """Few figures of codes that are still being learned, cheap enough for every few epochs.

    Args:
        codes: int [N, L], one of all items before any uniqueness policy.
        sizes: Codebook sizes, length L.

    Returns:
        `collision_rate`, and of each level `used_a`, `used_b`, ... (codes with an item) and `perplexity_a`, ...: names
        and values that accelerate's trackers take.
    """
    figures = {"collision_rate": (len(codes) - count_distinct(codes, sizes)) / max(len(codes), 1)}
    levels = [LevelUsage.of_counts(np.bincount(codes[:, level], minlength=size)) for level, size in enumerate(sizes)]
    figures |= {f"used_{chr(ord('a') + number)}": float(level.used) for number, level in enumerate(levels)}
    return figures | {f"perplexity_{chr(ord('a') + number)}": level.perplexity for number, level in enumerate(levels)}


def collapse_warning(figures: Mapping[str, float], sizes: Sequence[int], num_items: int) -> str | None:
    """Says which level has collapsed and what to do; None where none has.

    A level has collapsed where fewer than a tenth of the codes it could use (no more than there are items) have an
    item, or where its perplexity is below a tenth of its used codes: then nearly all items sit on a few of them, as
    happens when dead codes are revived again and again without taking hold. The level with the smallest share is
    named.

    Args:
        figures: Of `monitored_figures`.
        sizes: Codebook sizes, length L.
        num_items: N.
    """
    worst, warning = COLLAPSE_SHARE, None
    for level, size in enumerate(sizes):
        letter = chr(ord("a") + level)
        used, perplexity = figures[f"used_{letter}"], figures[f"perplexity_{letter}"]
        reachable = max(min(size, num_items), 1)
        if used / reachable < worst:
            worst, warning = used / reachable, f"the items use only {used:.0f} of {reachable} codes of level {letter}"
        if perplexity / max(used, 1) < worst:
            worst = perplexity / max(used, 1)
            warning = (
                f"nearly all items sit on few of the {used:.0f} used codes of level {letter} (perplexity"
                f" {perplexity:.1f})"
            )
    if warning is None:
        return None
    return (
        f"{warning} (collapse): set revive_until, a smaller learning_rate, or standardize, start the codebooks"
        " with k-means, and see whether the embeddings differ between items"
    )


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
