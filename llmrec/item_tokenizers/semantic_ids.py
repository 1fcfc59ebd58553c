"""Semantic IDs: one integer array of codes, the codebook sizes, and the item IDs they belong to.

Knows how to read, save, look up and make codes unique. Doesn't know how codes are learned (the item tokenizers) nor
which token IDs they get in a language model (`llmrec.vocabulary`).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmrec.data.item_order import check_item_order
from llmrec.errors import DataError, MissingPartError, SettingsError
from llmrec.files import atomic_file, check_format, read_json
from llmrec.item_tokenizers.uniqueness import (
    CodeGeometry,
    UniquenessReport,
    append_counter_level,
    assign_min_cost,
    mixed_radix_keys,
    repair_with_sinkhorn,
)

FORMAT_VERSION = 1
POLICIES = ("min_cost", "extra_level", "sinkhorn", "allow")
MAX_KEY = np.iinfo(np.int64).max
_CODE_TOKEN = re.compile(r"<([a-z])_(\d{1,9})>")


def code_token(level: int, code: int) -> str:
    """The text of a code's token, its level visible: `code_token(0, 12)` is `"<a_12>"`.

    Args:
        level: Level from 0 (`a`) to 25 (`z`).
        code: Code number from 0.

    Raises:
        SettingsError: The level has no letter, or the code is negative.
    """
    if not 0 <= level < 26 or code < 0:
        raise SettingsError(f"no code token for level {level}, code {code}: levels are 0 to 25, codes 0 and up")
    return f"<{chr(ord('a') + level)}_{code}>"


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """The codes of a catalogue.

    Attributes:
        item_ids: Outside IDs, row i of `codes` is item i.
        codes: int32 [N, L], `0 <= codes[:, l] < codebook_sizes[l]`.
        codebook_sizes: Number of codes of each level, length L.
        policy: What was done about items with equal codes: "min_cost", "extra_level", "sinkhorn", or "allow"
            (nothing: such items share their semantic ID, and whoever decodes one must answer with all of them).
        report: What `make_unique` moved and what it cost; None where it didn't run.

    Raises:
        DataError: Shapes disagree, a code is outside its codebook, or the policy is unknown.
    """

    item_ids: tuple[str, ...]
    codes: np.ndarray
    codebook_sizes: tuple[int, ...]
    policy: str = "allow"
    report: UniquenessReport | None = None

    def __post_init__(self) -> None:
        codes = np.asarray(self.codes)
        sizes = tuple(int(size) for size in self.codebook_sizes)
        if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
            raise DataError(f"codes must be integers [items, levels]: got {codes.dtype} of shape {codes.shape}")
        if len(codes) != len(self.item_ids):
            raise DataError(f"{len(codes)} rows of codes for {len(self.item_ids)} item IDs")
        if codes.shape[1] == 0 or codes.shape[1] != len(sizes) or min(sizes, default=0) < 1:
            raise DataError(f"codes have {codes.shape[1]} level(s), codebook_sizes are {sizes}: one size >= 1 a level")
        if self.policy not in POLICIES:
            raise DataError(f"unknown uniqueness policy {self.policy!r}; known: {', '.join(POLICIES)}")
        outside = ((codes < 0) | (codes >= np.array(sizes))).any(axis=1)
        if outside.any():
            row = int(np.flatnonzero(outside)[0])
            raise DataError(
                f"item {self.item_ids[row]!r} (row {row}) has codes {codes[row].tolist()}, outside the codebook sizes"
                f" {list(sizes)}"
            )
        object.__setattr__(self, "item_ids", tuple(self.item_ids))
        object.__setattr__(self, "codebook_sizes", sizes)
        object.__setattr__(self, "codes", np.ascontiguousarray(codes, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def num_items(self) -> int:
        """N, the number of items."""
        return len(self.item_ids)

    @property
    def num_levels(self) -> int:
        """L, the number of codes of each item."""
        return len(self.codebook_sizes)

    def keys(self) -> np.ndarray:
        """One number an item, equal exactly where all codes are equal, in the order of the code tuples: int64 [N].

        Raises:
            SettingsError: There are more possible tuples than int64 holds.
        """
        self._check_keys_fit()
        return mixed_radix_keys(self.codes, self.codebook_sizes)

    @cached_property
    def _order(self) -> np.ndarray:
        """Rows sorted by key, equal keys in row order: int64 [N]."""
        return np.argsort(self.keys(), kind="stable")

    @cached_property
    def _sorted_keys(self) -> np.ndarray:
        return self.keys()[self._order]

    @cached_property
    def num_distinct(self) -> int:
        """Number of different code tuples."""
        return int(np.count_nonzero(np.diff(self._sorted_keys))) + (self.num_items > 0)

    @property
    def is_unique(self) -> bool:
        """Whether no two items have equal codes."""
        return self.num_distinct == self.num_items

    @property
    def collision_rate(self) -> float:
        """(N - distinct tuples) / N, the measure of LETTER and LC-Rec; 0 for an empty catalogue."""
        return (self.num_items - self.num_distinct) / max(self.num_items, 1)

    def group_sizes(self) -> np.ndarray:
        """Items of each different tuple, in the order of the keys: int64 [distinct]."""
        starts = np.flatnonzero(np.diff(self._sorted_keys, prepend=-1))
        return np.diff(starts, append=self.num_items)

    def rows_of(self, codes: np.ndarray | Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The items of given code tuples, colliding ones included.

        Args:
            codes: Integers [Q, L].

        Returns:
            Q arrays int64 of row numbers, ascending; empty where no item has these codes (also where a code is
            outside its codebook).

        Raises:
            DataError: Another number of levels.
        """
        queries = np.asarray(codes, dtype=np.int64)
        if queries.ndim != 2 or queries.shape[1] != self.num_levels:
            raise DataError(f"codes to look up have shape {queries.shape}; it must be [queries, {self.num_levels}]")
        keys = mixed_radix_keys(queries, self.codebook_sizes)
        keys[((queries < 0) | (queries >= np.array(self.codebook_sizes))).any(axis=1)] = -1
        starts = np.searchsorted(self._sorted_keys, keys, side="left")
        ends = np.searchsorted(self._sorted_keys, keys, side="right")
        return [self._order[start:end] for start, end in zip(starts, ends, strict=True)]

    def tokens(self, row: int) -> list[str]:
        """The code tokens of an item: `["<a_12>", "<b_7>", ...]`."""
        return [code_token(level, int(code)) for level, code in enumerate(self.codes[row])]

    def make_unique(self, policy: str = "min_cost", *, geometry: CodeGeometry | None = None) -> "SemanticIds":
        """Gives every item codes of its own, by a named policy. Deterministic.

        `"min_cost"` (the default) keeps every prefix and moves colliding items to last-level codes that are free
        under it, so that the sum of squared distances is smallest: see `assign_min_cost`, also for what happens where
        a prefix has more items than the last level has codes. `"extra_level"` appends a counter (TIGER's way, one
        more token to generate for every item). `"sinkhorn"` is the repair of LETTER's and LC-Rec's authors, for
        reproduction only: it may leave collisions, and its codes are about as far away as random ones (methods.md
        12.2). `"allow"` changes nothing.

        Args:
            policy: One of the four.
            geometry: Vectors of items and codes, as the item tokenizer gives them. Without it (published index
                files) min_cost has no distances: it changes as few codes as possible, see `assign_min_cost`.

        Raises:
            SettingsError: Unknown policy; "sinkhorn" without geometry; more items than code tuples.
        """
        if policy not in POLICIES:
            raise SettingsError(f"unknown uniqueness policy {policy!r}; known: {', '.join(POLICIES)}")
        if policy == "allow":
            return SemanticIds(self.item_ids, self.codes, self.codebook_sizes, "allow")
        self._check_keys_fit()
        collisions = self.num_items - self.num_distinct
        sizes = self.codebook_sizes
        if policy == "extra_level":
            codes, sizes = append_counter_level(self.codes, sizes)
        elif policy == "min_cost":
            codes = assign_min_cost(self.codes, sizes, geometry)
        elif geometry is None:
            raise SettingsError("the policy sinkhorn needs the vectors of items and codes: use encode(policy=...)")
        else:
            codes = repair_with_sinkhorn(self.codes, sizes, geometry)
        report = UniquenessReport.measure(policy, self.codes, codes, collisions, geometry)
        return SemanticIds(self.item_ids, codes, sizes, policy, report)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file (codes, sizes, item IDs, policy, report), whole or not at all."""
        encoded = [item_id.encode() for item_id in self.item_ids]
        tensors = {
            "codes": self.codes,
            "codebook_sizes": np.array(self.codebook_sizes, dtype=np.int64),
            # IDs are tensors: as metadata they'd hit the format's limit of 100 MB on its header.
            "item_id_bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "item_id_ends": np.cumsum([len(item_id) for item_id in encoded], dtype=np.int64),
        }
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "policy": self.policy,
            "report": json.dumps(None if self.report is None else asdict(self.report)),
        }
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, *, item_ids: Sequence[str] | None = None) -> "SemanticIds":
        """Reads what `save` wrote.

        Args:
            path: The safetensors file.
            item_ids: IDs of the catalogue in row order, compared with those of the file.

        Raises:
            MissingPartError: No such file.
            DataError: Not a file of `save`, or of a later llmrec.
            ItemOrderError: The file is about other items, or in another order.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingPartError(f"no semantic IDs at {path}")
        try:
            with safe_open(path, framework="np") as file:
                metadata: dict[str, Any] = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise DataError(f"{path} is not a safetensors file: {error}") from error
        version = metadata.get("format_version", "")
        check_format({"format_version": int(version)} if version.isdigit() else {}, FORMAT_VERSION, path)
        needed = ("codes", "codebook_sizes", "item_id_bytes", "item_id_ends")
        missing = [name for name in needed if name not in tensors]
        if missing or "policy" not in metadata:
            raise DataError(f"{path} was not written by SemanticIds.save: it lacks {', '.join(missing) or 'policy'}")
        text = tensors["item_id_bytes"].tobytes()
        ends = [0, *tensors["item_id_ends"].tolist()]
        found = tuple(text[start:end].decode() for start, end in pairwise(ends))
        if item_ids is not None:
            check_item_order(item_ids, found, f"the semantic IDs in {path.name}")
        report = json.loads(metadata.get("report", "null"))
        return cls(
            found,
            tensors["codes"],
            tuple(tensors["codebook_sizes"].tolist()),
            metadata["policy"],
            None if report is None else UniquenessReport(**report),
        )

    @classmethod
    def from_index_json(
        cls,
        path: str | Path,
        item_ids: Sequence[str],
        *,
        item_keys: Sequence[str] | None = None,
        codebook_sizes: int | Sequence[int] | None = None,
        policy: str = "allow",
    ) -> "SemanticIds":
        """Reads the index file that LETTER, LC-Rec and MiniOneRec publish: `{"0": ["<a_183>", "<b_70>", ...], ...}`.

        Args:
            path: The JSON file.
            item_ids: IDs of the catalogue in row order.
            item_keys: The file's key of each of these items; by default the row number as a string, as in all
                published files.
            codebook_sizes: Sizes of the levels (one number: of each). The file doesn't tell them; by default each
                level gets the largest code number of the whole file + 1.
            policy: Given to `make_unique`; there are no distances here.

        Raises:
            MissingPartError: No such file.
            DataError: Not such a file; items of another number of codes; an item without codes; keys left over.
        """
        content = read_json(path)
        keys = [str(row) for row in range(len(item_ids))] if item_keys is None else list(item_keys)
        if not isinstance(content, dict) or not content or len(keys) != len(item_ids):
            raise DataError(f"{path} holds no index, or {len(keys)} item keys don't fit {len(item_ids)} item IDs")
        missing = [key for key in keys if key not in content]
        if missing or len(content) != len(keys):
            raise DataError(
                f"{path} has codes of {len(content)} items, the catalogue {len(keys)};"
                f" {len(missing)} without codes{f', first {missing[0]!r}' if missing else ''}: is it of this data set?"
            )
        num_levels = len(content[keys[0]])
        codes = np.array([_parse_tokens(content[key], num_levels, key, path) for key in keys], dtype=np.int64)
        if codebook_sizes is None:
            codebook_sizes = int(codes.max()) + 1
        sizes = (codebook_sizes,) * num_levels if isinstance(codebook_sizes, int) else tuple(codebook_sizes)
        semantic_ids = cls(tuple(item_ids), codes, sizes)
        return semantic_ids if policy == "allow" else semantic_ids.make_unique(policy)

    def _check_keys_fit(self) -> None:
        if prod(self.codebook_sizes) > MAX_KEY:
            raise SettingsError(
                f"codebook sizes {list(self.codebook_sizes)} allow {prod(self.codebook_sizes):.3g} tuples, more than a"
                f" 64-bit key holds ({MAX_KEY:.3g}); use fewer levels or smaller codebooks"
            )


def _parse_tokens(tokens: Any, num_levels: int, key: str, path: str | Path) -> list[int]:
    matches = [_CODE_TOKEN.fullmatch(token) for token in tokens] if isinstance(tokens, list) else []
    codes = [
        int(match[2]) for level, match in enumerate(matches) if match is not None and ord(match[1]) - ord("a") == level
    ]
    if len(codes) != num_levels or len(matches) != num_levels or num_levels == 0:
        raise DataError(
            f"{path}: item {key!r} has {tokens!r}; expected {num_levels} tokens like"
            f" {', '.join(code_token(level, 7) for level in range(min(num_levels, 4)))}"
        )
    return codes
