"""Searches recorded as CUDA graphs: one launch for a whole search, from the prompts to the leaves.

With few requests a GPU waits for the host, which has hundreds of small operations to launch a forward. A search reads
nothing back from the device and its shapes follow from the batch alone, so it can be recorded once for a shape and
replayed on other prompts. Prompts are padded to a multiple of some length, and batches to a power of two, so that few
shapes come up. Without CUDA the recorded function is simply run again, on the same buffers.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from llmrec.errors import SettingsError
from llmrec.generation.beam_search import BeamSearchOutput, check_search, search_tree
from llmrec.generation.item_sets import LeafSubset
from llmrec.generation.packing import PackedPrompts, pad_prompts
from llmrec.generation.selection import Best
from llmrec.generation.tree_models import why_no_tree
from llmrec.generation.trie import ItemTrie
from llmrec.vocabulary import CodeVocabulary

_DENIED_STEP = 64
_WARM_UPS = 2  # before recording: kernels are chosen and workspaces allocated in the first runs


class GraphedSearch:
    """A beam search that is recorded for each shape of its input, and replayed from then on.

    The answers are those of `beam_search` with the same arguments. Each shape keeps the memory of a search. The
    model's weights are read where they were when a shape was recorded: they may change in place, but not move.

    Args:
        model: On the device to search on, in evaluation mode.
        trie: On the same device.
        vocabulary: Token IDs of the codes.
        num_beams: K.
        scope: Over what a code's probability is normalised, see `beam_search`.
        length_step: Prompts are padded to a multiple of this many tokens.

    Raises:
        SettingsError: The model can't take a tree of beams, or `num_beams` or `length_step` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        trie: ItemTrie,
        vocabulary: CodeVocabulary,
        *,
        num_beams: int,
        scope: str = "vocabulary",
        length_step: int = 64,
    ):
        if num_beams < 1 or length_step < 1:
            raise SettingsError(f"num_beams is {num_beams}, length_step is {length_step}; both must be at least 1")
        reason = why_no_tree(model, vocabulary)
        if reason is not None:
            raise SettingsError(f"a search can't be recorded with this model: {reason}")
        self.model, self.trie, self.vocabulary = model, trie, vocabulary
        self.num_beams, self.scope, self.length_step = num_beams, scope, length_step
        self._recorded: dict[tuple[Any, ...], _Recording] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], subset: LeafSubset | None = None) -> BeamSearchOutput:
        """Searches; records first where no batch of this shape came before.

        Args:
            prompts: B lists of token IDs.
            subset: What each request may be answered with, on the device of the model.

        Returns:
            Leaves and scores [B, K].
        """
        check_search(prompts, self.trie, self.vocabulary, self.scope)
        batch = 1 << (len(prompts) - 1).bit_length()
        filled = [*prompts, *[prompts[-1]] * (batch - len(prompts))]
        step = self.length_step
        packed = pad_prompts(filled, length=-(-max(map(len, prompts)) // step) * step)
        subset = None if subset is None else _padded_subset(subset, batch)
        shape = (packed.is_plain, *(None if part is None else part.shape for part in _parts(packed, subset)))
        if shape not in self._recorded:
            self._recorded[shape] = _Recording(self._search, packed.to(self.trie.device), subset)
        leaves, scores = self._recorded[shape](packed, subset)
        leaves = leaves.masked_fill(scores.isneginf(), -1)
        missing = (0, self.num_beams - leaves.shape[1])
        return BeamSearchOutput(
            nn.functional.pad(leaves, missing, value=-1)[: len(prompts)],
            nn.functional.pad(scores, missing, value=-torch.inf)[: len(prompts)],
        )

    def _search(self, prompts: PackedPrompts, subset: LeafSubset | None) -> tuple[Tensor, Tensor]:
        chooses = Best(self.num_beams)
        return search_tree(self.model, prompts, self.trie, self.vocabulary, chooses, self.scope, subset)


class _Recording:
    """A search on buffers of its own."""

    def __init__(
        self,
        search: Callable[[PackedPrompts, LeafSubset | None], tuple[Tensor, Tensor]],
        prompts: PackedPrompts,
        subset: LeafSubset | None,
    ):
        self._prompts, self._subset = copy.deepcopy(prompts), copy.deepcopy(subset)
        self._run = lambda: search(self._prompts, self._subset)
        self._graph: torch.cuda.CUDAGraph | None = None
        if prompts.device.type != "cuda":
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._run()

    def __call__(self, prompts: PackedPrompts, subset: LeafSubset | None) -> tuple[Tensor, Tensor]:
        for buffer, part in zip(_parts(self._prompts, self._subset), _parts(prompts, subset), strict=True):
            if buffer is not None and part is not None:
                buffer.copy_(part)
        if self._graph is None:
            return self._run()
        self._graph.replay()
        leaves, scores = self._output
        return leaves.clone(), scores.clone()


def _parts(prompts: PackedPrompts, subset: LeafSubset | None) -> list[Tensor | None]:
    """All tensors of a search's input."""
    parts = [getattr(prompts, entry.name) for entry in fields(prompts) if entry.name != "is_plain"]
    return parts if subset is None else [*parts, subset.allowed, subset.set_of_request, subset.denied]


def _padded_subset(subset: LeafSubset, num_requests: int) -> LeafSubset:
    """A subset of that many requests, the last ones like the last, with its denied leaves padded to a few widths."""

    def stretched(part: Tensor | None) -> Tensor | None:
        return None if part is None else torch.cat([part, part[-1:].expand(num_requests - len(part), *part.shape[1:])])

    denied = stretched(subset.denied)
    if denied is not None:
        width = -(-denied.shape[1] // _DENIED_STEP) * _DENIED_STEP
        denied = nn.functional.pad(denied, (0, width - denied.shape[1]), value=torch.iinfo(denied.dtype).max)
    return LeafSubset(subset.allowed, stretched(subset.set_of_request), denied)
