"""Embeddings kept in a folder under a hash of all they were made of, and found again there."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import LlmrecError
from llmrec.pretrained import PretrainedSource
from llmrec.processes import Processes

logger = logging.getLogger(__name__)


def cache_path(folder: str | Path, kind: str, content: Any) -> Path:
    """File for embeddings made of `content` (anything JSON can hold): `<kind>-<hash>.safetensors`."""
    digest = hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    return Path(folder) / f"{kind}-{digest[:32]}.safetensors"


def weight_files(source: PretrainedSource) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file of a local model: other weights in the same folder are other keys."""
    if source.is_hub_id:
        return []
    folder = Path(source.path)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def read_cache(path: Path, item_ids: Sequence[str], processes: Processes) -> ItemEmbeddings | None:
    """What lies in the cache, if every process can read it there; else None on all of them."""
    embeddings = None
    if path.is_file():
        try:
            embeddings = ItemEmbeddings.load(path, item_ids=item_ids)
        except LlmrecError as error:
            logger.warning("the cached embeddings %s can't be read and are made again: %s", path, error)
    if not processes.gather_array(np.array([embeddings is not None])).all():
        return None
    if processes.is_main:
        logger.info("embeddings read from %s", path)
    return embeddings


def write_cache(path: Path, embeddings: ItemEmbeddings, processes: Processes) -> None:
    """Saves what all processes hold: the main one writes, the others wait."""
    if processes.is_main:
        embeddings.save(path)
    processes.barrier()
