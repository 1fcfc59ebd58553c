"""Item text to vectors: which text of an item is read, how fields are combined, and the cache.

After LETTER's inputs (as its published code does): every field is encoded on its own and an item's vector is the
mean over its fields. The encoders are in `text_encoders.py`; nothing here knows how a text becomes a vector.
"""

import logging
import math
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.embeddings.cache import cache_path, read_cache, weight_files, write_cache
from llmrec.embeddings.text_encoders import (
    EncoderSettings,
    encode_tfidf,
    encode_with_sentence_transformers,
    encode_with_transformers,
)
from llmrec.errors import DataError, LlmrecError, MissingPartError, SettingsError
from llmrec.pretrained import PretrainedSource, resolve_pretrained
from llmrec.processes import Processes

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

TFIDF = "tfidf"
TFIDF_WIDTH = 256
CACHE_VERSION = 2  # raised whenever the same texts and settings would give other vectors


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
    processes: Processes | None = None,
) -> ItemEmbeddings:
    """Embeds the text of every item.

    An item's vector is the mean of the vectors of its fields, each encoded apart (LETTER). A field that is missing or
    blank for an item is left out of its mean. An item without any text gets the mean vector of all other items and
    `present` False; how many there are is logged and stands in `source["items_without_text"]`. Equal texts are encoded
    once.

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
        device: A torch device, None for that of `processes`, or without them the first GPU or else the CPU. Not part
            of the cache key.
        revision: Branch, tag or commit of a Hub ID.
        cache_dir: Folder for results, keyed by a hash of item IDs, texts, encoder and settings; a result found there
            is returned without loading the model. None: no cache.
        processes: Processes that share the work, each encoding its part of the texts and all getting all vectors;
            every one of them must make this call. TF-IDF is computed by the main one alone, because its SVD needs all
            texts at once. None: this process does everything.

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
    processes = processes or Processes.alone(device)
    settings = EncoderSettings(
        batch_size, max_length, dtype, device or str(processes.device), revision, show_progress=processes.is_main
    )
    item_ids, texts = item_texts(items, fields)
    without_text = sum(all(field is None for field in item) for item in texts)
    if without_text and processes.is_main:
        logger.warning(
            "%d of %d items have no text in %s: they are masked, with the mean vector of all others in their rows",
            without_text,
            len(texts),
            ", ".join(fields),
        )
    pretrained = None if encoder == TFIDF else resolve_pretrained(encoder)
    path = None
    if cache_dir is not None:
        key_settings: dict[str, Any] = {"encoder": TFIDF, "width": width or TFIDF_WIDTH}
        if pretrained is not None:
            key_settings = {"encoder": encoder, "width": width, "pooling": pooling, "max_length": max_length}
            key_settings |= {"dtype": dtype, "revision": revision, "files": weight_files(pretrained)}
        path = cache_path(cache_dir, "text", [CACHE_VERSION, item_ids, texts, key_settings])
        cached = read_cache(path, item_ids, processes)
        if cached is not None:
            return cached

    rows, unique = _distinct(texts)
    if pretrained is None:
        own = encode_tfidf(unique, width=width or TFIDF_WIDTH) if processes.is_main else None
        vectors = processes.broadcast(own)
    else:
        by_themselves = _uses_sentence_transformers(pretrained, pooling, revision)
        encode = encode_with_sentence_transformers if by_themselves else encode_with_transformers
        part = processes.part(len(unique))
        own = encode(unique[part] or unique[:1], pretrained, settings=settings)  # never none at all: D must be known
        vectors = processes.gather_array(own[: part.stop - part.start])
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
    embeddings = ItemEmbeddings(
        item_ids, _average_fields(vectors, rows), source, present=np.asarray((rows >= 0).any(axis=1))
    )
    if encoder != TFIDF and width is not None:
        embeddings = embeddings.reduce(width)
    if path is not None:
        write_cache(path, embeddings, processes)
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
    """Mean over the fields that each item has; the mean of all such items where it has none. float32 [N, D]."""
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
