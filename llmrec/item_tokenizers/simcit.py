"""SimCIT: codes learned by contrast alone, from any number of modalities (arXiv 2506.16683).

Each modality is a view of the item. Attention fuses the views, a soft residual quantiser turns the fused vector into
codes, and the only training signal is that the quantised vector of an item finds the item's own views among those of
others: no reconstruction, no commitment. After the authors' published code; the paper's own settings for public data
sets are not known. Holds config, module, losses and item tokenizer; knows nothing of what a modality is about.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, SettingsError
from llmrec.item_tokenizers.fit_loop import Keep, Schedule, TrainBatch, seeded
from llmrec.item_tokenizers.item_vectors import ItemBatch, ItemVectors
from llmrec.item_tokenizers.quantizers import ResidualQuantizer, residual_codes, squared_distances
from llmrec.item_tokenizers.trained import TrainedTokenizer, mean_and_scale, sample_rows
from llmrec.item_tokenizers.uniqueness import CodeGeometry
from llmrec.processes import Processes

SimCITInitialisation = Literal["uniform", "kmeans"]

MEASURED_ITEMS = 4096


@dataclass(frozen=True)
class SimCITConfig:
    """Settings of SimCIT.

    Widths, regulariser and weight decay are those of the public configuration. The rest departs from it, which is for
    15,000 epochs on GPUs; the defaults are for minutes on a CPU. What was measured on Amazon Beauty (12,101 items,
    MiniLM text and collaborative vectors, seed 42), in one run each, the other settings as they were then:

    - Starting weights have the same variance at any input width, and inputs are standardised, so that modalities start
      alike. With Xavier's rule, which favours wide inputs, text took 95 to 97 % of the attention within 20 epochs,
      and the collaborative loss stayed near that of guessing.
    - `gumbel_temperature` 1 in place of 0.2: after 5 epochs a loss of 4.1 against 7.3, collisions of 0.3 % against
      5.1 %, and the same cosine (0.9) between what is trained and what is exported. At 0.2 mixtures are nearly codes,
      and little gradient passes through them. On the way from 1 to 0.2 (annealed over 15 epochs) the loss was 5.0; at
      a constant 2 it was 2.7, but the cosine 0.84.
    - `initialisation="kmeans"`: after 5 epochs at 0.2 a level used 186 to 226 codes, with "uniform" 53 to 149.
    - `batch_size` 256, as many negatives as on each of the authors' two GPUs: four times the steps of 1024 in the same
      time.
    - `contrastive_temperature` 0.2 in place of 0.07: a small recommender trained on the codes (titles and our own
      SASRec, 30 epochs; `eval/benchmarks/codes.py`, validation, one seed, standard error .002) found .0869 of the next
      items among its ten best, .0816 with 0.07 and .0795 with 0.5. Lower ones tell items apart from their
      likes: 9 % of an item's nearest by title shared its first code with 0.07, 13 % with 0.2; collisions 0.12 and
      0.40 %.
    - No revival of dead codes: it throws training back (at batch 1024 and 0.2, after 15 epochs, a loss of 9.7 against
      8.7, collisions of 1.0 % against 0.7 %), and few codes die after a start from k-means.

    As the authors train, save for their warm-up of 100 epochs: `num_codebooks=2, codebook_size=128, epochs=15000,
    batch_size=512, learning_rate=2e-4, contrastive_temperature=0.07, gumbel_temperature=0.2, initialisation="uniform",
    standardize=False`.

    Attributes:
        num_codebooks: Levels L.
        codebook_size: Codes K of each level.
        codebook_dim: Width d of latents, code vectors and the projection.
        hidden_sizes: Layers of each modality's encoder between input and latents.
        contrastive_temperature: t of the contrastive loss, which divides cosines.
        gumbel_temperature: T of the soft quantiser; constant, or where annealing ends.
        annealing_start: T before the first epoch where it is annealed.
        annealing_rate: T of epoch e is annealing_start * exp(-annealing_rate * e), at least gumbel_temperature.
            0: no annealing. The authors' code has a scheduler of this form that nothing calls.
        codeword_weight: Weight of `codeword_similarity` against the contrastive losses.
        standardize: Whether to subtract the mean of each input feature and divide by one scale for all of a modality,
            from the items that have it, so that the mean variance is 1. The authors feed the vectors as they are.
        initialisation: How codebooks start: "uniform" on [0, 1), or "kmeans" on the fused latents of the items.
        initialisation_items: Items that are drawn for it at most.
        revive_until: Share of training in which codes that no item uses are moved onto residuals of random items, at
            each measuring; not in the authors' code.
        epochs: Passes over the catalogue.
        batch_size: Items of a step over all processes, each with the others as negatives; the last short batch is
            kept.
        learning_rate: Of AdamW, the highest of the schedule.
        weight_decay: Of AdamW, on codebooks too.
        schedule: `"cosine"` down to 1 % of the rate, or `"constant"`.
        evaluate_every: Epochs between two measurings.
        keep: Which of the measured weights are kept: the "last", or those of the "lowest_collision_rate". Collisions
            rise while items that are alike come together, so that the lowest rate is that of the least trained.
        seed: Of all draws.

    Raises:
        SettingsError: A value that can't work.
    """

    num_codebooks: int = 4
    codebook_size: int = 256
    codebook_dim: int = 128
    hidden_sizes: tuple[int, ...] = (512, 384, 256)
    contrastive_temperature: float = 0.2
    gumbel_temperature: float = 1.0
    annealing_start: float = 2.0
    annealing_rate: float = 0.0
    codeword_weight: float = 1.0
    standardize: bool = True
    initialisation: SimCITInitialisation = "kmeans"
    initialisation_items: int = 100_000
    revive_until: float = 0.0
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 5e-4
    weight_decay: float = 1e-3
    schedule: Schedule = "cosine"
    evaluate_every: int = 5
    keep: Keep = "last"
    seed: int = 42

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", tuple(self.hidden_sizes))
        may_be_zero = ("annealing_rate", "codeword_weight", "revive_until", "weight_decay", "seed")
        wrong = [
            f"{field.name}={value}"
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), int | float) and not isinstance(value, bool)
            and not (value > 0 or (value == 0 and field.name in may_be_zero))
        ]  # fmt: skip
        if self.codebook_size < 2 or min(self.hidden_sizes, default=1) < 1:
            wrong.append("codebook_size (2 or more) or hidden_sizes (1 or more)")
        if wrong:
            raise SettingsError(f"{type(self).__name__}: {', '.join(wrong)} too small")
        choices = {"schedule": Schedule, "initialisation": SimCITInitialisation, "keep": Keep}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise SettingsError(f"{name} is {getattr(self, name)!r}; known: {', '.join(get_args(known))}")
        if self.annealing_rate > 0 and self.annealing_start < self.gumbel_temperature:
            raise SettingsError(
                f"annealing_start is {self.annealing_start}, below gumbel_temperature {self.gumbel_temperature}, where"
                " annealing ends: start higher, or set annealing_rate to 0"
            )

    def temperature_at(self, epoch: int) -> float:
        """T of the soft quantiser in an epoch, counted from 0."""
        if self.annealing_rate == 0:
            return self.gumbel_temperature
        return max(self.gumbel_temperature, self.annealing_start * math.exp(-self.annealing_rate * epoch))


@dataclass(frozen=True)
class FusedItems:
    """Items as the quantiser and the contrastive loss take them; M modalities in the order of `SimCIT.encoders`.

    Attributes:
        views: float [M, B, d], the encoded modalities e_m; 0 where the item lacks one.
        present: bool [M, B].
        attention: float [M, B], pi: sums to 1 over the modalities that an item has, 0 for the others.
        latents: float [B, d], f = sum_m pi_m e_m.
    """

    views: torch.Tensor
    present: torch.Tensor
    attention: torch.Tensor
    latents: torch.Tensor


class ModalityEncoder(nn.Module):
    """Standardises the vectors of one modality and encodes them: linear layers without bias, SiLU between them.

    Weights start at a variance of 2 / inputs (He's rule), so that latents start at one size whatever the width is.
    """

    input_mean: torch.Tensor
    input_scale: torch.Tensor

    def __init__(self, sizes: list[int]):
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes):
            linear = nn.Linear(width_in, width_out, bias=False)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            layers += [linear, nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])
        self.register_buffer("input_mean", torch.zeros(sizes[0]))
        self.register_buffer("input_scale", torch.ones(()))

    def forward(self, vectors: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Vectors float [B, D] to float [B, d]; rows that are not present (bool [B]) become 0, whatever they hold."""
        standardized = (vectors - self.input_mean) / self.input_scale
        encoded: torch.Tensor = self.layers(torch.where(present[:, None], standardized, 0.0))
        return encoded


class SimCIT(nn.Module):
    """One encoder a modality, attention over them, codebooks, and the projection that the loss compares in.

    Biases are where the authors' code has them: in the attention's first layer and in the projection.

    Args:
        widths: Modality to width of its vectors. Modules and weights are in alphabetical order of names, so that the
            order in which modalities are passed doesn't matter.
        config: See `SimCITConfig`; its seed fixes the starting weights.
    """

    def __init__(self, widths: dict[str, int], config: SimCITConfig):
        super().__init__()
        dim = config.codebook_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoders = nn.ModuleDict(
                {name: ModalityEncoder([widths[name], *config.hidden_sizes, dim]) for name in sorted(widths)}
            )
            self.attention = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, 1, bias=False))
            self.projection = nn.Linear(dim, dim)
            self.quantizer = ResidualQuantizer((config.codebook_size,) * config.num_codebooks, dim)
            for codebook in self.quantizer.codebooks:
                nn.init.uniform_(codebook)

    def forward(self, items: ItemBatch) -> FusedItems:
        """Encodes and fuses. A modality that `items` doesn't hold at all is one that none of them has.

        The softmax of the attention leaves out what an item lacks, so the result is that of an item described by the
        others alone. An item without any modality gets NaN: to be refused before.
        """
        views, present = [], []
        size, device = len(items), self.projection.weight.device
        for name, encoder in self.encoders.items():
            if name in items.vectors:
                present.append(items.present[name])
                views.append(encoder(items.vectors[name], present[-1]))
            else:
                present.append(torch.zeros(size, dtype=torch.bool, device=device))
                views.append(torch.zeros(size, self.projection.in_features, device=device))
        stacked, mask = torch.stack(views), torch.stack(present)  # [M, B, d], [M, B]
        scores = self.attention(stacked).squeeze(-1).masked_fill(~mask, -math.inf)
        weights = scores.softmax(0)
        return FusedItems(stacked, mask, weights, torch.einsum("mb,mbd->bd", weights, stacked))


@dataclass(frozen=True)
class SoftQuantized:
    """What the soft quantiser gives for a batch.

    Attributes:
        vectors: float [B, d], the sum over levels of mixtures of code vectors.
        max_probabilities: float [B, L], the largest weight of each mixture: 1 where training sees a hard code.
    """

    vectors: torch.Tensor
    max_probabilities: torch.Tensor


def soft_quantize(
    latents: torch.Tensor, codebooks: list[torch.Tensor], uniform: torch.Tensor | None, *, temperature: float
) -> SoftQuantized:
    """Residual quantisation by mixtures: p = softmax((-D + g) / T), q = sum_k p_k c_k, and q leaves the residual.

    SimCIT's training pass (Gumbel-softmax; D squared distances). No straight-through: gradients reach latents and all
    codebooks through all levels. As T goes to 0 the mixture becomes the code with the largest -D + g, which without
    noise is the nearest one. The noise is not divided by D's scale: where distances between codes are small against
    1, codes are drawn nearly at random whatever T is.

    Args:
        latents: float [B, d].
        codebooks: L tensors, float [K, d].
        uniform: Draws from [0, 1), float [B, L, K], that become Gumbel noise -log(-log U); None: no noise.
        temperature: T, above 0.
    """
    residual, total, largest = latents, torch.zeros_like(latents), []
    for level, codebook in enumerate(codebooks):
        logits = -squared_distances(residual, codebook)
        if uniform is not None:
            draws = uniform[:, level].clamp(min=torch.finfo(uniform.dtype).tiny)  # a draw of 0 would be infinite
            logits = logits - torch.log(-torch.log(draws))
        probabilities = (logits / temperature).softmax(1)
        vectors = probabilities @ codebook
        total = total + vectors
        residual = residual - vectors
        largest.append(probabilities.detach().amax(1))
    return SoftQuantized(total, torch.stack(largest, 1))


def contrastive_losses(
    quantized: torch.Tensor,
    views: torch.Tensor,
    present: torch.Tensor,
    *,
    temperature: float,
    rows: slice = slice(None),
) -> torch.Tensor:
    """How well quantised vectors find their own items' views, one loss a modality.

    SimCIT: l_i^m = -log exp(s(u_i, v_i^m)/t) / (sum_j exp(s(u_i, v_j^m)/t) + sum_{j != i} exp(s(u_i, u_j)/t)), s the
    cosine, averaged over items. One direction: the quantised vector is always the anchor; negatives are the views
    *and* the quantised vectors of the other items. It is 0 for a batch of one, and log(2 B - 1) where all vectors are
    equal. Masks are ours (the authors' items have all modalities): the loss of modality m is the mean over the items
    that have it, and the views that don't exist are nobody's negatives; quantised vectors exist for every item.

    Args:
        quantized: u, float [B, d]. Needs at least one item; negatives get better with more.
        views: v, float [M, B, d].
        present: bool [M, B].
        temperature: t, above 0. 0.07 in the public config.
        rows: The anchors whose losses are added up: one process's part of the batch. Means are over the whole batch,
            so that the parts of all processes add up to the loss.

    Returns:
        float [M]; 0 for a modality that no item of the batch has.
    """
    quantized = functional.normalize(quantized, dim=1)
    views = functional.normalize(views, dim=2)
    anchors = quantized[rows]
    own = torch.arange(len(quantized), device=quantized.device)[rows]
    # The lowest finite number, not -inf: the gradient of a logsumexp over -inf alone (a batch of one) is NaN.
    among_quantized = (anchors @ quantized.t() / temperature).scatter(
        1, own[:, None], torch.finfo(quantized.dtype).min
    )
    others = among_quantized.logsumexp(1)  # [B_rows], shared by all modalities
    losses = []
    for view, has_view in zip(views, present, strict=True):
        chosen = has_view[rows]
        positive = (anchors * view[rows]).sum(1)[chosen] / temperature
        among_views = (anchors[chosen] @ view[has_view].t() / temperature).logsumexp(1)
        terms = torch.logaddexp(among_views, others[chosen]) - positive
        losses.append(terms.sum() / has_view.sum().clamp(min=1))
    return torch.stack(losses)


def codeword_similarity(codebooks: list[torch.Tensor]) -> torch.Tensor:
    """R: the mean over levels of the mean cosine of all pairs of code vectors (a code with itself too), a scalar.

    Computed as the squared length of the mean unit vector, which it equals, in O(K d) and not O(K^2 d). So it takes
    away the direction that the codes of a level have in common (R is about 0.75 at the uniform start) and no more: it
    is 0 for two opposite bundles of equal codes, and doesn't prevent collapse. What spreads codes is the contrast
    between quantised vectors. 1 where all codes of a level point the same way; 0 is the least.

    Args:
        codebooks: L tensors, float [K, d].
    """
    means = [functional.normalize(codebook, dim=1).mean(0) for codebook in codebooks]
    return torch.stack(means).square().sum(1).mean()


class SimCITTokenizer(TrainedTokenizer):
    """Item tokenizer that learns SimCIT on any number of modalities, under any names.

    It is meant for two modalities or more. With a single one there is nothing to fuse (attention is 1) and nothing
    to align: what is left is that an item's quantised vector finds its own vector before quantisation among those of
    others, and that is fitted without complaint.

    Items may lack modalities (`ItemEmbeddings.present`): attention leaves them out, and the loss too. What all new
    items lack, as a collaborative vector, needn't be passed to `encode`; every item needs one modality at least.

    Example:
        >>> modalities = {"text": text, "image": images, "collaborative": sasrec}  # doctest: +SKIP
        >>> tokenizer = SimCITTokenizer().fit(modalities)  # doctest: +SKIP
        >>> semantic_ids = tokenizer.encode({"text": new_text, "image": new_images})  # doctest: +SKIP
    """

    config_class: ClassVar[type] = SimCITConfig
    modalities: ClassVar[tuple[str, ...]] = ()
    encode_modalities: ClassVar[tuple[str, ...]] = ()
    config: Any
    _temperature: float = math.nan

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level, length L."""
        return (self.config.codebook_size,) * self.config.num_codebooks

    def new_module(self, widths: dict[str, int]) -> SimCIT:
        """See `TrainedTokenizer`."""
        return SimCIT(widths, self.config)

    def codebooks(self, module: SimCIT) -> list[torch.Tensor]:
        """See `TrainedTokenizer`."""
        return list(module.quantizer.codebooks)

    def latents(self, module: SimCIT, items: ItemBatch) -> torch.Tensor:
        """The fused vectors, float [B, d]."""
        latents: torch.Tensor = module(items).latents
        return latents

    def start_epoch(self, module: SimCIT, epoch: int) -> None:
        """Sets the temperature of the soft quantiser."""
        self._temperature = self.config.temperature_at(epoch)

    def batch_losses(self, module: SimCIT, batch: TrainBatch) -> dict[str, torch.Tensor]:
        """A contrastive loss a modality, over the whole batch of all processes, and the codewords' similarity.

        Vectors are gathered from all processes with their gradients, so that everything in the batch is a negative
        (the authors' negatives stay within a process: 256 of their 512).
        """
        config = self.config
        fused = module(batch.items)
        uniform = batch.uniform(config.num_codebooks, config.codebook_size)
        soft = soft_quantize(fused.latents, self.codebooks(module), uniform, temperature=self._temperature)
        projected = module.projection(torch.cat([soft.vectors[None], fused.views]))  # [1 + M, B_i, d]
        whole = batch.processes.gather_rows(projected.transpose(0, 1))  # [B, 1 + M, d]
        losses = contrastive_losses(
            whole[:, 0],
            whole[:, 1:].transpose(0, 1),
            batch.processes.gather_rows(fused.present.t().long()).t().bool(),
            temperature=config.contrastive_temperature,
            rows=batch.processes.part(batch.size),
        )
        named = {f"contrastive_{name}": loss for name, loss in zip(module.encoders, losses, strict=True)}
        if config.codeword_weight > 0:
            share = len(batch.items) / batch.size
            named["codewords"] = config.codeword_weight * share * codeword_similarity(self.codebooks(module))
        return named

    def start(self, module: SimCIT, vectors: ItemVectors, processes: Processes) -> None:
        """Sets the scaling of inputs, and the codebooks where they start from data."""
        config = self.config
        if config.standardize:
            for name in module.encoders:
                encoder: Any = module.encoders[name]
                mean, scale = mean_and_scale(vectors, name, processes)
                encoder.input_mean.copy_(mean)
                encoder.input_scale.fill_(scale)
        if config.initialisation == "kmeans" and processes.is_main:
            draws = seeded(config.seed, 0, 0)[1]
            rows = sample_rows(len(vectors), config.initialisation_items, draws)
            module.quantizer.initialise(self._latents_of(module, vectors, rows), "kmeans", draws)
        module.quantizer.load_state_dict(processes.broadcast(module.quantizer.state_dict()))

    @torch.no_grad()
    def measurements(self, module: SimCIT, vectors: ItemVectors, processes: Processes) -> dict[str, float]:
        """How far training is from what is exported, on 4,096 items that are always the same.

        Returns:
            "max_probability_1" to "_L": the mean largest weight of a level's mixtures, with noise, as training sees
            them: near 1 they are codes, near 1 / K the mean of the codebook. "soft_hard_cosine": the mean cosine of an
            item's mixtures and its nearest codes, each added over levels.
        """
        noise, draws = seeded(self.config.seed, 0, 4)
        latents = self._latents_of(module, vectors, sample_rows(len(vectors), MEASURED_ITEMS, draws))
        codebooks = self.codebooks(module)
        uniform = torch.rand(len(latents), len(codebooks), self.config.codebook_size, generator=noise)
        soft = soft_quantize(latents, codebooks, uniform.to(latents.device), temperature=self._temperature)
        codes = residual_codes(latents, codebooks)
        hard = torch.stack([codebook[level] for codebook, level in zip(codebooks, codes.t(), strict=True)]).sum(0)
        means = soft.max_probabilities.mean(0).tolist()
        figures = {f"max_probability_{level}": value for level, value in enumerate(means, start=1)}
        return figures | {"soft_hard_cosine": functional.cosine_similarity(soft.vectors, hard).mean().item()}

    def _modalities_to_fit(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings]
    ) -> Mapping[str, ItemEmbeddings]:
        embeddings = {"text": embeddings} if isinstance(embeddings, ItemEmbeddings) else embeddings
        if not embeddings:
            raise DataError(
                f"{type(self).__name__} was given no modality: pass {{'text': ..., 'collaborative': ...}}, two or more"
            )
        taken = dir(nn.ModuleDict())
        wrong = [name for name in embeddings if not name.isidentifier() or name in taken]
        if wrong:
            raise DataError(
                f"{wrong[0]!r} can't name a modality: names become parts of the names of saved weights, so use"
                " letters, digits and underscores, and none of PyTorch's own words such as 'type' or 'values'"
            )
        return {name: embeddings[name] for name in sorted(embeddings)}

    def _modalities_to_encode(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings]
    ) -> Mapping[str, ItemEmbeddings]:
        if isinstance(embeddings, ItemEmbeddings):
            embeddings = {next(iter(self.widths)) if len(self.widths) == 1 else "text": embeddings}
        found = {name: embeddings[name] for name in self.widths if name in embeddings}
        known = ", ".join(self.widths)
        if not found:
            raise DataError(
                f"{type(self).__name__} needs at least one of the modalities that it was fitted with;"
                f" {known} is missing"
            )
        unknown = [name for name in embeddings if name not in found]
        if unknown:
            raise DataError(
                f"this {type(self).__name__} was fitted with {known}; {', '.join(unknown)} is none of them: what is"
                " passed under another name wouldn't be looked at, so rename it or leave it out"
            )
        return found

    def check(self, vectors: ItemVectors) -> None:
        """Every item needs a modality at least."""
        _check_every_item_has_a_modality(vectors)

    def _quantize(self, vectors: ItemVectors, processes: Processes) -> tuple[np.ndarray, CodeGeometry]:
        _check_every_item_has_a_modality(vectors)
        return super()._quantize(vectors, processes)


def _check_every_item_has_a_modality(vectors: ItemVectors) -> None:
    if any(name not in vectors.present for name in vectors.arrays):
        return
    bare = np.flatnonzero(~np.any(list(vectors.present.values()), axis=0))
    if len(bare):
        raise DataError(
            f"{len(bare)} item(s) have none of the modalities {', '.join(vectors.arrays)}; first item"
            f" {vectors.item_ids[bare[0]]!r} (row {bare[0]}): leave them out, or add a modality that they have"
        )
