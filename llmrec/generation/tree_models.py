"""Which models can take a tree of beams.

Many architectures ignore a 4-D mask or read it otherwise, most of them without an error: recurrent and convolutional
layers, chunked attention, FlashAttention. A model is refused by what its config says; one of a type that was never
tried is given a small tree once, and must score it as plain forwards do.
"""

import logging
from typing import Any

import numpy as np
import torch
from torch import nn

from llmrec.generation.head import level_columns
from llmrec.generation.packing import pack_prompts
from llmrec.generation.prompt_tree import prompt_tree
from llmrec.processes import device_of
from llmrec.vocabulary import CodeVocabulary

logger = logging.getLogger(__name__)

# Architectures whose beams were compared with those of `generate`, in the tests.
TRIED = frozenset(
    {"gemma", "gemma2", "gemma3_text", "gpt2", "llama", "ministral", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}
    | {"smollm3"}
)
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of log-probabilities; half precision is far off anyway
_HALF_TOLERANCE = 0.3


def why_no_tree(model: nn.Module, vocabulary: CodeVocabulary) -> str | None:
    """Why the tree search can't be used with a model; None where it can.

    It needs attention in every layer, over everything or within a window, through SDPA or eager.
    """
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return f"{type(model).__name__} is not a decoder-only model of transformers"
    config = config.get_text_config()
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if others:
        return f"the model has layers of type {', '.join(others)}"
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return f"the attention implementation {implementation!r} takes no 4-D mask; load the model with 'sdpa'"
    if config.model_type in TRIED:
        return None
    if not hasattr(model, "_llmrec_tree_failure"):
        model._llmrec_tree_failure = _failure(model, vocabulary)  # type: ignore[assignment]
    return model._llmrec_tree_failure  # type: ignore[return-value]


def _failure(model: Any, vocabulary: CodeVocabulary) -> str | None:
    """What goes wrong when a model of an untried type scores a small tree; None where nothing does."""
    name = model.config.get_text_config().model_type
    try:
        difference = _difference(model, vocabulary)
    except Exception as error:  # whatever an unknown architecture raises on such a mask or cache
        return f"a model of type {name!r} fails on a tree of beams ({type(error).__name__}: {error})"
    tolerance = _TOLERANCE.get(model.get_input_embeddings().weight.dtype, _HALF_TOLERANCE)
    if not difference <= tolerance:
        return f"a model of type {name!r} scores a tree of beams otherwise than one by one (by {difference:.2g})"
    logger.info("models of type %r were not tried before: a tree of beams agrees with plain forwards", name)
    return None


@torch.no_grad()
def _difference(model: Any, vocabulary: CodeVocabulary) -> float:
    """Largest difference of a log-probability between a small tree and plain forwards over each of its paths."""
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, vocabulary.first_token_id, length).tolist() for length in (9, 5)]
    sizes, device = vocabulary.codebook_sizes, device_of(model)
    # Two nodes a level, the second level's in the other order than their parents.
    levels = [
        ([0, size - 1], [0, 0] if level == 0 else [1, 0]) for level, size in enumerate(sizes[:2][: len(sizes) - 1])
    ]
    packed = pack_prompts(prompts, attention_scale=10**9).to(device)  # both in one row
    paths: list[list[int]] = [[]]
    with prompt_tree(model, packed, vocabulary, scope="codes", num_slots=2 * len(levels)) as tree:
        scores = [tree.read_prompts()]
        for level, (codes, parents) in enumerate(levels):
            written = (torch.tensor([part, part], device=device) for part in (codes, parents))
            scores.append(tree.write(level, *written))
    difference = 0.0
    for level, found in enumerate(scores):
        if level > 0:
            codes, parents = levels[level - 1]
            tokens = [code + level_columns(vocabulary, level - 1)[0] for code in codes]
            paths = [[*paths[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        start, end = level_columns(vocabulary, level)
        for request, prompt in enumerate(prompts):
            for node, path in enumerate(paths):
                logits = model(input_ids=torch.tensor([prompt + path], device=device)).logits[0, -1, start:end]
                expected = logits.float().log_softmax(dim=0)
                difference = max(difference, float((found[request, node].log_softmax(dim=0) - expected).abs().max()))
    return difference
