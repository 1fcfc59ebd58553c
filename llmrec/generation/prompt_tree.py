"""The prompts of several requests, and the tree of codes that a search writes after each of them.

Hugging Face's `generate` copies the prompt, with its keys and values, once per beam. Here the prompt of a request is
read once; then all beams of a level are fed as one short query, and a 4-D mask lets each beam see the prompt and its
own ancestors. Keys and values stand in slots that are allocated once, and are never copied or reordered; those of
the last level that is written are not kept, because nothing comes after it.

Shapes depend on the prompts and on the number of beams alone, and nothing is read back from the device: a decode can
be captured in a CUDA graph (`graphs.py`). This module knows models, slots and masks. It knows nothing of items.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from llmrec.generation.grouped_attention import grouped_attention
from llmrec.generation.head import SearchHead, level_columns, search_head
from llmrec.generation.packing import PackedPrompts
from llmrec.vocabulary import CodeVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Slots:
    """What all layers of a cache share.

    Attributes:
        prompts: Where the prompts' tokens are in the rows of the first forward.
        count: Slots of each request: P for its prompt, then those of the levels.
        filled: How many hold keys, P after the first forward; 0 before.
        keep: Whether the next forward's keys get slots of their own.
    """

    prompts: PackedPrompts
    count: int
    filled: int = 0
    keep: bool = True


class _TreeLayer(CacheLayerMixin):
    """Keys and values of one layer, each [B, H, slots, D]."""

    is_sliding = False  # windows are in the masks: nothing may be dropped
    is_compileable = True

    def __init__(self, slots: _Slots):
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates all slots; those after the prompts are written before anything sees them."""
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (self.slots.prompts.num_requests, states.shape[1], self.slots.count, states.shape[3])
            setattr(self, name, states.new_empty(shape))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of a forward, and gives those that its queries are compared with."""
        slots = self.slots
        if not self.is_initialized:  # rows of prompts: each sees its own row, and every request keeps its own part
            self.lazy_initialization(key_states, value_states)
            for kept, states in ((self.keys, key_states), (self.values, value_states)):
                cast(Tensor, kept)[:, :, : slots.prompts.longest] = _by_request(states, slots.prompts)
            return key_states, value_states
        keys, values = cast(Tensor, self.keys), cast(Tensor, self.values)
        end = slots.filled + key_states.shape[2]
        if not slots.keep:
            before = slice(slots.filled)
            return torch.cat([keys[:, :, before], key_states], 2), torch.cat([values[:, :, before], value_states], 2)
        keys[:, :, slots.filled : end] = key_states
        values[:, :, slots.filled : end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys and their offset."""
        return self.slots.filled + query_length, 0

    def get_seq_length(self) -> int:
        """Filled slots."""
        return self.slots.filled

    def get_max_length(self) -> int:
        """All slots."""
        return self.slots.count

    def get_max_cache_shape(self) -> int:
        """The same, as transformers up to 5.20 calls it."""
        return self.slots.count


def _by_request(states: Tensor, prompts: PackedPrompts) -> Tensor:
    """Keys or values [B, H, P, D] of each prompt, out of those of the rows, [R, H, W, D]."""
    if prompts.is_plain:
        return states
    return states[prompts.rows, :, prompts.columns].transpose(1, 2)


class PromptTree:
    """The prompts, read once, and the levels of codes that were written after them so far.

    Made by `prompt_tree`. Each call gives the scores of the codes that may come next: float32 [B, K, C] for B
    requests, K nodes each and the C codes of the level: log-probabilities over the vocabulary in the scope
    "vocabulary", and logits in the others.
    """

    def __init__(
        self,
        model: Any,
        head: SearchHead,
        prompts: PackedPrompts,
        vocabulary: CodeVocabulary,
        scope: str,
        num_slots: int,
    ):
        self.prompts = prompts
        self.vocabulary = vocabulary
        self._model = model
        self._head = head
        self._windows = layer_windows(model.config.get_text_config())
        self._dtype = _compute_dtype(model, prompts.device)
        self._over_vocabulary = scope == "vocabulary"
        self._head_normalises = self._over_vocabulary
        self._slots = _Slots(prompts, prompts.longest + num_slots)
        self._cache = Cache(layer_class_to_replicate=partial(_TreeLayer, self._slots))  # type: ignore[arg-type]
        self.rewind()

    def read_prompts(self) -> Tensor:
        """Reads the prompts; scores [B, 1, C] of the first level's codes."""
        prompts, head = self.prompts, self._head
        mask = None  # the model's own causal mask, and its fastest kernels
        if not prompts.is_plain:
            mask = self._masks({window: prompts.visible(window) for window in self._windows.values()})
        head.tokens_wanted = prompts.last()
        logits = self._forward(prompts.input_ids, mask, prompts.positions)  # [B, V]
        head.tokens_wanted = None
        # Models that scale or cap their logits after the head normalise over other logits than the head sees.
        self._head_normalises = self._over_vocabulary and logits.data_ptr() == head.last_output.data_ptr()
        self._slots.filled = prompts.longest
        return self._level_scores(logits, 0).unsqueeze(1)

    def rewind(self) -> None:
        """Forgets all codes, so that others can be written after the prompts."""
        prompts = self.prompts
        self._slots.filled = 0 if self._slots.filled == 0 else prompts.longest
        self._visible = prompts.present().unsqueeze(1)  # [B, K, S]: which slots each node sees
        places = torch.arange(prompts.longest, device=prompts.device)
        self._positions = places.expand(prompts.num_requests, -1)  # [B, S]: place in the sequence of each slot's token

    def write(self, level: int, codes: Tensor, parents: Tensor, *, is_last: bool = False) -> Tensor:
        """Writes codes of one level, each after a node of the level before.

        Args:
            level: 0 for codes right after the prompts.
            codes: int64 [B, K].
            parents: int64 [B, K]: after which node of the last call each is written; zeros in level 0.
            is_last: Nothing will be written after these.

        Returns:
            Scores [B, K, C] of the codes of level + 1.
        """
        num_nodes = codes.shape[1]
        ancestors = self._visible.gather(1, parents.unsqueeze(2).expand(-1, -1, self._visible.shape[2]))
        itself = torch.eye(num_nodes, dtype=torch.bool, device=codes.device).expand(len(codes), -1, -1)
        self._visible = torch.cat([ancestors, itself], dim=2)
        positions = (self.prompts.lengths + level).unsqueeze(1).expand(-1, num_nodes)
        self._positions = torch.cat([self._positions, positions], dim=1)
        masks = self._masks({window: self._visible_within(window, positions) for window in self._windows.values()})

        self._slots.keep = not is_last
        whole = self._over_vocabulary and not self._head_normalises
        self._head.level_columns = None if whole else level_columns(self.vocabulary, level + 1)
        self._head.over_vocabulary = self._head_normalises
        logits = self._forward(codes + level_columns(self.vocabulary, level)[0], masks, positions)
        self._head.level_columns = None
        self._slots.filled += num_nodes
        return self._level_scores(logits, level + 1) if whole else logits.float()

    def _level_scores(self, logits: Tensor, level: int) -> Tensor:
        """Scores [..., C] of a level's codes from the logits [..., V] of the whole vocabulary."""
        start, end = level_columns(self.vocabulary, level)
        scores = logits[..., start:end].float()
        return scores - logits.float().logsumexp(dim=-1, keepdim=True) if self._over_vocabulary else scores

    def _visible_within(self, window: int | None, positions: Tensor) -> Tensor:
        if window is None:
            return self._visible
        return self._visible & (positions.unsqueeze(2) - self._positions.unsqueeze(1) < window)

    def _masks(self, visible: dict[int | None, Tensor]) -> Any:
        """What the model takes for the slots that are visible with each window: one mask, or one a layer type."""
        masks = {window: _additive_mask(slots, self._dtype) for window, slots in visible.items()}
        if len(self._windows) == 1:
            return next(iter(masks.values()))
        return {layer_type: masks[window] for layer_type, window in self._windows.items()}

    def _forward(self, input_ids: Tensor, mask: Any, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return cast(Tensor, output.logits)


@contextmanager
def prompt_tree(
    model: nn.Module, prompts: PackedPrompts, vocabulary: CodeVocabulary, *, scope: str, num_slots: int
) -> Iterator[PromptTree]:
    """A tree for some prompts; within the block the model's head belongs to it.

    Args:
        model: One that `why_no_tree` has nothing against.
        prompts: On the model's device.
        vocabulary: Token IDs of the codes.
        scope: "vocabulary", "codes" or "trie".
        num_slots: Nodes that will be written after each prompt, those of the last call to `write` left out.
    """
    with search_head(model) as head, grouped_attention(cast(Any, model).config.get_text_config()):
        yield PromptTree(model, head, prompts, vocabulary, scope, num_slots)


def layer_windows(config: Any) -> dict[str, int | None]:
    """How many tokens the layers of each type look back over; None: all of them.

    Args:
        config: Of a model whose layers are all of type "full_attention" or "sliding_attention".
    """
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return {"full_attention": None} if window is None else {"sliding_attention": window}
    return {name: window if name == "sliding_attention" else None for name in sorted(set(layer_types))}


def _additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, K, S] of 0 and the type's smallest number: eager attention adds the mask, so it can't be boolean."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)


def _compute_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """The type of the queries: the autocast type where that is on, else the one of the embeddings."""
    embedding = cast(nn.Embedding, cast("PreTrainedModel", model).get_input_embeddings()).weight
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return embedding.dtype
