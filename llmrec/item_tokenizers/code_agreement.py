"""How far two code sets of one catalogue agree: the same items together, and the same codes.

Two fits that differ only in their seed number their codes differently, so that equal codes say little; what can be
compared is which items share a prefix. Both are measured here. Knows `SemanticIds` only.
"""

import io
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from llmrec.data.item_order import check_item_order
from llmrec.item_tokenizers.prefixes import pairs_together, prefix_numbers
from llmrec.item_tokenizers.semantic_ids import SemanticIds


@dataclass(frozen=True)
class PrefixAgreement:
    """Agreement of two code sets about the prefixes of one depth.

    Attributes:
        depth: Number of codes of the prefix, from 1.
        adjusted_rand: Adjusted Rand index of the two groupings of items by prefix (Hubert and Arabie 1985): 1 where
            they are equal, 0 in the mean where one is shuffled. None where no pair of items shares a prefix in either
            (unique codes at full depth), or all do in both: there is nothing to agree on.
        shared_pairs: Of the pairs of items that share a prefix in at least one of the sets, the share that does in
            both (Jaccard index of pairs); None where there is no such pair.
        equal_prefixes: Share of items with the same first codes, number by number, in both sets.
    """

    depth: int
    adjusted_rand: float | None
    shared_pairs: float | None
    equal_prefixes: float


@dataclass(frozen=True)
class CodeAgreement:
    """Agreement of two code sets; `str()` is a table.

    Attributes:
        num_items: N.
        levels: Levels of the first and of the second set.
        prefixes: Of each depth that both have.
        equal_tuples: Share of items with all codes equal; 0 where the sets have different numbers of levels.
    """

    num_items: int
    levels: tuple[int, int]
    prefixes: tuple[PrefixAgreement, ...]
    equal_tuples: float

    def to_table(self) -> Table:
        """One row a depth."""
        table = Table(title=f"Agreement of two code sets of {self.num_items:,} items", title_justify="left")
        for heading in ("first codes", "adjusted Rand", "pairs together in both", "same codes"):
            table.add_column(heading, justify="right")
        for prefix in self.prefixes:
            found = (prefix.adjusted_rand, prefix.shared_pairs)
            figures = ["-" if value is None else f"{value:.3f}" for value in found]
            table.add_row(str(prefix.depth), *figures, f"{prefix.equal_prefixes:.2%}")
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=100).print(self.to_table())
        note = "" if self.levels[0] == self.levels[1] else f" ({self.levels[0]} and {self.levels[1]} levels)"
        lines = "\n".join(line.rstrip() for line in text.getvalue().splitlines())
        return f"{lines}\nall codes equal: {self.equal_tuples:.2%} of the items{note}"


def compare_codes(first: SemanticIds, second: SemanticIds) -> CodeAgreement:
    """Compares two code sets of one catalogue, depth by depth.

    Everything is counted on the pairs of prefixes that occur (at most N), never on a table of all of them. The
    adjusted Rand index is used because its expectation has a closed form; that of the mutual information is a sum
    over all pairs of group sizes.

    Args:
        first: One code set.
        second: The other, of the same items in the same order. Codebook sizes and levels may differ.

    Raises:
        ItemOrderError: They are about other items, or in another order.
    """
    check_item_order(first.item_ids, second.item_ids, "the second code set")
    found = []
    equal = np.ones(first.num_items, dtype=bool)
    both = zip(
        prefix_numbers(first.codes, first.codebook_sizes),
        prefix_numbers(second.codes, second.codebook_sizes),
        strict=False,
    )
    for level, (left, right) in enumerate(both):
        equal &= first.codes[:, level] == second.codes[:, level]
        found.append(_agreement(level + 1, left, right, _share(equal)))
    same_levels = first.num_levels == second.num_levels
    return CodeAgreement(
        num_items=first.num_items,
        levels=(first.num_levels, second.num_levels),
        prefixes=tuple(found),
        equal_tuples=found[-1].equal_prefixes if same_levels else 0.0,
    )


def _agreement(depth: int, left: np.ndarray, right: np.ndarray, equal_prefixes: float) -> PrefixAgreement:
    """From the prefix numbers of both sets, dense int64 [N]."""
    joint = np.unique(left * (int(right.max(initial=0)) + 1) + right, return_inverse=True)[1]
    in_left, in_right, in_both = pairs_together(left), pairs_together(right), pairs_together(joint)
    in_either = in_left + in_right - in_both
    pairs = len(left) * (len(left) - 1) // 2
    expected = in_left * in_right / pairs if pairs else 0.0
    most = (in_left + in_right) / 2
    return PrefixAgreement(
        depth=depth,
        adjusted_rand=None if most == expected else (in_both - expected) / (most - expected),
        shared_pairs=in_both / in_either if in_either else None,
        equal_prefixes=equal_prefixes,
    )


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if flags.size else 0.0
