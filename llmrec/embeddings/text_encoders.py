"""Encoders of text: TF-IDF with truncated SVD, sentence-transformers, and any Hugging Face encoder or causal LM.

An encoder turns a list of texts into float32 [n, D]. It knows nothing of items, fields or caches; `text.py` does.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from llmrec.embeddings.weights import refuse_random_weights
from llmrec.errors import DataError, SettingsError
from llmrec.pretrained import PretrainedSource, load_text_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def encode_tfidf(texts: Sequence[str], *, width: int) -> np.ndarray:
    """TF-IDF over words, then truncated SVD. Needs no weights, and equal texts give equal vectors on one machine.

    Words are runs of letters and digits in lower case, term counts enter as 1 + ln(count), rows have length 1 before
    the SVD. Scripts without spaces between words come out as one word a phrase: use a pretrained encoder for them.

    Args:
        texts: Non-empty texts, at least one.
        width: D asked for. It is lowered, with a line in the log, where there are fewer texts or fewer words.

    Returns:
        float32 [len(texts), D].

    Raises:
        DataError: No text holds a letter or a digit.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True, dtype=np.float64)
    try:
        matrix = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise DataError(f"TF-IDF finds no word in the {len(texts)} text(s), first {texts[0]!r}: {error}") from error
    possible = min(matrix.shape)
    if possible < width:
        logger.warning(
            "TF-IDF: width lowered from %d to %d (%d different texts, %d words)", width, possible, *matrix.shape
        )
    if possible == 1:  # one text or one word: scikit-learn's randomised solver has nothing to project on
        return np.asarray(matrix.sum(axis=1), dtype=np.float32).reshape(-1, 1)
    svd = TruncatedSVD(n_components=min(width, possible), n_iter=7, random_state=0)
    vectors = svd.fit_transform(matrix).astype(np.float32)
    logger.info("TF-IDF: %d words, %.1f %% of the variance kept", matrix.shape[1], 100 * _kept(svd))
    return vectors


def _kept(svd: Any) -> float:
    kept = float(svd.explained_variance_ratio_.sum())
    return kept if np.isfinite(kept) else 1.0  # all rows equal: no variance to keep


def encode_with_sentence_transformers(
    texts: Sequence[str], source: PretrainedSource, *, settings: "EncoderSettings"
) -> np.ndarray:
    """A sentence-transformers model with its own pooling and normalisation, float32 [len(texts), D].

    Raises:
        SettingsError: The package sentence-transformers isn't installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise SettingsError(
            f"{source.path} is a sentence-transformers model and that package isn't installed: `pip install"
            ' "llmrec[text]"`, or choose pooling="mean" or the encoder "tfidf"'
        ) from error
    import torch

    model = SentenceTransformer(
        source.path,
        device=settings.resolved_device,
        revision=settings.revision if source.is_hub_id else None,
        model_kwargs={"dtype": getattr(torch, settings.dtype)},
        trust_remote_code=False,
    )
    if settings.max_length is not None:
        model.max_seq_length = min(settings.max_length, model.max_seq_length or settings.max_length)
    progress = tqdm(total=len(texts), desc="Encoding texts", unit="text", disable=settings.bar_disabled)
    parts = []
    order = sorted(range(len(texts)), key=lambda row: (-len(texts[row]), row))
    with progress:
        for start in range(0, len(order), settings.batch_size):
            batch = [texts[row] for row in order[start : start + settings.batch_size]]
            vectors = model.encode(batch, batch_size=len(batch), show_progress_bar=False, convert_to_tensor=True)
            parts.append(vectors.float().cpu().numpy())
            progress.update(len(batch))
    return _in_given_order(parts, order)


@dataclass(frozen=True)
class EncoderSettings:
    """How a pretrained encoder runs; see `llmrec.embeddings.text.embed_text` for the meaning of each field."""

    batch_size: int = 64
    max_length: int | None = None
    dtype: str = "float32"
    device: str | None = None
    revision: str | None = None
    show_progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SettingsError(f"batch_size is {self.batch_size}: it must be at least 1")
        if self.max_length is not None and self.max_length < 1:
            raise SettingsError(f"max_length is {self.max_length}: it must be at least 1 token, or None")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise SettingsError(f"dtype is {self.dtype!r}: choose float32, bfloat16 or float16")

    @property
    def resolved_device(self) -> str:
        """The device given, else the first GPU, else the CPU."""
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def bar_disabled(self) -> bool | None:
        """For tqdm: None leaves it to tqdm, which shows bars on terminals only."""
        return None if self.show_progress else True


DEFAULT_MAX_LENGTH = 512


def encode_with_transformers(
    texts: Sequence[str], source: PretrainedSource, *, settings: EncoderSettings
) -> np.ndarray:
    """Any Hugging Face encoder or causal LM: mean of the last hidden state over non-pad tokens, as LETTER does.

    Special tokens that the text tokenizer adds count as tokens. Of an encoder-decoder model the encoder is used.
    Batches hold texts of similar length, longest first, so a batch that doesn't fit into memory fails at the start.

    Returns:
        float32 [len(texts), hidden size].

    Raises:
        MissingPartError: The files of the model lack some of its weights.
    """
    import torch
    from transformers import AutoModel

    hub = {"revision": settings.revision} if source.is_hub_id else {}
    text_tokenizer = load_text_tokenizer(source.path, **hub)
    text_tokenizer.padding_side = "right"
    dtype = getattr(torch, settings.dtype)
    model, loading = AutoModel.from_pretrained(
        source.path, dtype=dtype, output_loading_info=True, **source.load_arguments, **hub
    )
    # A pooler would come after the last hidden state, and of an encoder-decoder model the encoder is used.
    refuse_random_weights(loading["missing_keys"], source.path, unused=("pooler.", "decoder."))
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model = model.to(settings.resolved_device).eval()
    max_length = _max_length(settings.max_length, text_tokenizer, model.config)

    token_ids = text_tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    full = sum(len(ids) >= max_length for ids in token_ids)
    if full and settings.show_progress:
        logger.info("%d of %d texts reach max_length (%d tokens): what is beyond is cut", full, len(texts), max_length)
    order = sorted(range(len(texts)), key=lambda row: (-len(token_ids[row]), row))
    parts = []
    with tqdm(total=len(texts), desc="Encoding texts", unit="text", disable=settings.bar_disabled) as progress:
        for start in range(0, len(order), settings.batch_size):
            batch = [token_ids[row] for row in order[start : start + settings.batch_size]]
            parts.append(_mean_hidden(model, batch, text_tokenizer.pad_token_id))
            progress.update(len(batch))
    return _in_given_order(parts, order)


def _max_length(asked: int | None, text_tokenizer: "PreTrainedTokenizerBase", config: Any) -> int:
    """The length asked for (or 512), at most what model and text tokenizer say they can take."""
    limits = [asked or DEFAULT_MAX_LENGTH, text_tokenizer.model_max_length]
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None:
        # RoBERTa numbers positions from padding_idx + 1, so that many rows of its table are never used
        unused = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        limits.append(positions - unused)
    return int(min(limits))


def _mean_hidden(model: "torch.nn.Module", batch: Sequence[Sequence[int]], pad_token_id: int) -> np.ndarray:
    """Mean hidden state of each token list, float32 [len(batch), hidden size]; an empty list gives zeros."""
    import torch

    device = next(model.parameters()).device
    longest = max(1, max(len(ids) for ids in batch))
    input_ids = torch.full((len(batch), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros((len(batch), longest), dtype=torch.int64)
    for row, ids in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[row, : len(ids)] = 1
    with torch.inference_mode():
        hidden = model(input_ids=input_ids.to(device), attention_mask=mask.to(device)).last_hidden_state  # [B, T, D]
        weights = mask.to(device)[:, :, None].float()
        mean = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    return mean.cpu().numpy()


def _in_given_order(parts: Sequence[np.ndarray], order: Sequence[int]) -> np.ndarray:
    vectors = np.concatenate(parts).astype(np.float32)
    given = np.empty_like(vectors)
    given[np.asarray(order)] = vectors
    return given
