"""Models of random weights in the shapes of published ones, and catalogues and prompts for them.

Time and memory of a search don't depend on the values of the weights, so a benchmark that measures nothing else needs
neither a download nor a data set.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmrec.vocabulary import CodeVocabulary, add_code_rows


@dataclass(frozen=True)
class Shape:
    """What a published config says.

    Attributes:
        model_type: As transformers names it.
        first_token_id: Length of the text tokenizer, where code tokens start; the embedding may have more rows.
        settings: Of the config.
    """

    model_type: str
    first_token_id: int
    settings: dict[str, Any]


SHAPES = {
    "smollm2-135m": Shape(
        "llama",
        49_152,
        {
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-1.7b": Shape(
        "qwen3",
        151_669,
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "tie_word_embeddings": True,
        },
    ),
    "llama-7b": Shape(
        "llama",
        32_000,
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
    ),
    "tiny": Shape(  # to try a script, not to measure
        "qwen3",
        300,
        {
            "vocab_size": 310,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "initializer_range": 0.2,  # so that scores differ clearly
            "tie_word_embeddings": True,
        },
    ),
}


def random_model(
    shape: Shape, codebook_sizes: tuple[int, ...], *, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> tuple[Any, CodeVocabulary]:
    """A model with rows for the codes, all its weights of one type, and where the codes stand."""
    config = CONFIG_MAPPING[shape.model_type](**shape.settings)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    vocabulary = CodeVocabulary(codebook_sizes, shape.first_token_id)
    add_code_rows(model, vocabulary, seed=seed)
    return model.to(device=device, dtype=dtype), vocabulary  # the new rows are float32: trained, not served


def random_codes(num_items: int, codebook_sizes: tuple[int, ...], *, seed: int = 0) -> np.ndarray:
    """Code tuples int32 [N, L], drawn independently: where the tuples are few, some items share theirs."""
    generator = np.random.default_rng(seed)
    columns = [generator.integers(0, size, num_items, dtype=np.int32) for size in codebook_sizes]
    return np.stack(columns, axis=1)


def random_prompts(number: int, length: int, num_tokens: int, *, seed: int = 0) -> list[list[int]]:
    """Prompts of `length` tokens each, drawn from the first `num_tokens`."""
    return np.random.default_rng(seed).integers(3, num_tokens, (number, length)).tolist()
