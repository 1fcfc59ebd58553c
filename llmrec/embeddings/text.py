"""Item text to vectors: which text of an item is read, how fields are combined, and the cache.

After LETTER's inputs (as its published code does): every field is encoded on its own and an item's vector is the
mean over its fields. The encoders are in `text_encoders.py`; nothing here knows how a text becomes a vector.
"""

import hashlib
import json
import logging
import math
import numbers
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from safetensors import SafetensorError

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.embeddings.text_encoders import (
    EncoderSettings,
    encode_tfidf,
    encode_with_sentence_transformers,
    encode_with_transformers,
)
from llmrec.errors import DataError, LlmrecError, MissingPartError, SettingsError
from llmrec.pretrained import PretrainedSource, resolve_pretrained

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

TFIDF = "tfidf"
TFIDF_WIDTH = 256
CACHE_VERSION = 1  # raised whenever the same texts and settings would give other vectors


def embed_text(
    items: "datasets.Dataset",
    *,
    encoder: str = TFIDF,
    fields: Sequence[str] = ("title",),
    width: int | None = None,
    pooling: Literal["auto", "mean", "sentence-transformers"] = "auto",
    batch_size: int = 64,
    max_length: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> ItemEmbeddings:
    """Embeds the text of every item.

    An item's vector is the mean of the vectors of its fields, each encoded apart (LETTER). A field that is missing or
    blank for an item is left out of its mean. An item without any text gets the mean vector of all other items; how
    many there are is logged and stands in `source["items_without_text"]`. Equal texts are encoded once.

    Args:
        items: The catalogue, one row an item, with column "item_id" (string) and the columns of `fields`. A list in a
            cell is joined with ", ", a number is written out.
        encoder: "tfidf" (no weights needed, the offline default), or a pretrained model as `resolve_pretrained` reads
            it: a Hub ID, a folder, or "package:<installed Python package>".
        fields: Columns to read.
        width: D. For TF-IDF the number of components (256 where None; lowered for tiny catalogues, see
            `encode_tfidf`). For a pretrained model None keeps its own width, a smaller one is reached by
            `ItemEmbeddings.reduce`.
        pooling: How a pretrained model makes one vector of a text. "auto": sentence-transformers where the model comes
            in that format (it has a modules.json), else the mean over non-pad tokens of the last hidden state.
        batch_size: Texts a batch.
        max_length: Tokens read of each field; the rest is cut. None: the sentence-transformers model's own length,
            else 512 or what the model can take. LETTER uses 2048.
        dtype: "float32", "bfloat16" or "float16" for the weights. The mean is always float32.
        device: A torch device, None for the first GPU or else the CPU. Not part of the cache key.
        revision: Branch, tag or commit of a Hub ID.
        cache_dir: Folder for results, keyed by a hash of item IDs, texts, encoder and settings; a result found there
            is returned without loading the model. None: no cache.

    Returns:
        Embeddings in the order of `items`.

    Raises:
        DataError: A column is missing, a cell can't be read as text, or no item has any text.
        SettingsError: A setting can't work.
        MissingPartError: The encoder's folder or package doesn't exist.

    Example:
        >>> import datasets
        >>> items = datasets.Dataset.from_dict({"item_id": ["a", "b"], "title": ["red shoe", "blue shoe"]})
        >>> embed_text(items).vectors.shape
        (2, 2)
    """
    if width is not None and width < 1:
        raise SettingsError(f"width is {width}: it must be at least 1")
    if pooling not in ("auto", "mean", "sentence-transformers"):
        raise SettingsError(f"pooling is {pooling!r}: choose auto, mean or sentence-transformers")
    settings = EncoderSettings(batch_size, max_length, dtype, device, revision)
    item_ids, texts = item_texts(items, fields)
    if encoder == TFIDF:
        key_settings: dict[str, Any] = {"encoder": TFIDF, "width": width or TFIDF_WIDTH}
    else:
        pretrained = resolve_pretrained(encoder)
        key_settings = {"encoder": encoder, "width": width, "pooling": pooling, **asdict(settings)}
        del key_settings["device"], key_settings["batch_size"]
        key_settings["files"] = _weight_files(pretrained)

    path = None
    if cache_dir is not None:
        content = [CACHE_VERSION, item_ids, texts, key_settings]
        digest = hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
        path = Path(cache_dir) / f"text-{digest[:32]}.safetensors"
        cached = _read_cache(path, item_ids)
        if cached is not None:
            return cached

    rows, unique = _distinct(texts)
    if encoder == TFIDF:
        vectors = encode_tfidf(unique, width=width or TFIDF_WIDTH)
    elif _uses_sentence_transformers(pretrained, pooling, revision):
        vectors = encode_with_sentence_transformers(unique, pretrained, settings=settings)
    else:
        vectors = encode_with_transformers(unique, pretrained, settings=settings)
    without_text = sum(all(field is None for field in item) for item in texts)
    source = {
        "kind": "text",
        "encoder": encoder,
        "fields": list(fields),
        "items_without_text": without_text,
        "revision": revision,
        "dtype": dtype if encoder != TFIDF else "float32",
        "max_length": max_length,
        "pooling": pooling if encoder != TFIDF else None,
    }
    embeddings = ItemEmbeddings(item_ids, _average_fields(vectors, rows), source)
    if encoder != TFIDF and width is not None:
        embeddings = embeddings.reduce(width)
    if path is not None:
        embeddings.save(path)
    return embeddings


def item_texts(items: "datasets.Dataset", fields: Sequence[str]) -> tuple[tuple[str, ...], list[list[str | None]]]:
    """Item IDs, and for each item the text of each field, None where it has none.

    Raises:
        DataError: A column is missing, a cell can't be read as text, or no item has any text.
    """
    if isinstance(fields, str) or not fields:
        raise SettingsError(f'fields is {fields!r}: pass a list of column names, such as ["title"]')
    missing = [name for name in ("item_id", *fields) if name not in items.column_names]
    if missing:
        raise DataError(
            f"the catalogue has no column {missing[0]!r}; its columns are {', '.join(items.column_names)}"
            " (choose among them with `fields`)"
        )
    columns = [[_as_text(value, name, row) for row, value in enumerate(items[name])] for name in fields]
    texts = [list(item) for item in zip(*columns, strict=True)]
    without = sum(all(field is None for field in item) for item in texts)
    if without == len(texts):
        raise DataError(f"none of the {len(texts)} items has any text in {', '.join(fields)}: nothing to embed")
    if without:
        logger.warning(
            "%d of %d items have no text in %s: they get the mean vector of all others",
            without,
            len(texts),
            ", ".join(fields),
        )
    return tuple(items["item_id"]), texts


def _as_text(value: Any, column: str, row: int) -> str | None:
    """One cell as text with single spaces, None where it is missing or blank."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, list | tuple):
        parts = [part for part in (_as_text(entry, column, row) for entry in value) if part is not None]
        return ", ".join(parts) or None
    if not isinstance(value, str | numbers.Number):
        raise DataError(
            f"column {column!r} holds a {type(value).__name__} in row {row} ({str(value)[:60]!r}): only text, numbers"
            " and lists of these can be embedded; make a text column of it first"
        )
    return " ".join(str(value).split()) or None


def _distinct(texts: Sequence[Sequence[str | None]]) -> tuple[np.ndarray, list[str]]:
    """Rows into the distinct texts, int64 [items, fields] with -1 for none, and these texts in order of appearance."""
    numbers_of: dict[str, int] = {}
    rows = [[-1 if text is None else numbers_of.setdefault(text, len(numbers_of)) for text in item] for item in texts]
    return np.asarray(rows, dtype=np.int64), list(numbers_of)


def _average_fields(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean over the present fields of each item; the mean of all such items where it has none. float32 [N, D]."""
    total = np.zeros((len(rows), vectors.shape[1]), dtype=np.float64)
    count = np.zeros(len(rows), dtype=np.int64)
    for field_rows in rows.T:
        present = field_rows >= 0
        total[present] += vectors[field_rows[present]]
        count += present
    total[count > 0] /= count[count > 0, None]
    total[count == 0] = total[count > 0].mean(axis=0)
    return total.astype(np.float32)


def _uses_sentence_transformers(source: PretrainedSource, pooling: str, revision: str | None) -> bool:
    if pooling != "auto":
        return pooling == "sentence-transformers"
    if not source.is_hub_id:
        return (Path(source.path) / "modules.json").is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        hf_hub_download(source.path, "modules.json", revision=revision)
    except LocalEntryNotFoundError as error:  # offline and never downloaded: the answer isn't known
        raise LlmrecError(
            f'can\'t reach the Hub to see how {source.path} pools its text; choose pooling="mean" or'
            ' "sentence-transformers", or the encoder "tfidf", which needs no download'
        ) from error
    except RepositoryNotFoundError as error:
        raise MissingPartError(
            f"there is no model {source.path!r} on the Hub (or it is private and no token is set): check the name, or"
            ' choose the encoder "tfidf", which needs no download'
        ) from error
    except EntryNotFoundError:
        return False
    return True


def _weight_files(source: PretrainedSource) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file of a local model: other weights in the same folder are other keys."""
    if source.is_hub_id:
        return []
    folder = Path(source.path)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _read_cache(path: Path, item_ids: Sequence[str]) -> ItemEmbeddings | None:
    if not path.is_file():
        return None
    try:
        embeddings = ItemEmbeddings.load(path, item_ids=item_ids)
    except (LlmrecError, SafetensorError) as error:
        logger.warning("the cached embeddings %s can't be read and are made again: %s", path, error)
        return None
    logger.info("text embeddings read from %s", path)
    return embeddings
