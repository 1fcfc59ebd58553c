"""What every item tokenizer offers: `fit`, `encode`, `save_pretrained`, `from_pretrained`.

Knows about modalities, widths and the saved folder. Doesn't know how codes are learned. To add a method: one file with
its config, module and losses, a subclass of `ItemTokenizer`, one line in `item_tokenizer_classes`.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, MissingPartError, SettingsError
from llmrec.files import atomic_file, atomic_folder, check_format, read_json, write_json
from llmrec.item_tokenizers.item_vectors import ItemVectors
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.uniqueness import CodeGeometry
from llmrec.processes import Processes

Monitor = Callable[[int, dict[str, float]], None]
"""Called while fitting with the step that is done (an epoch, a level) and figures by name."""

FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


class NotFittedError(SettingsError):
    """An item tokenizer was asked for codes before `fit`."""


@dataclasses.dataclass(frozen=True)
class QuantizedItems:
    """Items with the codes that their own vectors lead to, before any uniqueness policy.

    Attributes:
        semantic_ids: Policy "allow": items may share their codes.
        geometry: What distances between items and codes are computed from; None where codes were given.
    """

    semantic_ids: SemanticIds
    geometry: CodeGeometry | None

    def make_unique(self, policy: str = "min_cost", *, counter_size: int | None = None) -> SemanticIds:
        """See `SemanticIds.make_unique`."""
        return self.semantic_ids.make_unique(policy, geometry=self.geometry, counter_size=counter_size)


class ItemTokenizer(ABC):
    """Turns the embeddings of an item into a tuple of codes.

    A subclass names its settings dataclass and modalities, and implements the methods with a leading underscore.

    Args:
        config: The method's settings; its defaults where None.

    Attributes:
        widths: Modality to width of its vectors, as fitted; empty before `fit`.
        fit_report: What `fit` measured (JSON values only: losses, collision rate, epoch), for model cards.
        fit_history: What was measured on the way, oldest first; of this process's `fit` only, not saved with it.
    """

    config_class: ClassVar[type]
    modalities: ClassVar[tuple[str, ...]] = ("text",)
    """What `fit` needs. Where it is one, a single one of any other name serves too; where none, any number of any."""
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
        self.fit_history: tuple[dict[str, float], ...] = ()

    @property
    def is_fitted(self) -> bool:
        """Whether `encode` can be called."""
        return bool(self.widths)

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level, length L."""

    def code_vectors(self) -> tuple[np.ndarray, ...]:
        """Codebook of each level, float32 [K_l, d]: an item is quantised to the sum of its L code vectors.

        Empty where codes have no vectors, as given ones.
        """
        return ()

    def fit(
        self,
        embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings],
        *,
        progress: bool | None = None,
        checkpoint_folder: str | Path | None = None,
        processes: Processes | None = None,
        monitor: Monitor | None = None,
    ) -> Self:
        """Learns codebooks from the items of a catalogue. Deterministic by the config's seed, on one machine.

        Args:
            embeddings: One `ItemEmbeddings` a modality, by name, all about the same items in the same order; a single
                one where the method has one modality. Memory-mapped ones are read a batch at a time.
            progress: Whether to show a progress bar; None: where standard error is a terminal.
            checkpoint_folder: Where to keep the state after every few epochs. A fit that was killed goes on from
                there, and ends in the same weights, when it is started again with the same data and settings.
            processes: Who fits together; all of them call this with the same arguments, and `batch_size` is that of
                all together. None: this process alone, on the first GPU or else the CPU.
            monitor: Called on the main process with what is measured while fitting: losses, collision rate, use of
                the codes.

        Returns:
            Itself.

        Raises:
            DataError: A modality is missing, or there is no item.
            ItemOrderError: Two modalities are about other items, or in another order.
        """
        vectors = ItemVectors.of(self._modalities_to_fit(embeddings))
        if not len(vectors):
            raise DataError(f"can't fit {type(self).__name__} on no items")
        folder = None if checkpoint_folder is None else Path(checkpoint_folder)
        processes = processes or Processes.alone()
        shown = progress if processes.is_main else False
        monitor = monitor if processes.is_main else None
        self._fit(vectors, progress=shown, checkpoint_folder=folder, processes=processes, monitor=monitor)
        self.widths = vectors.widths
        return self

    def encode(
        self,
        embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings],
        *,
        policy: str = "min_cost",
        processes: Processes | None = None,
    ) -> SemanticIds:
        """The semantic IDs of items, each by its own vectors alone; then made unique among these items.

        For items that join a catalogue use `extend`: it keeps clear of the codes that are taken.

        Args:
            embeddings: As for `fit`, of the modalities in `encode_modalities`; any items.
            policy: What to do about equal codes: see `SemanticIds.make_unique`.
            processes: Who shares the work; all of them call this, and all get the whole result. None: this one alone.

        Raises:
            NotFittedError: `fit` or `from_pretrained` comes first.
            DataError: A modality is missing, or has another width than it was fitted with.
        """
        return self.quantize(embeddings, processes=processes).make_unique(policy)

    def quantize(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings], *, processes: Processes | None = None
    ) -> QuantizedItems:
        """The codes of items before any uniqueness policy: they don't depend on which items are encoded together.

        Arguments and errors as for `encode`.
        """
        vectors = self._vectors_to_encode(embeddings)
        codes, geometry = self._quantize(vectors, processes or Processes.alone())
        return QuantizedItems(SemanticIds(vectors.item_ids, codes, self.codebook_sizes), geometry)

    def quantize_catalogue(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings], *, processes: Processes | None = None
    ) -> QuantizedItems:
        """The codes of the whole catalogue that it was fitted on.

        The same as `quantize`, save for methods that spread a catalogue evenly over the codes (balanced RQ-KMeans).
        """
        vectors = self._vectors_to_encode(embeddings)
        codes, geometry = self._quantize_catalogue(vectors, processes or Processes.alone())
        return QuantizedItems(SemanticIds(vectors.item_ids, codes, self.codebook_sizes), geometry)

    def extend(
        self, semantic_ids: SemanticIds, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings]
    ) -> SemanticIds:
        """Adds new items to a catalogue's semantic IDs: no present item changes its codes, none are used twice.

        Args:
            semantic_ids: Of the catalogue, made by this item tokenizer.
            embeddings: Of the new items alone, as for `encode`.

        Returns:
            The present items, then the new ones, under the same uniqueness policy.

        Raises:
            DataError: A new item's ID is in the catalogue already, or the semantic IDs have other levels.
        """
        new = self.quantize(embeddings)
        codes = new.semantic_ids
        return semantic_ids.append(codes.item_ids, codes.codes, geometry=new.geometry)

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

    def _modalities_to_fit(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings]
    ) -> Mapping[str, ItemEmbeddings]:
        return self._by_modality(embeddings, self.modalities)

    def _modalities_to_encode(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings]
    ) -> Mapping[str, ItemEmbeddings]:
        return self._by_modality(embeddings, self.encode_modalities)

    def _by_modality(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings], needed: tuple[str, ...]
    ) -> dict[str, ItemEmbeddings]:
        if isinstance(embeddings, ItemEmbeddings):
            embeddings = {needed[0]: embeddings}
        elif len(self.modalities) == len(embeddings) == 1:  # a method of one modality takes any, whatever its name
            embeddings = {needed[0]: next(iter(embeddings.values()))}
        missing = [name for name in needed if name not in embeddings]
        if missing:
            raise DataError(
                f"{type(self).__name__} needs the modalities {', '.join(needed)}; {', '.join(missing)} is missing:"
                f" pass {{{', '.join(f'{name!r}: ...' for name in needed)}}}"
            )
        return {name: embeddings[name] for name in needed}

    def _vectors_to_encode(self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings]) -> ItemVectors:
        if not self.is_fitted:
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted: call fit() or load one by from_pretrained()"
            )
        vectors = ItemVectors.of(self._modalities_to_encode(embeddings))
        for name, width in vectors.widths.items():
            if width != self.widths.get(name, width):
                raise DataError(
                    f"the {name} embeddings have width {width}, this {type(self).__name__} was fitted with"
                    f" {self.widths[name]}: use the encoder that it was fitted with"
                )
        return vectors

    @abstractmethod
    def _fit(
        self,
        vectors: ItemVectors,
        *,
        progress: bool | None,
        checkpoint_folder: Path | None,
        processes: Processes,
        monitor: Monitor | None,
    ) -> None:
        """Learns from one item or more; every process is given all of them."""

    @abstractmethod
    def _quantize(self, vectors: ItemVectors, processes: Processes) -> tuple[np.ndarray, CodeGeometry | None]:
        """Codes int32 [N, L] of all items by nearest code, and what distances are computed from; on every process."""

    def _quantize_catalogue(
        self, vectors: ItemVectors, processes: Processes
    ) -> tuple[np.ndarray, CodeGeometry | None]:
        """The same of the catalogue that it was fitted on."""
        return self._quantize(vectors, processes)

    @abstractmethod
    def _state(self) -> dict[str, torch.Tensor]:
        """All tensors that `_encode` needs, by name."""

    @abstractmethod
    def _load_state(self, state: dict[str, torch.Tensor], widths: dict[str, int]) -> None:
        """Takes what `_state` gave; raises `DataError` on a missing or wrong tensor."""


def item_tokenizer_classes() -> dict[str, type[ItemTokenizer]]:
    """The one table in which a saved folder finds its class."""
    from llmrec.item_tokenizers.given_codes import GivenCodesTokenizer
    from llmrec.item_tokenizers.letter import LetterTokenizer
    from llmrec.item_tokenizers.rq_kmeans import RQKMeansTokenizer
    from llmrec.item_tokenizers.rq_kmeans_plus import RQKMeansPlusTokenizer
    from llmrec.item_tokenizers.rq_vae import RQVAETokenizer
    from llmrec.item_tokenizers.simcit import SimCITTokenizer

    classes: tuple[type[ItemTokenizer], ...] = (
        GivenCodesTokenizer,
        LetterTokenizer,
        RQKMeansPlusTokenizer,
        RQKMeansTokenizer,
        RQVAETokenizer,
        SimCITTokenizer,
    )
    return {found.__name__: found for found in classes}
