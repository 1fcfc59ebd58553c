"""Embeddings as settings files name them: from text, images, interactions or a file, one modality each.

    embeddings:
      title: {from: text, encoder: tfidf, fields: [title]}
      image: {from: image, encoder: openai/clip-vit-base-patch32, column: image_path}
      collaborative: {from: sasrec, width: 32}
      location: {from: file, path: geo.parquet, missing: mask}

Knows where vectors come from and that they must be about the catalogue. What reads them is elsewhere.
"""

import dataclasses
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import leave_one_out
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.embeddings.collaborative import SASRec, SASRecConfig
from llmrec.embeddings.image import embed_images
from llmrec.embeddings.lightgcn import LightGCN, LightGCNConfig
from llmrec.embeddings.text import embed_text
from llmrec.errors import MissingPartError, SettingsError
from llmrec.files import read_json
from llmrec.processes import Processes
from llmrec.settings import settings_from

logger = logging.getLogger(__name__)

COLLABORATIVE: dict[str, tuple[Any, Any]] = {"sasrec": (SASRec, SASRecConfig), "lightgcn": (LightGCN, LightGCNConfig)}
CONTENT: dict[str, Callable[..., ItemEmbeddings]] = {"text": embed_text, "image": embed_images}
FILE_OPTIONS = ("path", "ids_file", "id_column", "vector_column", "memory_map", "cache_dir", "missing")
KINDS = (*CONTENT, *COLLABORATIVE, "file")


@dataclass(frozen=True)
class EmbeddingSource:
    """Where the vectors of one modality come from.

    Attributes:
        kind: "text" (`embed_text`), "image" (`embed_images`), "sasrec" or "lightgcn" (trained here, on the training
            part of a leave-one-out split), or "file".
        options: Keyword arguments of `embed_text` or `embed_images`; fields of `SASRecConfig` or `LightGCNConfig`; for
            "file" the `path` of a saved SASRec or LightGCN, or of what `ItemEmbeddings.load` reads, with its options,
            and `missing: mask` where some items may lack a vector.
        reduce_to: Width to bring the vectors to by `ItemEmbeddings.reduce`; None keeps theirs.
    """

    kind: str
    options: Mapping[str, Any]
    reduce_to: int | None = None

    @classmethod
    def from_settings(cls, name: str, values: Mapping[str, Any]) -> "EmbeddingSource":
        """Reads `{from: kind, ...}` and refuses, before any work, what the kind doesn't take.

        Raises:
            SettingsError: Unknown kind or option.
        """
        what = f"embeddings.{name}"
        if not isinstance(values, Mapping) or "from" not in values:
            raise SettingsError(f"{what} is {values!r}: say where it comes from, 'from: ' and {', '.join(KINDS)}")
        options = {key: value for key, value in values.items() if key not in ("from", "reduce_to")}
        kind, reduce_to = values["from"], values.get("reduce_to")
        if kind in COLLABORATIVE:
            settings_from(COLLABORATIVE[kind][1], options, what)
        elif kind in CONTENT or kind == "file":
            parameters = inspect.signature(CONTENT[kind]).parameters if kind in CONTENT else FILE_OPTIONS
            known = [option for option in parameters if option not in ("items", "processes")]
            unknown = [option for option in options if option not in known]
            if unknown:
                raise SettingsError(
                    f"{what}: unknown setting {unknown[0]!r}; known: from, reduce_to, {', '.join(known)}"
                )
        else:
            raise SettingsError(f"{what}: from is {kind!r}; known: {', '.join(KINDS)}")
        if kind == "file" and "path" not in options:
            raise SettingsError(f"{what}: a file needs its path")
        if options.get("missing", "error") not in ("error", "mask"):
            raise SettingsError(f"{what}: missing is {options['missing']!r}; choose error or mask")
        if reduce_to is not None and (not isinstance(reduce_to, int) or reduce_to < 1):
            raise SettingsError(f"{what}: reduce_to is {reduce_to!r}; it must be a width, 1 or more")
        return cls(kind, options, reduce_to)

    def check_files(self) -> None:
        """Raises `MissingPartError` where a file or folder isn't there: before other modalities take their time."""
        if self.kind == "file" and not Path(self.options["path"]).exists():
            raise MissingPartError(f"no embeddings at {self.options['path']}")


def make_embeddings(
    sources: Mapping[str, EmbeddingSource],
    dataset: InteractionDataset,
    output_folder: Path,
    *,
    processes: Processes | None = None,
    resume: bool = False,
) -> dict[str, ItemEmbeddings]:
    """The embeddings of a catalogue by modality, in its order.

    Args:
        sources: Modality to source.
        dataset: The catalogue, and the histories that a collaborative model is trained on.
        output_folder: Where a model that is trained here is saved, in `sasrec/` or `lightgcn/`.
        processes: Who shares the work of text and images; a collaborative model is trained by the main process alone,
            and loaded by the others. All of them call this.
        resume: Whether collaborative models go on from a checkpoint, and are taken from `output_folder` where they
            were trained there with the same settings and data.
    """
    processes = processes or Processes.alone()
    for source in sources.values():
        source.check_files()
    embeddings = {}
    for name, source in sources.items():
        if source.kind in CONTENT:
            made = CONTENT[source.kind](dataset.items, **source.options, processes=processes)
        elif source.kind in COLLABORATIVE:
            made = _trained(source, dataset, output_folder, processes, resume)
        else:
            with processes.main_first():  # it may write a memory-mapped copy beside the file
                made = _from_file(source.options, dataset)
        if source.reduce_to is not None and source.reduce_to != made.width:
            made = made.reduce(source.reduce_to)
        embeddings[name] = made
    return embeddings


def _trained(
    source: EmbeddingSource, dataset: InteractionDataset, output_folder: Path, processes: Processes, resume: bool
) -> ItemEmbeddings:
    model_class, config_class = COLLABORATIVE[source.kind]
    config = settings_from(config_class, source.options, source.kind)
    folder = output_folder / source.kind
    splits = leave_one_out(dataset)
    if processes.is_main and not (resume and _is_of(folder, config, splits.train)):
        checkpoints = output_folder / f"{source.kind}_checkpoint" if resume else None
        device = str(processes.device)
        fitted = model_class.fit(splits.train, config, splits.validation, checkpoint_dir=checkpoints, device=device)
        fitted.save_pretrained(folder)
    processes.barrier()
    embeddings: ItemEmbeddings = model_class.from_pretrained(folder).item_embeddings()
    return embeddings


def _is_of(folder: Path, config: Any, train: InteractionDataset) -> bool:
    """Whether a saved model was trained with these settings on these interactions."""
    if not (folder / "config.json").is_file():
        return False
    content = read_json(folder / "config.json")
    same = content["config"] == dataclasses.asdict(config)
    same = same and content["training"].get("dataset_fingerprint") == train.fingerprint
    if same:
        logger.info("%s was trained with the same data and settings: reused", folder)
    return bool(same)


def _from_file(options: Mapping[str, Any], dataset: InteractionDataset) -> ItemEmbeddings:
    path = Path(options["path"])
    if (path / "config.json").is_file():
        kind = str(read_json(path / "config.json").get("model")).lower()
        if kind not in COLLABORATIVE:
            raise SettingsError(f"{path} holds a {kind!r}, not a saved {' or '.join(COLLABORATIVE)}")
        embeddings: ItemEmbeddings = COLLABORATIVE[kind][0].from_pretrained(path).item_embeddings()
        embeddings.check_order(dataset.item_ids, f"the model in {path}")
        return embeddings
    loading = {name: value for name, value in options.items() if name not in ("path", "missing")}
    if path.suffix == ".npy" and "ids_file" not in options:  # it has no IDs: row i is item i
        return ItemEmbeddings.load(path, item_ids=dataset.item_ids, **loading)
    loaded = ItemEmbeddings.load(path, **loading)
    return loaded.align(dataset.item_ids, missing=options.get("missing", "error"), what=f"the embeddings in {path}")
