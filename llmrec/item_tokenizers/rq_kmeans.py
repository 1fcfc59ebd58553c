"""RQ-KMeans: k-means on the vectors, then on what its centres leave over, level by level; plain and balanced.

After QARM's and OneRec's item codes (arXiv 2411.11739, 2502.18965) and GRID's (arXiv 2507.22224). There is no
network: the latents are the vectors themselves. Residuals are computed anew for each chunk of rows from the vectors
and the codes so far, so that of a catalogue only its codes are held in memory.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from llmrec.errors import DataError, SettingsError
from llmrec.files import atomic_file
from llmrec.item_tokenizers.balanced_assignment import assign_balanced, assign_greedy_in_order, balanced_prices
from llmrec.item_tokenizers.base import ItemTokenizer, Monitor
from llmrec.item_tokenizers.clustering import start_centres
from llmrec.item_tokenizers.diagnostics import monitored_figures
from llmrec.item_tokenizers.fit_loop import CHECKPOINT_NAME, identity_of, seeded
from llmrec.item_tokenizers.item_vectors import ItemVectors
from llmrec.item_tokenizers.quantizers import residual_codes
from llmrec.item_tokenizers.residuals import CHUNK_ROWS, Moments, Residuals, nearest, squared_distances
from llmrec.item_tokenizers.trained import sample_rows
from llmrec.item_tokenizers.uniqueness import CodeGeometry
from llmrec.processes import Processes

logger = logging.getLogger(__name__)

Algorithm = Literal["full", "mini_batch"]
Balance = Literal["none", "greedy", "exact"]

CHECKPOINT_EVERY = 10  # rounds


@dataclass(frozen=True)
class RQKMeansConfig:
    """Settings of RQ-KMeans.

    Four levels of 256 codes, as the other item tokenizers here, so that codes can be compared; OneRec has 3 x 8,192,
    GRID and MiniOneRec 3 x 256. Two departures hold for all: centres start by k-means++ on a sample (OneRec: random
    ones), and residuals are never brought to unit length (GRID does so): then an item's code vectors would no longer
    add up to its vector, and distances to codes, which uniqueness needs, would mean nothing.

    Attributes:
        num_codebooks: Levels L.
        codebook_size: Codes K of each level.
        algorithm: `"full"`: every round reads all items (Lloyd). `"mini_batch"`: every round reads `batch_size` items
            drawn at random, and a centre moves by 1 / (items it has had so far), as in web-scale k-means and GRID.
        balance: `"none"`: nearest centres. `"exact"`: in each round the assignment of least cost among those with
            sizes within the limits (constrained k-means, as in MiniOneRec's variant). `"greedy"`: OneRec's rule,
            centres in order take their nearest items that are left. The balanced ones need the algorithm "full".
        size_slack: How far sizes may be from N / K, as a share of it, with balance "exact": 0 gives N // K to
            ceil(N / K), 0.5 half to one and a half times N / K. MiniOneRec allows one item less and one more.
        iterations: Rounds of a level at most.
        tolerance: A level ends when a round lowers the inertia by no more than this share; not for "mini_batch".
        batch_size: Items of a mini-batch, over all processes.
        initialisation_items: Items that are drawn for k-means++; GRID takes 3,072.
        balanced_items: Items that are balanced together at most. They need a float32 matrix [items, K], 64 MB for
            65,536 x 256. Of a larger catalogue, that many items are drawn to learn the centres from, and codes are
            given block by block of the catalogue's rows, each block balanced by itself.
        seed: Of all draws.

    Raises:
        SettingsError: A value that can't work.
    """

    num_codebooks: int = 4
    codebook_size: int = 256
    algorithm: Algorithm = "full"
    balance: Balance = "none"
    size_slack: float = 0.0
    iterations: int = 100
    tolerance: float = 1e-4
    batch_size: int = 16_384
    initialisation_items: int = 20_000
    balanced_items: int = 65_536
    seed: int = 42

    def __post_init__(self) -> None:
        least = {"num_codebooks": 1, "codebook_size": 2, "iterations": 1, "batch_size": 1, "initialisation_items": 1,
                 "balanced_items": 1, "size_slack": 0, "tolerance": 0, "seed": 0}  # fmt: skip
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise SettingsError(f"{name} is {getattr(self, name)}: {smallest} is the least")
        for name, known in {"algorithm": get_args(Algorithm), "balance": get_args(Balance)}.items():
            if getattr(self, name) not in known:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.balance != "none" and self.algorithm != "full":
            raise SettingsError(
                f"balance {self.balance!r} spreads all items at once, algorithm {self.algorithm!r} sees a few at a"
                " time: choose algorithm 'full' (balanced_items bounds its memory) or balance 'none'"
            )

    def size_limits(self, count: int) -> tuple[int, int]:
        """Least and most items of a code when `count` items are balanced together."""
        share = count / self.codebook_size
        return int(share * max(1 - self.size_slack, 0)), int(np.ceil(share * (1 + self.size_slack)))


@dataclass
class _Level:
    """A level that is being learned.

    Attributes:
        centres: float32 [K, D].
        totals: Items each centre has had, float64 [K], for mini-batches.
        prices: float32 [K], from which the next exact assignment starts; they save time and nothing else.
        rounds: Rounds done.
        inertia: Of the last round, sum of squared distances to the centres before it; of its items alone for
            mini-batches.
    """

    centres: torch.Tensor
    totals: torch.Tensor
    prices: np.ndarray
    rounds: int = 0
    inertia: float = float("inf")


class RQKMeansTokenizer(ItemTokenizer):
    """Item tokenizer by residual k-means on text embeddings.

    `encode` gives every item its nearest centres, also where the centres were learned by balanced k-means: new items
    come one at a time. `quantize_catalogue` spreads a whole catalogue over the centres as they were learned, level by
    level; what it gives depends on the company.

    Example:
        >>> tokenizer = RQKMeansTokenizer(RQKMeansConfig(balance="exact")).fit(text_embeddings)  # doctest: +SKIP
        >>> tokenizer.quantize_catalogue(text_embeddings).make_unique().tokens(0)  # doctest: +SKIP
        ['<a_183>', '<b_70>', '<c_232>', '<d_6>']
    """

    config_class: ClassVar[type] = RQKMeansConfig
    config: RQKMeansConfig
    codebooks: tuple[torch.Tensor, ...] = ()
    """Centres of each level, float32 [K, D] on the CPU; empty before `fit`."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level, length L."""
        return (self.config.codebook_size,) * self.config.num_codebooks

    def code_vectors(self) -> tuple[np.ndarray, ...]:
        """See `ItemTokenizer`."""
        return tuple(codebook.numpy() for codebook in self.codebooks)

    @torch.no_grad()
    def _fit(
        self,
        vectors: ItemVectors,
        *,
        progress: bool | None,
        checkpoint_folder: Path | None,
        processes: Processes,
        monitor: Monitor | None,
    ) -> None:
        config = self.config
        most = len(vectors) if config.balance == "none" else config.balanced_items
        rows = sample_rows(len(vectors), most, seeded(config.seed, 0, 0)[1])
        residuals = Residuals(vectors, rows, processes, [], np.zeros((len(rows), 0), dtype=np.int32))
        checkpoint = _Checkpoint(checkpoint_folder, config, residuals)
        level, history = checkpoint.load()
        processes.barrier()  # nobody writes a checkpoint before all have looked for one
        bar = tqdm(
            total=config.num_codebooks, initial=len(residuals.codebooks), desc=f"fitting {type(self).__name__}",
            unit="level", disable=None if progress is None else not progress,
        )  # fmt: skip
        with bar:
            for number in range(len(residuals.codebooks), config.num_codebooks):
                level = level or self._start_level(residuals, number)
                while not self._round(residuals, level, number):
                    bar.set_postfix(round=level.rounds, inertia=f"{level.inertia:.5g}")
                    if level.rounds % CHECKPOINT_EVERY == 0:
                        checkpoint.save(level, history)
                codes, inertia, level.prices = self._assign(residuals, level.centres, level.prices)
                residuals.add_level(level.centres, codes)
                history.append(self._figures(residuals, level.rounds, inertia))
                level = None
                checkpoint.save(level, history)
                bar.update()
                if monitor is not None:
                    monitor(number + 1, history[-1])
                logger.info("level %d: %d rounds, inertia %.5g", number + 1, history[-1]["rounds"], inertia)
        self.codebooks = tuple(codebook.cpu() for codebook in residuals.codebooks)
        self.fit_history = tuple(history)
        self.fit_report = {
            "items": len(vectors),
            "fitted_items": len(rows),
            "rounds": [int(figures["rounds"]) for figures in history],
            "inertia": [figures["inertia"] for figures in history],
            "collision_rate": history[-1]["collision_rate"],
        }

    def _start_level(self, residuals: Residuals, number: int) -> _Level:
        """Centres by k-means++ on a sample of the residuals, drawn on the main process."""
        config, processes = self.config, residuals.processes
        centres = None
        if processes.is_main:
            draws = seeded(config.seed, number, 1)[1]
            places = sample_rows(len(residuals), config.initialisation_items, draws)
            centres = start_centres(residuals.of(places).cpu().numpy(), config.codebook_size, draws)
        tensor = torch.from_numpy(processes.broadcast(centres)).to(processes.device)
        totals = torch.zeros(len(tensor), dtype=torch.float64, device=processes.device)
        return _Level(tensor, totals, np.zeros(len(tensor), dtype=np.float32))

    def _round(self, residuals: Residuals, level: _Level, number: int) -> bool:
        """Moves the centres once; whether that was the last round."""
        config = self.config
        moments = self._moments(residuals, level, number).over(residuals.processes)
        before, level.inertia = level.inertia, float(moments.inertia)
        revived = self._move_centres(residuals, level, moments)
        level.rounds += 1
        settled = level.rounds > 1 and before - level.inertia <= config.tolerance * before and not revived
        return level.rounds >= config.iterations or (settled and config.algorithm == "full")

    def _moments(self, residuals: Residuals, level: _Level, number: int) -> Moments:
        """This process's part of what the next centres are made of."""
        config, moments = self.config, Moments.of(level.centres)
        if config.balance != "none":
            codes, _, level.prices = self._assign(residuals, level.centres, level.prices)
            for places, left in residuals.own_chunks():
                chosen = torch.from_numpy(codes[places].astype(np.int64)).to(left.device)
                distances = (left - level.centres[chosen]).square().sum(1)
                moments.add(left, chosen, distances, places)
            return moments
        chunks = residuals.own_chunks()
        if config.algorithm == "mini_batch":
            draws = seeded(config.seed, number, 2, level.rounds)[1]
            chunks = residuals.chunks_of(sample_rows(len(residuals), config.batch_size, draws))
        for places, left in chunks:
            moments.add(left, *nearest(left, level.centres), places)
        return moments

    def _move_centres(self, residuals: Residuals, level: _Level, moments: Moments) -> bool:
        """Centres become means; those without an item move to the items that are furthest from theirs.

        Returns:
            Whether there were such.
        """
        if self.config.algorithm == "mini_batch":
            level.totals += moments.counts
            weights = moments.counts / level.totals.clamp(min=1)
        else:
            level.totals = moments.counts
            weights = (moments.counts > 0).double()
        means = moments.sums / moments.counts.clamp(min=1)[:, None]
        moved = level.centres.double() + weights[:, None] * (means - level.centres.double())
        level.centres = moved.float()
        dead = torch.nonzero(level.totals == 0).flatten()
        if len(dead) == 0 or self.config.balance != "none":  # balanced: only where there are fewer items than codes
            return False
        places = moments.furthest(len(dead))
        if len(places):
            level.centres[dead[: len(places)]] = residuals.of(places)
        return len(places) > 0

    def _assign(
        self, residuals: Residuals, centres: torch.Tensor, prices: np.ndarray
    ) -> tuple[np.ndarray, float, np.ndarray]:
        """Codes of all items at hand, as the settings say: int64 [n] on every process; inertia; prices for next time.

        Balanced assignments are made by every process for itself, from the same costs.
        """
        first, own = residuals.own.start, residuals.own.stop - residuals.own.start
        if self.config.balance == "none":
            codes, inertia = np.empty(own, dtype=np.int32), torch.zeros((), dtype=torch.float64, device=centres.device)
            for places, left in residuals.own_chunks():
                chosen, distances = nearest(left, centres)
                codes[places - first] = chosen.cpu().numpy()
                inertia += distances.double().sum()
            return residuals.processes.gather_array(codes), float(residuals.processes.sum(inertia)), prices
        costs = np.empty((own, len(centres)), dtype=np.float32)
        for places, left in residuals.own_chunks():
            costs[places - first] = squared_distances(left, centres).cpu().numpy()
        costs = residuals.processes.gather_array(costs)
        codes, prices = self._balanced(costs, prices)
        return codes, float(costs[np.arange(len(codes)), codes].sum(dtype=np.float64)), prices

    def _balanced(self, costs: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.config.balance == "greedy":
            return assign_greedy_in_order(costs), prices
        limits = self.config.size_limits(len(costs))
        prices = balanced_prices(costs, *limits, start=prices)  # centres move little from round to round
        return assign_balanced(costs, *limits, prices=prices), prices

    def _figures(self, residuals: Residuals, rounds: int, inertia: float) -> dict[str, float]:
        """Figures after a level; "epoch" is the number of levels, so that reports draw them as they do epochs."""
        levels = len(residuals.codebooks)
        figures = monitored_figures(residuals.codes, self.codebook_sizes[:levels])
        return {"epoch": float(levels), "rounds": float(rounds), "inertia": inertia, **figures}

    @torch.no_grad()
    def _quantize(self, vectors: ItemVectors, processes: Processes) -> tuple[np.ndarray, CodeGeometry]:
        codebooks = [codebook.to(processes.device) for codebook in self.codebooks]
        own = processes.part(len(vectors))
        codes = np.empty((own.stop - own.start, len(codebooks)), dtype=np.int32)
        for chunk in vectors.chunks(own, CHUNK_ROWS):
            left = vectors.rows(chunk, processes.device).vectors["text"]
            codes[chunk.start - own.start : chunk.stop - own.start] = residual_codes(left, codebooks).cpu().numpy()
        return processes.gather_array(codes), self._geometry(vectors)

    @torch.no_grad()
    def _quantize_catalogue(self, vectors: ItemVectors, processes: Processes) -> tuple[np.ndarray, CodeGeometry]:
        if self.config.balance == "none":
            return self._quantize(vectors, processes)
        blocks = -(-len(vectors) // self.config.balanced_items)
        edges = np.arange(blocks + 1) * len(vectors) // max(blocks, 1)
        own = [np.zeros((0, self.config.num_codebooks), dtype=np.int32)]
        for block in range(blocks)[processes.part(blocks)]:
            rows = np.arange(edges[block], edges[block + 1])
            alone = Processes.alone(processes.device)  # a block is one process's work
            residuals = Residuals(vectors, rows, alone, [], np.zeros((len(rows), 0), dtype=np.int32))
            for codebook in self.codebooks:
                centres = codebook.to(processes.device)
                codes, _, _ = self._assign(residuals, centres, np.zeros(len(centres), dtype=np.float32))
                residuals.add_level(centres, codes)
            own.append(residuals.codes)
        return processes.gather_array(np.concatenate(own)), self._geometry(vectors)

    def _geometry(self, vectors: ItemVectors) -> CodeGeometry:
        return CodeGeometry(vectors.arrays["text"], self.code_vectors())

    def _state(self) -> dict[str, torch.Tensor]:
        return {"codebooks": torch.stack(self.codebooks)}

    def _load_state(self, state: dict[str, torch.Tensor], widths: dict[str, int]) -> None:
        expected = (self.config.num_codebooks, self.config.codebook_size, widths["text"])
        found = tuple(state["codebooks"].shape) if "codebooks" in state else None
        if found != expected:
            raise DataError(f"the saved weights don't fit the saved settings: codebooks {found}, expected {expected}")
        self.codebooks = tuple(state["codebooks"])


class _Checkpoint:
    """The state of a fit in one safetensors file; does nothing without a folder."""

    def __init__(self, folder: Path | None, config: RQKMeansConfig, residuals: Residuals):
        self.path = None if folder is None else folder / CHECKPOINT_NAME
        self.residuals = residuals
        if self.path is not None:
            self.identity = identity_of(asdict(config) | {"class": "RQKMeansTokenizer"}, residuals.vectors.arrays)

    def save(self, level: _Level | None, history: list[dict[str, float]]) -> None:
        """Writes finished levels and, where there is one, the level at hand; on the main process."""
        residuals = self.residuals
        if self.path is None or not residuals.processes.is_main:
            return
        tensors = {f"codebook.{number}": codebook for number, codebook in enumerate(residuals.codebooks)}
        tensors["codes"] = torch.from_numpy(residuals.codes)
        state: dict[str, Any] = {"history": history, "level": None}
        if level is not None:
            tensors |= {"centres": level.centres, "totals": level.totals, "prices": torch.from_numpy(level.prices)}
            state["level"] = {"rounds": level.rounds, "inertia": level.inertia}
        metadata = {"identity": self.identity, "state": json.dumps(state)}
        with atomic_file(self.path) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)

    def load(self) -> tuple[_Level | None, list[dict[str, float]]]:
        """Puts finished levels into the residuals; the level at hand and the history, empty where there is no file."""
        if self.path is None or not self.path.is_file():
            return None, []
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != self.identity:
                raise DataError(
                    f"{self.path} is of a fit with other settings or other data: remove it, or choose another folder"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        state, device = json.loads(metadata["state"]), self.residuals.processes.device
        self.residuals.codes = tensors["codes"].numpy()
        for number in range(self.residuals.codes.shape[1]):
            self.residuals.codebooks.append(tensors[f"codebook.{number}"].to(device))
        logger.info("resuming after %d levels from %s", len(self.residuals.codebooks), self.path)
        if state["level"] is None:
            return None, state["history"]
        centres, totals = tensors["centres"].to(device), tensors["totals"].to(device)
        return _Level(centres, totals, tensors["prices"].numpy(), **state["level"]), state["history"]
