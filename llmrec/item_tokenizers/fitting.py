"""From a data set to saved semantic IDs: what `tokenizers/fit.py`, the recipes and the command line share.

Loads items, makes their embeddings, fits an item tokenizer, makes the codes unique, measures them, saves all of it.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrec.data.interactions import InteractionDataset
from llmrec.data.loading import load_dataset_from
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.embeddings.sources import EmbeddingSource, make_embeddings
from llmrec.errors import SettingsError
from llmrec.files import write_json
from llmrec.item_tokenizers.base import ItemTokenizer, Monitor, QuantizedItems
from llmrec.item_tokenizers.diagnostics import CodeDiagnostics, diagnose
from llmrec.item_tokenizers.fit_loop import CHECKPOINT_NAME
from llmrec.item_tokenizers.given_codes import GivenCodesTokenizer
from llmrec.item_tokenizers.letter import LetterTokenizer
from llmrec.item_tokenizers.report.page import write_html_report
from llmrec.item_tokenizers.rq_kmeans import RQKMeansTokenizer
from llmrec.item_tokenizers.rq_kmeans_plus import RQKMeansPlusTokenizer
from llmrec.item_tokenizers.rq_vae import RQVAETokenizer
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.simcit import SimCITTokenizer
from llmrec.processes import Processes
from llmrec.settings import read_settings, settings_from

logger = logging.getLogger(__name__)

METHODS: dict[str, type[ItemTokenizer]] = {
    "rq_vae": RQVAETokenizer,
    "rq_kmeans": RQKMeansTokenizer,
    "rq_kmeans_plus": RQKMeansPlusTokenizer,
    "letter": LetterTokenizer,
    "simcit": SimCITTokenizer,
}
GIVEN_CODES = "given_codes"
TOKENIZER_FOLDER = "item_tokenizer"
SEMANTIC_IDS_FILE = "semantic_ids.safetensors"
DIAGNOSTICS_FILE = "diagnostics.json"
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class FitSettings:
    """What a settings file of `tokenizers/` holds.

    Attributes:
        method: "rq_vae", "rq_kmeans", "rq_kmeans_plus", "letter", "simcit", or "given_codes".
        dataset: As `load_dataset_from` takes it; paths from the folder the command is started in.
        dataset_options: Its keyword arguments.
        embeddings: Modality to where its vectors come from, `{from: text, ...}`: see `EmbeddingSource`. LETTER reads
            "text" and "collaborative", SimCIT any number under any names, the others one under any name.
        item_tokenizer: Fields of the method's config.
        index: The published index file (JSON), for "given_codes".
        uniqueness_policy: See `SemanticIds.make_unique`.
        log_with: Trackers of accelerate that get what is measured while fitting: "tensorboard", "wandb", "trackio".

    Raises:
        SettingsError: Unknown method, or a setting that fits none.
    """

    method: str
    dataset: str
    dataset_options: dict[str, Any] = field(default_factory=dict)
    embeddings: dict[str, Any] = field(default_factory=dict)
    item_tokenizer: dict[str, Any] = field(default_factory=dict)
    index: str | None = None
    uniqueness_policy: str = "min_cost"
    log_with: Sequence[str] = ()

    def __post_init__(self) -> None:
        sources = self.sources()
        if (self.method == GIVEN_CODES) != (self.index is not None):
            raise SettingsError(
                f"index is {self.index!r} and method {self.method!r}: given_codes, and only it, has an index file"
            )
        if self.method == GIVEN_CODES:
            if self.item_tokenizer:
                raise SettingsError("given_codes has no settings of an item tokenizer: remove item_tokenizer")
            return
        self.new_tokenizer()  # refuses unknown methods and settings before any work
        needed = METHODS[self.method].modalities
        if not sources or (len(needed) > 1 and set(sources) != set(needed)) or (len(needed) == 1 != len(sources)):
            any_names = "one modality" if needed else "one or more modalities"
            wanted = " and ".join(needed) if len(needed) > 1 else any_names
            raise SettingsError(
                f"{self.method} needs embeddings of {wanted}, found {', '.join(sources) or 'none'}: set embeddings,"
                " such as {text: {from: text, fields: [title]}}"
            )

    def sources(self) -> dict[str, EmbeddingSource]:
        """Where the vectors of each modality come from."""
        return {name: EmbeddingSource.from_settings(name, values) for name, values in self.embeddings.items()}

    def new_tokenizer(self) -> ItemTokenizer:
        """The unfitted item tokenizer that these settings describe."""
        return new_item_tokenizer(self.method, self.item_tokenizer)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "FitSettings":
        """Reads a settings file.

        Raises:
            MissingPartError: No such file.
            SettingsError: Not a mapping, or a setting that doesn't exist.
        """
        return settings_from(cls, read_settings(path), str(path))


@dataclass(frozen=True)
class FittedItems:
    """An item tokenizer with the semantic IDs of the catalogue it was fitted on.

    Attributes:
        tokenizer: Fitted.
        semantic_ids: After the uniqueness policy.
        before: Diagnostics of the codes before it.
        after: Diagnostics after it.
    """

    tokenizer: ItemTokenizer
    semantic_ids: SemanticIds
    before: CodeDiagnostics
    after: CodeDiagnostics

    def save(
        self,
        folder: str | Path,
        *,
        embeddings: Mapping[str, ItemEmbeddings] | None = None,
        titles: Sequence[str] | None = None,
    ) -> None:
        """Writes `item_tokenizer/`, `semantic_ids.safetensors`, `diagnostics.json` and `report.html` into a folder.

        Args:
            folder: Made where it isn't there.
            embeddings: Of the items; the first are what the report's map is drawn from.
            titles: Of the items, for the map.
        """
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        self.semantic_ids.save(folder / SEMANTIC_IDS_FILE)
        history = list(self.tokenizer.fit_history)
        content = {"before": dataclasses.asdict(self.before), "after": dataclasses.asdict(self.after)}
        write_json(folder / DIAGNOSTICS_FILE, {"format_version": 1, **content, "fit_history": history})
        write_html_report(
            folder / REPORT_FILE,
            title=f"{type(self.tokenizer).__name__} on {len(self.semantic_ids):,} items",
            before=self.before,
            after=self.after,
            semantic_ids=self.semantic_ids,
            map_embeddings=next(iter(embeddings.values())) if embeddings else None,
            item_titles=titles,
            history=history,
        )


def new_item_tokenizer(method: str, settings: Mapping[str, Any]) -> ItemTokenizer:
    """An unfitted item tokenizer by the name of its method and the fields of its config.

    Raises:
        SettingsError: Unknown method or field.
    """
    if method not in METHODS:
        raise SettingsError(f"unknown method {method!r}; known: {', '.join(METHODS)}, {GIVEN_CODES}")
    config_class = METHODS[method].config_class
    return METHODS[method](settings_from(config_class, settings, f"item_tokenizer ({config_class.__name__})"))


def fit_item_tokenizer(
    tokenizer: ItemTokenizer,
    embeddings: Mapping[str, ItemEmbeddings],
    *,
    policy: str = "min_cost",
    progress: bool | None = None,
    checkpoint_folder: str | Path | None = None,
    processes: Processes | None = None,
    monitor: Monitor | None = None,
) -> FittedItems:
    """Fits, encodes, makes unique and measures. Arguments as in `ItemTokenizer.fit` and `encode`."""
    tokenizer.fit(
        embeddings, progress=progress, checkpoint_folder=checkpoint_folder, processes=processes, monitor=monitor
    )
    quantized = tokenizer.quantize_catalogue(embeddings, processes=processes)
    return measure_codes(tokenizer, quantized, embeddings, policy=policy)


def measure_codes(
    tokenizer: ItemTokenizer,
    quantized: QuantizedItems,
    embeddings: Mapping[str, ItemEmbeddings],
    *,
    policy: str = "min_cost",
) -> FittedItems:
    """Makes the codes of a catalogue unique, and measures them before and after.

    Args:
        tokenizer: What the codes are from.
        quantized: Of the catalogue.
        embeddings: By name; in each of them the nearest neighbours of items are looked at.
        policy: See `SemanticIds.make_unique`.
    """
    semantic_ids = quantized.make_unique(policy)
    logger.info("uniqueness: %s", semantic_ids.report)
    before = diagnose(quantized.semantic_ids, geometry=quantized.geometry)
    after = diagnose(semantic_ids, geometry=quantized.geometry, neighbours=embeddings)
    return FittedItems(tokenizer, semantic_ids, before, after)


def fit_from_settings(
    settings: FitSettings,
    output_folder: str | Path,
    *,
    dataset: InteractionDataset | None = None,
    progress: bool | None = None,
    resume: bool = False,
    processes: Processes | None = None,
) -> FittedItems:
    """Does all that a settings file asks for and saves the result into `output_folder`.

    Args:
        settings: See `FitSettings`.
        output_folder: Gets what `FittedItems.save` writes, and collaborative models that were trained here.
        dataset: The data set, where it is loaded already (and filtered, maybe); None: as the settings say.
        progress: Whether to show progress bars; None: on a terminal.
        resume: Whether to keep checkpoints in `output_folder` while fitting, and go on from those that are there.
        processes: Who fits together; all of them call this, the main one writes. None: this one alone.
    """
    output_folder, processes = Path(output_folder), processes or Processes.alone()
    if dataset is None:
        dataset = load_dataset_from(settings.dataset, **settings.dataset_options)
    sources, policy = settings.sources(), settings.uniqueness_policy
    if settings.index is not None:
        given = GivenCodesTokenizer.from_index(settings.index, dataset.item_ids, item_keys=dataset.item_keys)
        embeddings = make_embeddings(sources, dataset, output_folder, processes=processes, resume=resume)
        fitted = measure_codes(given, QuantizedItems(given.semantic_ids, None), embeddings, policy=policy)
    else:
        tokenizer = settings.new_tokenizer()
        embeddings = make_embeddings(sources, dataset, output_folder, processes=processes, resume=resume)
        with trackers(settings.log_with, output_folder, processes) as monitor:
            fitted = fit_item_tokenizer(
                tokenizer,
                embeddings,
                policy=policy,
                progress=progress,
                checkpoint_folder=output_folder if resume else None,
                processes=processes,
                monitor=monitor,
            )
    if processes.is_main:
        fitted.save(output_folder, embeddings=embeddings, titles=dataset.titles)
        (output_folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    processes.barrier()
    return fitted


def embeddings_of(
    settings: FitSettings,
    dataset: InteractionDataset,
    folder: str | Path,
    *,
    processes: Processes | None = None,
) -> dict[str, ItemEmbeddings]:
    """The embeddings that a settings file names, for an item tokenizer that is fitted already.

    Args:
        settings: Those that the item tokenizer was fitted by. Its method and its own settings aren't looked at.
        dataset: The same catalogue and, where a collaborative model is among the sources, the same interactions.
        folder: What `fit_from_settings` wrote into. A collaborative model in it that was trained with the same
            settings on the same data is loaded; otherwise one is trained and saved there. Vectors of another training
            lie in another space than those that the item tokenizer knows: keep the folder.
        processes: Who shares the work; all of them call this. None: this one alone.

    Returns:
        Modality to embeddings, in the order of the catalogue.

    Raises:
        SettingsError: The settings name no embeddings.
        MissingPartError: A file of embeddings isn't there.
    """
    sources = settings.sources()
    if not sources:
        raise SettingsError(
            f"these settings of {settings.method!r} name no embeddings, so there is nothing to encode: pass the"
            " settings file that the item tokenizer was fitted by, or set embeddings"
        )
    return make_embeddings(sources, dataset, Path(folder), processes=processes, resume=True)


@contextlib.contextmanager
def trackers(names: Sequence[str], folder: Path, processes: Processes) -> Iterator[Monitor | None]:
    """Accelerate's trackers as a monitor of `ItemTokenizer.fit`; None where none are named.

    Args:
        names: Of trackers, as accelerate's `log_with`.
        folder: Where those that write files write them.
        processes: Who fits; all of them enter this.
    """
    if not names:
        yield None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(names), project_dir=str(folder), cpu=processes.device.type == "cpu")
    accelerator.init_trackers("llmrec")
    try:
        yield lambda step, figures: accelerator.log(figures, step=step)
    finally:
        accelerator.end_training()
