"""Whether a model keeps packed samples apart.

transformers finds the samples of a packed row by their positions, which restart, and masks attention between them. A
layer that carries a state along (recurrent, convolutional) doesn't see positions, and an architecture may build its
masks another way; the samples of a row then leak into each other, without any error. So the settings of the model are
read, and the model is tried on two samples before anything is trained.
"""

from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = {"full_attention", "sliding_attention"}
# Of logits, relative to the largest of them; a leak changes all.
_TOLERANCE = 1e-2
_HALF_TOLERANCE = 0.15
_LENGTHS = (7, 5, 1)


def why_no_packing(model: nn.Module) -> str | None:
    """Why samples can't be packed for a model; None where they can.

    Args:
        model: With or without LoRA, not yet prepared for several processes. It is run on a few tokens, but where its
            weights are spread over processes already (ZeRO-3 while loading).
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "the samples of an encoder-decoder model aren't packed"
    text_config = config.get_text_config()
    others = sorted(set(getattr(text_config, "layer_types", None) or ()) - _LAYERS)
    if others:
        return f"the model has layers of type {', '.join(others)}, which don't keep packed samples apart"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return None
    difference = _difference(model)
    weights = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    in_half = torch.is_autocast_enabled(weights.device.type) or weights.dtype not in (torch.float32, torch.float64)
    if not difference <= (_HALF_TOLERANCE if in_half else _TOLERANCE):
        return f"the samples of a packed row see each other: logits differ by {difference:.2g} of their size"
    return None


@torch.no_grad()
def _difference(model: Any) -> float:
    """Largest difference of a logit between a packed row and its samples alone, relative to the largest logit."""
    device, was_training = next(model.parameters()).device, model.training
    tokens = torch.arange(sum(_LENGTHS), device=device) % 11 + 3
    samples = tokens.split(_LENGTHS)
    positions = torch.cat([torch.arange(length, device=device) for length in _LENGTHS])

    def logits(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = model(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False)
        return output.logits[0].float()

    model.eval()
    try:
        packed = logits(tokens, positions)
        alone = torch.cat([logits(sample, torch.arange(len(sample), device=device)) for sample in samples])
    finally:
        model.train(was_training)
    return float((packed - alone).abs().max() / alone.abs().max())
