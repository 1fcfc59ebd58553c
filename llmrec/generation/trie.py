"""The trie of real items, as arrays.

All code tuples of the catalogue, sorted. The children of a node are then one contiguous run, so a level of the trie is
two integer arrays: the code of each child node, and where each node's run starts. A node at depth d is its number
among the sorted distinct prefixes of length d; the leaves are the distinct tuples, and everything below a node is
again one contiguous run of leaves. A step is gathers and comparisons on the device of the arrays: no Python loop over
rows, no copy to the host, and a cost that doesn't depend on the number of items. (A trie in compressed sparse rows, as
STATIC has it, arXiv 2602.22647; without its dense tables for the first levels.)

This module knows codes and catalogue rows. It knows nothing of tokens, models or item IDs.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmrec.errors import DataError, MissingPartError
from llmrec.files import atomic_file, check_format
from llmrec.item_tokenizers.semantic_ids import SemanticIds

FORMAT_VERSION = 1


class Children(NamedTuple):
    """Children of R nodes, padded to the largest number of children in the level.

    Attributes:
        codes: int64 [R, C], the code that leads to each child.
        nodes: int64 [R, C], the child nodes; where `valid` is False some node of that depth that is no child.
        valid: bool [R, C].
    """

    codes: Tensor
    nodes: Tensor
    valid: Tensor


@dataclass(frozen=True)
class ItemTrie:
    """Which codes may follow which prefix, and which items a whole tuple stands for.

    L levels, N items, M_d nodes at depth d (M_0 = 1, the root; M_L leaves). All arrays are int32.

    Attributes:
        codebook_sizes: K of each level.
        codes: L arrays; array d is [M_{d+1}], the code of each node of depth d + 1.
        starts: L arrays; array d is [M_d + 1]: the children of node i of depth d are the nodes `starts[i]` to
            `starts[i + 1]` of depth d + 1.
        items: [N], catalogue rows in the order of the leaves, ascending within a leaf.
        item_starts: [M_L + 1]: the items of leaf i stand at `item_starts[i]` to `item_starts[i + 1]` in `items`.
        leaf_starts: L + 1 arrays; array d is [M_d + 1]: the leaves below node i of depth d.
        leaf_of_item: [N], the leaf of each catalogue row.
        branching: The largest number of children of a node, for each level.
    """

    codebook_sizes: tuple[int, ...]
    codes: tuple[Tensor, ...]
    starts: tuple[Tensor, ...]
    items: Tensor
    item_starts: Tensor
    leaf_starts: tuple[Tensor, ...]
    leaf_of_item: Tensor
    branching: tuple[int, ...]

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
        return len(self.item_starts) - 1

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return self.items.device

    def num_nodes(self, depth: int) -> int:
        """M_d, the number of nodes at a depth from 0 (the root) to L (the leaves)."""
        return len(self.leaf_starts[depth]) - 1

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
            DataError: No items, not two axes, or a code outside its codebook.
        """
        codes, sizes = np.asarray(codes), tuple(int(size) for size in codebook_sizes)
        if codes.ndim != 2 or 0 in codes.shape or codes.shape[1] != len(sizes):
            raise DataError(f"a trie needs codes [items, {len(sizes)}] of at least one item, got shape {codes.shape}")
        if (codes < 0).any() or (codes >= np.asarray(sizes)).any():
            row = int(np.flatnonzero(((codes < 0) | (codes >= np.asarray(sizes))).any(axis=1))[0])
            raise DataError(f"row {row} has codes {codes[row].tolist()}, outside codebooks of sizes {sizes}")

        order = _sorted_rows(codes, sizes)
        ordered = codes[order]
        is_new = np.zeros(len(codes), dtype=bool)
        is_new[0] = True
        firsts = [np.zeros(1, dtype=np.int64)]  # of each depth: the first sorted row of every node
        level_codes = []
        for level in range(len(sizes)):
            is_new[1:] |= ordered[1:, level] != ordered[:-1, level]
            firsts.append(np.flatnonzero(is_new))
            level_codes.append(ordered[firsts[-1], level])
        starts = [
            np.append(np.searchsorted(firsts[depth + 1], firsts[depth]), len(firsts[depth + 1]))
            for depth in range(len(sizes))
        ]
        item_starts = np.append(firsts[-1], len(codes))
        return cls._from_arrays(
            sizes, [_int32(a) for a in level_codes], [_int32(a) for a in starts], _int32(order), _int32(item_starts)
        )

    @classmethod
    def _from_arrays(
        cls,
        codebook_sizes: tuple[int, ...],
        codes: list[Tensor],
        starts: list[Tensor],
        items: Tensor,
        item_starts: Tensor,
    ) -> "ItemTrie":
        """Derives what follows from the saved arrays."""
        num_leaves = len(item_starts) - 1
        leaf_starts = [torch.arange(num_leaves + 1, dtype=torch.int32)]
        for level_starts in reversed(starts):
            leaf_starts.insert(0, leaf_starts[0][level_starts.long()])
        leaf_of_item = torch.empty_like(items)
        leaf_of_item[items.long()] = torch.repeat_interleave(
            torch.arange(num_leaves, dtype=torch.int32), item_starts.diff()
        )
        branching = tuple(int(level_starts.diff().max()) for level_starts in starts)
        return cls(
            codebook_sizes,
            tuple(codes),
            tuple(starts),
            items,
            item_starts,
            tuple(leaf_starts),
            leaf_of_item,
            branching,
        )

    def to(self, device: torch.device | str) -> "ItemTrie":
        """The same trie on another device; itself where it is there already."""
        if torch.device(device) == self.device:
            return self
        return ItemTrie(
            self.codebook_sizes,
            tuple(array.to(device) for array in self.codes),
            tuple(array.to(device) for array in self.starts),
            self.items.to(device),
            self.item_starts.to(device),
            tuple(array.to(device) for array in self.leaf_starts),
            self.leaf_of_item.to(device),
            self.branching,
        )

    def children(self, level: int, nodes: Tensor) -> Children:
        """Children of nodes.

        Args:
            level: 0 for the children of the root, up to L - 1: the depth of `nodes`.
            nodes: int64 [R], nodes of that depth.

        Returns:
            [R, C] with C = `branching[level]`, whatever the nodes are.
        """
        first, end = self._run(level, nodes)
        wanted = first + torch.arange(self.branching[level], device=self.device)
        child = torch.minimum(wanted, end - 1)
        return Children(self.codes[level][child].long(), child, wanted < end)

    def has_items_left(self, level: int, nodes: Tensor, denied: Tensor) -> Tensor:
        """Whether each child has a leaf below it that is not denied.

        Args:
            level: Depth of `nodes`.
            nodes: int64 [R], R = B times the rows of a request, which stand side by side.
            denied: int64 [B, D], from `denied_leaves`.

        Returns:
            bool [R, C], in the places of `children(level, nodes)`; False where there is no child.
        """
        first, end = self._run(level, nodes)
        # Leaves of neighbouring children touch: C + 1 boundaries give all C runs of leaves, and one search in the
        # denied leaves how many of each run are denied. Beyond the last child the runs are empty.
        bounds = torch.minimum(first + torch.arange(self.branching[level] + 1, device=self.device), end)
        leaves = self.leaf_starts[level + 1][bounds].long()  # [R, C + 1]
        below = torch.searchsorted(denied, leaves.view(len(denied), -1)).view_as(leaves)
        return below.diff(dim=1) < leaves.diff(dim=1)

    def _run(self, depth: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """First and one past the last child of each node, both int64 [R, 1]."""
        starts = self.starts[depth]
        return starts[nodes].long().unsqueeze(1), starts[nodes + 1].long().unsqueeze(1)

    def child(self, level: int, nodes: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Follows one code from each node, by binary search in the node's run.

        Args:
            level: Depth of `nodes`.
            nodes: int64 [R].
            codes: int64 [R], any integers.

        Returns:
            The child nodes, int64 [R], and bool [R] whether there is such a child; where there isn't, some node of
            that depth stands in its place.
        """
        level_codes = self.codes[level]
        low, high = self.starts[level][nodes].long(), self.starts[level][nodes + 1].long()
        end = high
        for _ in range(self.branching[level].bit_length()):
            middle = torch.div(low + high, 2, rounding_mode="floor")
            smaller = level_codes[middle.clamp(max=len(level_codes) - 1)] < codes
            searching = low < high
            low = torch.where(searching & smaller, middle + 1, low)
            high = torch.where(searching & ~smaller, middle, high)
        found = torch.minimum(low, end - 1)
        return found, (low < end) & (level_codes[found] == codes)

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

    def denied_leaves(self, items: Sequence[np.ndarray]) -> Tensor | None:
        """What the search needs to keep some items out of each request's answer.

        Args:
            items: For each of the B requests the catalogue rows to leave out, in any order, repeats allowed.

        Returns:
            int64 [B, D] on the trie's device: the leaves all of whose items are denied, ascending, padded with the
            number of leaves. None where no leaf is denied in any request.
        """
        leaf_of_item, item_starts = self.leaf_of_item.cpu().numpy(), self.item_starts.cpu().numpy()
        denied = []
        for rows in items:
            leaves, counts = np.unique(leaf_of_item[np.unique(rows)], return_counts=True)
            denied.append(leaves[counts == item_starts[leaves + 1] - item_starts[leaves]])
        longest = max((len(leaves) for leaves in denied), default=0)
        if longest == 0:
            return None
        padded = np.full((len(denied), longest), self.num_leaves, dtype=np.int64)
        for request, leaves in enumerate(denied):
            padded[request, : len(leaves)] = leaves
        return torch.from_numpy(padded).to(self.device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all."""
        tensors = {"items": self.items, "item_starts": self.item_starts}
        for level in range(self.num_levels):
            tensors[f"codes.{level}"], tensors[f"starts.{level}"] = self.codes[level], self.starts[level]
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "codebook_sizes": " ".join(str(size) for size in self.codebook_sizes),
        }
        with atomic_file(path) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ItemTrie":
        """Reads what `save` wrote.

        Raises:
            MissingPartError: No such file.
            DataError: Not a trie, or one of a later format.
        """
        if not os.path.isfile(path):
            raise MissingPartError(f"no trie at {path}")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "codebook_sizes" not in metadata:
                raise DataError(f"{path} was not written by ItemTrie.save")
            check_format({"format_version": int(metadata["format_version"])}, FORMAT_VERSION, path)
            sizes = tuple(int(size) for size in metadata["codebook_sizes"].split())
            return cls._from_arrays(
                sizes,
                [file.get_tensor(f"codes.{level}") for level in range(len(sizes))],
                [file.get_tensor(f"starts.{level}") for level in range(len(sizes))],
                file.get_tensor("items"),
                file.get_tensor("item_starts"),
            )


def _sorted_rows(codes: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Row numbers in the order of their tuples; rows of one tuple stay in their own order."""
    if sum(float(np.log2(size)) for size in sizes) >= 62:
        return np.lexsort(codes.T[::-1])
    keys = np.zeros(len(codes), dtype=np.int64)
    for level, size in enumerate(sizes):
        keys = keys * size + codes[:, level]
    return np.argsort(keys, kind="stable")


def _int32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
