"""The vectors that an item tokenizer reads: several modalities of the same items, a batch of rows at a time.

Arrays may be memory-mapped and larger than memory: rows are copied when they are asked for, never the whole.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from llmrec.data.item_order import check_item_order
from llmrec.embeddings.base import ItemEmbeddings

CHUNK_ROWS = 16_384


@dataclass(frozen=True)
class ItemBatch:
    """Some items.

    Attributes:
        vectors: Modality to float32 [B, D_m].
        present: Modality to bool [B], False where the item lacks it (its vector is then a stand-in).
    """

    vectors: dict[str, torch.Tensor]
    present: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.vectors.values())))


@dataclass(frozen=True)
class ItemVectors:
    """All items.

    Attributes:
        item_ids: Outside IDs, in the order of the rows.
        arrays: Modality to float32 [N, D_m].
        present: Modality to bool [N]; only modalities that some items lack.
    """

    item_ids: tuple[str, ...]
    arrays: dict[str, np.ndarray]
    present: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, embeddings: Mapping[str, ItemEmbeddings]) -> "ItemVectors":
        """From embeddings of the same items in the same order.

        Raises:
            ItemOrderError: Two modalities are about other items, or in another order.
        """
        first, *others = embeddings
        for name in others:
            check_item_order(
                embeddings[first].item_ids, embeddings[name].item_ids, f"the {name} embeddings (against {first})"
            )
        arrays = {name: of.vectors for name, of in embeddings.items()}
        present = {name: of.present for name, of in embeddings.items() if of.present is not None}
        return cls(embeddings[first].item_ids, arrays, present)

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def widths(self) -> dict[str, int]:
        """Modality to D_m."""
        return {name: int(array.shape[1]) for name, array in self.arrays.items()}

    def rows(self, rows: np.ndarray | slice, device: torch.device | str = "cpu") -> ItemBatch:
        """Copies some rows to a device.

        Args:
            rows: Row numbers int64 [B], or a slice.
            device: Where the tensors go.
        """
        vectors = {name: torch.from_numpy(_copied(array, rows)).to(device) for name, array in self.arrays.items()}
        size = len(next(iter(vectors.values())))
        present = {
            name: torch.from_numpy(_copied(self.present[name], rows)).to(device)
            if name in self.present
            else torch.ones(size, dtype=torch.bool, device=device)
            for name in self.arrays
        }
        return ItemBatch(vectors, present)

    def chunks(self, rows: slice | None = None, size: int = CHUNK_ROWS) -> Iterator[slice]:
        """Consecutive slices of at most `size` rows that make up `rows` (all where None)."""
        start, stop, _ = slice(None).indices(len(self)) if rows is None else rows.indices(len(self))
        for first in range(start, stop, size):
            yield slice(first, min(first + size, stop))


def _copied(array: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
    """The rows as an array of their own: by slice NumPy gives a view, which may be read-only."""
    chosen = np.asarray(array[rows])
    return chosen.copy() if isinstance(rows, slice) else chosen
