"""The index files that LETTER, LC-Rec and MiniOneRec publish: item number to code tokens, as JSON.

Three layouts: tokens `<a_183>` of equal number for every item (LETTER with four, MiniOneRec with three); MiniOneRec's
constrained variant, whose colliding items alone have a further token, their rank in the group, and whose code numbers
start at 1 and are written `<|a_183|>`. `SemanticIds.from_index_json` is the door to what is here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.errors import DataError
from llmrec.files import read_json

_CODE_TOKEN = re.compile(r"<([a-z])_(\d{1,9})>|<\|([a-z])_(\d{1,9})\|>")


@dataclass(frozen=True, eq=False)
class IndexFile:
    """What an index file holds.

    Attributes:
        path: The file.
        codes: int64 [N, L] in the order of the keys asked for.
        counted: Whether the last level is a counter that the file has for colliding items alone; 0 at the others.
    """

    path: Path
    codes: np.ndarray
    counted: bool

    def codebook_sizes(self, given: int | Sequence[int] | None) -> tuple[int, ...]:
        """Sizes of the levels; see `SemanticIds.from_index_json`.

        Raises:
            DataError: A code is outside the given sizes, or their number is wrong.
        """
        largest, learned = self.codes.max(axis=0).tolist(), self.codes.shape[1] - self.counted
        if given is None or isinstance(given, int):
            size = max(largest[:learned]) + 1 if given is None else given
            sizes = (size,) * learned + ((largest[-1] + 1,) if self.counted else ())
        else:
            sizes = tuple(given)
        if len(sizes) != len(largest):
            raise DataError(
                f"{self.path} has {len(largest)} levels, codebook_sizes are {list(sizes)}: one size a level"
            )
        outside = [level for level, size in enumerate(sizes) if largest[level] >= size]
        if outside:
            level = outside[0]
            from_one = self.codes[:, :learned].min() > 0
            remedy = "its numbers start at 1: give one more than the codebook has" if from_one else "give more"
            raise DataError(
                f"{self.path} has the code number {largest[level]} at level {level}, outside the codebook size"
                f" {sizes[level]}; {remedy}"
            )
        return sizes


def read_index(path: str | Path, keys: Sequence[str]) -> IndexFile:
    """Reads an index file.

    Args:
        path: The JSON file.
        keys: The file's keys of the catalogue's items, in row order.

    Raises:
        MissingPartError: No such file.
        DataError: Not such a file; an item that lacks more than the last code; an item without codes; keys left over.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} holds no index: it must be a JSON object of item number to code tokens")
    missing = [key for key in keys if key not in content]
    if missing or len(content) != len(keys):
        raise DataError(
            f"{path} has codes of {len(content)} items, the catalogue {len(keys)};"
            f" {len(missing)} without codes{f', first {missing[0]!r}' if missing else ''}: is it of this data set?"
        )
    lengths = [len(content[key]) if isinstance(content[key], list) else 0 for key in keys]
    num_levels = max(lengths)
    counted = min(lengths) == num_levels - 1 > 0
    rows = [_parse_tokens(content[key], num_levels, counted, key, path) for key in keys]
    has_counter = np.array([len(row) == num_levels for row in rows])
    codes = np.array([row if len(row) == num_levels else [*row, 0] for row in rows], dtype=np.int64)
    if counted and codes[has_counter, -1].min() == 0:
        codes[has_counter, -1] += 1
    return IndexFile(Path(path), codes, counted)


def _parse_tokens(tokens: Any, num_levels: int, counted: bool, key: str, path: str | Path) -> list[int]:
    matches = [_CODE_TOKEN.fullmatch(str(token)) for token in tokens] if isinstance(tokens, list) else []
    found = [(match[1] or match[3], int(match[2] or match[4])) for match in matches if match is not None]
    codes = [code for level, (letter, code) in enumerate(found) if ord(letter) - ord("a") == level]
    allowed = (num_levels - 1, num_levels) if counted else (num_levels,)
    if len(codes) != len(matches) or len(codes) not in allowed or not codes:
        example = ", ".join(f"<{chr(ord('a') + level)}_7>" for level in range(min(max(num_levels, 1), 4)))
        raise DataError(
            f"{path}: item {key!r} has {tokens!r}; expected {max(num_levels, 1)} tokens like {example}; only the last"
            " one may be missing"
        )
    return codes
