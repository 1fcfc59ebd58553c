"""Residuals of items at a level of RQ-KMeans, read a chunk at a time, and what a round of k-means needs of them.

Residuals are computed anew from the vectors and the codes so far, so that of a catalogue only its codes are held in
memory. Knows nothing of rounds, balance or settings: that is `rq_kmeans.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from llmrec.item_tokenizers.item_vectors import ItemVectors
from llmrec.processes import Processes

CHUNK_ROWS = 2_048  # twice as fast as 16,384 rows of width 768: residuals stay in the processor's cache
FAR_POINTS = 256  # of each chunk, candidates for centres that have lost all items


@dataclass
class Residuals:
    """What the levels so far leave of some items; every process knows all codes and reads its own part.

    Attributes:
        vectors: All items of the catalogue.
        rows: The items at hand: row numbers int64 [n] ascending.
        processes: Who works together.
        codebooks: Of the levels done, float32 [K, D] on the device.
        codes: int32 [n, levels done].
    """

    vectors: ItemVectors
    rows: np.ndarray
    processes: Processes
    codebooks: list[torch.Tensor]
    codes: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def own(self) -> slice:
        """This process's part of the items at hand."""
        return self.processes.part(len(self))

    def of(self, places: slice | np.ndarray) -> torch.Tensor:
        """Residuals of the items at some places among those at hand: float32 [b, D], on the device."""
        rows = self.rows[places]
        consecutive = isinstance(places, slice) and len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1
        wanted = slice(int(rows[0]), int(rows[-1]) + 1) if consecutive else rows  # a slice is read without an index
        left = self.vectors.rows(wanted, self.processes.device).vectors["text"]
        for level, codebook in enumerate(self.codebooks):
            codes = torch.from_numpy(self.codes[places, level].astype(np.int64)).to(left.device)
            left = left - codebook[codes]
        return left

    def own_chunks(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """This process's part, chunk by chunk: places among the items at hand int64 [b], residuals float32 [b, D]."""
        for start in range(self.own.start, self.own.stop, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, self.own.stop)
            yield np.arange(start, stop), self.of(slice(start, stop))

    def chunks_of(self, places: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """This process's part of some places, in the same way."""
        own = places[self.processes.part(len(places))]
        for start in range(0, len(own), CHUNK_ROWS):
            chunk = own[start : start + CHUNK_ROWS]
            yield chunk, self.of(chunk)

    def add_level(self, codebook: torch.Tensor, codes: np.ndarray) -> None:
        """Takes a level off."""
        self.codebooks.append(codebook)
        self.codes = np.column_stack([self.codes, codes]).astype(np.int32)


@dataclass
class Moments:
    """What a round needs of its items, added up over chunks and then over processes.

    Attributes:
        sums: Of the residuals of each code, float64 [K, D].
        counts: Items of each code, float64 [K].
        inertia: Sum of squared distances, float64 [].
        far: Items far from their centres, of each chunk float64 [m, 2]: squared distance, place.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    inertia: torch.Tensor
    far: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, centres: torch.Tensor) -> "Moments":
        """Of no item yet; centres float32 [K, D]."""
        zeros = torch.zeros_like(centres, dtype=torch.float64)
        return cls(zeros, zeros[:, 0].clone(), zeros[0, 0].clone())

    def add(self, left: torch.Tensor, codes: torch.Tensor, distances: torch.Tensor, places: np.ndarray) -> None:
        """Adds a chunk: residuals [b, D], codes int64 [b], squared distances to their centres [b], places [b]."""
        self.sums += _sums(left, codes, len(self.counts))
        self.counts += torch.bincount(codes, minlength=len(self.counts))
        self.inertia += distances.double().sum()
        values, order = distances.topk(min(FAR_POINTS, len(distances)))
        kept = (values > 1e-6 * left[order].square().sum(1)).cpu().numpy()  # else rounding errors
        far = np.column_stack([values.double().cpu().numpy(), places[order.cpu().numpy()]])
        self.far.append(far[kept])

    def over(self, processes: Processes) -> "Moments":
        """Of all processes' items; `far` is then one array."""
        far = processes.gather_array(np.concatenate([np.zeros((0, 2)), *self.far]))
        sums, counts, inertia = (processes.sum(part) for part in (self.sums, self.counts, self.inertia))
        return Moments(sums, counts, inertia, [far])

    def furthest(self, count: int) -> np.ndarray:
        """Places of the items furthest from their centres, at most `count`: int64 [n]; ties: the first place."""
        far = np.concatenate(self.far)
        return far[np.lexsort((far[:, 1], -far[:, 0]))][:count, 1].astype(np.int64)


def squared_distances(left: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared distances of residuals to all centres, not below 0: float32 [B, K]."""
    squares = left.square().sum(1, keepdim=True) + centres.square().sum(1)
    return torch.addmm(squares, left, centres.t(), alpha=-2.0).clamp_(min=0)


def nearest(left: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centres int64 [B] (ties: the lowest) and the squared distances to them float32 [B]."""
    scores = torch.addmm(centres.square().sum(1), left, centres.t(), alpha=-2.0)
    codes = scores.argmin(1)
    return codes, (scores.gather(1, codes[:, None])[:, 0] + left.square().sum(1)).clamp_(min=0)


def _sums(left: torch.Tensor, codes: torch.Tensor, num_codes: int) -> torch.Tensor:
    """Sums of the residuals of each code: float32 [K, D]."""
    if left.device.type == "cpu":
        return torch.zeros(num_codes, left.shape[1]).index_add_(0, codes, left)
    one_hot = torch.zeros(len(left), num_codes, device=left.device).scatter_(1, codes[:, None], 1.0)
    return one_hot.t() @ left  # a GPU's index_add_ adds in no fixed order
