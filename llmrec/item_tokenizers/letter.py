"""LETTER: an RQ-VAE whose codes also know who takes what, and are spread (Wang et al., arXiv 2405.07314).

Three regularisers: semantic (RQ-VAE), collaborative (quantised latents are held against vectors of a collaborative
filtering model) and diversity (code vectors of one cluster attract each other, others repel). After the authors'
published code; where the paper's formulas differ, they are named settings. Losses are pure functions on tensors.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional

from llmrec.errors import DataError, SettingsError
from llmrec.item_tokenizers.clustering import constrained_kmeans
from llmrec.item_tokenizers.fit_loop import TrainBatch, seeded
from llmrec.item_tokenizers.item_vectors import ItemVectors
from llmrec.item_tokenizers.quantizers import Initialisation
from llmrec.item_tokenizers.rq_vae import RQVAE, RQVAEConfig, RQVAETokenizer, rq_vae_losses
from llmrec.processes import Processes

MASKED = -1e12


@dataclass(frozen=True)
class LetterConfig(RQVAEConfig):
    """Settings of LETTER; those of `RQVAEConfig` and these.

    Sinkhorn and constrained k-means are on as in the authors' code. The defaults of `collaborative_weight` and
    `diversity_weight` are those of the authors' commands (their code's own default for the latter, 0.1, is not what
    they ran); their search grids were 0.1, 0.02, 0.01, 0.001 and 1e-2 to 1e-5. As the authors train:
    `epochs=20000, schedule="constant", learning_rate=1e-3, standardize=False, revive_until=0.0,
    hidden_sizes=(2048, 1024, 512, 256, 128, 64)`.

    On Amazon Beauty (MiniLM titles, our own SASRec, `eval/benchmarks/codes.py` on validation, one seed, standard error
    .002) a small recommender on the codes found, of the next items, this share among its ten best: alpha 0.3, 300
    epochs, no revival .0848; revival in the first 20 of 150 epochs .0834; alpha 0.3 and 1, 100 epochs, revival to the
    end of three quarters .0812 and .0822; alpha 1, 300 epochs, no revival .0783; the published codes .0877. Without
    revival a level ends with 112 to 256 codes in use, with it 256, but an item's nearest share its first codes more
    often without (by title 37 % against 29 %, by SASRec 20 % against 12 %).

    Attributes:
        collaborative_weight: Weight alpha of the collaborative loss.
        diversity_weight: Weight beta of the diversity loss. With `reduction="mean"` it is averaged over levels with
            the quantisation losses, as in the code (beta / L each); with `"sum"` it is added up, as in the paper.
        num_clusters: Clusters of the codes of a level; at most half of `codebook_size`.
    """

    sinkhorn_epsilon: float = 0.003
    initialisation: Initialisation = "constrained_kmeans"
    collaborative_weight: float = 0.01
    diversity_weight: float = 1e-4
    num_clusters: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_clusters <= self.codebook_size // 2:
            raise SettingsError(
                f"num_clusters is {self.num_clusters} for codebook_size {self.codebook_size}: clusters need two codes"
                f" at least, so choose 1 to {self.codebook_size // 2}"
            )


def collaborative_loss(
    quantized: torch.Tensor, collaborative: torch.Tensor, processes: Processes | None = None
) -> torch.Tensor:
    """-mean_i log softmax_j(<z_i, h_j>)[i]: each quantised latent finds its own item's vector within the batch.

    LETTER, equation of L_CF: raw inner products, no temperature, one direction, in-batch negatives. log(B) where all
    vectors are equal; 0 for a batch of one. Its gradient goes to the encoder, never to a codebook.

    Args:
        quantized: float [B, d], straight-through.
        collaborative: float [B, d], row i of the same item as row i of `quantized`.
        processes: Where these are one process's part of a batch: the vectors of the other parts are negatives too,
            and the result is this part's share of the mean.
    """
    candidates, first = collaborative, 0
    if processes is not None and processes.count > 1:
        candidates = processes.gather_rows(collaborative)
        first = processes.part(len(candidates)).start
    labels = torch.arange(first, first + len(quantized), device=quantized.device)
    return functional.cross_entropy(quantized @ candidates.t(), labels, reduction="sum") / len(candidates)


@dataclass(frozen=True)
class CodeClusters:
    """A clustering of the codes of one level, laid out so that a partner is drawn without a loop.

    Attributes:
        members: int64 [K], the codes, cluster after cluster.
        start: int64 [K], where in `members` the cluster of each code starts.
        size: int64 [K], the size of its cluster.
        position: int64 [K], its place within its cluster.
    """

    members: torch.Tensor
    start: torch.Tensor
    size: torch.Tensor
    position: torch.Tensor

    @classmethod
    def from_labels(cls, labels: np.ndarray, device: torch.device | str = "cpu") -> "CodeClusters":
        """From the cluster number of each code, int [K]."""
        members = np.argsort(labels, kind="stable")
        sizes = np.bincount(labels)
        starts = np.cumsum(sizes) - sizes
        position = np.empty(len(labels), dtype=np.int64)
        position[members] = np.arange(len(labels)) - starts[labels[members]]
        arrays = (members, starts[labels], sizes[labels], position)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))

    def draw_partners(self, codes: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """For each code another one of its cluster, uniformly: int64 [B]; the code itself where it is alone.

        Args:
            codes: int64 [B].
            uniform: Draws from [0, 1), float [B].
        """
        size = self.size[codes]
        step = 1 + torch.minimum((uniform * (size - 1)).long(), size - 2)  # 1 .. size - 1: never the code itself
        return self.members[self.start[codes] + (self.position[codes] + step) % size]


def diversity_loss(
    codes: torch.Tensor, partners: torch.Tensor, codebook: torch.Tensor, processes: Processes | None = None
) -> torch.Tensor:
    """-mean_i log softmax_{j != c_i}(<e_{c_i}, e_j>)[partner_i] of one level, temperature 1.

    LETTER, equation of L_Div. Rows of the softmax depend on the code alone, so it is taken once for each code and
    not once for each item. Codes without a partner are left out; 0 where none has one. Its gradient goes
    to the level's codebook, never to the encoder.

    Args:
        codes: Chosen codes c_i, int64 [B].
        partners: Other codes of their clusters, int64 [B]; the code itself where it has none.
        codebook: float [K, d].
        processes: Where these are one process's part of a batch: the result is this part's share of the mean.
    """
    has_partner = codes != partners
    if len(codes) < len(codebook):
        rows, places = torch.unique(codes, return_inverse=True)
    else:
        rows, places = torch.arange(len(codebook), device=codes.device), codes
    logits = (codebook[rows] @ codebook.t()).scatter(1, rows[:, None], MASKED)
    log_probabilities = functional.log_softmax(logits, dim=1)[places, partners]
    count = has_partner.sum() if processes is None else processes.sum(has_partner.sum())
    return -torch.where(has_partner, log_probabilities, 0.0).sum() / count.clamp(min=1)


class LetterTokenizer(RQVAETokenizer):
    """LETTER's item tokenizer: fits on text and collaborative vectors, encodes from text alone.

    The collaborative vectors (SASRec's or LightGCN's item table) must be trained on the training part only, or codes
    know the test items.

    Example:
        >>> tokenizer = LetterTokenizer().fit({"text": text, "collaborative": sasrec})  # doctest: +SKIP
        >>> semantic_ids = tokenizer.encode(text)  # doctest: +SKIP
    """

    config_class: ClassVar[type] = LetterConfig
    modalities: ClassVar[tuple[str, ...]] = ("text", "collaborative")
    encode_modalities: ClassVar[tuple[str, ...]] = ("text",)
    _clusters: tuple[CodeClusters, ...] = ()

    def batch_losses(self, module: RQVAE, batch: TrainBatch) -> dict[str, torch.Tensor]:
        """RQ-VAE's losses, alpha * collaborative, beta * diversity; see `TrainedTokenizer`."""
        config = self.config
        output = module(batch.items.vectors["text"], batch_size=batch.size, processes=batch.processes)
        quantized = output.quantized
        losses = rq_vae_losses(output, config, batch.size)
        if config.collaborative_weight > 0:
            aligned = collaborative_loss(quantized.vectors, batch.items.vectors["collaborative"], batch.processes)
            losses["collaborative"] = config.collaborative_weight * aligned
        if config.diversity_weight > 0:
            uniform = batch.uniform(config.num_codebooks)
            levels = torch.stack([
                diversity_loss(codes, clusters.draw_partners(codes, draws), codebook, batch.processes)
                for codes, clusters, draws, codebook in zip(
                    quantized.codes.T, self._clusters, uniform.T, module.quantizer.codebooks, strict=True
                )
            ])  # fmt: skip
            diversity = config.quantization_weight * levels.mean() if config.reduction == "mean" else levels.sum()
            losses["diversity"] = config.diversity_weight * diversity
        return losses

    def start_epoch(self, module: RQVAE, epoch: int) -> None:
        """Groups the codes of each level anew, clusters of the authors' sizes (10 to 60 of 256) or in proportion."""
        if self.config.diversity_weight == 0:
            return
        size, count = self.config.codebook_size, self.config.num_clusters
        limits = {"min_size": max(min(size // (2 * count), 10), 2), "max_size": max(60, -(-2 * size // count))}
        draws = seeded(self.config.seed, epoch, 3)[1]
        self._clusters = tuple(
            CodeClusters.from_labels(
                constrained_kmeans(codebook.detach().cpu().numpy(), count, draws, **limits)[1], codebook.device
            )
            for codebook in module.quantizer.codebooks
        )

    def check(self, vectors: ItemVectors) -> None:
        """The collaborative vectors must be as wide as the codes: the loss takes inner products of the two."""
        width = vectors.widths["collaborative"]
        if width != self.config.codebook_dim:
            raise DataError(
                f"the collaborative embeddings have width {width}, but codebook_dim is {self.config.codebook_dim}:"
                " LETTER takes inner products of the two. Bring them to that width by"
                f" ItemEmbeddings.reduce({self.config.codebook_dim}), or set codebook_dim to {width}"
            )
