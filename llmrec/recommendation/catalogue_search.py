"""Searches and scores a catalogue with a model, batch after batch, one search of a model at a time.

Joins requests, filters and settings with the functions of `generation/`. Knows nothing of folders.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from llmrec.data.recommendation import Recommendation
from llmrec.errors import DataError, SettingsError
from llmrec.generation.beam_search import beam_search, check_scope
from llmrec.generation.scoring import score_leaves
from llmrec.processes import device_of, is_sharded
from llmrec.recommendation.catalogue import Catalogue
from llmrec.recommendation.item_filters import ItemFilters
from llmrec.recommendation.request_batches import in_batches
from llmrec.recommendation.search_settings import SearchSettings
from llmrec.vocabulary import CodeVocabulary


class CatalogueSearch:
    """One call's search.

    Args:
        model: Knows the code tokens; in any mode.
        vocabulary: Token IDs of the codes.
        scope: Over what scores are normalised.
        catalogue: What is searched, to the end of the call.
        prompts: Token IDs of B requests, none empty.

    Raises:
        SettingsError: An unknown scope.
    """

    def __init__(
        self,
        model: Any,
        vocabulary: CodeVocabulary,
        scope: str,
        catalogue: Catalogue,
        prompts: Sequence[Sequence[int]],
    ):
        check_scope(scope)
        self.model = model
        self.vocabulary = vocabulary
        self.scope = scope
        self.catalogue = catalogue
        self.prompts = prompts

    def find(
        self,
        settings: SearchSettings,
        filters: ItemFilters,
        histories: Sequence[Sequence[str]],
        *,
        batch_size: int,
        progress: bool | None,
    ) -> list[list[Recommendation]]:
        """The items that each request is answered with.

        Args:
            settings: What is searched for.
            filters: What each request may be answered with.
            histories: Item IDs of each request; its seed comes from them.
            batch_size: Requests at once.
            progress: See `in_batches`.

        Raises:
            DataError: The model computes NaN.
            SettingsError: A single request doesn't fit into memory.
        """
        seeds = [settings.seed_of(history) for history in histories]

        def answer(batch: list[int]) -> list[list[Recommendation]]:
            with one_at_a_time(self.model):
                found = beam_search(
                    self.model,
                    [self.prompts[request] for request in batch],
                    self.catalogue.trie_on(device_of(self.model)),
                    self.vocabulary,
                    num_beams=settings.width(self.catalogue.trie.num_leaves),
                    scope=self.scope,
                    subset=filters.subset(batch),
                    sampling=settings.sampling([seeds[request] for request in batch]),
                    diversity=settings.diversity,
                )
                leaves, scores = found.leaves.cpu().numpy(), found.scores.cpu().numpy()
            answers = []
            for request, of_request, with_scores in zip(batch, leaves, _checked(scores), strict=True):
                items = filters.answer(request, of_request, with_scores, settings.num_wanted)
                answers.append(settings.choose(items, seeds[request]))
            return answers

        return in_batches(
            answer,
            [len(prompt) for prompt in self.prompts],
            batch_size=batch_size,
            description="recommend",
            progress=progress,
            together=is_sharded(self.model),
        )

    def score(self, rows: Sequence[np.ndarray], *, batch_size: int, progress: bool | None) -> list[list[float]]:
        """The score of each of the given items.

        Args:
            rows: Catalogue rows that each request asks for, int64; -1 gets minus infinity.
            batch_size: Requests at once.
            progress: See `in_batches`.

        Raises:
            DataError: The model computes NaN.
            SettingsError: A single request doesn't fit into memory, or the model is sharded over processes: the number
                of forwards depends on the items asked for.
        """
        if is_sharded(self.model):
            raise SettingsError(
                "the model is sharded over processes (ZeRO-3, FSDP or tensor parallel), which scores can't be computed"
                " with: load the whole recommender, with Recommender.from_pretrained(..., device=...)"
            )
        leaf_of_item = self.catalogue.trie.leaf_of_item.numpy()

        def answer(batch: list[int]) -> list[list[float]]:
            known = [rows[request] >= 0 for request in batch]
            with one_at_a_time(self.model):
                found = score_leaves(
                    self.model,
                    [self.prompts[request] for request in batch],
                    [
                        leaf_of_item[rows[request][of_request]]
                        for request, of_request in zip(batch, known, strict=True)
                    ],
                    self.catalogue.trie_on(device_of(self.model)),
                    self.vocabulary,
                    scope=self.scope,
                )
            answers = []
            for of_request, scores in zip(known, found, strict=True):
                with_unknown = np.full(len(of_request), -np.inf, dtype=np.float32)
                with_unknown[of_request] = _checked(scores)
                answers.append(with_unknown.tolist())
            return answers

        lengths = [len(prompt) for prompt in self.prompts]
        return in_batches(answer, lengths, batch_size=batch_size, description="score", progress=progress)


def _checked(scores: np.ndarray) -> np.ndarray:
    if np.isnan(scores).any():
        raise DataError("the model computes NaN: its weights are damaged, or its type overflows; try dtype=float32")
    return scores


# Beside the models, not on them: a model with a lock can't be copied.
_locks: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_making_locks = threading.Lock()


@contextmanager
def one_at_a_time(model: nn.Module) -> Iterator[None]:
    """Within the block no other thread searches with the model, which is in evaluation mode.

    A search sets modes of the model's head, so two at once would read each other's.
    """
    with _making_locks:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        was_training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
