"""A tiny LLaMA built on the spot, for trying everything out without downloading anything.

Its text tokenizer is a SentencePiece model trained on the texts given, its weights are random. It knows no language:
what it can do after fine-tuning, it learned from the interactions alone.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from llmrec.errors import DataError
from llmrec.files import atomic_folder, write_json

TINY_LLAMA = "tiny-llama"


def build_tiny_llama(
    texts: Iterable[str],
    folder: str | Path,
    *,
    vocabulary_size: int = 800,
    hidden_size: int = 128,
    num_layers: int = 4,
    max_length: int = 512,
    seed: int = 0,
) -> None:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Args:
        texts: What the SentencePiece model (BPE with byte fallback) is trained on, such as the titles of a catalogue.
        folder: Written whole or not at all; replaced where it exists.
        vocabulary_size: Upper bound; fewer pieces are made of few texts.
        hidden_size: D, a multiple of 32: there are D / 32 attention heads.
        num_layers: Number of decoder layers.
        max_length: Longest prompt, in tokens.
        seed: Seeds the weights.

    Raises:
        DataError: There is no text to train on.
    """
    import sentencepiece
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    lines = [line for line in texts if line.strip()]
    if not lines:
        raise DataError("no text to train a SentencePiece model on: the catalogue has no titles")
    with atomic_folder(folder) as temporary:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(temporary / "tokenizer"),
            model_type="bpe",
            vocab_size=vocabulary_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=1.0,
            pad_id=3,
            num_threads=1,  # several threads make the pieces depend on their timing
            minloglevel=2,
        )
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "model_max_length": max_length}
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        write_json(temporary / "tokenizer_config.json", {**settings, **special})
        text_tokenizer = AutoTokenizer.from_pretrained(temporary)
        text_tokenizer.save_pretrained(temporary)
        (temporary / "tokenizer.vocab").unlink()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=len(text_tokenizer),
                    hidden_size=hidden_size,
                    intermediate_size=2 * hidden_size,
                    num_hidden_layers=num_layers,
                    num_attention_heads=hidden_size // 32,
                    max_position_embeddings=max_length,
                    tie_word_embeddings=True,
                    bos_token_id=1,
                    eos_token_id=2,
                    pad_token_id=3,
                )
            )
        model.save_pretrained(temporary)
