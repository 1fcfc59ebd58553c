"""RQ-VAE: an autoencoder whose middle is a residual quantiser (TIGER, arXiv 2305.05065; LC-Rec, arXiv 2311.09049).

Holds config, module, losses and item tokenizer. Knows nothing of collaborative signals: that is `letter.py`.
"""

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, get_args

import torch
from torch import nn

from llmrec.errors import SettingsError
from llmrec.item_tokenizers.fit_loop import Keep, Schedule, TrainBatch, seeded
from llmrec.item_tokenizers.item_vectors import ItemBatch, ItemVectors
from llmrec.item_tokenizers.quantizers import (
    Initialisation,
    Quantized,
    Reduction,
    ResidualQuantizer,
    ResidualUpdate,
    squared_error,
)
from llmrec.item_tokenizers.trained import AlignedVectors, TrainedTokenizer, mean_and_scale, sample_rows
from llmrec.processes import Processes


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
        revive_until: Share of training in which codes that no item uses are moved onto residuals of random items, at
            each measuring; 0: never, as the authors. Reviving to 0.75 has LETTER use all 256 codes of every level of
            Beauty, but spreads what belongs together: see `LetterConfig`.
        epochs: Passes over the catalogue.
        batch_size: Items of a step; the last short batch is kept.
        learning_rate: Of AdamW, the highest of the schedule.
        weight_decay: Of AdamW, on codebooks too.
        schedule: `"cosine"` down to 1 % of the rate, or `"constant"` (the papers).
        evaluate_every: Epochs between two measurings.
        keep: Which of the measured weights are kept: those of the "lowest_collision_rate", as the authors do, or the
            "last".
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
    revive_until: float = 0.0
    epochs: int = 200
    batch_size: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"
    evaluate_every: int = 5
    keep: Keep = "lowest_collision_rate"
    seed: int = 42

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        may_be_zero = ("_weight", "_decay", "_epsilon", "_until", "seed")
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
        if self.revive_until > 1:
            raise SettingsError(f"revive_until is {self.revive_until}: it is a share of training, at most 1")
        choices = {"reduction": Reduction, "residual_update": ResidualUpdate, "schedule": Schedule,
                   "initialisation": Initialisation, "keep": Keep}  # fmt: skip
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

    def forward(
        self, inputs: torch.Tensor, *, batch_size: int | None = None, processes: Processes | None = None
    ) -> RQVAEOutput:
        """Encodes, quantises (balanced in training mode, where the config asks for it) and decodes.

        Args:
            inputs: float [B, D].
            batch_size: Items of the whole batch, where these are one process's part of it; see `ResidualQuantizer`.
            processes: Who has the other parts.
        """
        inputs = self.standardized(inputs)
        latents = self.encoder(inputs)
        quantized = self.quantizer(latents, balanced=self.training, batch_size=batch_size, processes=processes)
        return RQVAEOutput(inputs, latents, quantized, self.decoder(quantized.vectors))

    def standardized(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs as the encoder takes them: float [B, D]."""
        return (inputs - self.input_mean) / self.input_scale

    def latents(self, inputs: torch.Tensor) -> torch.Tensor:
        """What is quantised: float [B, d] for float [B, D]."""
        latents: torch.Tensor = self.encoder(self.standardized(inputs))
        return latents


def rq_vae_losses(output: RQVAEOutput, config: RQVAEConfig, batch_size: int | None = None) -> dict[str, torch.Tensor]:
    """Reconstruction and quantisation loss, scalars.

    With `reduction="mean"`: MSE + w * mean over levels of (codebook + commitment_weight * commitment), as the code of
    LC-Rec and LETTER; with `"sum"` levels are added and norms not divided by widths, as the papers.

    Args:
        output: Of a forward pass with the same `batch_size`.
        config: Weights and reduction.
        batch_size: Items of the whole batch, where the output is of a part of it.
    """
    levels = output.quantized.codebook_losses + config.commitment_weight * output.quantized.commitment_losses
    quantization = levels.mean() if config.reduction == "mean" else levels.sum()
    reconstruction = squared_error(output.reconstruction, output.inputs, config.reduction, batch_size)
    return {"reconstruction": reconstruction, "quantization": config.quantization_weight * quantization}


class RQVAETokenizer(TrainedTokenizer):
    """Item tokenizer that learns an RQ-VAE on text embeddings.

    Example:
        >>> tokenizer = RQVAETokenizer(RQVAEConfig(epochs=50)).fit(text_embeddings)  # doctest: +SKIP
        >>> tokenizer.encode(text_embeddings).tokens(0)  # doctest: +SKIP
        ['<a_183>', '<b_70>', '<c_232>', '<d_6>']
    """

    config_class: ClassVar[type] = RQVAEConfig
    config: Any

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level, length L."""
        return (self.config.codebook_size,) * self.config.num_codebooks

    def new_module(self, widths: dict[str, int]) -> RQVAE:
        """See `TrainedTokenizer`."""
        return RQVAE(widths["text"], self.config)

    def batch_losses(self, module: RQVAE, batch: TrainBatch) -> dict[str, torch.Tensor]:
        """See `TrainedTokenizer`, and `rq_vae_losses`."""
        output = module(batch.items.vectors["text"], batch_size=batch.size, processes=batch.processes)
        return rq_vae_losses(output, self.config, batch.size)

    def latents(self, module: RQVAE, items: ItemBatch) -> torch.Tensor:
        """See `TrainedTokenizer`."""
        return module.latents(items.vectors["text"])

    def codebooks(self, module: RQVAE) -> list[torch.Tensor]:
        """See `TrainedTokenizer`."""
        return list(module.quantizer.codebooks)

    def aligned_vectors(self, module: RQVAE, items: ItemBatch) -> AlignedVectors:
        """See `TrainedTokenizer`: `restored` is what the decoder writes.

        That is in standardised space, where the config says `standardize`. (ETEGRec's authors don't standardise.)
        """
        latents = self.latents(module, items)
        return AlignedVectors(latents, module.decoder(module.quantizer(latents, balanced=False).vectors))

    def restored_width(self, module: RQVAE) -> int:
        """D, the width of the decoder's outputs and of the text embeddings."""
        last: Any = module.decoder[-1]
        return int(last.out_features)

    def start(self, module: RQVAE, vectors: ItemVectors, processes: Processes) -> None:
        """Sets the scaling of inputs, and lets the codebooks start from the latents of (a sample of) the items."""
        config = self.config
        if config.standardize:
            mean, scale = mean_and_scale(vectors, "text", processes)
            module.input_mean.copy_(mean)
            module.input_scale.fill_(scale)
        draws = seeded(config.seed, 0, 0)[1]
        if processes.is_main:
            rows = sample_rows(len(vectors), config.initialisation_items, draws)
            module.quantizer.initialise(self._latents_of(module, vectors, rows), config.initialisation, draws)
        module.quantizer.load_state_dict(processes.broadcast(module.quantizer.state_dict()))
