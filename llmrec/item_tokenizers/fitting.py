"""From a data set to saved semantic IDs: what `tokenizers/fit.py`, the recipes and the command line share.

Loads items, makes their embeddings, fits an item tokenizer, makes the codes unique, measures them, saves all of it.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrec.data.interactions import InteractionDataset
from llmrec.data.loading import load_dataset_from
from llmrec.data.splits import leave_one_out
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.embeddings.collaborative import SASRec, SASRecConfig
from llmrec.embeddings.text import embed_text
from llmrec.errors import SettingsError
from llmrec.files import write_json
from llmrec.item_tokenizers.base import ItemTokenizer
from llmrec.item_tokenizers.diagnostics import CodeDiagnostics, diagnose
from llmrec.item_tokenizers.fit_loop import CHECKPOINT_NAME
from llmrec.item_tokenizers.letter import LetterTokenizer
from llmrec.item_tokenizers.rq_vae import RQVAETokenizer
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.settings import read_settings, settings_from

logger = logging.getLogger(__name__)

METHODS: dict[str, type[ItemTokenizer]] = {"letter": LetterTokenizer, "rq_vae": RQVAETokenizer}
TOKENIZER_FOLDER = "item_tokenizer"
SEMANTIC_IDS_FILE = "semantic_ids.safetensors"
SASREC_FOLDER = "sasrec"
TRAIN_SASREC = "sasrec"


@dataclass(frozen=True)
class FitSettings:
    """What a settings file of `tokenizers/` holds.

    Attributes:
        method: "letter" or "rq_vae".
        dataset: As `load_dataset_from` takes it; paths from the folder the command is started in.
        dataset_options: Its keyword arguments.
        text: Keyword arguments of `embed_text`: encoder, fields, ...
        collaborative: Where the collaborative vectors come from, for methods that take them: a `.npy` (row i is item
            i) or `.safetensors` file of embeddings, the folder of a saved SASRec, or "sasrec": one is trained here, on
            the training part of a leave-one-out split.
        collaborative_width: Reduces them to that many values; LETTER needs `codebook_dim`.
        sasrec: Fields of `SASRecConfig`, for "sasrec".
        item_tokenizer: Fields of the method's config.
        uniqueness_policy: See `SemanticIds.make_unique`.

    Raises:
        SettingsError: Unknown method, or a setting that fits none.
    """

    method: str
    dataset: str
    dataset_options: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    collaborative: str | None = None
    collaborative_width: int | None = None
    sasrec: dict[str, Any] = field(default_factory=dict)
    item_tokenizer: dict[str, Any] = field(default_factory=dict)
    uniqueness_policy: str = "min_cost"

    def __post_init__(self) -> None:
        self.new_tokenizer()  # refuses unknown methods and settings before any work
        needs_collaborative = "collaborative" in METHODS[self.method].modalities
        if needs_collaborative and self.collaborative is None:
            raise SettingsError(f"{self.method} needs collaborative vectors: set collaborative (a file, or 'sasrec')")
        if not needs_collaborative and self.collaborative is not None:
            raise SettingsError(f"{self.method} takes no collaborative vectors: remove the setting collaborative")
        if self.sasrec and self.collaborative != TRAIN_SASREC:
            raise SettingsError(f"sasrec settings are given, but collaborative is {self.collaborative!r}: remove one")
        settings_from(SASRecConfig, self.sasrec, "sasrec")

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

    def save(self, folder: str | Path) -> None:
        """Writes `item_tokenizer/`, `semantic_ids.safetensors` and `diagnostics.json` into a folder."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        self.semantic_ids.save(folder / SEMANTIC_IDS_FILE)
        content = {"before": dataclasses.asdict(self.before), "after": dataclasses.asdict(self.after)}
        write_json(folder / "diagnostics.json", {"format_version": 1, **content})


def new_item_tokenizer(method: str, settings: Mapping[str, Any]) -> ItemTokenizer:
    """An unfitted item tokenizer by the name of its method and the fields of its config.

    Raises:
        SettingsError: Unknown method or field.
    """
    if method not in METHODS:
        raise SettingsError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    config_class = METHODS[method].config_class
    return METHODS[method](settings_from(config_class, settings, f"item_tokenizer ({config_class.__name__})"))


def fit_item_tokenizer(
    tokenizer: ItemTokenizer,
    embeddings: Mapping[str, ItemEmbeddings],
    *,
    policy: str = "min_cost",
    progress: bool | None = None,
    checkpoint_folder: str | Path | None = None,
) -> FittedItems:
    """Fits, encodes, makes unique and measures. Arguments as in `ItemTokenizer.fit` and `encode`."""
    tokenizer.fit(embeddings, progress=progress, checkpoint_folder=checkpoint_folder)
    semantic_ids = tokenizer.encode(embeddings, policy=policy)
    before = diagnose(tokenizer.encode(embeddings, policy="allow"))
    logger.info("uniqueness: %s", semantic_ids.report)
    return FittedItems(tokenizer, semantic_ids, before, diagnose(semantic_ids))


def make_embeddings(
    settings: FitSettings, dataset: InteractionDataset, output_folder: Path
) -> dict[str, ItemEmbeddings]:
    """The embeddings that the method of these settings needs, by modality, in catalogue order.

    Args:
        settings: See `FitSettings`.
        dataset: The catalogue, and the histories that a SASRec is trained on.
        output_folder: Where a SASRec that was trained here is saved, in `sasrec/`.
    """
    embeddings = {"text": embed_text(dataset.items, **settings.text)}
    if settings.collaborative is None:
        return embeddings
    source = Path(settings.collaborative)
    if settings.collaborative == TRAIN_SASREC:
        splits = leave_one_out(dataset)
        config = settings_from(SASRecConfig, settings.sasrec, "sasrec")
        sasrec = SASRec.fit(splits.train, config, splits.validation)
        sasrec.save_pretrained(output_folder / SASREC_FOLDER)
        collaborative = sasrec.item_embeddings()
    elif source.is_dir():
        collaborative = SASRec.from_pretrained(source).item_embeddings()
        collaborative.check_order(dataset.item_ids, f"the SASRec in {source}")
    else:
        collaborative = ItemEmbeddings.load(source, item_ids=dataset.item_ids)
    if settings.collaborative_width is not None and settings.collaborative_width != collaborative.width:
        collaborative = collaborative.reduce(settings.collaborative_width)
    return embeddings | {"collaborative": collaborative}


def fit_from_settings(
    settings: FitSettings, output_folder: str | Path, *, progress: bool | None = None, resume: bool = False
) -> FittedItems:
    """Does all that a settings file asks for and saves the result into `output_folder`.

    Args:
        settings: See `FitSettings`.
        output_folder: Gets what `FittedItems.save` writes.
        progress: Whether to show progress bars; None: on a terminal.
        resume: Whether to keep a checkpoint in `output_folder` while fitting, and go on from one that is there.
    """
    output_folder = Path(output_folder)
    tokenizer = settings.new_tokenizer()
    dataset = load_dataset_from(settings.dataset, **settings.dataset_options)
    embeddings = make_embeddings(settings, dataset, output_folder)
    fitted = fit_item_tokenizer(
        tokenizer,
        embeddings,
        policy=settings.uniqueness_policy,
        progress=progress,
        checkpoint_folder=output_folder if resume else None,
    )
    fitted.save(output_folder)
    (output_folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    return fitted
