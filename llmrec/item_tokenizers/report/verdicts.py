"""Figures of codes in words: good, look at it, or bad, with the threshold and what to do.

The thresholds are ours, set with published, random and collapsed codes at hand. They tell where to look before
a language model is trained for hours; only the recommender that is trained on the codes tells how good they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from llmrec.item_tokenizers.diagnostics import CodeDiagnostics
from llmrec.item_tokenizers.neighbours import NeighbourAgreement
from llmrec.item_tokenizers.uniqueness import UniquenessReport

State = Literal["good", "look", "bad"]
STATE_WORDS: dict[State, str] = {"good": "good", "look": "look at it", "bad": "bad"}


@dataclass(frozen=True)
class Verdict:
    """One figure and what it means.

    Attributes:
        name: Of the figure.
        value: As it is shown.
        state: "good", "look" or "bad".
        meaning: What was measured and where the thresholds are, one or two sentences.
        remedy: What to do about it; empty where it is good.
    """

    name: str
    value: str
    state: State
    meaning: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.name} {self.value}: {STATE_WORDS[self.state]}. {self.meaning}"
        return f"{text} {self.remedy}" if self.remedy else text


def judge(
    before: CodeDiagnostics, after: CodeDiagnostics, report: UniquenessReport | None = None
) -> tuple[Verdict, ...]:
    """Judges codes by their diagnostics.

    Args:
        before: Of the codes as they were fitted, collisions and all. Where it isn't known: `after` again.
        after: Of the codes in use. Figures that need latents or embeddings are taken from here and left out where it
            has none.
        report: What the uniqueness policy did, if it ran.
    """
    return tuple(_verdicts(before, after, report))


def _verdicts(before: CodeDiagnostics, after: CodeDiagnostics, report: UniquenessReport | None) -> Iterator[Verdict]:
    if before is not after:
        yield _low(
            "Collisions as fitted", before.collision_rate, 0.01, 0.05,
            "Items whose codes another item had first. Up to {0} is good, above {1} bad; the published LETTER codes of"
            " Beauty have 0.11%.",
            "Use more codes or one more level, train longer, or see whether many items have equal embeddings.",
        )  # fmt: skip
    yield _collisions_left(after)
    if report is not None and after.num_items:
        yield _low(
            "Items moved", report.moved / after.num_items, 0.02, 0.10,
            f"Items that the uniqueness policy ({report.policy}) gave other codes than their nearest. Up to {{0}} is"
            " good, above {1} bad: then the codes say less about the items.",
            "Lower the collisions of the fit first: more codes, more levels, longer training.",
        )  # fmt: skip
    yield from _usage(after)
    if after.reconstruction is not None and after.reconstruction.relative_error:
        yield _low(
            "Error left", after.reconstruction.relative_error[-1], 0.25, 0.5,
            "Share of the variance of the latents that all codes together don't tell. Up to {0} is good, above {1}"
            " bad.",
            "Use more codes or levels, or train longer; look for levels that add little below.",
        )  # fmt: skip
    for space, agreement in after.neighbours.items():
        if agreement.num_queries:
            yield _neighbours(space, agreement)


def _low(name: str, value: float, good: float, bad: float, meaning: str, remedy: str) -> Verdict:
    state: State = "good" if value <= good else "look" if value <= bad else "bad"
    shown = "0%" if value == 0 else f"{value:.2%}" if value < 0.1 else f"{value:.1%}"
    return Verdict(name, shown, state, meaning.format(f"{good:.0%}", f"{bad:.0%}"), "" if state == "good" else remedy)


def _high(name: str, value: float, good: float, bad: float, meaning: str, remedy: str) -> Verdict:
    state: State = "good" if value >= good else "look" if value >= bad else "bad"
    shown = f"{value:.1%}" if value < 0.9995 else "100%"
    return Verdict(name, shown, state, meaning.format(f"{good:.0%}", f"{bad:.0%}"), "" if state == "good" else remedy)


def _collisions_left(after: CodeDiagnostics) -> Verdict:
    return _low(
        "Collisions left", after.collision_rate, 0.0, 0.01,
        f"Items that share all their codes with another after the policy {after.policy}. {{0}} is good, above {{1}}"
        " bad: whoever decodes such codes must answer with several items.",
        "Make the codes unique with the policy min_cost, or extra_level.",
    )  # fmt: skip


def _usage(after: CodeDiagnostics) -> Iterator[Verdict]:
    levels = after.levels[:-1] if after.policy == "extra_level" and len(after.levels) > 1 else after.levels
    shares = [level.used / max(min(level.codebook_size, after.num_items), 1) for level in levels]
    worst = min(range(len(levels)), key=lambda number: shares[number])
    yield _high(
        "Codes used", shares[worst], 0.4, 0.25,
        f"Of the level that uses fewest ({_letter(worst)}: {levels[worst].used:,} of {levels[worst].codebook_size:,})."
        " {0} and more is good, below {1} bad; the published LETTER codes of Beauty use 77% of their first level.",
        "Start the codebooks with k-means, lower the learning rate, use a smaller codebook, or revive dead codes"
        " (revive_until), which spreads like items, though: compare before and after.",
    )  # fmt: skip
    evenness = [level.perplexity / max(level.used, 1) for level in levels]
    worst = min(range(len(levels)), key=lambda number: evenness[number])
    yield _high(
        "Evenness", evenness[worst], 0.4, 0.1,
        f"Perplexity over used codes, of the least even level ({_letter(worst)}: {levels[worst].perplexity:,.0f} of"
        f" {levels[worst].used:,}). {{0}} and more is good, below {{1}} bad: then most items sit on few codes.",
        "Standardize the embeddings, raise the diversity loss, or use a balanced method.",
    )  # fmt: skip


def _neighbours(space: str, agreement: NeighbourAgreement) -> Verdict:
    shared, chance = agreement.shared_prefix[0], agreement.chance[0]
    corrected = (shared - chance) / (1.0 - chance) if chance < 1.0 else 0.0
    remedy = "See whether the codes and these embeddings are of the same items, and whether the fit converged."
    if "collaborative" in space:
        remedy = "Raise collaborative_weight, or see whether these vectors are any good by themselves."
    above_chance = _high(
        f"{space.capitalize()} neighbours", corrected, 0.10, 0.03,
        f"So many of the {agreement.num_neighbours} nearest items have an item's first code; of random ones"
        f" {chance:.1%}. {{0}} of the way from chance to all is good, below {{1}} bad: then a model can't carry over"
        " what it learns from one item to its like.",
        remedy,
    )  # fmt: skip
    return replace(above_chance, value=f"{shared:.1%}")


def _letter(level: int) -> str:
    return chr(ord("a") + level)
