"""Semantic IDs: one integer array of codes, the codebook sizes, and the item IDs they belong to.

Knows how to read, save, look up and make codes unique. Doesn't know how codes are learned (the item tokenizers) nor
which token IDs they get in a language model (`llmrec.vocabulary`).
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import compress, pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llmrec.data.item_order import ItemIndex, check_item_order
from llmrec.errors import DataError, MissingPartError, SettingsError
from llmrec.files import atomic_file, check_format
from llmrec.item_tokenizers.code_assignment import assign_counters, assign_fixed_counters, assign_min_cost
from llmrec.item_tokenizers.index_files import read_index
from llmrec.item_tokenizers.uniqueness import (
    CodeGeometry,
    UniquenessReport,
    append_counter_level,
    mixed_radix_keys,
    repair_with_sinkhorn,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
POLICIES = ("min_cost", "extra_level", "sinkhorn", "allow")
MAX_KEY = np.iinfo(np.int64).max


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


def pack_item_ids(item_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Item IDs as arrays for a safetensors file: in its metadata they'd hit the limit of 100 MB on the header."""
    encoded = [item_id.encode() for item_id in item_ids]
    return {
        "item_id_bytes": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "item_id_ends": np.cumsum([len(item_id) for item_id in encoded], dtype=np.int64),
    }


def unpack_item_ids(arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """What `pack_item_ids` packed."""
    text = arrays["item_id_bytes"].tobytes()
    ends = [0, *arrays["item_id_ends"].tolist()]
    return tuple(text[start:end].decode() for start, end in pairwise(ends))


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """The codes of a catalogue.

    Attributes:
        item_ids: Outside IDs, row i of `codes` is item i.
        codes: int32 [N, L], `0 <= codes[:, l] < codebook_sizes[l]`.
        codebook_sizes: Number of codes of each level, length L.
        policy: What was done about items with equal codes: "min_cost", "extra_level", "sinkhorn", or "allow"
            (nothing: such items share their semantic ID, and whoever decodes one must answer with all of them).
        report: What `make_unique` moved and what it cost, or `append` among the new items; None where neither ran.

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

    def make_unique(
        self, policy: str = "min_cost", *, geometry: CodeGeometry | None = None, counter_size: int | None = None
    ) -> "SemanticIds":
        """Gives every item codes of its own, by a named policy. Deterministic.

        `"min_cost"` (the default) keeps every prefix and moves colliding items to last-level codes that are free
        under it, so that the sum of squared distances is smallest: see `assign_min_cost`, also for what happens where
        a prefix has more items than the last level has codes. `"extra_level"` appends a counter (TIGER's way, one
        more token to generate for every item; codes that have one stay as they are). `"sinkhorn"` is the repair of
        LETTER's and LC-Rec's authors, for reproduction only: it may leave collisions, and its codes are about as far
        away as random ones (methods.md 12.2). `"allow"` changes nothing.

        Args:
            policy: One of the four.
            geometry: Vectors of items and codes, as the item tokenizer gives them. Without it (published index
                files) min_cost has no distances: it changes as few codes as possible, see `assign_min_cost`.
            counter_size: For "extra_level": how many codes the counter has, whatever the largest group is, for a
                model whose vocabulary is there already. Of larger groups the items that lose least move to the nearest
                prefix with room (`assign_fixed_counters`), and a warning says how many. None: as many as the largest
                group has items. The other policies have no counter and don't look at it.

        Raises:
            SettingsError: Unknown policy; "sinkhorn" without geometry; more items than code tuples; a counter of no
                codes, or of fewer than the codes have already.
        """
        if policy not in POLICIES:
            raise SettingsError(f"unknown uniqueness policy {policy!r}; known: {', '.join(POLICIES)}")
        if policy == "extra_level" and counter_size is not None:
            return self._with_counter_of(counter_size, geometry)
        if policy == "extra_level" == self.policy:
            return self
        sizes = self.codebook_sizes
        if policy != "allow":
            self._check_keys_fit()
        elif prod(sizes) > MAX_KEY:  # colliding items can't be counted, nor need they be
            return SemanticIds(self.item_ids, self.codes, sizes, "allow")
        codes = self.codes
        if policy == "extra_level":
            codes, sizes = append_counter_level(self.codes, sizes)
        elif policy == "min_cost":
            codes = assign_min_cost(self.codes, sizes, geometry)
        elif policy == "sinkhorn" and geometry is None:
            raise SettingsError("the policy sinkhorn needs the vectors of items and codes: use encode(policy=...)")
        elif geometry is not None and policy == "sinkhorn":
            codes = repair_with_sinkhorn(self.codes, sizes, geometry)
        report = UniquenessReport.measure(policy, self.codes, codes, sizes, geometry)
        return SemanticIds(self.item_ids, codes, sizes, policy, report)

    def _with_counter_of(self, size: int, geometry: CodeGeometry | None) -> "SemanticIds":
        """Under "extra_level", with a counter of exactly so many codes."""
        if size < 1:
            raise SettingsError(f"counter_size is {size}: the counter needs a code at least, 256 is ETEGRec's")
        if self.policy == "extra_level":
            largest = int(self.codes[:, -1].max(initial=-1))
            if largest >= size:
                raise SettingsError(
                    f"counter_size is {size}, but these codes have counters up to {largest}: raise it, or make the"
                    " codes before the counter unique anew"
                )
            return replace(self, codebook_sizes=(*self.codebook_sizes[:-1], size))
        sizes = (*self.codebook_sizes, size)
        _check_keys_fit(sizes)
        codes = assign_fixed_counters(self.codes, self.codebook_sizes, size, geometry)
        moved = int((codes[:, :-1] != self.codes).any(axis=1).sum())
        if moved:
            logger.warning(
                "%s of %s items share their codes with more others than a counter of %d tells apart, and moved to the"
                " %s codes with room: a larger counter_size, or an item tokenizer that collides less, lets them stay",
                f"{moved:,}", f"{self.num_items:,}", size, "lowest" if geometry is None else "nearest",
            )  # fmt: skip
        report = UniquenessReport.measure("extra_level", self.codes, codes, sizes, geometry)
        return SemanticIds(self.item_ids, codes, sizes, "extra_level", report)

    def append(
        self,
        item_ids: Sequence[str],
        codes: np.ndarray | Sequence[Sequence[int]],
        *,
        geometry: CodeGeometry | None = None,
    ) -> "SemanticIds":
        """Adds new items. Not a bit of the existing rows changes, and under this object's policy nothing collides.

        "min_cost": new items that collide, with an existing one or with each other, move to codes that are free under
        their prefix, together at the least cost; where the prefix is full, to the nearest sibling prefix with room
        (`assign_min_cost`). "extra_level": they get the lowest free counter of their group, the next one where no
        item was removed. "sinkhorn": as min_cost, because the authors' repair moves existing items too; the report
        says min_cost. "allow": as they are.

        Items appended in one go are placed together; one after the other each gets the best code that is left, so the
        result can differ and the sum of distances be larger.

        Args:
            item_ids: Outside IDs of the new items, none of them here yet.
            codes: Their codes as the item tokenizer gives them, int [new, L]; [new, L - 1] under "extra_level", where
                the counter is added here.
            geometry: Vectors of the new items (row i is new item i) and of the codes; see `make_unique`.

        Returns:
            Existing and new items; its report is about the new items alone.

        Raises:
            DataError: An item ID is here already or stands twice; codes of a wrong shape or outside the codebooks.
            SettingsError: More items than code tuples, or a group larger than the counter level.
        """
        new, sizes = self._new_items(tuple(item_ids), codes, geometry), self.codebook_sizes
        ids = self.item_ids + new.item_ids
        if self.policy == "allow" and prod(sizes) > MAX_KEY:
            return SemanticIds(ids, np.concatenate([self.codes, new.codes]), sizes, "allow")
        self._check_keys_fit()
        taken = self._sorted_keys if self.is_unique else np.unique(self._sorted_keys)
        policy, placed = self.policy, new.codes
        if policy == "extra_level":
            placed = assign_counters(new.codes, sizes, taken)
        elif policy != "allow":
            if policy == "sinkhorn":
                logger.info("new items that collide are placed by min_cost: sinkhorn would move existing items")
            policy, placed = "min_cost", assign_min_cost(new.codes, sizes, geometry, taken=taken)
        report = UniquenessReport.measure(policy, new.codes, placed, sizes, geometry, taken=taken)
        return SemanticIds(ids, np.concatenate([self.codes, placed]), sizes, self.policy, report)

    def remove(self, item_ids: Sequence[str]) -> "SemanticIds":
        """Takes items out; the others keep their codes and their order, and the freed codes can be given again.

        A model that was trained on the freed codes knows the old item behind them: give them to a new item only
        where it is trained on.

        Raises:
            UnknownItemError: One of the IDs is not here.
        """
        keep = np.ones(self.num_items, dtype=bool)
        keep[ItemIndex(self.item_ids).rows(item_ids)] = False
        left = tuple(compress(self.item_ids, keep))
        return SemanticIds(left, self.codes[keep], self.codebook_sizes, self.policy)

    def _new_items(
        self, item_ids: tuple[str, ...], codes: np.ndarray | Sequence[Sequence[int]], geometry: CodeGeometry | None
    ) -> "SemanticIds":
        """Checks what `append` was given."""
        counted = self.policy == "extra_level"
        sizes = self.codebook_sizes[:-1] if counted else self.codebook_sizes
        array = np.asarray(codes)
        if array.ndim != 2 or array.shape != (len(item_ids), len(sizes)):
            without = ", without the counter, which is added here" if counted else ""
            raise DataError(f"codes of new items must be [{len(item_ids)}, {len(sizes)}]{without}; got {array.shape}")
        distinct = set(item_ids)
        if len(distinct) < len(item_ids):
            twice = next(item_id for row, item_id in enumerate(item_ids) if item_id in item_ids[:row])
            raise DataError(f"new item {twice!r} stands twice: give every item once")
        known = [item_id for item_id in self.item_ids if item_id in distinct]
        if known:
            raise DataError(
                f"{len(known)} of {len(item_ids)} new items are here already, first {known[0]!r}: their codes never"
                " change; leave them out, or remove() them first"
            )
        if geometry is not None and len(geometry.latents) != len(item_ids):
            raise DataError(
                f"the geometry is about {len(geometry.latents)} items, {len(item_ids)} are new: pass theirs"
            )
        return SemanticIds(item_ids, array, sizes)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file (codes, sizes, item IDs, policy, report), whole or not at all."""
        tensors = {
            "codes": self.codes,
            "codebook_sizes": np.array(self.codebook_sizes, dtype=np.int64),
            **pack_item_ids(self.item_ids),
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
        found = unpack_item_ids(tensors)
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

        MiniOneRec's constrained variant gives a further token to colliding items alone. Those without get code 0 at
        that level, and the others' numbers are shifted by one where 0 is in use, so that all have L codes; the policy
        is "extra_level" then. All other code numbers are kept as they are in the file, also where they start at 1
        (the same variant): the tokens of a model trained on them stay right, and code 0 is without items.

        Args:
            path: The JSON file.
            item_ids: IDs of the catalogue in row order.
            item_keys: The file's key of each of these items; by default the row number as a string, as in all
                published files.
            codebook_sizes: Sizes of the levels (one number: of each but that further level). The file doesn't tell
                them; by default each level gets the largest code number of the whole file + 1, the further level its
                own.
            policy: Given to `make_unique`; there are no distances here.

        Raises:
            MissingPartError: No such file.
            DataError: Not such a file; an item that lacks more than the last code; an item without codes; keys left
                over; a code outside `codebook_sizes`.
        """
        keys = [str(row) for row in range(len(item_ids))] if item_keys is None else list(item_keys)
        if len(keys) != len(item_ids):
            raise DataError(f"{len(keys)} item keys don't fit {len(item_ids)} item IDs")
        index = read_index(path, keys)
        sizes = index.codebook_sizes(codebook_sizes)
        semantic_ids = cls(tuple(item_ids), index.codes, sizes)
        if index.counted and policy in ("allow", "extra_level") and semantic_ids.is_unique:
            return cls(semantic_ids.item_ids, semantic_ids.codes, sizes, "extra_level")
        return semantic_ids.make_unique(policy)

    def _check_keys_fit(self) -> None:
        _check_keys_fit(self.codebook_sizes)


def _check_keys_fit(sizes: tuple[int, ...]) -> None:
    if prod(sizes) > MAX_KEY:
        raise SettingsError(
            f"codebook sizes {list(sizes)} allow {prod(sizes):.3g} tuples, more than a 64-bit key holds"
            f" ({MAX_KEY:.3g}); use fewer levels or smaller codebooks"
        )
