"""From the codes of a catalogue to the arrays of its trie: sorted, merged, thinned out, and one linear pass.

All in NumPy. The code tuples are sorted as one integer each, which holds the tuple in its high bits and the catalogue
row in its low ones, so the rows come out with the order and ties stay in row order. What follows is linear: where a
tuple differs from the one before it in the first d codes, a node of depth d begins.

This module knows codes and rows. It knows nothing of tensors or devices, nor of what the arrays are used for.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmrec.errors import DataError

_MOST_ITEMS = 2**31 - 2  # all arrays are int32
_LARGEST_CODEBOOK = 2**31
_TABLE_BYTES_PER_ITEM = 4
_BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class SortedCodes:
    """Code tuples in ascending order.

    Attributes:
        columns: L arrays [N], the codes of each level in the narrowest type (`code_type`).
        rows: int32 [N], the catalogue row of each tuple; ascending among equal tuples.
    """

    columns: tuple[np.ndarray, ...]
    rows: np.ndarray


@dataclass(frozen=True)
class TrieArrays:
    """The arrays of `ItemTrie`, which says what each is."""

    codes: tuple[np.ndarray, ...]
    starts: tuple[np.ndarray, ...]
    items: np.ndarray
    leaf_of_item: np.ndarray
    shared_starts: np.ndarray | None
    leaf_starts: tuple[np.ndarray, ...]
    tables: tuple[np.ndarray | None, ...]
    fingerprint: int


def code_type(size: int) -> type[np.integer]:
    """The narrowest type for the codes of a codebook that PyTorch computes with: uint8, int16 or int32."""
    if size <= 2**8:
        return np.uint8
    return np.int16 if size <= 2**15 else np.int32


def check_codes(codes: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """The codes as an array [N, L].

    Raises:
        DataError: No items, too many, not integers on two axes, a code outside its codebook, or too large a codebook.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or 0 in codes.shape or codes.shape[1] != len(sizes):
        raise DataError(f"a trie needs codes [items, {len(sizes)}] of at least one item, got shape {codes.shape}")
    if not np.issubdtype(codes.dtype, np.integer):
        raise DataError(f"a trie needs integer codes, got {codes.dtype}")
    if max(sizes) > _LARGEST_CODEBOOK:
        raise DataError(f"codebooks of sizes {sizes}: codes are 32-bit integers, so {_LARGEST_CODEBOOK:,} is the most")
    if len(codes) > _MOST_ITEMS:
        raise DataError(f"a trie holds up to {_MOST_ITEMS:,} items, got {len(codes):,}: split the catalogue")
    for level, size in enumerate(sizes):
        if codes[:, level].min() < 0 or codes[:, level].max() >= size:
            row = int(np.flatnonzero((codes[:, level] < 0) | (codes[:, level] >= size))[0])
            raise DataError(f"row {row} has codes {codes[row].tolist()}, outside codebooks of sizes {sizes}")
    return codes


def sort_codes(codes: np.ndarray, sizes: tuple[int, ...]) -> SortedCodes:
    """Sorts checked codes [N, L]; rows of one tuple stay in their own order."""
    row_bits = (len(codes) - 1).bit_length()
    if sum(_bits(sizes)) + row_bits > 63:
        order = np.lexsort(codes.T[::-1])
        columns = tuple(codes[order, level].astype(code_type(size)) for level, size in enumerate(sizes))
        return SortedCodes(columns, order.astype(np.int32))
    packed = _packed([codes[:, level] for level in range(len(sizes))], sizes)
    packed <<= row_bits
    packed |= np.arange(len(codes))
    packed.sort()  # no ties, so the quick unstable sort will do
    rows = (packed & (2**row_bits - 1)).astype(np.int32)
    packed >>= row_bits
    last_first = []
    for size, bits in zip(reversed(sizes), reversed(_bits(sizes)), strict=True):
        last_first.append((packed & (2**bits - 1)).astype(code_type(size)))
        packed >>= bits
    return SortedCodes(tuple(reversed(last_first)), rows)


def merge_codes(old: SortedCodes, new: np.ndarray, sizes: tuple[int, ...]) -> SortedCodes:
    """Adds checked codes [n, L] as the rows N, N + 1, ... Linear in N where a tuple fits into 63 bits."""
    if sum(_bits(sizes)) > 63:
        codes = np.empty((len(old.rows), len(sizes)), dtype=np.int32)
        for level, column in enumerate(old.columns):
            codes[old.rows, level] = column
        return sort_codes(np.concatenate([codes, new]), sizes)
    added = sort_codes(new, sizes)
    # On the right of equal tuples: the new rows are the higher ones.
    places = np.searchsorted(_packed(old.columns, sizes), _packed(added.columns, sizes), side="right")
    columns = (np.insert(before, places, more) for before, more in zip(old.columns, added.columns, strict=True))
    return SortedCodes(tuple(columns), np.insert(old.rows, places, added.rows + np.int32(len(old.rows))))


def drop_rows(old: SortedCodes, is_dropped: np.ndarray) -> SortedCodes:
    """Leaves out the rows marked in bool [N]; the others are numbered anew in their order."""
    kept = ~is_dropped[old.rows]
    numbers = np.cumsum(~is_dropped, dtype=np.int32) - np.int32(1)
    return SortedCodes(tuple(column[kept] for column in old.columns), numbers[old.rows[kept]])


def build_arrays(ordered: SortedCodes, sizes: tuple[int, ...]) -> TrieArrays:
    """Finds the nodes in sorted codes."""
    num_items = len(ordered.rows)
    is_first = np.zeros(num_items, dtype=bool)  # whether a node of the depth begins here
    is_first[0] = True
    codes, starts = [], []
    for column in ordered.columns:
        parent_begins = is_first.copy()
        is_first[1:] |= column[1:] != column[:-1]
        firsts = np.flatnonzero(is_first)
        codes.append(column[firsts])
        starts.append(_with_end(np.flatnonzero(parent_begins[firsts]), len(firsts)))

    num_leaves = len(codes[-1])
    shared_starts = None if num_leaves == num_items else _with_end(firsts, num_items)
    leaf_of_item = np.empty(num_items, dtype=np.int32)
    leaf_of_item[ordered.rows] = (
        np.arange(num_items, dtype=np.int32)
        if shared_starts is None
        else np.cumsum(is_first, dtype=np.int32) - np.int32(1)
    )
    leaf_starts = [starts[-1]]
    for level_starts in reversed(starts[:-1]):
        leaf_starts.insert(0, leaf_starts[0][level_starts])
    tables = [_table(*level, num_items) for level in zip(codes, starts, sizes, strict=True)]
    return TrieArrays(
        tuple(codes),
        tuple(starts),
        ordered.rows,
        leaf_of_item,
        shared_starts,
        tuple(leaf_starts),
        tuple(tables),
        _fingerprint([np.asarray(sizes), *codes, *starts, ordered.rows, leaf_of_item]),
    )


def _table(codes: np.ndarray, starts: np.ndarray, size: int, num_items: int) -> np.ndarray | None:
    """Bits uint8 [M_d, K / 8 rounded up]: which codes follow each node; None where it would be large."""
    num_nodes = len(starts) - 1
    if num_nodes * -(-size // 8) > _TABLE_BYTES_PER_ITEM * num_items:
        return None
    parents = np.repeat(np.arange(num_nodes), np.diff(starts))
    blocks, step = [], max(1, _BLOCK_BYTES // size)  # of nodes: the bools of all of them would take much memory
    for first in range(0, num_nodes, step):
        block = slice(starts[first], starts[min(first + step, num_nodes)])
        follows = np.zeros((min(step, num_nodes - first), size), dtype=bool)
        follows[parents[block] - first, codes[block]] = True
        blocks.append(np.packbits(follows, axis=1, bitorder="little"))
    return np.concatenate(blocks)


def _bits(sizes: tuple[int, ...]) -> list[int]:
    return [(size - 1).bit_length() for size in sizes]


def _packed(columns: Sequence[np.ndarray], sizes: tuple[int, ...]) -> np.ndarray:
    """One integer for each tuple, in the order of the tuples: int64 [N]."""
    packed = columns[0].astype(np.int64)
    for column, bits in zip(columns[1:], _bits(sizes)[1:], strict=True):
        packed <<= bits
        packed |= column.astype(np.int64)
    return packed


def _with_end(firsts: np.ndarray, end: int) -> np.ndarray:
    """Int32 [n + 1]."""
    starts = np.empty(len(firsts) + 1, dtype=np.int32)
    starts[:-1], starts[-1] = firsts, end
    return starts


def _fingerprint(arrays: Sequence[np.ndarray]) -> int:
    fingerprint = 0
    for array in arrays:
        fingerprint = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, fingerprint)
    return fingerprint
