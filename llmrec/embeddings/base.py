"""Vectors of items, together with the IDs of the items they belong to."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from llmrec.data.item_order import check_item_order
from llmrec.errors import DataError, MissingPartError, SettingsError
from llmrec.files import atomic_file

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ItemEmbeddings:
    """One vector an item.

    Attributes:
        item_ids: Outside IDs, row i of `vectors` is item i.
        vectors: float32 [N, D].
        source: How they were made (encoder, fields, data), for model cards; JSON values only.

    Raises:
        DataError: Shapes disagree, or a value is NaN or infinite.
    """

    item_ids: tuple[str, ...]
    vectors: np.ndarray
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "item_ids", tuple(self.item_ids))
        object.__setattr__(self, "vectors", np.ascontiguousarray(self.vectors, dtype=np.float32))
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.item_ids):
            raise DataError(
                f"embeddings must be [items, width]: got shape {self.vectors.shape} for {len(self.item_ids)} item IDs"
            )
        finite = np.isfinite(self.vectors).all(axis=1)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise DataError(
                f"{int((~finite).sum())} embedding(s) hold NaN or infinite values, first item {self.item_ids[row]!r}"
                f" (row {row}); repair or leave out these items"
            )

    def __repr__(self) -> str:
        return f"ItemEmbeddings({len(self)} items, width {self.width}, source {dict(self.source)})"

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def width(self) -> int:
        """D, the number of values of each vector."""
        return int(self.vectors.shape[1])

    @property
    def fingerprint(self) -> str:
        """SHA-256 over IDs and values: equal for equal embeddings, used as a cache key."""
        digest = hashlib.sha256(json.dumps(self.item_ids).encode())
        digest.update(np.asarray(self.vectors.shape, dtype=np.int64).tobytes())
        digest.update(self.vectors.tobytes())
        return digest.hexdigest()

    def check_order(self, item_ids: Sequence[str], what: str = "the embeddings") -> None:
        """Raises `ItemOrderError` where these embeddings are about other items, or in another order."""
        check_item_order(item_ids, self.item_ids, what)

    def reduce(self, width: int) -> "ItemEmbeddings":
        """The same items in fewer dimensions, with inner products kept as well as `width` dimensions can.

        With the singular value decomposition X = U S Vᵀ (not centred, in float64) the result is U S cut to `width`
        columns: no other [N, width] matrix Y has Y Yᵀ closer to X Xᵀ (Eckart and Young). The sign of each column is
        fixed by making the entry of V of largest size positive. With fewer items than `width` the last columns are 0
        and inner products are exact.

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
        left, singular, right = np.linalg.svd(self.vectors.astype(np.float64), full_matrices=False)
        kept = min(width, len(singular))
        largest = np.abs(right[:kept]).argmax(axis=1)
        signs = np.where(right[np.arange(kept), largest] < 0, -1.0, 1.0)
        vectors = np.zeros((len(self), width))
        vectors[:, :kept] = left[:, :kept] * (singular[:kept] * signs)
        return ItemEmbeddings(self.item_ids, vectors, {**self.source, "reduced_from_width": self.width})

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "item_ids": json.dumps(self.item_ids),
            "source": json.dumps(dict(self.source)),
        }
        with atomic_file(path) as temporary:
            save_file({"vectors": self.vectors}, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, *, item_ids: Sequence[str] | None = None) -> "ItemEmbeddings":
        """Reads what `save` wrote, or a `.npy` array [N, D] whose row i is item i of `item_ids`.

        Args:
            path: A `.safetensors` file of `save`, or a `.npy` file.
            item_ids: IDs of the catalogue in row order: compared with those of the file. A `.npy` file has none of
                its own, so they are needed there, and its number of rows must equal theirs.

        Raises:
            MissingPartError: No such file.
            DataError: A `.npy` without `item_ids` or of another length; a file that isn't ours.
            ItemOrderError: The file is about other items, or in another order.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingPartError(f"no embeddings at {path}")
        if path.suffix == ".npy":
            if item_ids is None:
                raise DataError(f"{path} holds no item IDs: pass item_ids, in the order of its rows")
            return cls(tuple(item_ids), np.load(path, allow_pickle=False), {"file": path.name})
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if "item_ids" not in metadata or "vectors" not in file.keys():  # noqa: SIM118 (not a mapping)
                raise DataError(f"{path} was not written by ItemEmbeddings.save: it holds no item IDs")
            found = tuple(json.loads(metadata["item_ids"]))
            embeddings = cls(found, file.get_tensor("vectors"), json.loads(metadata.get("source", "{}")))
        if item_ids is not None:
            embeddings.check_order(item_ids, f"the embeddings in {path.name}")
        return embeddings
