"""The first stages of a training: the data, split, and the codes of its items.

What takes long (embeddings, item tokenizer) is kept under the output folder and reused by the next run with the same
data and settings. Nothing here knows a language model.
"""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.data.interactions import InteractionDataset
from llmrec.data.loading import load_dataset_from
from llmrec.data.splits import DatasetSplits, leave_one_out, split_by_time
from llmrec.errors import SettingsError
from llmrec.files import read_json, write_json
from llmrec.item_tokenizers.base import ItemTokenizer
from llmrec.item_tokenizers.fitting import FitSettings, fit_from_settings
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.training.arguments import FinetuneArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ItemCodes:
    """What the item-tokenizer stage gives: the codes, and what made them where it is known."""

    semantic_ids: SemanticIds
    tokenizer: ItemTokenizer | None
    source: str


def prepare_data(arguments: FinetuneArguments) -> DatasetSplits:
    """Reads, filters and splits the data set."""
    files = {"items": arguments.items, "users": arguments.users}
    dataset = load_dataset_from(arguments.dataset, **{name: file for name, file in files.items() if file})
    if arguments.k_core:
        dataset = dataset.k_core(arguments.k_core)
    logger.info("%s", dataset.summary())
    if arguments.split == "leave_one_out":
        return leave_one_out(dataset)
    shares = arguments.split_fractions
    if len(shares) != 3:
        raise SettingsError(f"split_fractions is {shares}; give three shares: training, validation, test")
    return split_by_time(dataset, fractions=(shares[0], shares[1], shares[2]))


def prepare_item_codes(arguments: FinetuneArguments, dataset: InteractionDataset, folder: Path) -> ItemCodes:
    """Fits the item tokenizer, or loads what was fitted.

    Args:
        arguments: `item_tokenizer` says what.
        dataset: The catalogue. A settings file that names another data set is refused.
        folder: A fitted item tokenizer is kept here, and reused where data and settings are the same.
    """
    source = Path(str(arguments.item_tokenizer))
    if source.name.endswith(".json"):
        codes = SemanticIds.from_index_json(source, dataset.item_ids, item_keys=dataset.item_keys)
        return ItemCodes(codes.make_unique(), None, source.name)
    if source.is_dir():
        return _load_item_codes(source, dataset)
    settings = FitSettings.from_yaml(source)
    if settings.dataset != arguments.dataset:
        raise SettingsError(
            f"{source} is for the data set {settings.dataset!r}, the run is on {arguments.dataset!r}; name the same"
        )
    identity = _identity(dataset.fingerprint, dataclasses.asdict(settings))
    stamp = folder / "fitted_from.json"
    if stamp.is_file() and read_json(stamp).get("identity") == identity:
        logger.info("the item tokenizer in %s was fitted with the same data and settings: reused", folder)
        return _load_item_codes(folder, dataset)
    fitted = fit_from_settings(settings, folder, dataset=dataset)
    write_json(stamp, {"identity": identity, "settings": dataclasses.asdict(settings)})
    logger.info("%s", fitted.after)
    return _load_item_codes(folder, dataset)


def _load_item_codes(folder: Path, dataset: InteractionDataset) -> ItemCodes:
    codes = SemanticIds.load(folder / "semantic_ids.safetensors", item_ids=dataset.item_ids)
    tokenizer = ItemTokenizer.from_pretrained(folder / "item_tokenizer")
    return ItemCodes(codes, tokenizer, type(tokenizer).__name__)


def _identity(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
