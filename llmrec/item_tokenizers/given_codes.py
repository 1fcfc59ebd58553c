"""Codes that others published, as an item tokenizer: given, nothing fitted.

So that the code sets of LETTER, LC-Rec and MiniOneRec can stand wherever an item tokenizer can. The saved folder holds
the codes and stands alone. Knows no vectors: codes of items that aren't in the published file can't be computed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

import numpy as np
import torch

from llmrec.data.item_order import ItemIndex
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, SettingsError, UnknownItemError
from llmrec.item_tokenizers.base import ItemTokenizer, QuantizedItems
from llmrec.item_tokenizers.item_vectors import ItemVectors
from llmrec.item_tokenizers.semantic_ids import SemanticIds, pack_item_ids, unpack_item_ids
from llmrec.processes import Processes


@dataclass(frozen=True)
class GivenCodesConfig:
    """No settings: the codes are all there is."""


class GivenCodesTokenizer(ItemTokenizer):
    """Looks the codes of known items up by item ID.

    `encode` takes embeddings as every item tokenizer does, of any modalities, but reads their item IDs alone: any of
    the known items in any order.

    Example:
        >>> tokenizer = GivenCodesTokenizer.from_index("Beauty.letter-index.json", dataset.item_ids)  # doctest: +SKIP
    """

    config_class = GivenCodesConfig
    modalities = ()
    encode_modalities = ()

    def __init__(self, config: GivenCodesConfig | None = None):
        super().__init__(config)
        self._given: SemanticIds | None = None
        self._index = ItemIndex(())

    @classmethod
    def from_semantic_ids(cls, semantic_ids: SemanticIds) -> Self:
        """Takes codes from wherever they come."""
        tokenizer = cls()
        tokenizer._take(semantic_ids)
        return tokenizer

    @classmethod
    def from_index(
        cls,
        path: str | Path,
        item_ids: Sequence[str],
        item_keys: Sequence[str] | None = None,
        codebook_sizes: int | Sequence[int] | None = None,
    ) -> Self:
        """Reads a published index file; arguments and errors as of `SemanticIds.from_index_json`.

        Raises:
            DataError: No such file of this catalogue.
            MissingPartError: No such file.
        """
        given = SemanticIds.from_index_json(path, item_ids, item_keys=item_keys, codebook_sizes=codebook_sizes)
        tokenizer = cls.from_semantic_ids(given)
        tokenizer.fit_report = {"items": given.num_items, "index": Path(path).name}
        return tokenizer

    @property
    def is_fitted(self) -> bool:
        """Whether it has codes."""
        return self._given is not None

    @property
    def semantic_ids(self) -> SemanticIds:
        """The codes as given, of all known items.

        Raises:
            SettingsError: None were given.
        """
        if self._given is None:
            raise SettingsError("no codes were given: make this item tokenizer by GivenCodesTokenizer.from_index()")
        return self._given

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes of each level, length L."""
        return self.semantic_ids.codebook_sizes

    def quantize(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings], *, processes: Processes | None = None
    ) -> QuantizedItems:
        """The given codes of known items. Collisions of the published file are kept.

        Args:
            embeddings: Any modalities; only the item IDs are read.
            processes: Not needed.

        Raises:
            UnknownItemError: An item isn't in the published file.
        """
        quantized = super().quantize(embeddings, processes=processes)
        if self.semantic_ids.policy != "extra_level":
            return quantized
        found = quantized.semantic_ids  # they have their counter: another one would be in vain
        return QuantizedItems(SemanticIds(found.item_ids, found.codes, found.codebook_sizes, "extra_level"), None)

    def quantize_catalogue(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings], *, processes: Processes | None = None
    ) -> QuantizedItems:
        """The same as `quantize`."""
        return self.quantize(embeddings, processes=processes)

    def _modalities_to_fit(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings]
    ) -> Mapping[str, ItemEmbeddings]:
        return self._modalities_to_encode(embeddings)

    def _modalities_to_encode(
        self, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings]
    ) -> Mapping[str, ItemEmbeddings]:
        modalities = {"items": embeddings} if isinstance(embeddings, ItemEmbeddings) else embeddings
        if not modalities:
            raise DataError("no embeddings were given: pass those of any modality, their item IDs are looked up")
        return modalities

    def _fit(self, vectors: ItemVectors, **_: object) -> NoReturn:
        raise SettingsError(
            "given codes can't be fitted: they come from a published index file, by GivenCodesTokenizer.from_index();"
            " to learn codes choose another item tokenizer"
        )

    def _quantize(self, vectors: ItemVectors, processes: Processes) -> tuple[np.ndarray, None]:
        try:
            rows = self._index.rows(vectors.item_ids)
        except UnknownItemError as error:
            raise UnknownItemError(
                f"{error}; given codes say nothing about other items, nothing was fitted: choose another item"
                " tokenizer, and fit it, to get codes for new items"
            ) from None
        return self.semantic_ids.codes[rows], None

    def _state(self) -> dict[str, torch.Tensor]:
        given = self.semantic_ids
        arrays = {
            "codes": given.codes,
            "codebook_sizes": np.array(given.codebook_sizes, dtype=np.int64),
            "has_counter": np.array([given.policy == "extra_level"]),
            **pack_item_ids(given.item_ids),
        }
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}

    def _load_state(self, state: dict[str, torch.Tensor], widths: dict[str, int]) -> None:
        arrays = {name: tensor.numpy() for name, tensor in state.items()}
        missing = {"codes", "codebook_sizes", "has_counter", "item_id_bytes", "item_id_ends"} - set(arrays)
        if missing:
            raise DataError(f"the weights don't fit: given codes need the tensor {min(missing)}")
        policy = "extra_level" if arrays["has_counter"].any() else "allow"
        sizes = tuple(arrays["codebook_sizes"].tolist())
        self._take(SemanticIds(unpack_item_ids(arrays), arrays["codes"], sizes, policy))

    def _take(self, semantic_ids: SemanticIds) -> None:
        self._given, self._index = semantic_ids, ItemIndex(semantic_ids.item_ids)
