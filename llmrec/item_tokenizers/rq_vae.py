"""RQ-VAE: an autoencoder whose middle is a residual quantiser (TIGER, arXiv 2305.05065; LC-Rec, arXiv 2311.09049).

Holds config, module, losses and item tokenizer. Knows nothing of collaborative signals: that is `letter.py`.
"""

import logging
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from torch import nn

from llmrec.errors import DataError, SettingsError
from llmrec.item_tokenizers.base import ItemTokenizer
from llmrec.item_tokenizers.fit_loop import LoopSettings, Schedule, identity_of, run_epochs, seeded
from llmrec.item_tokenizers.quantizers import (
    ENCODE_BATCH,
    Initialisation,
    Quantized,
    Reduction,
    ResidualQuantizer,
    ResidualUpdate,
    squared_error,
)
from llmrec.item_tokenizers.uniqueness import CodeGeometry, mixed_radix_keys

logger = logging.getLogger(__name__)

COLLAPSE_SHARE = 0.1


@dataclass(frozen=True)
class RQVAEConfig:
    """Settings of an RQ-VAE.

    Defaults are those of LC-Rec's and LETTER's code, save for these. The hidden layers are for text embeddings of a
    few hundred values on a CPU; the papers go 2048-1024-512-256-128-64 from 4,096. 200 epochs with a cosine schedule
    from 2e-3, in place of 10,000 to 20,000 at a constant 1e-3: minutes on two cores for ten thousand items. Inputs are
    standardised: the features of a unit vector of width 384 have a variance of 1/384, so that without it the mean
    squared reconstruction error is a hundred times smaller than the quantisation losses and trains little.

    Attributes:
        num_codebooks: Levels L.
        codebook_size: Codes K of each level.
        codebook_dim: Width d of latents and code vectors.
        hidden_sizes: Layers of the encoder between input and latents; the decoder has them in reverse.
        commitment_weight: Weight of ||r - sg[e]||^2 against ||sg[r] - e||^2.
        quantization_weight: Weight of all quantisation losses against reconstruction.
        reduction: `"mean"` (the code): losses are means over features and over levels. `"sum"` (the papers): squared
            norms, levels added. The mean is the default because it keeps weights comparable between widths.
        residual_update: `"straight_through"` (the code) or `"codebook"` (the papers): see `ResidualQuantizer`. The
            former is the default because the published codes were made with it.
        sinkhorn_epsilon: Regularisation of the balanced last level in training; 0: nearest codes, as TIGER does;
            0.003 in LC-Rec and LETTER.
        sinkhorn_iterations: Its rounds.
        standardize: Whether to subtract the mean of each input feature and divide by one scale for all of them, so
            that the mean variance is 1. Geometry is kept but for the mean.
        initialisation: How codebooks start, from the latents of the items: "kmeans", "constrained_kmeans", "random".
        initialisation_items: Items that are drawn for it at most.
        revive_dead_codes: Whether codes that no item uses are moved onto residuals of random items at each measuring
            in the first three quarters of training. The authors have no such thing and train much longer; on Beauty
            after 60 epochs a level used 245 to 254 codes with it and the first three 141 to 158 without.
        epochs: Passes over the catalogue.
        batch_size: Items of a step; the last short batch is kept.
        learning_rate: Of AdamW, the highest of the schedule.
        weight_decay: Of AdamW, on codebooks too.
        schedule: `"cosine"` down to 1 % of the rate, or `"constant"` (the papers).
        evaluate_every: Epochs between two measurings of the collision rate, which choose the weights to keep.
        seed: Of all draws.

    Raises:
        SettingsError: A value that can't work.
    """

    num_codebooks: int = 4
    codebook_size: int = 256
    codebook_dim: int = 32
    hidden_sizes: tuple[int, ...] = (512, 256, 128, 64)
    commitment_weight: float = 0.25
    quantization_weight: float = 1.0
    reduction: Reduction = "mean"
    residual_update: ResidualUpdate = "straight_through"
    sinkhorn_epsilon: float = 0.0
    sinkhorn_iterations: int = 50
    standardize: bool = True
    initialisation: Initialisation = "kmeans"
    initialisation_items: int = 100_000
    revive_dead_codes: bool = True
    epochs: int = 200
    batch_size: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"
    evaluate_every: int = 5
    seed: int = 42

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        may_be_zero = ("_weight", "_decay", "_epsilon", "seed")
        wrong = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and (
                value < 0 or (value == 0 and not isinstance(value, bool) and not field.name.endswith(may_be_zero))
            ):
                wrong.append(f"{field.name}={value}")
        if self.codebook_size < 2 or min(self.hidden_sizes, default=1) < 1:
            wrong.append("codebook_size (2 or more) or hidden_sizes (1 or more)")
        if wrong:
            raise SettingsError(f"{type(self).__name__}: {', '.join(wrong)} too small")
        choices = {"reduction": Reduction, "residual_update": ResidualUpdate, "schedule": Schedule,
                   "initialisation": Initialisation}  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise SettingsError(f"{name} is {getattr(self, name)!r}; known: {', '.join(get_args(known))}")


@dataclass(frozen=True)
class RQVAEOutput:
    """One forward pass.

    Attributes:
        inputs: float [B, D], standardised: what the reconstruction is held against.
        latents: float [B, d].
        quantized: Codes, quantised latents, losses a level.
        reconstruction: float [B, D].
    """

    inputs: torch.Tensor
    latents: torch.Tensor
    quantized: Quantized
    reconstruction: torch.Tensor


def _mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them, Xavier-normal weights, zero biases."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        linear = nn.Linear(width_in, width_out)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class RQVAE(nn.Module):
    """Encoder, residual quantiser, decoder.

    Args:
        width: Width D of the inputs.
        config: See `RQVAEConfig`; its seed fixes the starting weights.
    """

    input_mean: torch.Tensor
    input_scale: torch.Tensor

    def __init__(self, width: int, config: RQVAEConfig):
        super().__init__()
        sizes = [width, *config.hidden_sizes, config.codebook_dim]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = _mlp(sizes)
            self.decoder = _mlp(sizes[::-1])
            self.quantizer = ResidualQuantizer(
                (config.codebook_size,) * config.num_codebooks,
                config.codebook_dim,
                residual_update=config.residual_update,
                reduction=config.reduction,
                sinkhorn_epsilon=config.sinkhorn_epsilon,
                sinkhorn_iterations=config.sinkhorn_iterations,
            )
        self.register_buffer("input_mean", torch.zeros(width))
        self.register_buffer("input_scale", torch.ones(()))

    def forward(self, inputs: torch.Tensor) -> RQVAEOutput:
        """Encodes, quantises (balanced in training mode, where the config asks for it) and decodes float [B, D]."""
        inputs = self.standardized(inputs)
        latents = self.encoder(inputs)
        quantized = self.quantizer(latents, balanced=self.training)
        return RQVAEOutput(inputs, latents, quantized, self.decoder(quantized.vectors))

    def standardized(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs as the encoder takes them: float [B, D]."""
        return (inputs - self.input_mean) / self.input_scale

    @torch.no_grad()
    def latents(self, inputs: torch.Tensor) -> torch.Tensor:
        """Latents of any number of items, batch by batch: float [N, d] for float [N, D]."""
        return torch.cat([self.encoder(self.standardized(part)) for part in inputs.split(ENCODE_BATCH)])


def rq_vae_loss(output: RQVAEOutput, config: RQVAEConfig) -> torch.Tensor:
    """Reconstruction plus quantisation losses, a scalar.

    With `reduction="mean"`: MSE + w * mean over levels of (codebook + commitment_weight * commitment), as the code of
    LC-Rec and LETTER; with `"sum"` levels are added and norms not divided by widths, as the papers.
    """
    levels = output.quantized.codebook_losses + config.commitment_weight * output.quantized.commitment_losses
    quantization = levels.mean() if config.reduction == "mean" else levels.sum()
    reconstruction = squared_error(output.reconstruction, output.inputs, config.reduction)
    return reconstruction + config.quantization_weight * quantization


class RQVAETokenizer(ItemTokenizer):
    """Item tokenizer that learns an RQ-VAE on text embeddings.

    Example:
        >>> tokenizer = RQVAETokenizer(RQVAEConfig(epochs=50)).fit(text_embeddings)  # doctest: +SKIP
        >>> tokenizer.encode(text_embeddings).tokens(0)  # doctest: +SKIP
        ['<a_183>', '<b_70>', '<c_232>', '<d_6>']
    """

    config_class: ClassVar[type] = RQVAEConfig
    config: Any
    module: RQVAE | None = None
    """The network, on the CPU after `fit` and `from_pretrained`; joint training takes it from here."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level, length L."""
        return (self.config.codebook_size,) * self.config.num_codebooks

    def batch_loss(
        self, module: RQVAE, rows: torch.Tensor, vectors: dict[str, torch.Tensor], generator: torch.Generator
    ) -> torch.Tensor:
        """The training loss of a batch, a scalar.

        Args:
            module: The network.
            rows: Row numbers, int64 [B].
            vectors: All vectors by modality, float [N, D].
            generator: For the losses that draw.
        """
        return rq_vae_loss(module(vectors["text"][rows]), self.config)

    def start_epoch(self, module: RQVAE, epoch: int) -> None:
        """Called before each epoch; for the methods that refresh something."""

    def _fit(self, vectors: dict[str, np.ndarray], *, progress: bool | None, checkpoint_folder: Path | None) -> None:
        config = self.config
        module = RQVAE(vectors["text"].shape[1], config)
        tensors = {name: torch.from_numpy(array) for name, array in vectors.items()}
        if config.standardize:
            _set_standardization(module, vectors["text"])
        draws = seeded(config.seed, 0, 0)[1]
        sample = tensors["text"]
        if len(sample) > config.initialisation_items:
            chosen = np.sort(draws.choice(len(sample), config.initialisation_items, replace=False))
            sample = sample[torch.from_numpy(chosen)]
        module.quantizer.initialise(module.latents(sample), config.initialisation, draws)

        def measure(epochs_done: int) -> float:
            latents = module.latents(tensors["text"])
            codes = module.quantizer.encode(latents)
            self._warn_of_collapse(codes, epochs_done)
            if config.revive_dead_codes and 4 * epochs_done < 3 * config.epochs:
                module.quantizer.revive(latents, codes, seeded(config.seed, epochs_done, 2)[1])
            keys = mixed_radix_keys(codes.numpy(), self.codebook_sizes)
            return 1.0 - len(np.unique(keys)) / len(keys)

        state = run_epochs(
            module,
            len(vectors["text"]),
            LoopSettings(**{field.name: getattr(config, field.name) for field in fields(LoopSettings)}),
            start_epoch=lambda epoch: self.start_epoch(module, epoch),
            batch_loss=lambda rows, generator: self.batch_loss(module, rows, tensors, generator),
            measure=measure,
            identity=identity_of(asdict(config) | {"class": type(self).__name__}, vectors),
            description=f"fitting {type(self).__name__}",
            progress=progress,
            checkpoint_folder=checkpoint_folder,
        )
        self.module = module
        self.fit_report = {"items": len(vectors["text"]), **vars(state)}

    def _encode(self, vectors: dict[str, np.ndarray]) -> tuple[np.ndarray, CodeGeometry]:
        module = self._fitted_module()
        latents = module.latents(torch.from_numpy(vectors["text"]))
        codes = module.quantizer.encode(latents).numpy().astype(np.int32)
        codebooks = tuple(codebook.detach().numpy() for codebook in module.quantizer.codebooks)
        return codes, CodeGeometry(latents.numpy(), codebooks)

    def _state(self) -> dict[str, torch.Tensor]:
        return self._fitted_module().state_dict()

    def _load_state(self, state: dict[str, torch.Tensor], widths: dict[str, int]) -> None:
        module = RQVAE(widths["text"], self.config)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise DataError(f"the saved weights don't fit the saved settings: {error}") from error
        self.module = module.eval()

    def _fitted_module(self) -> RQVAE:
        if self.module is None:
            raise SettingsError(f"this {type(self).__name__} is not fitted")
        return self.module

    def _warn_of_collapse(self, codes: torch.Tensor, epochs_done: int) -> None:
        used = [len(torch.unique(level)) for level in codes.T]
        reachable = min(self.config.codebook_size, len(codes))
        if min(used) < COLLAPSE_SHARE * reachable and epochs_done >= self.config.epochs / 2:
            logger.warning(
                "epoch %d: the items use only %s of %d codes a level (collapse); set revive_dead_codes, a smaller"
                " learning_rate, or standardize, and see whether the embeddings differ between items",
                epochs_done, "/".join(map(str, used)), self.config.codebook_size,
            )  # fmt: skip


def _set_standardization(module: RQVAE, vectors: np.ndarray) -> None:
    """Sets mean and scale in double precision; items that are all equal keep scale 1."""
    module.input_mean.copy_(torch.from_numpy(vectors.mean(axis=0, dtype=np.float64)))
    scale = float(np.sqrt(vectors.var(axis=0, dtype=np.float64).mean()))
    module.input_scale.fill_(scale if scale > 1e-12 else 1.0)
