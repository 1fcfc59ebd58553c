"""What a recommender makes of a history before it writes the next item: the states that ETEGRec aligns.

Of an encoder-decoder model the summary of a history is the mean of the encoder's states, and the preference the
decoder's state at its start token, from which the first code is written (ETEGRec, arXiv 2409.05546, section 3.2). A
decoder-only model has one state that is both: that of the last token before the next item, from which its first code
is written. Inside a longer sequence there is such a state before every item.

The states are read where they pass, by hooks, so that they are part of the forward's graph under every engine. This
module knows models and labels; it knows no item tokenizer and no loss.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmrec.training.losses import target_positions, target_tokens
from llmrec.vocabulary import CodeVocabulary, find_code_head


@dataclass(frozen=True)
class SequenceStates:
    """States of the targets of a batch, n of them, row by row.

    Attributes:
        summaries: [n, W], of the history.
        preferences: [n, W], from which the first code is written.
        codes: int64 [n, L], of the items that are written.
    """

    summaries: Tensor
    preferences: Tensor
    codes: Tensor


@dataclass
class WatchedForward:
    """What the hooks of `watch_states` have seen of one forward."""

    head_input: Tensor | None = None
    encoder_output: Tensor | None = None

    def states(self, inputs: dict[str, Any], labels: Tensor, vocabulary: CodeVocabulary) -> SequenceStates:
        """The states before each item that the labels hold.

        Args:
            inputs: What the forward took.
            labels: int64 [B, T], whole items alone; rows without any are passed over.
            vocabulary: Where the code tokens are.
        """
        if self.head_input is None:
            raise RuntimeError("the model's head wasn't called: its states can't be read")
        levels = vocabulary.num_levels
        encoder_decoder = self.encoder_output is not None
        positions = target_positions(labels, encoder_decoder=encoder_decoder)
        hidden = self.head_input[positions].view(-1, levels, self.head_input.shape[-1])
        offsets = torch.from_numpy(vocabulary.level_offsets).to(labels.device) + vocabulary.first_token_id
        codes = target_tokens(labels, encoder_decoder=encoder_decoder).view(-1, levels) - offsets
        preferences = hidden[:, 0]
        if self.encoder_output is None:
            return SequenceStates(preferences, preferences, codes)
        mask = inputs["attention_mask"].unsqueeze(-1).to(self.encoder_output.dtype)
        means = (self.encoder_output * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return SequenceStates(means[positions.any(dim=1)], preferences, codes)


@contextmanager
def watch_states(model: nn.Module) -> Iterator[WatchedForward]:
    """Within the block the model's forward leaves its states in what is given.

    Args:
        model: With code rows, plain or wrapped. Of a compiled model the states can't be seen.
    """
    watched = WatchedForward()

    def of_head(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        watched.head_input = arguments[0]

    def of_encoder(module: nn.Module, arguments: Any, output: Any) -> None:
        watched.encoder_output = output[0] if isinstance(output, tuple) else output.last_hidden_state

    handles = [find_code_head(model).register_forward_pre_hook(of_head)]
    encoder = _encoder_of(model)
    if encoder is not None:
        handles.append(encoder.register_forward_hook(of_encoder))
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model, through any wrapper."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "is_encoder_decoder", False) and isinstance(getattr(module, "encoder", None), nn.Module):
            found: nn.Module = module.encoder  # type: ignore[assignment]
            return found
    return None
