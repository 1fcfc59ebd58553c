"""Nearest codes, Sinkhorn assignment, and the residual quantiser that RQ-VAE, LETTER and ETEGRec share.

Residual quantisation follows LETTER (arXiv 2405.07314) and LC-Rec (arXiv 2311.09049), each in the form of the paper
and in the form of the published code. Knows nothing of encoders, catalogues or training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from llmrec.errors import SettingsError
from llmrec.item_tokenizers.clustering import constrained_kmeans, kmeans_centres
from llmrec.processes import Processes

ResidualUpdate = Literal["straight_through", "codebook"]
Reduction = Literal["mean", "sum"]
Initialisation = Literal["kmeans", "constrained_kmeans", "random"]


def squared_distances(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """||r||^2 + ||e||^2 - 2<r, e>, one matrix product: float [B, K] for [B, d] and [K, d]."""
    squares = vectors.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return torch.addmm(squares, vectors, codebook.t(), alpha=-2.0)


def nearest_codes(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Number of the nearest code vector (ties: the lowest): int64 [B] for [B, d] and [K, d]."""
    return torch.addmm(codebook.square().sum(1), vectors, codebook.t(), alpha=-2.0).argmin(1)


@torch.no_grad()
def residual_codes(latents: torch.Tensor, codebooks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Nearest codes level by level, each on what the earlier code vectors leave: int64 [B, L] for float [B, d]."""
    residual, codes = latents, []
    for level, codebook in enumerate(codebooks):
        codes.append(nearest_codes(residual, codebook))
        if level + 1 < len(codebooks):
            residual = residual - codebook[codes[-1]]
    return torch.stack(codes, 1)


def sinkhorn_codes(distances: torch.Tensor, *, epsilon: float = 0.003, iterations: int = 50) -> torch.Tensor:
    """Codes spread evenly over the batch: the arg-max of an entropic transport plan (methods.md 1.3).

    The published routine normalises the rows and columns of a B x K matrix in turn; here its two scaling vectors are
    updated instead (the same plan, two matrix-vector products a round). Always in double precision: single precision
    overflows at epsilon 0.003.

    Args:
        distances: Squared distances, float [B, K].
        epsilon: Entropic regularisation, relative to half the range of the distances.
        iterations: Rounds T.

    Returns:
        int64 [B].
    """
    doubles = distances.detach().double()
    low, high = doubles.aminmax()
    middle = (high + low) / 2
    amplitude = high - middle + 1e-5
    plan = torch.exp((middle - doubles) / (amplitude * epsilon))  # B x K
    # On a CPU by NumPy, whose small products take two thirds of the time; the same operators serve tensors elsewhere.
    matrix: Any = plan.numpy() if plan.device.type == "cpu" else plan
    columns: Any = matrix[0] * 0 + 1
    for _ in range(iterations):
        rows = 1 / (matrix @ columns)
        columns = 1 / (rows @ matrix)
        columns /= columns.mean()  # only the ratios matter; keeps them away from overflow
    return (plan * torch.as_tensor(columns)).argmax(1)


@dataclass(frozen=True)
class Quantized:
    """What a residual quantiser gives for a batch.

    Attributes:
        codes: int64 [B, L].
        vectors: float [B, d], the sum of the code vectors; its gradient passes straight to the latents.
        codebook_losses: float [L], ||sg[r_l] - e_l||^2 of each level: moves codes to residuals.
        commitment_losses: float [L], ||r_l - sg[e_l]||^2 of each level: moves residuals to codes.
    """

    codes: torch.Tensor
    vectors: torch.Tensor
    codebook_losses: torch.Tensor
    commitment_losses: torch.Tensor


class ResidualQuantizer(nn.Module):
    """L codebooks, each for what the earlier ones leave over.

    Args:
        codebook_sizes: Codes of each level.
        codebook_dim: Width d of code vectors.
        residual_update: `"straight_through"`: the residual is reduced by the straight-through value, as in the code
            of LETTER, LC-Rec and ETEGRec; then only the first level's commitment reaches the encoder.
            `"codebook"`: it is reduced by the code vector, as in the papers' formulas; then every level's does, and
            later losses also move earlier codebooks. The values are the same.
        reduction: `"mean"`: losses are means over features, as in the code; `"sum"`: squared norms, as in the papers.
            Over the batch always a mean.
        sinkhorn_epsilon: Regularisation of the balanced assignment on the last level, when it is asked for; 0: never.
        sinkhorn_iterations: Its rounds.

    The buffer `initialised` tells whether the codebooks hold data, and is saved: LETTER's code keeps it as a Python
    flag, and overwrites a loaded codebook at the next training step.

    Raises:
        SettingsError: A setting that can't work.
    """

    initialised: torch.Tensor

    def __init__(
        self,
        codebook_sizes: tuple[int, ...],
        codebook_dim: int,
        *,
        residual_update: ResidualUpdate = "straight_through",
        reduction: Reduction = "mean",
        sinkhorn_epsilon: float = 0.0,
        sinkhorn_iterations: int = 50,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if not codebook_sizes or min(codebook_sizes) < 1 or codebook_dim < 1:
            raise SettingsError(f"codebook_sizes {codebook_sizes} and codebook_dim {codebook_dim} must be positive")
        if residual_update not in get_args(ResidualUpdate) or reduction not in get_args(Reduction):
            raise SettingsError(
                f"residual_update {residual_update!r} or reduction {reduction!r} is unknown; known:"
                f" {get_args(ResidualUpdate)}, {get_args(Reduction)}"
            )
        self.residual_update = residual_update
        self.reduction = reduction
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        self.codebooks = nn.ParameterList(
            nn.Parameter(torch.randn(size, codebook_dim, generator=generator) / codebook_dim**0.5)
            for size in codebook_sizes
        )
        self.register_buffer("initialised", torch.tensor(False))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of each level, length L."""
        return tuple(len(codebook) for codebook in self.codebooks)

    def forward(
        self,
        latents: torch.Tensor,
        *,
        balanced: bool = False,
        batch_size: int | None = None,
        processes: Processes | None = None,
    ) -> Quantized:
        """Quantises with gradients.

        Args:
            latents: float [B, d].
            balanced: Sinkhorn on the last level, where `sinkhorn_epsilon` is above 0: for training, not for export.
            batch_size: Items of the whole batch, where these are one process's part of it: the losses are then that
                part's share. None: these are all.
            processes: Who has the other parts; Sinkhorn balances over the whole batch.
        """
        residual, total = latents, torch.zeros_like(latents)
        codes, codebook_losses, commitment_losses = [], [], []
        for level, codebook in enumerate(self.codebooks):
            last = level == len(self.codebooks) - 1
            chosen = self._choose(residual, codebook, balanced=balanced and last, processes=processes)
            vectors = functional.embedding(chosen, codebook)
            codes.append(chosen)
            codebook_losses.append(squared_error(vectors, residual.detach(), self.reduction, batch_size))
            commitment_losses.append(squared_error(vectors.detach(), residual, self.reduction, batch_size))
            if self.residual_update == "straight_through":
                vectors = residual + (vectors - residual).detach()
            total = total + vectors
            residual = residual - vectors
        if self.residual_update == "codebook":
            total = latents + (total - latents).detach()
        return Quantized(torch.stack(codes, 1), total, torch.stack(codebook_losses), torch.stack(commitment_losses))

    @torch.no_grad()
    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """Nearest codes of every level, Sinkhorn off: int64 [B, L] for float [B, d]."""
        return residual_codes(latents, list(self.codebooks))

    @torch.no_grad()
    def initialise(self, latents: torch.Tensor, method: Initialisation, generator: np.random.Generator) -> None:
        """Lets the codebooks start from data, level by level on what nearest codes of the earlier levels leave.

        Args:
            latents: float [N, d], any N >= 1: the whole catalogue or a sample.
            method: `"kmeans"`; `"constrained_kmeans"`: clusters of N // (2 K) to ceil(2 N / K) items, the rule of
                LETTER's code (N // 512 to four times that, at most 200, for K = 256) made to work for any N and K;
                `"random"`: rows drawn from the residuals.
            generator: Source of all draws.

        Raises:
            SettingsError: Unknown method.
        """
        residual = latents
        for codebook in self.codebooks:
            vectors, size = residual.cpu().numpy(), len(codebook)
            if method == "kmeans":
                centres = kmeans_centres(vectors, size, generator)
            elif method == "constrained_kmeans":
                limits = {"min_size": len(vectors) // (2 * size), "max_size": -(-2 * len(vectors) // size)}
                centres, _ = constrained_kmeans(vectors, size, generator, **limits)
            elif method == "random":
                centres = vectors[generator.choice(len(vectors), size, replace=len(vectors) < size)]
            else:
                raise SettingsError(f"unknown initialisation {method!r}; known: {get_args(Initialisation)}")
            codebook.copy_(torch.from_numpy(centres))
            residual = residual - codebook[nearest_codes(residual, codebook)]
        self.initialised.fill_(True)

    def _choose(
        self, residual: torch.Tensor, codebook: torch.Tensor, *, balanced: bool, processes: Processes | None
    ) -> torch.Tensor:
        with torch.no_grad():
            if not balanced or self.sinkhorn_epsilon <= 0:
                return nearest_codes(residual, codebook)
            distances = squared_distances(residual, codebook)
            own = slice(None)
            if processes is not None:
                distances = processes.gather_rows(distances)
                own = processes.part(len(distances))
            codes = sinkhorn_codes(distances, epsilon=self.sinkhorn_epsilon, iterations=self.sinkhorn_iterations)
            return codes[own]


def revive_dead_codes(
    codebooks: Sequence[torch.Tensor],
    codes: np.ndarray,
    latents_of: Callable[[np.ndarray], torch.Tensor],
    generator: np.random.Generator,
) -> list[int]:
    """Moves codes that no item uses onto residuals of items drawn at random, in place.

    Args:
        codebooks: Of each level float [K_l, d].
        codes: Nearest codes of the whole catalogue, int [N, L].
        latents_of: From row numbers int64 [n] to latents float [n, d].
        generator: Source of all draws.

    Returns:
        How many codes of each level were dead.
    """
    dead = [
        np.flatnonzero(np.bincount(codes[:, level], minlength=len(codebook)) == 0)
        for level, codebook in enumerate(codebooks)
    ]
    drawn = [generator.choice(len(codes), len(lost), replace=len(codes) < len(lost)) for lost in dead]
    for level, (lost, rows) in enumerate(zip(dead, drawn, strict=True)):
        if len(lost) == 0:
            continue
        residual = latents_of(rows)
        for earlier in range(level):
            chosen = torch.from_numpy(codes[rows, earlier].astype(np.int64)).to(residual.device)
            residual = residual - codebooks[earlier].detach()[chosen]
        with torch.no_grad():
            codebooks[level][torch.from_numpy(lost).to(residual.device)] = residual
    return [len(lost) for lost in dead]


def squared_error(
    left: torch.Tensor, right: torch.Tensor, reduction: Reduction, batch_size: int | None = None
) -> torch.Tensor:
    """Squared error of [B, d] against [B, d]: mean over all values, or sum over features and mean over the batch.

    Args:
        left: float [B, d].
        right: float [B, d].
        reduction: Which of the two.
        batch_size: Items of the whole batch where these are a part of it: the result is the part's share of the mean.
    """
    items = len(left) if batch_size is None else batch_size
    divisor = items * left.shape[1] if reduction == "mean" else items
    return functional.mse_loss(left, right, reduction="sum") / divisor
