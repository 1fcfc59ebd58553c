"""The trie of real items, as arrays.

All code tuples of the catalogue, sorted. The children of a node are then one contiguous run, so a level of the trie is
two integer arrays: the code of each child node, and where each node's run starts. A node at depth d is its number
among the sorted distinct prefixes of length d; the leaves are the distinct tuples, and everything below a node is
again one contiguous run of leaves. A step is gathers and comparisons on the device of the arrays: no Python loop over
rows, no copy to the host, and a cost that doesn't depend on the number of items. (A trie in compressed sparse rows, as
STATIC has it, arXiv 2602.22647; as there, the first levels, where nearly every code is taken, have dense tables too.)

This module knows codes and catalogue rows. It knows nothing of tokens, models or item IDs.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmrec.errors import DataError, MissingPartError
from llmrec.files import atomic_file, check_format
from llmrec.generation.item_sets import ItemSet, LeafSubset, check_rows, make_item_set, make_subset
from llmrec.generation.trie_building import (
    SortedCodes,
    TrieArrays,
    build_arrays,
    check_codes,
    drop_rows,
    merge_codes,
    sort_codes,
)
from llmrec.item_tokenizers.semantic_ids import SemanticIds

FORMAT_VERSION = 2


class Children(NamedTuple):
    """Children of R nodes, padded to the largest number of children in the level: the last child again and again.

    Attributes:
        codes: int64 [R, C], the code that leads to each child, ascending.
        nodes: int64 [R, C], the child nodes.
        valid: bool [R, C], False at padding.
    """

    codes: Tensor
    nodes: Tensor
    valid: Tensor


@dataclass(frozen=True, eq=False)
class ItemTrie:
    """Which codes may follow which prefix, and which items a whole tuple stands for.

    L levels, N items, M_d nodes at depth d (M_0 = 1, the root; M_L leaves). Nothing changes a trie: `insert` and
    `remove` make another one. All arrays are on one device, and int32 unless said otherwise.

    Attributes:
        codebook_sizes: K of each level.
        codes: L arrays; array d is [M_{d+1}], the code of each node of depth d + 1: uint8, int16 or int32, whichever
            is enough for the codebook.
        starts: L arrays; array d is [M_d + 1]: the children of node i of depth d are the nodes `starts[i]` to
            `starts[i + 1]` of depth d + 1.
        items: [N], catalogue rows in the order of the leaves, ascending within a leaf.
        leaf_of_item: [N], the leaf of each catalogue row.
        shared_starts: [M_L + 1]: the items of leaf i stand at `shared_starts[i]` to `shared_starts[i + 1]` in
            `items`. None where no two items share a leaf: item i of `items` is then that of leaf i.
        leaf_starts: L arrays; array d is [M_d + 1]: the leaves below node i of depth d are `leaf_starts[i]` to
            `leaf_starts[i + 1]`. The last one is the last of `starts`.
        tables: L entries, uint8 [M_d, K / 8 rounded up]: which codes follow each node of depth d, a bit a code, lowest
            bit first; None where that would be large, at nodes with few children.
        branching: The largest number of children of a node, for each level.
        fingerprint: A number that equal tries share: a checksum of the arrays.
    """

    codebook_sizes: tuple[int, ...]
    codes: tuple[Tensor, ...]
    starts: tuple[Tensor, ...]
    items: Tensor
    leaf_of_item: Tensor
    shared_starts: Tensor | None
    leaf_starts: tuple[Tensor, ...]
    tables: tuple[Tensor | None, ...]
    branching: tuple[int, ...]
    fingerprint: int
    _slots: tuple[Tensor, ...] = field(init=False, repr=False)
    _bools_of_byte: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # What steps would otherwise make anew: 0 to C of each level, and the eight bools in each byte, as one integer.
        slots = torch.arange(max(self.branching) + 1, dtype=torch.int32, device=self.device)
        bools = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").view(np.int64)[:, 0]
        object.__setattr__(self, "_slots", tuple(slots[: most + 1] for most in self.branching))
        object.__setattr__(self, "_bools_of_byte", torch.from_numpy(bools.copy()).to(self.device))

    @property
    def num_levels(self) -> int:
        """L, the number of codes of an item."""
        return len(self.codebook_sizes)

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.items)

    @property
    def num_leaves(self) -> int:
        """Number of distinct code tuples: N where no two items share one."""
        return len(self.codes[-1])

    @property
    def item_starts(self) -> Tensor:
        """`shared_starts`, also where no two items share a leaf: int32 [M_L + 1]."""
        if self.shared_starts is None:
            return torch.arange(self.num_items + 1, dtype=torch.int32, device=self.device)
        return self.shared_starts

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return self.items.device

    @property
    def num_bytes(self) -> int:
        """Memory of all arrays."""
        return sum(array.numel() * array.element_size() for array in self._named_arrays().values())

    def num_nodes(self, depth: int) -> int:
        """M_d, the number of nodes at a depth from 0 (the root) to L (the leaves)."""
        return len(self.codes[depth - 1]) if depth else 1

    @classmethod
    def from_semantic_ids(cls, semantic_ids: SemanticIds) -> "ItemTrie":
        """Builds the trie of a catalogue. Items that share a tuple share a leaf."""
        return cls.from_codes(semantic_ids.codes, semantic_ids.codebook_sizes)

    @classmethod
    def from_codes(cls, codes: np.ndarray, codebook_sizes: Sequence[int]) -> "ItemTrie":
        """Builds a trie by sorting.

        Args:
            codes: Integers [N, L], the tuple of each catalogue row. Equal rows are allowed.
            codebook_sizes: K of each of the L levels.

        Raises:
            DataError: No items, not two axes, not integers, or a code outside its codebook.
        """
        sizes = tuple(int(size) for size in codebook_sizes)
        return cls._from_sorted(sort_codes(check_codes(codes, sizes), sizes), sizes)

    @classmethod
    def _from_sorted(cls, ordered: SortedCodes, sizes: tuple[int, ...]) -> "ItemTrie":
        arrays = build_arrays(ordered, sizes)
        tensors: dict[str, Tensor] = {}
        for part in fields(TrieArrays):
            value = getattr(arrays, part.name)
            levels = value if isinstance(value, tuple) else [value]
            for level, array in enumerate(levels):
                name = f"{part.name}.{level}" if levels is value else part.name
                if isinstance(array, np.ndarray):
                    tensors[name] = torch.from_numpy(array)
        branching = tuple(int(np.diff(starts).max()) for starts in arrays.starts)
        return cls._from_named_arrays(tensors, sizes, branching, arrays.fingerprint)

    def _named_arrays(self) -> dict[str, Tensor]:
        """All arrays, each once."""
        arrays = {"items": self.items, "leaf_of_item": self.leaf_of_item}
        if self.shared_starts is not None:
            arrays["shared_starts"] = self.shared_starts
        for level, (codes, starts, table) in enumerate(zip(self.codes, self.starts, self.tables, strict=True)):
            arrays |= {f"codes.{level}": codes, f"starts.{level}": starts}
            if table is not None:
                arrays[f"tables.{level}"] = table
            if level < self.num_levels - 1:
                arrays[f"leaf_starts.{level}"] = self.leaf_starts[level]
        return arrays

    @classmethod
    def _from_named_arrays(
        cls, arrays: Mapping[str, Tensor], sizes: tuple[int, ...], branching: tuple[int, ...], fingerprint: int
    ) -> "ItemTrie":
        levels = range(len(sizes))
        starts = tuple(arrays[f"starts.{level}"] for level in levels)
        return cls(
            sizes,
            tuple(arrays[f"codes.{level}"] for level in levels),
            starts,
            arrays["items"],
            arrays["leaf_of_item"],
            arrays.get("shared_starts"),
            (*(arrays[f"leaf_starts.{level}"] for level in levels[:-1]), starts[-1]),
            tuple(arrays.get(f"tables.{level}") for level in levels),
            branching,
            fingerprint,
        )

    def to(self, device: torch.device | str) -> "ItemTrie":
        """The same trie on another device; itself where it is there already."""
        if torch.device(device) == self.device:
            return self
        arrays = {name: array.to(device) for name, array in self._named_arrays().items()}
        return self._from_named_arrays(arrays, self.codebook_sizes, self.branching, self.fingerprint)

    def children(self, level: int, nodes: Tensor) -> Children:
        """Children of nodes.

        Args:
            level: 0 for the children of the root, up to L - 1: the depth of `nodes`.
            nodes: int64 [R], nodes of that depth.

        Returns:
            [R, C] with C = `branching[level]`, whatever the nodes are.
        """
        first, end = self._run(level, nodes)
        slots = self._slots[level][:-1]
        child = torch.minimum(first + slots, end - 1)
        codes = self.codes[level].index_select(0, child.flatten()).view_as(child)
        return Children(codes.long(), child.long(), slots < end - first)

    def has_items_left(self, level: int, nodes: Tensor, subset: LeafSubset) -> Tensor:
        """Whether each child has a leaf below it that the request may be answered with.

        Args:
            level: Depth of `nodes`.
            nodes: int64 [R], R = B times the rows of a request, which stand side by side.
            subset: From `subset`, of B requests.

        Returns:
            bool [R, C], in the places of `children(level, nodes)`; False where there is no child.
        """
        return subset.any_left(self._leaf_bounds(level, self._bounds(level, nodes)))

    def _run(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The first and one past the last child of each node, both int32 [R, 1]."""
        starts = self.starts[level]
        return starts.index_select(0, nodes).unsqueeze(1), starts[1:].index_select(0, nodes).unsqueeze(1)

    def _bounds(self, level: int, nodes: Tensor) -> Tensor:
        """Where each child begins and ends among the nodes of the next depth: int32 [R, C + 1]."""
        first, end = self._run(level, nodes)
        return torch.minimum(first + self._slots[level], end)

    def _leaf_bounds(self, level: int, bounds: Tensor) -> Tensor:
        """From `_bounds`: where the leaves below each child begin and end. Those of neighbours touch."""
        if level + 1 == self.num_levels:
            return bounds
        return self.leaf_starts[level + 1].index_select(0, bounds.flatten()).view_as(bounds)

    def allowed_codes(self, level: int, nodes: Tensor, subset: LeafSubset | None = None) -> Tensor:
        """One step of masking: which codes may follow each node.

        Args:
            level: Depth of `nodes`.
            nodes: int64 [R].
            subset: From `subset`; R is then B requests times equally many rows, those of a request side by side.

        Returns:
            bool [R, K] with K = `codebook_sizes[level]`.
        """
        table, size = self.tables[level], self.codebook_sizes[level]
        if subset is None and table is not None:
            packed = table.index_select(0, nodes)
            unpacked = self._bools_of_byte.index_select(0, packed.flatten().int()).view(packed.shape)
            return unpacked.view(torch.bool)[:, :size]
        if subset is None:
            first, end = self._run(level, nodes)
            child = torch.maximum(end - self._slots[level][1:], first)  # the last children; the first one repeatedly
            codes = self.codes[level].index_select(0, child.flatten()).view_as(child).long()
            return torch.zeros(len(nodes), size, dtype=torch.bool, device=nodes.device).scatter_(1, codes, True)
        bounds = self._bounds(level, nodes)
        left = subset.any_left(self._leaf_bounds(level, bounds))
        child = bounds[:, :-1].clamp(max=self.num_nodes(level + 1) - 1)  # beyond the end nothing is left
        codes = self.codes[level].index_select(0, child.flatten()).view_as(child).long()
        allowed = torch.zeros(len(nodes), size + 1, dtype=torch.bool, device=nodes.device)
        return allowed.scatter_(1, torch.where(left, codes, size), True)[:, :size]  # column K took what isn't left

    def child(self, level: int, nodes: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Follows one code from each node, by binary search in the node's run (none where all codes follow all nodes).

        Args:
            level: Depth of `nodes`.
            nodes: int64 [R].
            codes: int64 [R], any integers.

        Returns:
            The child nodes, int64 [R], and bool [R] whether there is such a child; where there isn't, some node of
            that depth stands in its place.
        """
        size = self.codebook_sizes[level]
        if self.num_nodes(level + 1) == self.num_nodes(level) * size:
            return nodes * size + codes.clamp(0, size - 1), (codes >= 0) & (codes < size)
        level_codes, starts = self.codes[level], self.starts[level]
        found = starts.index_select(0, nodes)
        last = starts[1:].index_select(0, nodes) - 1
        for power in reversed(range((self.branching[level] - 1).bit_length())):
            # The last child known not to be beyond the code, by ever shorter steps.
            further = torch.minimum(found + 2**power, last)
            found = torch.where(level_codes.index_select(0, further) <= codes, further, found)
        return found.long(), level_codes.index_select(0, found) == codes

    def walk(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Follows a prefix of t codes from the root.

        Args:
            codes: int64 [R, t], t from 0 to L.

        Returns:
            The nodes of depth t, int64 [R], and bool [R] whether the prefix is one of an item.
        """
        nodes = torch.zeros(len(codes), dtype=torch.int64, device=self.device)
        exists = torch.ones(len(codes), dtype=torch.bool, device=self.device)
        for level in range(codes.shape[1]):
            nodes, found = self.child(level, nodes, codes[:, level])
            exists = exists & found
        return nodes, exists

    def nodes_of(self, leaves: Tensor) -> Tensor:
        """The paths of leaves.

        Args:
            leaves: int64 [n], leaves of the trie.

        Returns:
            int64 [n, L + 1], the node at every depth: 0, the root, first, the leaf itself last.
        """
        leaves = leaves.to(torch.int32)
        inner = [torch.searchsorted(starts, leaves, right=True) - 1 for starts in self.leaf_starts[1:]]
        return torch.stack([torch.zeros_like(leaves).long(), *inner, leaves.long()], dim=1)

    def codes_of(self, leaves: Tensor) -> Tensor:
        """The code tuples of leaves int64 [n]: int64 [n, L]."""
        nodes = self.nodes_of(leaves)[:, 1:].unbind(1)
        codes = (level.index_select(0, node) for level, node in zip(self.codes, nodes, strict=True))
        return torch.stack([of_level.long() for of_level in codes], dim=1)

    def items_of(self, leaf: int) -> np.ndarray:
        """Catalogue rows of a leaf's items, ascending: int32 [n], n at least 1."""
        if self.shared_starts is None:
            return self.items[leaf : leaf + 1].cpu().numpy()
        start, end = self.shared_starts[leaf : leaf + 2].tolist()
        return self.items[start:end].cpu().numpy()

    def item_set(self, items: np.ndarray) -> ItemSet:
        """Prepares some items for `subset`; once for any number of requests.

        Args:
            items: Catalogue rows in any order, repeats allowed, or bool [N], True where the item is in the set: a
                category, a date, what is in stock.

        Raises:
            DataError: A row outside the catalogue, or a mask of another length.
        """
        return make_item_set(self, items)

    def subset(
        self,
        *,
        allow: ItemSet | Sequence[ItemSet | None] | None = None,
        deny: Sequence[np.ndarray] | None = None,
    ) -> LeafSubset | None:
        """What the search needs to keep some items out of each request's answer.

        Items that share a leaf are left out only together: where one of them is allowed and not denied, the leaf
        stays, and whoever answers with items drops the others.

        Args:
            allow: One set for all requests, or a set for each of B requests, None where all items are allowed.
            deny: For each of the B requests the catalogue rows to leave out, in any order, repeats allowed.

        Returns:
            The subset; None where nothing is left out in any request.

        Raises:
            DataError: A row outside the catalogue.
            SettingsError: Sets of another catalogue, or `allow` and `deny` of different numbers of requests.
        """
        return make_subset(self, allow, deny)

    def insert(self, codes: np.ndarray) -> "ItemTrie":
        """The trie with more items, equal to one built anew of all.

        Merges, in time linear in the number of items, where a tuple fits into 63 bits; sorts anew where it doesn't.

        Args:
            codes: Integers [n, L]; the new items become the catalogue rows N to N + n - 1.

        Raises:
            DataError: As in `from_codes`.
        """
        merged = merge_codes(self._sorted_codes(), check_codes(codes, self.codebook_sizes), self.codebook_sizes)
        return self._from_sorted(merged, self.codebook_sizes).to(self.device)

    def remove(self, rows: np.ndarray) -> "ItemTrie":
        """The trie without some items, equal to one built anew of the others.

        Args:
            rows: Catalogue rows, in any order, repeats allowed. The others keep their order and are numbered from 0.

        Raises:
            DataError: A row outside the catalogue, or no item would be left.
        """
        is_removed = np.zeros(self.num_items, dtype=bool)
        is_removed[check_rows(rows, self.num_items)] = True
        if is_removed.all():
            raise DataError(f"all {self.num_items} items would be removed: a trie needs at least one")
        return self._from_sorted(drop_rows(self._sorted_codes(), is_removed), self.codebook_sizes).to(self.device)

    def _sorted_codes(self) -> SortedCodes:
        """The code tuples of all items in the order of the leaves."""
        item_starts = self.item_starts.cpu()
        columns = []
        for level, codes in enumerate(self.codes):
            is_leaf = level == self.num_levels - 1
            leaf_starts = None if is_leaf else self.leaf_starts[level + 1].cpu()
            firsts = item_starts if leaf_starts is None else item_starts.index_select(0, leaf_starts)
            columns.append(np.repeat(codes.cpu().numpy(), firsts.diff().numpy()))
        return SortedCodes(tuple(columns), self.items.cpu().numpy())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "codebook_sizes": " ".join(str(size) for size in self.codebook_sizes),
            "branching": " ".join(str(most) for most in self.branching),
            "fingerprint": str(self.fingerprint),
        }
        with atomic_file(path) as temporary:
            arrays = {name: array.cpu().contiguous() for name, array in self._named_arrays().items()}
            save_file(arrays, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ItemTrie":
        """Opens what `save` wrote, without reading it: memory-mapped, in pages that several processes share.

        Raises:
            MissingPartError: No such file.
            DataError: Not a trie, or one of another format.
        """
        if not os.path.isfile(path):
            raise MissingPartError(f"no trie at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if "codebook_sizes" not in metadata:
                    raise DataError(f"{path} was not written by ItemTrie.save")
                version = int(metadata["format_version"])
                check_format({"format_version": version}, FORMAT_VERSION, path)
                if version < FORMAT_VERSION:
                    raise DataError(f"{path} has format {version}, which this llmrec no longer reads: save it anew")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise DataError(f"{path} is no whole safetensors file: {error}") from error
        sizes, branching = (
            tuple(int(number) for number in metadata[name].split()) for name in ("codebook_sizes", "branching")
        )
        return cls._from_named_arrays(arrays, sizes, branching, int(metadata["fingerprint"]))
