"""RQ-KMeans+: RQ-KMeans whose vectors and centres learn on (GPR, arXiv 2511.10138; re-implemented in MiniOneRec).

An RQ-VAE as wide as its inputs: z = x + MLP(x), the MLP's last layer starting at zero and the codebooks at the centres
of constrained RQ-KMeans, so that before the first step its codes are those of RQ-KMeans. Knows RQ-VAE and RQ-KMeans.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llmrec.errors import SettingsError
from llmrec.item_tokenizers.fit_loop import Keep, Schedule
from llmrec.item_tokenizers.item_vectors import ItemVectors
from llmrec.item_tokenizers.quantizers import Reduction, ResidualUpdate
from llmrec.item_tokenizers.rq_kmeans import Balance, RQKMeansConfig, RQKMeansTokenizer
from llmrec.item_tokenizers.rq_vae import RQVAE, RQVAEConfig, RQVAETokenizer
from llmrec.processes import Processes


@dataclass(frozen=True)
class RQKMeansPlusConfig:
    """Settings of RQ-KMeans+.

    Rate, loss weights and the lack of weight decay are those of MiniOneRec's code. Departures: four levels, as the
    other item tokenizers here (theirs has three); hidden layers for embeddings of a few hundred values; batches of
    1,024 in place of 2,048, and 200 epochs with a cosine schedule in place of 10,000 at a constant rate, which is
    minutes on two cores. There is no `codebook_dim`, since codes are as wide as the inputs, and inputs aren't
    standardised: all losses are then of one scale anyway.

    Attributes:
        num_codebooks: Levels L.
        codebook_size: Codes K of each level.
        hidden_sizes: Layers of the MLP between input and latents; the decoder has them in reverse.
        commitment_weight: Weight of ||r - sg[e]||^2 against ||sg[r] - e||^2.
        quantization_weight: Weight of all quantisation losses against reconstruction.
        reduction: `"mean"` or `"sum"`, as in `RQVAEConfig`.
        residual_update: `"straight_through"` or `"codebook"`, as in `RQVAEConfig`.
        balance: Of the RQ-KMeans that it starts from: "exact" (constrained), "greedy" or "none".
        size_slack: Of that RQ-KMeans: how far sizes may be from N / K, as a share of it.
        kmeans_iterations: Of that RQ-KMeans: rounds of a level at most.
        balanced_items: Of that RQ-KMeans: items that are balanced together at most.
        revive_until: Share of training in which codes that no item uses are moved onto residuals of random items,
            as in `RQVAEConfig`. The authors don't; the balanced start leaves few dead codes.
        epochs: Passes over the catalogue.
        batch_size: Items of a step; the last short batch is kept.
        learning_rate: Of AdamW, the highest of the schedule.
        weight_decay: Of AdamW, on codebooks too.
        schedule: `"cosine"` down to 1 % of the rate, or `"constant"` (the authors).
        evaluate_every: Epochs between two measurings.
        keep: Which of the measured weights are kept, as in `RQVAEConfig`.
        seed: Of all draws.

    Raises:
        SettingsError: A value that can't work.
    """

    num_codebooks: int = 4
    codebook_size: int = 256
    hidden_sizes: tuple[int, ...] = (512, 256, 128, 64)
    commitment_weight: float = 0.25
    quantization_weight: float = 1.0
    reduction: Reduction = "mean"
    residual_update: ResidualUpdate = "straight_through"
    balance: Balance = "exact"
    size_slack: float = 0.0
    kmeans_iterations: int = 100
    balanced_items: int = 65_536
    revive_until: float = 0.0
    epochs: int = 200
    batch_size: int = 1024
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    evaluate_every: int = 5
    keep: Keep = "lowest_collision_rate"
    seed: int = 42

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        try:
            self.rq_vae(width=1)
            self.rq_kmeans()
        except SettingsError as error:
            raise SettingsError(f"{type(self).__name__}: {error}") from error

    def rq_vae(self, width: int) -> RQVAEConfig:
        """Settings of the RQ-VAE for inputs, and so codes, of this width."""
        shared = asdict(self)
        for name in ("balance", "size_slack", "kmeans_iterations", "balanced_items"):
            del shared[name]
        return RQVAEConfig(codebook_dim=width, standardize=False, **shared)

    def rq_kmeans(self) -> RQKMeansConfig:
        """Settings of the RQ-KMeans that it starts from."""
        return RQKMeansConfig(
            num_codebooks=self.num_codebooks, codebook_size=self.codebook_size, balance=self.balance,
            size_slack=self.size_slack, iterations=self.kmeans_iterations, balanced_items=self.balanced_items,
            seed=self.seed,
        )  # fmt: skip


class ResidualEncoder(nn.Module):
    """z = x + MLP(x), at first z = x: float [B, D] to float [B, D].

    Args:
        mlp: From width D to width D; its last layer, an `nn.Linear`, is set to zero.
    """

    def __init__(self, mlp: nn.Sequential):
        super().__init__()
        self.mlp = mlp
        for parameter in mlp[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Latents of inputs."""
        change: torch.Tensor = self.mlp(inputs)
        return inputs + change


class RQKMeansPlus(RQVAE):
    """An RQ-VAE with a `ResidualEncoder`.

    Args:
        width: Width D of the inputs, latents and code vectors.
        config: Settings with `codebook_dim` D.
    """

    encoder: Any

    def __init__(self, width: int, config: RQVAEConfig):
        super().__init__(width, config)
        self.encoder = ResidualEncoder(self.encoder)


class RQKMeansPlusTokenizer(RQVAETokenizer):
    """Item tokenizer that trains on from RQ-KMeans on text embeddings.

    Example:
        >>> tokenizer = RQKMeansPlusTokenizer().fit(text_embeddings)  # doctest: +SKIP
        >>> tokenizer.encode(text_embeddings).tokens(0)  # doctest: +SKIP
        ['<a_183>', '<b_70>', '<c_232>', '<d_6>']
    """

    config_class: ClassVar[type] = RQKMeansPlusConfig
    config: Any

    def new_module(self, widths: dict[str, int]) -> RQVAE:
        """See `TrainedTokenizer`."""
        return RQKMeansPlus(widths["text"], self.config.rq_vae(widths["text"]))

    def start(self, module: RQVAE, vectors: ItemVectors, processes: Processes) -> None:
        """Fits RQ-KMeans and takes its centres as codebooks."""
        start = RQKMeansTokenizer(self.config.rq_kmeans())
        start._fit(vectors, progress=False, checkpoint_folder=None, processes=processes, monitor=None)
        with torch.no_grad():
            for codebook, centres in zip(module.quantizer.codebooks, start.codebooks, strict=True):
                codebook.copy_(centres)
        module.quantizer.initialised.fill_(True)
