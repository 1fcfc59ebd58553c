"""The item tokenizer's half of joint training: its epochs, while the recommender is frozen, and what it is for both.

An epoch minimises L_SQ + mu L_SIA + lambda L_PSA (ETEGRec, arXiv 2409.05546, equation 11). L_SQ is whatever the item
tokenizer minimises when it is fitted alone: the RQ-VAE's losses in the paper.

The released code goes through all training sequences, runs the recommender on each, and quantises the batch's targets:
an item learns as often as it is a target, and one that never is learns nothing. Here an epoch goes through the
catalogue: every item learns once a pass, with the states of one sequence that led to it, drawn anew each epoch. Items
without a sequence learn by L_SQ alone. The frozen recommender reads only as many samples as hold all items, once,
which is what makes such an epoch cheap.

This module knows an item tokenizer, and states as tables. It knows no language model.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError
from llmrec.item_tokenizers.base import QuantizedItems
from llmrec.item_tokenizers.fit_loop import TrainBatch, load_optimizer_tensors, optimizer_tensors, seeded
from llmrec.item_tokenizers.item_vectors import ItemVectors
from llmrec.item_tokenizers.trained import TrainedTokenizer
from llmrec.processes import Processes
from llmrec.training.alignment import preference_semantic_losses, sequence_item_losses
from llmrec.training.item_states import ItemStates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlignmentSettings:
    """How strongly, and in which form, tokenizer and recommender are aligned; see `JointArguments`.

    Attributes:
        sia_weight: mu.
        psa_weight: lambda.
        psa_temperature: Of preference-semantic alignment.
        recursion: See `alignment.code_log_probabilities`.
        distance_sign: Likewise.
    """

    sia_weight: float = 3e-4
    psa_weight: float = 1e-4
    psa_temperature: float = 0.07
    recursion: str = "codebook"
    distance_sign: str = "negative"


@dataclass(frozen=True)
class TokenizerTraining:
    """Settings of the item tokenizer's optimiser.

    Attributes:
        learning_rate: Of AdamW, the highest; down to 0 as a cosine over all its steps, without warm-up, for the item
            tokenizer was trained before.
        weight_decay: Of AdamW, on codebooks too.
        batch_size: Items of a step, over all processes.
        passes: Passes over the catalogue in an epoch.
        max_grad_norm: The gradient is cut to this norm; 0: never.
        seed: Of all draws.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    batch_size: int = 512
    passes: int = 1
    max_grad_norm: float = 1.0
    seed: int = 0


class JointTokenizer:
    """An item tokenizer that goes on learning beside a recommender.

    Several processes have one each, with the same weights: they divide every batch, and add their gradients.

    Args:
        tokenizer: Fitted; trained in place. See `trainable_tokenizer` for those without a network.
        embeddings: What it was fitted on, by modality, of the whole catalogue.
        settings: Of the optimiser.
        alignment: Weights and forms of the alignments.
        processes: Who trains.

    Attributes:
        module: The network, on the device of the processes.
        epochs_done: Epochs so far.
        steps_done: Steps of its optimiser so far.
        total_steps: Those of the whole run, over which the learning rate falls; of one epoch until it is set.
    """

    def __init__(
        self,
        tokenizer: TrainedTokenizer,
        embeddings: Mapping[str, ItemEmbeddings],
        settings: TokenizerTraining,
        alignment: AlignmentSettings,
        processes: Processes,
    ):
        self.tokenizer = tokenizer
        self.embeddings = embeddings
        self.settings = settings
        self.alignment = alignment
        self.processes = processes
        self.vectors = ItemVectors.of(tokenizer._modalities_to_fit(embeddings))
        tokenizer.check(self.vectors)
        self.module: Any = tokenizer.module.to(processes.device)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.optimizer.zero_grad(set_to_none=True)  # a fit in this process leaves those of its last step
        self.epochs_done = 0
        self.steps_done = 0
        self.total_steps = self.steps_per_epoch

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def code_width(self) -> int:
        """d, width of latents and code vectors."""
        return int(self.tokenizer.codebooks(self.module)[0].shape[1])

    @property
    def item_width(self) -> int:
        """D, width of reconstructions."""
        return self.tokenizer.restored_width(self.module)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch in which it learns alone."""
        return self.settings.passes * -(-len(self.vectors) // self.settings.batch_size)

    def quantize(self) -> QuantizedItems:
        """The codes of the whole catalogue as it stands, before any uniqueness policy; on all processes."""
        self.module.eval()
        found = self.tokenizer.quantize_catalogue(self.embeddings, processes=self.processes)
        self.module.to(self.processes.device)  # `quantize` leaves it on the CPU
        return found

    # Losses

    def own_losses(self, rows: np.ndarray, generator: torch.Generator) -> dict[str, Tensor]:
        """L_SQ: the terms that the item tokenizer minimises when it is fitted alone, this process's share of each.

        Args:
            rows: Items of the whole batch, int64 [B]; this process takes its part of them.
            generator: In the same state on all processes.
        """
        own = rows[self.processes.part(len(rows))]
        items = self.vectors.rows(own, self.processes.device)
        return self.tokenizer.batch_losses(self.module, TrainBatch(items, len(rows), self.processes, generator))

    def alignment_losses(
        self, rows: np.ndarray, summaries: Tensor, preferences: Tensor, *, frozen: bool
    ) -> tuple[Tensor, Tensor]:
        """SIA and PSA of some items, unweighted scalars: this process's share of the means over the items.

        Args:
            rows: Different items, int64 [n], the same on all processes; this one takes its part of them as anchors.
            summaries: [n, d], projected, of all of them.
            preferences: [n, D], likewise.
            frozen: Whether the item tokenizer is (the recommender learns): nothing of it gets a gradient then.
        """
        part = self.processes.part(len(rows))
        if frozen:
            with torch.no_grad():
                whole = self.tokenizer.aligned_vectors(self.module, self._items(rows))
            latents, restored = whole.latents[part], whole.restored
            codebooks = [codebook.detach() for codebook in self.tokenizer.codebooks(self.module)]
        else:
            own = self.tokenizer.aligned_vectors(self.module, self._items(rows[part]))
            latents, restored = own.latents, self.processes.gather_rows(own.restored)
            codebooks = list(self.tokenizer.codebooks(self.module))
        of_pairs = sequence_item_losses(
            summaries[part],
            latents,
            codebooks,
            recursion=self.alignment.recursion,
            distance_sign=self.alignment.distance_sign,
        )
        contrast = preference_semantic_losses(
            preferences, restored, temperature=self.alignment.psa_temperature, rows=part
        )
        count = max(len(rows), 1)
        return of_pairs.sum() / count, contrast.sum() / count

    def _items(self, rows: np.ndarray) -> Any:
        return self.vectors.rows(rows, self.processes.device)

    # An epoch of its own

    def train_epoch(self, states: ItemStates | None) -> dict[str, float]:
        """Goes through the catalogue while the recommender is frozen.

        Args:
            states: Of the recommender; None: nothing is aligned.

        Returns:
            Means over the items of each loss term by name, unweighted "sia" and "psa" among them.

        Raises:
            DataError: The loss became infinite or no number.
        """
        self.start_epoch()
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def count(losses: Mapping[str, Tensor], items: int) -> None:
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + loss.detach() * items
                counts[name] = counts.get(name, 0) + items

        for number in range(self.settings.passes):
            draws, order = seeded(self.settings.seed, self.epochs_done, number)
            shuffled = order.permutation(len(self.vectors))
            for first in range(0, len(shuffled), self.settings.batch_size):
                rows = shuffled[first : first + self.settings.batch_size]
                losses = self.own_losses(rows, draws)
                total = torch.stack(list(losses.values())).sum()
                count(losses, len(rows))
                known = rows[:0] if states is None else rows[states.known[torch.from_numpy(rows)].numpy()]
                if states is not None and len(known):
                    of_known = torch.from_numpy(known)
                    summaries, preferences = (
                        table[of_known].to(self.processes.device) for table in (states.summaries, states.preferences)
                    )
                    sia, psa = self.alignment_losses(known, summaries, preferences, frozen=False)
                    total = total + self.alignment.sia_weight * sia + self.alignment.psa_weight * psa
                    count({"sia": sia, "psa": psa}, len(known))
                self.optimizer.zero_grad(set_to_none=True)
                total.backward()
                self.step()
        self.epochs_done += 1
        found = {name: float(self.processes.sum(total)) / counts[name] for name, total in sums.items()}
        if not all(np.isfinite(value) for value in found.values()):
            raise DataError(
                f"the item tokenizer's losses became {found} in its epoch {self.epochs_done}: lower"
                " tokenizer_learning_rate"
            )
        return found

    def start_epoch(self) -> None:
        """Puts the network into training mode, and lets the method refresh what it refreshes before an epoch."""
        self.module.train()
        self.tokenizer.start_epoch(self.module, self.epochs_done)

    def step(self, *, gradients_of: int = 1) -> None:
        """Adds the gradients of all processes, cuts them to the greatest norm, and steps.

        Args:
            gradients_of: What the gradients are too large by: the Trainer multiplies the losses of several processes.
        """
        self.processes.sum_gradients(self.module)
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        if gradients_of != 1:
            for parameter in parameters:
                parameter.grad = None if parameter.grad is None else parameter.grad / gradients_of
        if self.settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1

    def _learning_rate(self) -> float:
        share = min(self.steps_done / max(self.total_steps, 1), 1.0)
        return self.settings.learning_rate * (1 + math.cos(math.pi * share)) / 2

    # What a checkpoint holds

    def state(self) -> dict[str, Tensor]:
        """Weights and optimiser, on the CPU, by name."""
        tensors = {f"module.{name}": tensor for name, tensor in self.module.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer, "optimizer.")
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave.

        Raises:
            DataError: A weight is missing, or another's: the released code of ETEGRec loads such a file without a
                word, and starts from random weights.
        """
        weights = {name.removeprefix("module."): tensor for name, tensor in tensors.items() if name[:7] == "module."}
        try:
            self.module.load_state_dict(weights)
        except RuntimeError as error:
            raise DataError(f"the checkpoint is of another item tokenizer: {error}") from error
        moments = {name[10:]: tensor for name, tensor in tensors.items() if name[:10] == "optimizer."}
        load_optimizer_tensors(self.optimizer, moments)


def encoding_figures(quantized: QuantizedItems, before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """What an encoding of all items did, JSON values by name.

    Args:
        quantized: The codes before any uniqueness policy.
        before: Codes that the items had, int [N, L].
        after: Codes that they have now, int [N, L].

    Returns:
        "share_changed" of the items with other codes than before; of the codes before the policy "collision_rate",
        "largest_group" (items) and "utilisation", the share of its codes that each level uses.
    """
    codes = quantized.semantic_ids
    return {
        "share_changed": float((before != after).any(axis=1).mean()),
        "collision_rate": codes.collision_rate,
        "largest_group": int(codes.group_sizes().max()),
        "utilisation": [
            len(np.unique(of_level)) / size for of_level, size in zip(codes.codes.T, codes.codebook_sizes, strict=True)
        ],
    }
