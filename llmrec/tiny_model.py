"""Models of random weights built on the spot: they know no language, all they can do they learn from interactions.

`tiny-llama` is for trying everything out without downloading anything. `letter-tiger` is the T5 of LETTER-TIGER (Wang
et al., CIKM 2024; its shape is that of the authors' released script), and `etegrec` that of ETEGRec (Liu et al., arXiv
2409.05546); both papers train them from random weights too.

The text tokenizer of each is a SentencePiece model trained on the texts given. This module knows nothing of codes:
their tokens and rows are added to these models as to any other.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmrec.errors import DataError, SettingsError
from llmrec.files import atomic_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Config

TINY_LLAMA = "tiny-llama"
LETTER_TIGER = "letter-tiger"
ETEGREC = "etegrec"


def is_built_in(name: str | None) -> bool:
    """Whether a base model of this name is built on the spot, and neither a folder nor a Hub ID."""
    return name in _BUILDERS


def build(name: str, texts: Iterable[str], folder: str | Path, *, seed: int = 0) -> None:
    """Writes the folder of a built-in model; see `build_tiny_llama`, `build_letter_tiger` and `build_etegrec`.

    Raises:
        SettingsError: There is no built-in model of this name.
        DataError: There is no text to train a text tokenizer on.
    """
    if not is_built_in(name):
        raise SettingsError(f"no built-in model {name!r}; there are {', '.join(_BUILDERS)}")
    _BUILDERS[name](texts, folder, seed=seed)


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
    """Writes a tiny LLaMA, as a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

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
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(text_tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(text_tokenizer),
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=hidden_size // 32,
                max_position_embeddings=max_length,
                tie_word_embeddings=True,
                **_special_tokens(text_tokenizer),
            )
        )

    _write(folder, texts, make, vocabulary_size=vocabulary_size, max_length=max_length, start_token=True, seed=seed)


def build_letter_tiger(
    texts: Iterable[str],
    folder: str | Path,
    *,
    vocabulary_size: int = 800,
    max_length: int = 512,
    seed: int = 0,
) -> None:
    """Writes LETTER-TIGER's T5 with random weights, as a folder that `AutoModelForSeq2SeqLM` and `AutoTokenizer` load.

    Width 128, feed-forward 1,024 with ReLU, 6 heads of 64, 4 layers in the encoder and 4 in the decoder, dropout 0.1,
    32 buckets of relative positions, head tied to the embedding, which starts at a standard deviation of 1 as T5's
    does. The decoder starts from the padding token. Unlike the authors, who keep the 32,100 tokens of t5-small though
    no prompt has text in it, the text tokens are those of a small tokenizer trained on the titles: the softmax over
    the whole vocabulary is that much smaller.

    Args:
        texts: What the SentencePiece model (BPE with byte fallback) is trained on, such as the titles of a catalogue.
        folder: Written whole or not at all; replaced where it exists.
        vocabulary_size: Upper bound; fewer pieces are made of few texts.
        max_length: Longest prompt that the text tokenizer says it takes, in tokens; the model itself has no bound.
        seed: Seeds the weights.

    Raises:
        DataError: There is no text to train on.
    """
    from transformers import T5ForConditionalGeneration

    def make(text_tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
        shape = {"d_ff": 1024, "num_heads": 6, "num_layers": 4, "num_decoder_layers": 4}
        return T5ForConditionalGeneration(_t5_config(text_tokenizer, **shape))

    _write(folder, texts, make, vocabulary_size=vocabulary_size, max_length=max_length, start_token=False, seed=seed)


def build_etegrec(
    texts: Iterable[str],
    folder: str | Path,
    *,
    vocabulary_size: int = 800,
    max_length: int = 512,
    seed: int = 0,
) -> None:
    """Writes ETEGRec's T5 with random weights, as a folder that `AutoModelForSeq2SeqLM` and `AutoTokenizer` load.

    As in the paper: width 128, feed-forward 512 with ReLU, 4 heads of 64, 6 layers in the encoder and 6 in the
    decoder, dropout 0.1; all matrices start from N(0, 0.02^2), where T5 draws each on a scale of its own, and norms at
    1. As in the released code: logits are plain inner products of states and rows, where a T5 with a tied head
    multiplies them by 128^-0.5; the decoder starts from the padding token, whose row is learned.

    The paper's tables of codes, one a level, input and output in one, are the rows that
    `llmrec.vocabulary.add_code_rows` adds. They are drawn with mean and deviation of the rows that are there, so like
    these; under `loss_scope: codes` a softmax is over the codes of its level alone, as in the paper.

    Ours are the text tokens beside the codes, which a small tokenizer learns from the titles, the end token after the
    encoder's input, and T5's 32 buckets of relative positions, of which the paper says nothing.

    Args:
        texts: What the SentencePiece model (BPE with byte fallback) is trained on, such as the titles of a catalogue.
        folder: Written whole or not at all; replaced where it exists.
        vocabulary_size: Upper bound; fewer pieces are made of few texts.
        max_length: Longest prompt that the text tokenizer says it takes, in tokens; the model itself has no bound.
        seed: Seeds the weights.

    Raises:
        DataError: There is no text to train on.
    """
    from transformers import T5ForConditionalGeneration

    def make(text_tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedModel":
        shape = {"d_ff": 512, "num_heads": 4, "num_layers": 6, "num_decoder_layers": 6}
        # Of a T5 this setting says whether logits are scaled: transformers 5 ties its head all the same.
        model = T5ForConditionalGeneration(_t5_config(text_tokenizer, **shape, tie_word_embeddings=False))
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        return model

    _write(folder, texts, make, vocabulary_size=vocabulary_size, max_length=max_length, start_token=False, seed=seed)


_BUILDERS: dict[str, Callable[..., None]] = {
    TINY_LLAMA: build_tiny_llama,
    LETTER_TIGER: build_letter_tiger,
    ETEGREC: build_etegrec,
}


def _special_tokens(text_tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    return {name: getattr(text_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _t5_config(text_tokenizer: "PreTrainedTokenizerBase", **more: Any) -> "T5Config":
    """What the T5 models share: width 128 in heads of 64, ReLU, dropout, relative positions, a start from padding."""
    from transformers import T5Config

    special_tokens = _special_tokens(text_tokenizer)
    special_tokens["decoder_start_token_id"] = text_tokenizer.pad_token_id
    return T5Config(
        vocab_size=len(text_tokenizer),
        d_model=128,
        d_kv=64,
        dropout_rate=0.1,
        feed_forward_proj="relu",
        relative_attention_num_buckets=32,
        **special_tokens,
        **more,
    )


def _write(
    folder: str | Path,
    texts: Iterable[str],
    make: "Callable[[PreTrainedTokenizerBase], PreTrainedModel]",
    *,
    vocabulary_size: int,
    max_length: int,
    start_token: bool,
    seed: int,
) -> None:
    """Trains the text tokenizer, makes the model for it under the seed, and writes both."""
    lines = [line for line in texts if line.strip()]
    if not lines:
        raise DataError("no text to train a SentencePiece model on: the catalogue has no titles")
    with atomic_folder(folder) as temporary:
        text_tokenizer = _train_text_tokenizer(lines, temporary, vocabulary_size, max_length, start_token)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = make(text_tokenizer)
        model.save_pretrained(temporary)


def _train_text_tokenizer(
    lines: list[str], folder: Path, vocabulary_size: int, max_length: int, start_token: bool
) -> "PreTrainedTokenizerBase":
    """Writes a text tokenizer of at most so many pieces: `<unk>`, `<s>`, `</s>`, `<pad>`, bytes and parts of words."""
    import sentencepiece
    from transformers import AutoTokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocabulary_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=3,
        num_threads=1,  # several threads make the pieces depend on their timing
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": start_token, "model_max_length": max_length}
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {**settings, **special})
    text_tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    text_tokenizer.save_pretrained(folder)
    (folder / "tokenizer.vocab").unlink()
    return text_tokenizer
