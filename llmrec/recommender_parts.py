"""A recommender as a thing that is saved, loaded, merged and pushed: its parts, and the folder they become.

What it does with them, recommending, is in `llmrec.recommender`. File names and the Hub's client are in
`llmrec.recommender_folder`.
"""

import copy
import os
import threading
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from llmrec.adapter import is_adapter, is_quantized, merge_adapter, merge_quantized, save_adapter
from llmrec.data.item_order import ItemIndex
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.model_card import model_card
from llmrec.pretrained import load_base_model
from llmrec.recommendation.catalogue import Catalogue
from llmrec.recommendation.catalogue_search import one_at_a_time
from llmrec.recommender_folder import (
    CARD_NAME,
    ITEM_TOKENIZER_NAME,
    ITEMS_NAME,
    SEMANTIC_IDS_NAME,
    RecommenderConfig,
    check_others_can_load,
    check_parts,
    find_folder,
    push_folder,
    read_folder,
    replace_parts,
)
from llmrec.tasks.next_item import NextItemTask
from llmrec.vocabulary import CodeVocabulary, has_code_rows, merge_code_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec.item_tokenizers.base import ItemTokenizer

_PROBE_TOKENS = 128  # of a prompt on which two precisions of one model are compared


class RecommenderParts:
    """The parts of a `Recommender`, which says what they are."""

    def __init__(
        self,
        model: Any,
        text_tokenizer: "PreTrainedTokenizerBase",
        semantic_ids: SemanticIds,
        vocabulary: CodeVocabulary,
        items: datasets.Dataset,
        task: NextItemTask,
        config: RecommenderConfig,
        item_tokenizer: "ItemTokenizer | None" = None,
    ):
        self.model = model
        self.text_tokenizer = text_tokenizer
        self.vocabulary = vocabulary
        self.item_tokenizer = item_tokenizer
        self.config = config
        # Whoever answers takes this reference once: `add_items` and `remove_items` swap it.
        self._catalogue = Catalogue.of(semantic_ids, items, task)
        self._changes = threading.Lock()
        check_parts(config, model, vocabulary, semantic_ids, task)

    @property
    def is_adapter(self) -> bool:
        """Whether LoRA, or code rows alone, were trained on a base model, which is then not part of the folder."""
        return is_adapter(self.model)

    @property
    def catalogue(self) -> Catalogue:
        """All about the items as they are now; its parts belong together, whatever is added or removed meanwhile."""
        return self._catalogue

    @property
    def semantic_ids(self) -> SemanticIds:
        """IDs and codes of the catalogue as it is now."""
        return self._catalogue.semantic_ids

    @property
    def items(self) -> datasets.Dataset:
        """The catalogue as it is now, in the order of the codes."""
        return self._catalogue.items

    @property
    def item_index(self) -> ItemIndex:
        """Item IDs to catalogue rows."""
        return self._catalogue.item_index

    @property
    def titles(self) -> tuple[str, ...]:
        """Title of each item, "" where it has none."""
        return self._catalogue.titles

    @property
    def trie(self) -> ItemTrie:
        """Trie of the codes, on the CPU."""
        return self._catalogue.trie

    @property
    def task(self) -> NextItemTask:
        """Makes prompts of histories."""
        return self._catalogue.task

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes all that `recommend` needs into one folder, in JSON, safetensors and Parquet.

        `recommender_config.json`; the model (`adapter_model.safetensors` and `adapter_config.json` with LoRA and code
        rows, or `model.safetensors` and `config.json`); the text tokenizer; `semantic_ids.safetensors`;
        `items.parquet`; `item_tokenizer/`; the model card `README.md`. The folder appears whole or not at all. A
        recommender that stood there before is replaced; other files stay.
        """
        catalogue = self._catalogue
        with replace_parts(folder) as temporary:
            self._save_model(temporary)
            self.text_tokenizer.save_pretrained(temporary)
            catalogue.semantic_ids.save(temporary / SEMANTIC_IDS_NAME)
            pq.write_table(cast(pa.Table, catalogue.items.with_format("arrow")[:]), temporary / ITEMS_NAME)
            if self.item_tokenizer is not None:
                self.item_tokenizer.save_pretrained(temporary / ITEM_TOKENIZER_NAME)
            (temporary / CARD_NAME).write_text(self._card(catalogue), encoding="utf-8")
            self._saved_config().save(temporary)

    def _saved_config(self) -> RecommenderConfig:
        """The config, which `config` may have been set anew since, with the item tokenizer that is really there."""
        name = None if self.item_tokenizer is None else type(self.item_tokenizer).__name__
        return replace(self.config, item_tokenizer=name)

    def _card(self, catalogue: Catalogue, name: str = "<folder>") -> str:
        return model_card(self._saved_config(), catalogue.semantic_ids, is_adapter=self.is_adapter, name=name)

    def _save_model(self, folder: Path) -> None:
        if self.is_adapter:
            save_adapter(self.model, folder)
            return
        self.merge().model.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        base_model: str | None = None,
    ) -> Self:
        """Loads a recommender from a folder or from the Hub. No code of the repository is run.

        Args:
            name: A folder that `save_pretrained` wrote, or a Hub ID.
            revision: Branch, tag or commit, for Hub IDs.
            token: Access token, for private repositories.
            device: Where the model goes; by default the first accelerator, else the CPU.
            dtype: Type of the weights; by default the one they were saved in.
            base_model: Another place to take the base model of an adapter from.

        Raises:
            MissingPartError: No such folder or repository, or a part of it is missing: the message names it.
            DataError: A part can't be read.
            ItemOrderError, SettingsError: The parts don't fit each other.
        """
        folder = find_folder(str(name), revision=revision, token=token)
        arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        parts = read_folder(folder, base_model=base_model, token=token, **arguments)
        if device is None:
            device = torch.accelerator.current_accelerator() or torch.device("cpu")
        parts["model"] = parts["model"].to(device).eval()
        return cls(**parts)

    def merge(self) -> Self:
        """The same recommender with LoRA and code rows written into the model: a plain transformers model.

        Logits are the same. This one stays as it is; both take memory. Where the base was trained on in 4 or 8 bits,
        it is loaded again in the type that its other weights have, and the logits are those of the adapter on that;
        how far they are from those of the training run is logged (`merge_quantized`).

        Raises:
            MissingPartError: The base model, to be loaded again, isn't where the config says.
        """
        if not self.is_adapter and not has_code_rows(self.model):
            return self
        catalogue = self._catalogue
        with one_at_a_time(self.model):  # a search changes the head for its time
            if is_quantized(self.model):
                model = self._merged_from_quantized(catalogue)
            elif self.is_adapter:
                model = merge_adapter(copy.deepcopy(self.model))
            else:
                model = copy.deepcopy(self.model)
                merge_code_rows(model)
        return type(self)(
            model.eval(),
            self.text_tokenizer,
            catalogue.semantic_ids,
            self.vocabulary,
            catalogue.items,
            catalogue.task,
            self.config,
            self.item_tokenizer,
        )

    def _merged_from_quantized(self, catalogue: Catalogue) -> Any:
        name, revision = self.config.base_model, self.config.base_revision
        base = load_base_model(name, revision=revision, dtype=self.model.dtype).to(self.model.device)
        length = min(_PROBE_TOKENS, self.vocabulary.num_levels * catalogue.semantic_ids.num_items)
        tokens = self.vocabulary.token_ids(catalogue.semantic_ids.codes).flatten()[:length]
        return merge_quantized(self.model, base, torch.from_numpy(tokens).unsqueeze(0))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload recommender",
    ) -> str:
        """Pushes what `save_pretrained` writes to the Hub, as one commit: the repository then holds just that.

        Args:
            repo_id: "user/name"; made where it doesn't exist.
            private: Whether a new repository is private; by default what the account is set to.
            token: Access token; by default the one of `hf auth login`.
            revision: Branch to push to, made where it doesn't exist; by default the main one.
            commit_message: First line of the commit's message.

        Returns:
            Address of the repository.

        Raises:
            SettingsError: It is an adapter on a base model in a local folder, which nobody else has.
        """
        if self.is_adapter:
            check_others_can_load(self.config.base_model)
        with TemporaryDirectory() as name:
            folder = Path(name) / "recommender"
            self.save_pretrained(folder)
            (folder / CARD_NAME).write_text(self._card(self._catalogue, repo_id), encoding="utf-8")
            return push_folder(
                folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )
