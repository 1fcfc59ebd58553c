"""Item images to vectors: which image of an item is read, what becomes of those that can't be, and the cache.

Reading is in `image_reading.py`, the models are in `image_encoders.py`.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.embeddings.cache import cache_path, read_cache, weight_files, write_cache
from llmrec.embeddings.image_encoders import ImageEncoder
from llmrec.embeddings.image_reading import OUTCOME_WORDS, Outcome, import_pillow, locations_of, read_first
from llmrec.embeddings.text_encoders import EncoderSettings
from llmrec.errors import DataError
from llmrec.pretrained import resolve_pretrained
from llmrec.processes import Processes

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

CACHE_VERSION = 1  # raised whenever the same images and settings would give other vectors
READING_THREADS = 8  # Pillow decodes outside Python's lock
SHOWN_ITEMS = 3


def embed_images(
    items: "datasets.Dataset",
    *,
    encoder: str,
    column: str = "image",
    image_folder: str | Path | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    allow_urls: bool = False,
    cache_dir: str | Path | None = None,
    processes: Processes | None = None,
) -> ItemEmbeddings:
    """Embeds one image of every item, the first of its images that can be read.

    An item whose image is not given, missing, broken, cut off or too large (a decompression bomb, or 100 times as long
    as wide) gets `present` False and the mean vector of all others in its row. How many there are of each kind is
    logged with the first item IDs, and stands in `source["items_without_image"]` and `source["unreadable_images"]`.

    Args:
        items: The catalogue, one row an item, with column "item_id" (string) and the column of images.
        encoder: A vision model as `resolve_pretrained` reads it: a Hub ID, a folder, or "package:<installed Python
            package>"; see `ImageEncoder` for which models and which of their vectors.
        column: Column with the images: paths, `datasets.Image` (also made of PIL images or bytes), URLs, or lists of
            these. None and blank text are no image.
        image_folder: Where relative paths start; None: in the working folder.
        batch_size: Pictures a batch.
        dtype: "float32", "bfloat16" or "float16" for weights and pictures.
        device: A torch device, None for that of `processes`, or without them the first GPU or else the CPU. Not part
            of the cache key.
        revision: Branch, tag or commit of a Hub ID.
        allow_urls: Whether URLs are fetched: 10 s and 20 MB at most each. The servers are the ones that the catalogue
            names, also inside your own network: leave it off for catalogues that you don't trust.
        cache_dir: Folder for results, keyed by a hash of item IDs, images (path, size and time of change of a file,
            hash of bytes, URL), encoder and settings. A result that some URL is missing from is not kept. None: no
            cache.
        processes: Processes that share the work, each encoding the images of its part of the items and all getting all
            vectors; every one of them must make this call. None: this process does everything.

    Returns:
        Embeddings in the order of `items`.

    Raises:
        DataError: A column is missing, a cell is no image, URLs that aren't allowed, or no image at all could be read.
        SettingsError: A setting or an encoder that can't work; Pillow isn't installed.
        MissingPartError: The encoder's folder or package doesn't exist, or holds no image processor.
    """
    import_pillow()
    processes = processes or Processes.alone(device)
    settings = EncoderSettings(batch_size, None, dtype, device or str(processes.device), revision)
    source = resolve_pretrained(encoder)
    images = _Images(items, column, None if image_folder is None else Path(image_folder), allow_urls)
    item_ids = tuple(items["item_id"])
    path = None
    if cache_dir is None:
        images.check()
    else:
        facts = {"encoder": encoder, "dtype": dtype, "revision": revision, "files": weight_files(source)}
        path = cache_path(cache_dir, "image", [CACHE_VERSION, item_ids, images.fingerprints(), facts])
        cached = read_cache(path, item_ids, processes)
        if cached is not None:
            return cached

    model = ImageEncoder(source, settings)
    vectors, outcomes = _encode(images, processes.part(len(items)), model, batch_size, processes.is_main)
    vectors, outcomes = processes.gather_array(vectors), processes.gather_array(outcomes)
    present = outcomes == Outcome.READ
    counts = {outcome: int((outcomes == outcome).sum()) for outcome in OUTCOME_WORDS}
    if processes.is_main:
        for outcome, count in counts.items():
            if count:
                first = ", ".join(repr(item_ids[row]) for row in np.flatnonzero(outcomes == outcome)[:SHOWN_ITEMS])
                logger.warning("%d of %d items are masked %s: %s", count, len(items), OUTCOME_WORDS[outcome], first)
    if not present.any():
        reasons = ", ".join(f"{count} {OUTCOME_WORDS[outcome]}" for outcome, count in counts.items() if count)
        raise DataError(f"none of the {len(items)} items has an image in {column!r} that can be read ({reasons})")
    made_of = {
        "kind": "image",
        "encoder": encoder,
        "column": column,
        "revision": revision,
        "dtype": dtype,
        "items_without_image": counts[Outcome.NONE_GIVEN],
        "unreadable_images": int((~present).sum()) - counts[Outcome.NONE_GIVEN],
    }
    embeddings = ItemEmbeddings(item_ids, vectors, made_of, present)
    if path is not None and not counts[Outcome.NOT_FETCHED]:
        write_cache(path, embeddings, processes)
    return embeddings


class _Images:
    """A catalogue's column of images, a cell at a time; `datasets.Image` is left undecoded.

    Raises:
        DataError: A column is missing.
    """

    def __init__(self, items: "datasets.Dataset", column: str, folder: Path | None, allow_urls: bool):
        import datasets

        for name in ("item_id", column):
            if name not in items.column_names:
                raise DataError(
                    f"the catalogue has no column {name!r}; its columns are {', '.join(items.column_names)}"
                )
        cells = items.with_format(None).select_columns(["item_id", column])
        kind = cells.features[column]
        undecoded = datasets.Image(decode=False)
        if isinstance(kind, datasets.Image):
            cells = cells.cast_column(column, undecoded)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            cells = cells.cast_column(column, datasets.List(undecoded))
        self._cells, self._column, self._folder, self._allow_urls = cells, column, folder, allow_urls

    def locations(self, rows: slice) -> Iterator[list[Any]]:
        """Where the images of each of these items are."""
        for cell in self._cells.select(range(rows.start, rows.stop)):
            yield locations_of(cell[self._column], cell["item_id"], folder=self._folder, allow_urls=self._allow_urls)

    def check(self) -> None:
        """Raises where a cell of any item can't be taken, before a model is loaded."""
        for _ in self.locations(slice(0, len(self._cells))):
            pass

    def fingerprints(self) -> list[Any]:
        """What the cache knows the images by."""
        everything = slice(0, len(self._cells))
        return [[location.fingerprint() for location in item] for item in self.locations(everything)]


def _encode(
    images: _Images, part: slice, model: ImageEncoder, batch_size: int, show_progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors, float32 [n, D] with NaN where there is none, and `Outcome` of each item of `part`, int8 [n]."""
    outcomes: list[int] = []
    read: list[np.ndarray] = []
    bar = tqdm(
        total=part.stop - part.start, desc="Encoding images", unit="item", disable=None if show_progress else True
    )
    with bar, ThreadPoolExecutor(READING_THREADS) as pool:
        for batch in _read_ahead(images.locations(part), model, batch_size, pool):
            inputs = [prepared for prepared, _ in batch if prepared is not None]
            outcomes.extend(outcome for _, outcome in batch)
            if inputs:
                read.append(model.encode(inputs))
            bar.update(len(batch))
    if not read:  # the width must be known all the same
        read.append(model.encode([model.prepare(import_pillow().new("RGB", (32, 32)))])[:0])
    found = np.concatenate(read)
    states = np.asarray(outcomes, dtype=np.int8)
    vectors = np.full((len(states), found.shape[1]), np.nan, np.float32)
    vectors[states == Outcome.READ] = found
    return vectors, states


def _read_ahead(
    locations: Iterator[list[Any]], model: ImageEncoder, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[Any, Outcome]]]:
    """Batches of what the model takes; the next batch is read while the model works on the present one."""

    def read(found: list[Any]) -> tuple[Any, Outcome]:
        picture, outcome = read_first(found)
        return None if picture is None else model.prepare(picture), outcome  # full size for as short as possible

    waiting = [pool.submit(read, found) for found in islice(locations, batch_size)]
    while waiting:
        following = [pool.submit(read, found) for found in islice(locations, batch_size)]
        yield [future.result() for future in waiting]
        waiting = following
