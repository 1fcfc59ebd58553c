"""Item tokenizers that are a network: RQ-VAE, LETTER, RQ-KMeans+, SimCIT.

What they share: training epoch by epoch, measuring codes on the way, encoding a batch at a time, saving. A method
brings its network, its losses and where its latents and codebooks are. Methods without epochs start from `base.py`.
"""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmrec.errors import DataError, SettingsError
from llmrec.item_tokenizers.base import ItemTokenizer, Monitor
from llmrec.item_tokenizers.diagnostics import collapse_warning, monitored_figures
from llmrec.item_tokenizers.fit_loop import LoopSettings, TrainBatch, run_epochs, seeded
from llmrec.item_tokenizers.item_vectors import CHUNK_ROWS, ItemBatch, ItemVectors
from llmrec.item_tokenizers.quantizers import residual_codes, revive_dead_codes
from llmrec.item_tokenizers.uniqueness import CodeGeometry
from llmrec.processes import Processes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlignedVectors:
    """The two places at which an item tokenizer meets a recommender that is trained with it.

    What ETEGRec (arXiv 2409.05546) calls z in the space of the codes, and z-tilde.

    Attributes:
        latents: float [B, d], what is quantised: sequence-item alignment compares the codes that it leads to. Its
            gradient goes to the encoder.
        restored: float [B, D], what preference-semantic alignment compares: the reconstruction where there is a
            decoder, else the quantised vector. Its gradient goes to the decoder and, straight through the codes, to
            the encoder; never to the codebooks.
    """

    latents: torch.Tensor
    restored: torch.Tensor


class TrainedTokenizer(ItemTokenizer):
    """Base of the methods that train a network; see `ItemTokenizer`.

    The config holds the fields of `LoopSettings`, and `revive_until` where the method can revive codes.
    """

    module: Any = None
    """The network, on the CPU after `fit` and `from_pretrained`; joint training takes it from here."""

    @abstractmethod
    def new_module(self, widths: dict[str, int]) -> nn.Module:
        """The network for inputs of these widths by modality; its starting weights come from the config's seed."""

    @abstractmethod
    def batch_losses(self, module: Any, batch: TrainBatch) -> dict[str, torch.Tensor]:
        """The terms of the training loss, weighted, scalars by name; each is this process's share of the term."""

    @abstractmethod
    def latents(self, module: Any, items: ItemBatch) -> torch.Tensor:
        """What is quantised at encoding: float [B, d]."""

    @abstractmethod
    def codebooks(self, module: Any) -> Sequence[torch.Tensor]:
        """Code vectors of each level, float [K_l, d]; the parameters themselves."""

    def aligned_vectors(self, module: Any, items: ItemBatch) -> AlignedVectors:
        """What joint training aligns with the recommender, with gradients; codes are the nearest, never balanced.

        Here for methods without a decoder: `restored` is the sum of the item's code vectors, and its gradient that of
        the latents. Methods with a decoder give their reconstruction.

        Args:
            module: The network, in either mode: neither dropout nor Sinkhorn makes a difference here.
            items: B items, of the modalities that `encode` needs; on the module's device.

        Returns:
            Latents [B, d] and restored vectors [B, D], D as `restored_width` says.
        """
        latents, codebooks = self.latents(module, items), self.codebooks(module)
        codes = residual_codes(latents, codebooks)
        pairs = zip(codebooks, codes.T, strict=True)
        quantised = torch.stack([codebook[chosen] for codebook, chosen in pairs]).sum(0)
        return AlignedVectors(latents, latents + (quantised - latents).detach())

    def restored_width(self, module: Any) -> int:
        """D, the width of `AlignedVectors.restored`: here that of the codes."""
        return int(self.codebooks(module)[0].shape[1])

    def code_vectors(self) -> tuple[np.ndarray, ...]:
        """See `ItemTokenizer`."""
        return tuple(codebook.detach().numpy().copy() for codebook in self.codebooks(self._fitted_module()))

    def check(self, vectors: ItemVectors) -> None:
        """Called before a fit; raises `DataError` where these vectors can't be fitted."""

    def start(self, module: Any, vectors: ItemVectors, processes: Processes) -> None:
        """Called before the first epoch, on every process: scaling of inputs, first codebooks."""

    def start_epoch(self, module: Any, epoch: int) -> None:
        """Called before each epoch; for the methods that refresh something."""

    def measurements(self, module: Any, vectors: ItemVectors, processes: Processes) -> dict[str, float]:
        """Further figures to log at each measuring; called on every process."""
        return {}

    def _fit(
        self,
        vectors: ItemVectors,
        *,
        progress: bool | None,
        checkpoint_folder: Path | None,
        processes: Processes,
        monitor: Monitor | None,
    ) -> None:
        self.check(vectors)
        config = self.config
        settings = LoopSettings.of(config)
        module = self.new_module(vectors.widths).to(processes.device)

        def measure(epochs_done: int) -> dict[str, float]:
            codes, _ = self._quantize_with(module, vectors, processes, keep_latents=False)
            figures = monitored_figures(codes, self.codebook_sizes)
            figures |= self.measurements(module, vectors, processes)
            warning = collapse_warning(figures, self.codebook_sizes, len(vectors))
            if warning and 2 * epochs_done >= config.epochs and processes.is_main:
                logger.warning("epoch %d: %s", epochs_done, warning)
            if epochs_done < getattr(config, "revive_until", 0.0) * config.epochs:
                draws = seeded(config.seed, epochs_done, 2)[1]
                revive_dead_codes(
                    list(self.codebooks(module)), codes, lambda rows: self._latents_of(module, vectors, rows), draws
                )
            return figures

        state = run_epochs(
            module,
            vectors,
            settings,
            start=lambda: self.start(module, vectors, processes),
            start_epoch=lambda epoch: self.start_epoch(module, epoch),
            batch_losses=lambda batch: self.batch_losses(module, batch),
            measure=measure,
            identity=asdict(config) | {"class": type(self).__name__},
            description=f"fitting {type(self).__name__}",
            processes=processes,
            progress=progress,
            checkpoint_folder=checkpoint_folder,
            monitor=monitor,
        )
        self.module = module.cpu()
        self.fit_history = state.history
        self.fit_report = {
            "items": len(vectors),
            "epoch": state.epoch,
            "best_epoch": state.best_epoch,
            "best_collision_rate": state.best_collision_rate,
        }

    def _quantize(self, vectors: ItemVectors, processes: Processes) -> tuple[np.ndarray, CodeGeometry]:
        module = self._fitted_module().to(processes.device)
        try:
            codes, latents = self._quantize_with(module, vectors, processes)
        finally:
            module.cpu()
        return codes, CodeGeometry(latents, self.code_vectors())

    @torch.no_grad()
    def _quantize_with(
        self, module: Any, vectors: ItemVectors, processes: Processes, *, keep_latents: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Codes int32 [N, L] and, if kept, latents float32 [N, d] of all items, on every process."""
        module.eval()
        codebooks = [codebook.detach() for codebook in self.codebooks(module)]
        own = processes.part(len(vectors))
        size, width = own.stop - own.start, codebooks[0].shape[1]
        codes = np.empty((size, len(codebooks)), dtype=np.int32)
        latents = np.empty((size if keep_latents else 0, width), dtype=np.float32)
        for chunk in vectors.chunks(own):
            of_chunk = self.latents(module, vectors.rows(chunk, processes.device)).float()
            place = slice(chunk.start - own.start, chunk.stop - own.start)
            codes[place] = residual_codes(of_chunk, codebooks).cpu().numpy()
            if keep_latents:
                latents[place] = of_chunk.cpu().numpy()
        return processes.gather_array(codes), processes.gather_array(latents) if keep_latents else latents

    @torch.no_grad()
    def _latents_of(self, module: Any, vectors: ItemVectors, rows: np.ndarray) -> torch.Tensor:
        """Latents float [n, d] of some rows, on the module's device."""
        device = next(module.parameters()).device
        parts = np.split(rows, range(CHUNK_ROWS, len(rows), CHUNK_ROWS))
        return torch.cat([self.latents(module, vectors.rows(part, device)) for part in parts])

    def _state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self._fitted_module().state_dict()
        return state

    def _load_state(self, state: dict[str, torch.Tensor], widths: dict[str, int]) -> None:
        module = self.new_module(widths)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise DataError(f"the saved weights don't fit the saved settings: {error}") from error
        self.module = module.eval()

    def _fitted_module(self) -> Any:
        if self.module is None:
            raise SettingsError(f"this {type(self).__name__} is not fitted")
        return self.module


def mean_and_scale(vectors: ItemVectors, modality: str, processes: Processes) -> tuple[torch.Tensor, float]:
    """Mean of each feature (float64 [D]) and the root of the mean variance, of the items that have the modality.

    Items that are all equal get scale 1. Read a chunk at a time, divided over processes.
    """
    array, present = vectors.arrays[modality], vectors.present.get(modality)
    sums = torch.zeros(2 * array.shape[1] + 1, dtype=torch.float64, device=processes.device)
    for chunk in vectors.chunks(processes.part(len(vectors))):
        values = array[chunk] if present is None else array[chunk][present[chunk]]
        part = torch.from_numpy(np.array(values, dtype=np.float64)).to(processes.device)
        sums += torch.cat([part.sum(0), part.square().sum(0), part.new_tensor([len(part)])])
    total, squares, count = processes.sum(sums).cpu().split([array.shape[1], array.shape[1], 1])
    mean = total / count.clamp(min=1)
    variance = float((squares / count.clamp(min=1) - mean.square()).mean())
    return mean, variance**0.5 if variance > 1e-12 * max(1.0, float(mean.square().mean())) else 1.0


def sample_rows(count: int, most: int, generator: np.random.Generator) -> np.ndarray:
    """All row numbers, or `most` of them drawn at random; ascending, int64."""
    if count <= most:
        return np.arange(count)
    return np.sort(generator.choice(count, most, replace=False))
