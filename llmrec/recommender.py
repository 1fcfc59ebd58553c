"""Recommender: histories of item IDs in, item IDs out.

Joins what the other modules hold apart: the fine-tuned model, the text tokenizer, the codes of the items, their trie
and the prompt. It is saved as one folder, pushed to the Hub and loaded from either. Nothing here trains.
"""

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from llmrec.data.item_order import ItemIndex, check_item_order
from llmrec.data.recommendation import Recommendation, as_histories, check_k
from llmrec.errors import DataError, MissingPartError, SettingsError
from llmrec.generation.beam_search import SCOPES, beam_search
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.model_card import model_card
from llmrec.pretrained import load_text_tokenizer
from llmrec.recommender_folder import (
    CARD_NAME,
    ITEM_TOKENIZER_NAME,
    ITEMS_NAME,
    SEMANTIC_IDS_NAME,
    RecommenderConfig,
    check_others_can_load,
    download_folder,
    find_kind,
    load_adapter_model,
    load_full_model,
    push_folder,
    replace_parts,
)
from llmrec.tasks.next_item import NextItemTask
from llmrec.vocabulary import CodeVocabulary, find_code_head, has_code_rows, merge_code_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec.item_tokenizers.base import ItemTokenizer

logger = logging.getLogger(__name__)


class Recommender:
    """Recommends items of a catalogue by writing their codes.

    Args:
        model: A causal language model that knows the code tokens: with LoRA and code rows (`add_code_rows`,
            `add_lora`), with code rows alone, or a plain one.
        text_tokenizer: With the code tokens in it.
        semantic_ids: Codes of the catalogue.
        vocabulary: Token IDs of the codes.
        items: The catalogue in the same order: column "item_id", further columns ("title") as they come.
        task: Makes prompts of histories.
        config: What is saved about model and prompt.
        item_tokenizer: What made the codes, so that new items can be encoded; may be left out.

    Raises:
        ItemOrderError: Catalogue and codes are about other items, or in another order.
        SettingsError: Two of the parts don't fit each other.
    """

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
        self.semantic_ids = semantic_ids
        self.vocabulary = vocabulary
        self.items = items
        self.task = task
        self.item_tokenizer = item_tokenizer
        self.config = config
        self._check_parts()
        self.item_index = ItemIndex(semantic_ids.item_ids)
        self.titles: tuple[str, ...] = ("",) * len(items)
        if "title" in items.column_names:
            self.titles = tuple("" if title is None else str(title) for title in items["title"])
        self.trie = ItemTrie.from_semantic_ids(semantic_ids)
        self._device_trie = self.trie

    def _check_parts(self) -> None:
        check_item_order(self.items["item_id"][:], self.semantic_ids.item_ids, "the semantic IDs")
        described = {
            "codebook_sizes": (self.config.codebook_sizes, self.vocabulary.codebook_sizes, "the vocabulary"),
            "levels": (self.config.codebook_sizes, self.semantic_ids.codebook_sizes, "the semantic IDs"),
            "first_token_id": (self.config.first_token_id, self.vocabulary.first_token_id, "the text tokenizer"),
            "template": (self.config.template, self.task.template, "the task"),
            "max_history": (self.config.max_history, self.task.max_history, "the task"),
        }
        for name, (expected, found, where) in described.items():
            if expected != found:
                raise SettingsError(f"{name} is {expected!r} in the config, {found!r} in {where}: they don't fit")
        if self.config.scope not in SCOPES:
            raise SettingsError(f"unknown scope {self.config.scope!r}; known: {', '.join(SCOPES)}")
        end = self.vocabulary.first_token_id + self.vocabulary.num_tokens
        if has_code_rows(self.model):
            head = find_code_head(self.model)
            rows = (head.first_token_id, len(head.new_rows))
            if rows != (self.vocabulary.first_token_id, self.vocabulary.num_tokens):
                raise SettingsError(
                    f"the model has {rows[1]} code rows from token {rows[0]}, the vocabulary"
                    f" {self.vocabulary.num_tokens} from token {self.vocabulary.first_token_id}: they don't fit"
                )
        elif self.model.get_output_embeddings().weight.shape[0] < end:
            raise SettingsError(
                f"the model writes {self.model.get_output_embeddings().weight.shape[0]} tokens, the codes reach up to"
                f" token {end - 1}: it doesn't know them"
            )

    @property
    def is_adapter(self) -> bool:
        """Whether the model is LoRA on a base model, which is then not part of the folder."""
        return hasattr(self.model, "peft_config")

    def recommend(
        self,
        history: Sequence[str] | Sequence[Sequence[str]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        num_beams: int | None = None,
        batch_size: int = 16,
        on_unknown: str = "error",
        progress: bool | None = None,
    ) -> Any:
        """Recommends the next items for one history or for many.

        A history alone gives what it gives among others (floating-point sums in another order aside: scores agree to
        about 1e-5 in float32). Every answer is an item of the catalogue.

        Args:
            history: Item IDs, oldest first, or a list of such lists. The latest `config.max_history` make the prompt.
                Repeats are fine. An empty history gets what the model holds likely for anyone.
            k: Number of items wanted.
            exclude_seen: Leave out all items of the history (also those too old for the prompt).
            num_beams: Width of the search, at least k. By default max(20, 2 k): 20 is the width LETTER and LC-Rec
                report with for k = 10, and an item whose first codes rank below the first k prefixes is still found.
                Never more than there are items; then the search is exhaustive.
            batch_size: Histories searched at once; those of like length are put together.
            on_unknown: What to do about item IDs that the catalogue doesn't hold: "error", or "skip" (the log counts
                them).
            progress: Whether to show a progress bar; None: for many batches, where standard error is a terminal.

        Returns:
            For one history a list of `Recommendation`, best first; for many a list of such lists. Scores are sums of
            the natural log-probabilities of the codes. Fewer than k where fewer items are left. Items that share
            their codes share the score, and stand in catalogue order.

        Raises:
            DataError: `history` is a string, or holds something other than item IDs; or the model computes NaN.
            UnknownItemError: An item ID that the catalogue doesn't hold, unless `on_unknown` is "skip".
            SettingsError: k below 1, fewer beams than k, or an empty history with a template without any text.
        """
        k = check_k(k)
        if num_beams is not None and num_beams < k:
            raise SettingsError(
                f"num_beams is {num_beams}, k is {k}: a search of {num_beams} beams can't give {k} items"
            )
        if batch_size < 1 or on_unknown not in ("error", "skip"):
            raise SettingsError(
                f"batch_size is {batch_size} (at least 1), on_unknown is {on_unknown!r} ('error' or 'skip')"
            )
        histories, single = as_histories(history)
        rows = self._rows_of(histories, skip_unknown=on_unknown == "skip")
        prompts = [self.task.prompt(of_user) for of_user in rows]
        if not all(prompts):
            raise SettingsError(
                f"an empty history makes an empty prompt with the template {self.task.template!r}: give it some text"
            )
        width = min(max(20, 2 * k) if num_beams is None else num_beams, self.trie.num_leaves)

        order = sorted(range(len(prompts)), key=lambda request: -len(prompts[request]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        answers: list[list[Recommendation]] = [[] for _ in prompts]
        hide = (len(batches) < 2 or None) if progress is None else not progress
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in tqdm(batches, desc="recommend", unit="batch", disable=hide):
                seen = [rows[request] if exclude_seen else rows[request][:0] for request in batch]
                leaves, scores = self._search([prompts[request] for request in batch], seen, width)
                for place, request in enumerate(batch):
                    answers[request] = self._answer(leaves[place], scores[place], set(seen[place].tolist()), k)
        finally:
            self.model.train(was_training)
        return answers[0] if single else answers

    def _rows_of(self, histories: list[list[str]], *, skip_unknown: bool) -> list[np.ndarray]:
        """Catalogue rows of each history, int64."""
        if skip_unknown:
            known = [[item_id for item_id in history if item_id in self.item_index] for history in histories]
            num_skipped = sum(map(len, histories)) - sum(map(len, known))
            if num_skipped:
                logger.warning("skipped %d unknown item IDs in %d histories", num_skipped, len(histories))
            histories = known
        return [self.item_index.rows(history) for history in histories]

    def _search(self, prompts: list[list[int]], seen: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Leaves int64 [B, K] and scores float32 [B, K] of a batch of prompts."""
        device = self.model.device
        if self._device_trie.device != device:
            self._device_trie = self.trie.to(device)
        longest = max(map(len, prompts))
        input_ids = torch.full((len(prompts), longest), self.text_tokenizer.pad_token_id or 0)
        attention_mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, longest - len(prompt) :] = 1
        denied = self.trie.denied_leaves(seen)
        output = beam_search(
            self.model,
            input_ids.to(device),
            attention_mask.to(device),
            self._device_trie,
            self.vocabulary,
            num_beams=width,
            scope=self.config.scope,
            denied=None if denied is None else denied.to(device),
        )
        scores = output.scores.cpu().numpy()
        if np.isnan(scores).any():
            raise DataError(
                "the model computes NaN: its weights are damaged, or its type overflows; try dtype=float32"
            )
        return output.leaves.cpu().numpy(), scores

    def _answer(self, leaves: np.ndarray, scores: np.ndarray, seen: set[int], k: int) -> list[Recommendation]:
        """The first k items of the leaves of one request."""
        answer: list[Recommendation] = []
        for leaf, score in zip(leaves.tolist(), scores.tolist(), strict=True):
            if leaf < 0:
                break
            start, end = self.trie.item_starts[leaf], self.trie.item_starts[leaf + 1]
            for row in self.trie.items[start:end].tolist():
                if row not in seen:
                    answer.append(Recommendation(self.semantic_ids.item_ids[row], score, self.titles[row]))
        return answer[:k]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes all that `recommend` needs into one folder, in JSON, safetensors and Parquet.

        `recommender_config.json`; the model (`adapter_model.safetensors` and `adapter_config.json` with LoRA and code
        rows, or `model.safetensors` and `config.json`); the text tokenizer; `semantic_ids.safetensors`;
        `items.parquet`; `item_tokenizer/`; the model card `README.md`. The folder appears whole or not at all. A
        recommender that stood there before is replaced; other files stay.
        """
        with replace_parts(folder) as temporary:
            self._save_model(temporary)
            self.text_tokenizer.save_pretrained(temporary)
            self.semantic_ids.save(temporary / SEMANTIC_IDS_NAME)
            pq.write_table(cast(pa.Table, self.items.with_format("arrow")[:]), temporary / ITEMS_NAME)
            if self.item_tokenizer is not None:
                self.item_tokenizer.save_pretrained(temporary / ITEM_TOKENIZER_NAME)
            (temporary / CARD_NAME).write_text(self._card(), encoding="utf-8")
            self._saved_config().save(temporary)

    def _saved_config(self) -> RecommenderConfig:
        """The config, which `config` may have been set anew since, with the item tokenizer that is really there."""
        name = None if self.item_tokenizer is None else type(self.item_tokenizer).__name__
        return replace(self.config, item_tokenizer=name)

    def _card(self, name: str = "<folder>") -> str:
        return model_card(self._saved_config(), self.semantic_ids, is_adapter=self.is_adapter, name=name)

    def _save_model(self, folder: Path) -> None:
        if self.is_adapter:
            from llmrec.adapter import save_adapter

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
    ) -> "Recommender":
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
        folder = Path(name)
        if not folder.is_dir():
            if str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
                raise MissingPartError(f"no recommender folder {str(name)!r}")
            folder = download_folder(str(name), revision=revision, token=token)
        config = RecommenderConfig.load(folder)
        kind = find_kind(folder)
        item_tokenizer = None
        if config.item_tokenizer is not None:
            from llmrec.item_tokenizers.base import ItemTokenizer

            if not (folder / ITEM_TOKENIZER_NAME).is_dir():
                raise MissingPartError(
                    f"{folder / ITEM_TOKENIZER_NAME} is missing: the {config.item_tokenizer} is there"
                )
            item_tokenizer = ItemTokenizer.from_pretrained(folder / ITEM_TOKENIZER_NAME)
        text_tokenizer = load_text_tokenizer(str(folder))
        semantic_ids = SemanticIds.load(folder / SEMANTIC_IDS_NAME)
        try:
            items = datasets.Dataset(pq.read_table(folder / ITEMS_NAME))
        except pa.ArrowInvalid as error:
            raise DataError(f"{folder / ITEMS_NAME} can't be read: {error}") from error
        vocabulary = CodeVocabulary.from_tokenizer(text_tokenizer, config.codebook_sizes)
        task = NextItemTask(
            text_tokenizer, vocabulary, semantic_ids, template=config.template, max_history=config.max_history
        )
        arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if kind == "adapter":
            model = load_adapter_model(folder, config, base_model=base_model, token=token, **arguments)
        else:
            model = load_full_model(folder, **arguments)
        if device is None:
            device = torch.accelerator.current_accelerator() or torch.device("cpu")
        model = model.to(device).eval()
        return cls(model, text_tokenizer, semantic_ids, vocabulary, items, task, config, item_tokenizer)

    def merge(self) -> "Recommender":
        """The same recommender with LoRA and code rows written into the model: a plain transformers model.

        Logits are the same. This one stays as it is; both take memory.

        Raises:
            SettingsError: The base model is loaded in 4 or 8 bits.
        """
        if not self.is_adapter and not has_code_rows(self.model):
            return self
        model = copy.deepcopy(self.model)
        if self.is_adapter:
            from llmrec.adapter import merge_adapter

            model = merge_adapter(model)
        else:
            merge_code_rows(model)
        return Recommender(
            model.eval(),
            self.text_tokenizer,
            self.semantic_ids,
            self.vocabulary,
            self.items,
            self.task,
            self.config,
            self.item_tokenizer,
        )

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
            (folder / CARD_NAME).write_text(self._card(repo_id), encoding="utf-8")
            return push_folder(
                folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )
