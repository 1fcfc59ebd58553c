"""What every item tokenizer offers: `fit`, `encode`, `save_pretrained`, `from_pretrained`.

Knows about modalities, widths and the saved folder. Doesn't know how codes are learned. To add a method: one file with
its config, module and losses, a subclass of `ItemTokenizer`, one line in `item_tokenizer_classes`.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llmrec.data.item_order import check_item_order
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, MissingPartError, SettingsError
from llmrec.files import atomic_file, atomic_folder, check_format, read_json, write_json
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.uniqueness import CodeGeometry

FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


class NotFittedError(SettingsError):
    """An item tokenizer was asked for codes before `fit`."""


class ItemTokenizer(ABC):
    """Turns the embeddings of an item into a tuple of codes.

    A subclass names its settings dataclass and modalities, and implements the methods with a leading underscore.

    Args:
        config: The method's settings; its defaults where None.

    Attributes:
        widths: Modality to width of its vectors, as fitted; empty before `fit`.
        fit_report: What `fit` measured (JSON values only: losses, collision rate, epoch), for model cards.
    """

    config_class: ClassVar[type]
    modalities: ClassVar[tuple[str, ...]] = ("text",)
    """What `fit` needs."""
    encode_modalities: ClassVar[tuple[str, ...]] = ("text",)
    """What `encode` needs; more may be passed and isn't looked at."""

    def __init__(self, config: Any = None):
        self.config = self.config_class() if config is None else config
        if not isinstance(self.config, self.config_class):
            raise SettingsError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not {type(self.config).__name__}"
            )
        self.widths: dict[str, int] = {}
        self.fit_report: dict[str, Any] = {}

    @property
    def is_fitted(self) -> bool:
        """Whether `encode` can be called."""
        return bool(self.widths)

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level, length L."""

    def fit(
        self,
        embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings],
        *,
        progress: bool | None = None,
        checkpoint_folder: str | Path | None = None,
    ) -> Self:
        """Learns codebooks from the items of a catalogue. Deterministic by the config's seed, on one machine.

        Args:
            embeddings: One `ItemEmbeddings` a modality, by name, all about the same items in the same order; a single
                one where the method has one modality.
            progress: Whether to show a progress bar; None: where standard error is a terminal.
            checkpoint_folder: Where to keep the state after every few epochs. A fit that was killed goes on from
                there, and ends in the same weights, when it is started again with the same data and settings.

        Returns:
            Itself.

        Raises:
            DataError: A modality is missing, or there is no item.
            ItemOrderError: Two modalities are about other items, or in another order.
        """
        modalities = self._by_modality(embeddings, self.modalities)
        first_name = self.modalities[0]
        item_ids = modalities[first_name].item_ids
        if not item_ids:
            raise DataError(f"can't fit {type(self).__name__} on no items")
        for name, of_modality in modalities.items():
            check_item_order(item_ids, of_modality.item_ids, f"the {name} embeddings (against {first_name})")
        widths = {name: of_modality.width for name, of_modality in modalities.items()}
        folder = None if checkpoint_folder is None else Path(checkpoint_folder)
        vectors = {name: of_modality.vectors for name, of_modality in modalities.items()}
        self._fit(vectors, progress=progress, checkpoint_folder=folder)
        self.widths = widths
        return self

    def encode(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings], *, policy: str = "min_cost"
    ) -> SemanticIds:
        """The semantic IDs of items, each by its own vectors alone; then made unique among these items.

        The codes before the uniqueness policy don't depend on which other items are encoded with it.

        Args:
            embeddings: As for `fit`, of the modalities in `encode_modalities`; any items.
            policy: What to do about equal codes: see `SemanticIds.make_unique`.

        Raises:
            NotFittedError: `fit` or `from_pretrained` comes first.
            DataError: A modality is missing, or has another width than it was fitted with.
        """
        if not self.is_fitted:
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted: call fit() or load one by from_pretrained()"
            )
        modalities = self._by_modality(embeddings, self.encode_modalities)
        item_ids = modalities[self.encode_modalities[0]].item_ids
        for name, of_modality in modalities.items():
            check_item_order(item_ids, of_modality.item_ids, f"the {name} embeddings")
            if of_modality.width != self.widths[name]:
                raise DataError(
                    f"the {name} embeddings have width {of_modality.width}, this {type(self).__name__} was fitted with"
                    f" {self.widths[name]}: use the encoder that it was fitted with"
                )
        codes, geometry = self._encode({name: of_modality.vectors for name, of_modality in modalities.items()})
        semantic_ids = SemanticIds(item_ids, codes, self.codebook_sizes)
        return semantic_ids.make_unique(policy, geometry=geometry)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`; the folder appears whole or not at all.

        Raises:
            NotFittedError: There is nothing to save yet.
        """
        if not self.is_fitted:
            raise NotFittedError(f"this {type(self).__name__} is not fitted: there is nothing to save")
        config = {
            "format_version": FORMAT_VERSION,
            "class": type(self).__name__,
            "widths": self.widths,
            "settings": dataclasses.asdict(self.config),
            "fit_report": self.fit_report,
        }
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self._state().items()}
        with atomic_folder(folder) as temporary:
            write_json(temporary / CONFIG_NAME, config)
            with atomic_file(temporary / WEIGHTS_NAME) as path:  # also gives the file ordinary permissions
                save_file(weights, path)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Loads what `save_pretrained` wrote. `ItemTokenizer.from_pretrained` finds the class by its name.

        Raises:
            MissingPartError: The folder, or a file of it, is missing.
            DataError: Not such a folder, one of a later llmrec, or one of another item tokenizer than `cls`.
        """
        folder = Path(folder)
        content = read_json(folder / CONFIG_NAME)
        check_format(content, FORMAT_VERSION, folder / CONFIG_NAME)
        classes = item_tokenizer_classes()
        found = classes.get(content.get("class"))
        if found is None or not issubclass(found, cls):
            wanted = ", ".join(sorted(classes)) if cls is ItemTokenizer else cls.__name__
            raise DataError(f"{folder} holds a {content.get('class')!r}, expected {wanted}")
        if not (folder / WEIGHTS_NAME).is_file():
            raise MissingPartError(f"{folder / WEIGHTS_NAME} is missing: without it nothing can be loaded")
        try:
            tokenizer = found(found.config_class(**content["settings"]))
        except (TypeError, KeyError) as error:
            raise DataError(
                f"{folder / CONFIG_NAME} doesn't hold the settings of {found.__name__}: {error}"
            ) from error
        widths = {name: int(width) for name, width in content["widths"].items()}
        tokenizer._load_state(load_file(folder / WEIGHTS_NAME), widths)
        tokenizer.widths, tokenizer.fit_report = widths, content.get("fit_report", {})
        return tokenizer

    def _by_modality(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings], needed: tuple[str, ...]
    ) -> dict[str, ItemEmbeddings]:
        if isinstance(embeddings, ItemEmbeddings):
            embeddings = {needed[0]: embeddings}
        missing = [name for name in needed if name not in embeddings]
        if missing:
            raise DataError(
                f"{type(self).__name__} needs the modalities {', '.join(needed)}; {', '.join(missing)} is missing:"
                f" pass {{{', '.join(f'{name!r}: ...' for name in needed)}}}"
            )
        return {name: embeddings[name] for name in needed}

    @abstractmethod
    def _fit(self, vectors: dict[str, np.ndarray], *, progress: bool | None, checkpoint_folder: Path | None) -> None:
        """Learns from float32 [N, D] arrays of at least one row, one a modality."""

    @abstractmethod
    def _encode(self, vectors: dict[str, np.ndarray]) -> tuple[np.ndarray, CodeGeometry]:
        """Codes int32 [N, L] by nearest code, and what distances are computed from."""

    @abstractmethod
    def _state(self) -> dict[str, torch.Tensor]:
        """All tensors that `_encode` needs, by name."""

    @abstractmethod
    def _load_state(self, state: dict[str, torch.Tensor], widths: dict[str, int]) -> None:
        """Takes what `_state` gave; raises `DataError` on a missing or wrong tensor."""


def item_tokenizer_classes() -> dict[str, type[ItemTokenizer]]:
    """The one table in which a saved folder finds its class."""
    from llmrec.item_tokenizers.letter import LetterTokenizer
    from llmrec.item_tokenizers.rq_vae import RQVAETokenizer

    return {"LetterTokenizer": LetterTokenizer, "RQVAETokenizer": RQVAETokenizer}
