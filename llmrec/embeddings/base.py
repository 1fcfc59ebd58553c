"""Vectors of items, together with the IDs of the items they belong to. What files hold is read in `vector_files.py`.

The vectors may be a memory map of a file that is larger than memory: nothing here copies it whole, it is walked
through in blocks of rows.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmrec.data.item_order import check_item_order
from llmrec.embeddings.vector_files import (
    block_rows,
    map_vectors,
    open_vectors,
    read_item_ids,
    read_vectors,
    write_safetensors,
)
from llmrec.errors import DataError, ItemOrderError, SettingsError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ItemEmbeddings:
    """One vector an item.

    Attributes:
        item_ids: Outside IDs, all different; row i of `vectors` is item i.
        vectors: float32 [N, D], in memory or a read-only memory map. Another type is converted, which copies it.
        source: How they were made (encoder, fields, data), for model cards; JSON values only.
        present: bool [N], False where an item lacks what the vectors are made of (it has no image, no text). Its row
            is there all the same, so that methods without masks work: whatever is finite is kept, and a row with NaN
            or infinite values becomes the mean of all present ones. None: every item has its own vector; a mask that
            is True throughout becomes None.

    Raises:
        DataError: Shapes disagree, an ID stands twice, a present item has a NaN or infinite value, or an absent one
            has and the vectors are a memory map (which can't be filled in) or no item is present.
    """

    item_ids: tuple[str, ...]
    vectors: np.ndarray
    source: Mapping[str, Any] = field(default_factory=dict)
    present: np.ndarray | None = None

    def __post_init__(self) -> None:
        vectors = np.asanyarray(self.vectors)
        if vectors.dtype != np.float32 or not vectors.flags.c_contiguous:
            vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        object.__setattr__(self, "item_ids", tuple(self.item_ids))
        object.__setattr__(self, "vectors", vectors)
        if vectors.ndim != 2 or len(vectors) != len(self.item_ids):
            raise DataError(
                f"embeddings must be [items, width]: got shape {vectors.shape} for {len(self.item_ids)} item IDs"
            )
        _refuse_repeated(self.item_ids)
        if self.present is not None:
            object.__setattr__(self, "present", _as_mask(self.present, len(self)))
        self._check_finite()

    def _check_finite(self) -> None:
        finite = np.concatenate([np.isfinite(block).all(axis=1) for _, block in self.blocks()] or [np.ones(0, bool)])
        broken = ~finite if self.present is None else ~finite & self.present
        if broken.any():
            row = int(np.flatnonzero(broken)[0])
            raise DataError(
                f"{int(broken.sum())} embedding(s) hold NaN or infinite values, first item {self.item_ids[row]!r}"
                f" (row {row}); repair or leave out these items"
            )
        if finite.all():
            return
        row = int(np.flatnonzero(~finite)[0])
        if isinstance(self.vectors, np.memmap):
            raise DataError(
                f"item {self.item_ids[row]!r} (row {row}) is masked and its row of the memory-mapped file holds NaN or"
                " infinite values: write the mean of the other rows there, or load without memory_map"
            )
        if self.present is None or not self.present.any():
            raise DataError("no item is present, so there is no mean vector for those without one of their own")
        filled = self.vectors.copy()
        filled[~finite] = self.mean()
        object.__setattr__(self, "vectors", filled)

    def __repr__(self) -> str:
        absent = "" if self.present is None else f", {int((~self.present).sum())} without their own"
        return f"ItemEmbeddings({len(self)} items, width {self.width}{absent}, source {dict(self.source)})"

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def width(self) -> int:
        """D, the number of values of each vector."""
        return int(self.vectors.shape[1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over IDs, values and mask: equal for equal embeddings, used as a cache key."""
        digest = hashlib.sha256(json.dumps(self.item_ids).encode())
        digest.update(np.asarray(self.vectors.shape, dtype=np.int64).tobytes())
        for _, block in self.blocks():
            digest.update(np.ascontiguousarray(block).data)
        if self.present is not None:
            digest.update(self.present.tobytes())
        return digest.hexdigest()

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Runs of rows of about 32 MB: where they stand, and a view of them, float32 [n, D]."""
        rows = block_rows(self.width)
        for start in range(0, len(self), rows):
            part = slice(start, min(start + rows, len(self)))
            yield part, self.vectors[part]

    def mean(self) -> np.ndarray:
        """Mean vector of all present items, float32 [D], added up in float64; zeros where none is present."""
        total, count = np.zeros(self.width), 0
        for part, block in self.blocks():
            chosen = block if self.present is None else block[self.present[part]]
            total += chosen.sum(axis=0, dtype=np.float64)
            count += len(chosen)
        return (total / max(1, count)).astype(np.float32)

    def check_order(self, item_ids: Sequence[str], what: str = "the embeddings") -> None:
        """Raises `ItemOrderError` where these embeddings are about other items, or in another order."""
        check_item_order(item_ids, self.item_ids, what)

    def select(self, rows: Any) -> "ItemEmbeddings":
        """Some of the items, with vectors and mask as they are.

        Args:
            rows: A slice (the vectors are then a view, of a memory map too), row numbers in the order wanted, or
                bool [N]. The latter two copy the chosen rows into memory.

        Raises:
            DataError: A row that isn't there, or a mask of another length.
        """
        if not isinstance(rows, slice):
            rows = np.asarray(rows)
            rows = rows.astype(np.int64) if not rows.size else rows  # an empty list is of floats
        try:
            numbers = np.arange(len(self))[rows]
        except IndexError as error:
            raise DataError(f"can't select these rows of {len(self)} items: {error}") from error
        item_ids = tuple(self.item_ids[row] for row in numbers)
        present = None if self.present is None else self.present[rows]
        return ItemEmbeddings(item_ids, self.vectors[rows], self.source, present)

    def align(
        self,
        item_ids: Sequence[str],
        *,
        missing: Literal["error", "mask"] = "error",
        what: str = "the embeddings",
    ) -> "ItemEmbeddings":
        """The same vectors in the order of a catalogue, found by item ID.

        Items that the catalogue doesn't hold are left out; how many is logged. The result is in memory, also where
        these are a memory map, unless the order is the right one already.

        Args:
            item_ids: IDs of the catalogue in row order.
            missing: "error" refuses items without a vector, "mask" gives them the mean vector and `present` False.
            what: What the embeddings are, for messages.

        Raises:
            ItemOrderError: An item of the catalogue has no vector and `missing` is "error", or none of them has one.
            SettingsError: Another word for `missing`.
        """
        if missing not in ("error", "mask"):
            raise SettingsError(f"missing is {missing!r}: choose 'error' or 'mask'")
        item_ids = tuple(item_ids)
        if item_ids == self.item_ids:
            return self
        row_of = {item_id: row for row, item_id in enumerate(self.item_ids)}
        rows = np.fromiter((row_of.get(item_id, -1) for item_id in item_ids), np.int64, len(item_ids))
        absent = rows < 0
        if absent.any() and (missing == "error" or absent.all()):
            first = item_ids[int(np.flatnonzero(absent)[0])]
            remedy = "" if absent.all() else '; add vectors for them, or pass missing="mask" to mask these items'
            raise ItemOrderError(
                f"{what} have no vector for {int(absent.sum())} of the {len(item_ids)} items of the catalogue, first"
                f" {first!r} (their IDs look like {next(iter(self.item_ids), '')!r}){remedy}"
            )
        if unused := len(self) - int((~absent).sum()):
            logger.info("%s: %d of %d items aren't in the catalogue and are left out", what, unused, len(self))
        vectors = np.asarray(self.vectors[rows])
        vectors[absent] = np.nan  # the constructor puts the mean there
        present = ~absent if self.present is None else ~absent & self.present[rows]
        return ItemEmbeddings(item_ids, vectors, self.source, present)

    def reduce(self, width: int) -> "ItemEmbeddings":
        """The same items in fewer dimensions, with inner products kept as well as `width` dimensions can.

        With the singular value decomposition X = U S Vᵀ (not centred, in float64) the result is U S cut to `width`
        columns: no other [N, width] matrix Y has Y Yᵀ closer to X Xᵀ (Eckart and Young). The sign of each column is
        fixed by making the entry of V of largest size positive. With fewer items than `width` the last columns are 0
        and inner products are exact. With more items than dimensions V comes from the eigenvectors of Xᵀ X, added up
        block by block, and the result is X V: the memory needed doesn't grow with the items, save for the result.

        Items that aren't present have no part in V; their rows are projected like the others.

        Args:
            width: At least 1 and at most the present width.

        Returns:
            Embeddings [N, width]; `source` also says from which width they were reduced.

        Raises:
            SettingsError: `width` is below 1 or above the present width.
        """
        if not 1 <= width <= self.width:
            raise SettingsError(
                f"can't reduce embeddings of width {self.width} to width {width}: choose 1 to {self.width}"
            )
        directions = self._directions(width)  # [D, at most width]
        vectors = np.zeros((len(self), width), np.float32)
        for part, block in self.blocks():
            vectors[part, : directions.shape[1]] = block.astype(np.float64) @ directions
        source = {**self.source, "reduced_from_width": self.width}
        return ItemEmbeddings(self.item_ids, vectors, source, self.present)

    def _directions(self, width: int) -> np.ndarray:
        """The first right singular vectors of the present rows, float64 [D, min(width, rows)], signs fixed."""
        if len(self) > self.width:
            gram = np.zeros((self.width, self.width))
            for part, block in self.blocks():
                rows = (block if self.present is None else block[self.present[part]]).astype(np.float64)
                gram += rows.T @ rows
            directions = np.linalg.eigh(gram)[1][:, ::-1][:, :width]  # eigenvalues come in ascending order
        else:
            rows = (self.vectors if self.present is None else self.vectors[self.present]).astype(np.float64)
            directions = np.linalg.svd(rows, full_matrices=False)[2][:width].T
        largest = np.abs(directions).argmax(axis=0)
        signs = np.where(directions[largest, np.arange(directions.shape[1])] < 0, -1.0, 1.0)
        return directions * signs

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all; a memory map goes through memory block by block."""
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "item_ids": json.dumps(self.item_ids),
            "source": json.dumps(dict(self.source)),
        }
        arrays = {"vectors": self.vectors}
        if self.present is not None:
            arrays["present"] = self.present
        write_safetensors(path, arrays, metadata)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        item_ids: Sequence[str] | None = None,
        ids_file: str | Path | None = None,
        memory_map: bool = False,
        id_column: str = "item_id",
        vector_column: str = "embedding",
        cache_dir: str | Path | None = None,
    ) -> "ItemEmbeddings":
        """Reads what `save` wrote, or own vectors.

        - `.safetensors` of `save`: IDs, vectors and mask.
        - another `.safetensors`: its only two-dimensional tensor, or the one that is called like `vector_column`.
        - `.npy`: an array [N, D].
        - `.parquet`, or a folder of `.parquet` shards in the order of their names: a column of IDs and one of lists of
          floats, all of one length.

        Values of another float type become float32.

        Args:
            path: The file or folder.
            item_ids: IDs of the catalogue in row order: compared with those that the file came with. Where it has none
                (`.npy`, foreign safetensors) and there is no `ids_file`, they are taken as the IDs of its rows.
            ids_file: A `.json` list of IDs, or a `.txt` file with one ID a line, in the order of the rows of `path`.
            memory_map: Map the vectors instead of reading them into memory. float32 in `.npy` or `.safetensors` is
                mapped where it is; anything else is first written as such, in bounded memory, into a folder that ends
                in ".mapped", and found again as long as the files have the same sizes and times of change. Of several
                processes one should do this before the others (`Processes.main_first`).
            id_column: Of Parquet files; strings or integers.
            vector_column: Of Parquet files; see above for safetensors.
            cache_dir: Where the ".mapped" folder goes; None: beside `path`.

        Raises:
            MissingPartError: No such file.
            DataError: No item IDs are known, or not as many as rows; an ID stands twice; vectors of different lengths,
                null, NaN or infinite; a file that can't be read.
            ItemOrderError: The file is about other items than `item_ids`, or in another order; see `align`.
        """
        path = Path(path)
        found = open_vectors(path, id_column=id_column, vector_column=vector_column)
        if ids_file is not None:
            if found.item_ids is not None:
                raise DataError(f"{path} holds item IDs of its own: leave out ids_file")
            found.item_ids = read_item_ids(ids_file)
        if found.item_ids is None and item_ids is None:
            raise DataError(f"{path} holds no item IDs: pass item_ids (or an ids_file), in the order of its rows")
        ids = tuple(found.item_ids if found.item_ids is not None else item_ids or ())
        if len(ids) != found.shape[0]:
            raise DataError(
                f"embeddings must be [items, width]: {path} has shape {found.shape} for {len(ids)} item IDs"
            )
        vectors = map_vectors(found, cache_dir) if memory_map else read_vectors(found)
        embeddings = cls(ids, vectors, found.source, found.present)
        if item_ids is not None:
            embeddings.check_order(item_ids, f"the embeddings in {path.name}")
        return embeddings


def _as_mask(present: Any, length: int) -> np.ndarray | None:
    mask = np.array(present)
    if mask.dtype != bool or mask.shape != (length,):
        raise DataError(f"present is {mask.dtype} of shape {mask.shape}: it must be bool, one value for each item")
    return None if mask.all() else mask


def _refuse_repeated(item_ids: tuple[str, ...]) -> None:
    if len(set(item_ids)) == len(item_ids):
        return
    first_row: dict[str, int] = {}
    for row, item_id in enumerate(item_ids):
        if first_row.setdefault(item_id, row) != row:
            raise DataError(
                f"item {item_id!r} has two vectors, in rows {first_row[item_id]} and {row}: keep one of them"
            )
