"""Recommender: histories of item IDs in, item IDs out.

Joins what the other modules hold apart: the fine-tuned model, the text tokenizer, the codes of the items, their trie
and the prompt. It is saved as one folder, pushed to the Hub and loaded from either. Nothing here trains.
"""

import copy
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from llmrec.adapter import is_adapter, is_quantized, merge_adapter, merge_quantized, save_adapter
from llmrec.data.item_order import ItemIndex
from llmrec.data.recommendation import as_histories
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, SettingsError
from llmrec.generation.item_sets import ItemSet
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.model_card import model_card
from llmrec.pretrained import load_base_model
from llmrec.processes import device_of
from llmrec.recommendation.catalogue import Catalogue, NewItems
from llmrec.recommendation.catalogue_search import CatalogueSearch, one_at_a_time
from llmrec.recommendation.item_filters import ItemFilters, read_items
from llmrec.recommendation.request_batches import Requests
from llmrec.recommendation.search_settings import SearchSettings
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
from llmrec.tasks.item_search import SearchPrompts
from llmrec.tasks.next_item import NextItemTask
from llmrec.vocabulary import CodeVocabulary, has_code_rows, merge_code_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmrec.item_tokenizers.base import ItemTokenizer
    from llmrec.recommendation.batch import BatchSummary

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 128  # of a prompt on which two precisions of one model are compared


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

    def recommend(
        self,
        history: Sequence[str] | Sequence[Sequence[str]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        allow: Any = None,
        deny: Any = None,
        num_beams: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int = 0,
        num_groups: int = 1,
        diversity_penalty: float = 0.0,
        scope: str | None = None,
        batch_size: int = 16,
        on_unknown: str = "error",
        progress: bool | None = None,
    ) -> Any:
        """Recommends the next items for one history or for many.

        A history alone gives what it gives among others (floating-point sums in another order aside: scores agree to
        about 1e-5 in float32). Every answer is an item of the catalogue. Several threads may call this at once, also
        while items are added and removed: a call is answered wholly from the catalogue it started with.

        Args:
            history: Item IDs, oldest first, or a list of such lists. The latest `config.max_history` make the prompt.
                Repeats are fine. An empty history gets what the model holds likely for anyone.
            k: Number of items wanted.
            exclude_seen: Leave out all items of the history (also those too old for the prompt).
            allow: Answer only with these: item IDs, a bool mask [N] over the catalogue, or an `item_set` (prepared
                once, for many calls); or, with a list of histories, a list with one of these, or None, a history.
                None allows everything, an empty set nothing.
            deny: Leave these out, in the same forms.
            num_beams: Width of the search, at least k. By default max(20, 2 k): 20 is the width LETTER and LC-Rec
                report with for k = 10, and an item whose first codes rank below the first k prefixes is still found;
                with a temperature k or `top_k`, as a draw needs no more beams than items. Never more than there are
                code tuples; then the search is exhaustive.
            temperature: None for the k most likely items. A number above 0 draws k different items, likelier ones
                earlier on average, code by code (`Sampling`): from the model's distribution at 1, rather the most
                likely codes below, more evenly above. They come in the order of the draw.
            top_k: With a temperature, draw only among so many of the most likely items, at least k, in proportion to
                exp(score / temperature).
            seed: Of the draw, from 0. With the same seed a history draws the same alone and among others.
            num_groups: Groups of beams that keep away from each other's codes, for answers that cover more of the
                catalogue (`Diversity`). They take turns in the answer, so it is not in the order of the scores; fewer
                than k may be found where a search of few beams goes into many groups.
            diversity_penalty: What a code costs a group for each beam of an earlier group that has it there, in
                natural log-probability. It decides what is found, the scores stay without it.
            scope: Over what a code's probability is normalised: "vocabulary", "codes" or "trie" (see `beam_search`).
                By default the scope that the model was trained with, `config.scope`.
            batch_size: Histories searched at once; those of like length are put together. Where memory runs out the
                batch is split, and the log says so; `num_beams` stays as it is.
            on_unknown: What to do about item IDs that the catalogue doesn't hold, in histories, `allow` and `deny`:
                "error", or "skip" (the log counts them).
            progress: Whether to show a progress bar; None: for many batches, where standard error is a terminal.

        Returns:
            For one history a list of `Recommendation`, best first; for many a list of such lists. Scores are sums of
            the natural log-probabilities of the codes. Fewer than k where fewer items are left. Items that share
            their codes share the score, and stand in catalogue order.

        Raises:
            DataError: `history`, `allow` or `deny` is a string, or holds something other than item IDs; a mask of
                another length than the catalogue; or the model computes NaN.
            UnknownItemError: An item ID that the catalogue doesn't hold, unless `on_unknown` is "skip".
            SettingsError: k below 1, fewer beams than k, settings that contradict each other, an item set of another
                catalogue, an empty history with a template without any text, or a single request that doesn't fit
                into memory.
        """
        settings = SearchSettings(
            k,
            num_beams=num_beams,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            num_groups=num_groups,
            diversity_penalty=diversity_penalty,
        )
        catalogue = self._catalogue
        requests = Requests.read(history, catalogue, skip_unknown=_skips(on_unknown))
        filters = self._filters(requests, catalogue, exclude_seen, allow, deny, on_unknown)
        return self._answers(requests, catalogue, filters, settings, scope, batch_size, progress)

    def search(
        self,
        query: str | Sequence[str],
        k: int = 10,
        *,
        history: Sequence[str] | Sequence[Sequence[str]] | None = None,
        exclude_seen: bool = True,
        allow: Any = None,
        deny: Any = None,
        num_beams: int | None = None,
        scope: str | None = None,
        batch_size: int = 16,
        on_unknown: str = "error",
        progress: bool | None = None,
    ) -> Any:
        """Finds the items that a text asks for, with a model that was trained on the task `item_search`.

        Args:
            query: What is looked for, in the words of the training queries; or a list of such texts. The text is
                words to the model, whatever it says: "<a_3>" in it is no code.
            k: Number of items wanted.
            history: Item IDs of the one who asks, oldest first, which the answer is fitted to; for many queries a
                list of as many histories, empty ones among them where nothing is known.
            exclude_seen: Leave out all items of the history.
            allow: As for `recommend`; with many queries one set for all, or one a query.
            deny: Likewise.
            num_beams: As for `recommend`.
            scope: As for `recommend`.
            batch_size: Queries searched at once.
            on_unknown: As for `recommend`.
            progress: As for `recommend`.

        Returns:
            As for `recommend`: for one query a list of `Recommendation`, best first; for many a list of such lists.

        Raises:
            SettingsError: The model wasn't trained to search, or not with histories; another number of histories than
                of queries; and as for `recommend`.
            DataError: A query without text, or that is no text; and as for `recommend`.
            UnknownItemError: As for `recommend`.
        """
        if self.config.search_template is None:
            raise SettingsError(
                "this recommender was not trained to search (its config has no search_template): fine-tune it with the"
                " task 'item_search' among its tasks, on items with a column of queries"
            )
        settings, catalogue = SearchSettings(k, num_beams=num_beams), self._catalogue
        prompts = SearchPrompts(
            self.text_tokenizer,
            self.vocabulary,
            catalogue.task.frame,
            template=self.config.search_template,
            history_template=self.config.search_history_template,
        )
        requests = Requests.of_queries(query, history, catalogue, prompts, skip_unknown=_skips(on_unknown))
        filters = self._filters(requests, catalogue, exclude_seen, allow, deny, on_unknown)
        return self._answers(requests, catalogue, filters, settings, scope, batch_size, progress)

    def _filters(
        self, requests: Requests, catalogue: Catalogue, exclude_seen: bool, allow: Any, deny: Any, on_unknown: str
    ) -> ItemFilters:
        return ItemFilters(
            catalogue,
            device_of(self.model),
            requests.rows if exclude_seen else [rows[:0] for rows in requests.rows],
            allow=allow,
            deny=deny,
            single=requests.single,
            skip_unknown=_skips(on_unknown),
        )

    def _answers(
        self,
        requests: Requests,
        catalogue: Catalogue,
        filters: ItemFilters,
        settings: SearchSettings,
        scope: str | None,
        batch_size: int,
        progress: bool | None,
    ) -> Any:
        scope = self.config.scope if scope is None else scope
        search = CatalogueSearch(self.model, self.vocabulary, scope, catalogue, requests.prompts)
        answers = search.find(settings, filters, requests.histories, batch_size=batch_size, progress=progress)
        return answers[0] if requests.single else answers

    def score(
        self,
        history: Sequence[str] | Sequence[Sequence[str]],
        items: Sequence[str] | Sequence[Sequence[str]],
        *,
        scope: str | None = None,
        batch_size: int = 16,
        on_unknown: str = "error",
        progress: bool | None = None,
    ) -> Any:
        """The exact scores of given items: those that `recommend` would give them, whether it finds them or not.

        Seen items are scored like any other.

        Args:
            history: As for `recommend`.
            items: Item IDs, in any order, repeats allowed; for many histories one list for all, or a list of as many
                lists.
            scope: Over what a code's probability is normalised, see `recommend`.
            batch_size: Histories scored at once; see `recommend`.
            on_unknown: What to do about item IDs that the catalogue doesn't hold: "error", or "skip" (the log counts
                them), which gives such items minus infinity: they can't be recommended.
            progress: As for `recommend`.

        Returns:
            For one history a list of floats in the order of `items`, for many a list of such lists. Sums of the
            natural log-probabilities of the codes, computed in float32; items that share their codes share the score.

        Raises:
            DataError, UnknownItemError, SettingsError: As for `recommend`; and lists of items for one history, or as
                many as there are no histories.
        """
        catalogue = self._catalogue
        requests = Requests.read(history, catalogue, skip_unknown=_skips(on_unknown))
        rows = requests.rows_to_score(items, catalogue, skip_unknown=_skips(on_unknown))
        scope = self.config.scope if scope is None else scope
        search = CatalogueSearch(self.model, self.vocabulary, scope, catalogue, requests.prompts)
        scores = search.score(rows, batch_size=batch_size, progress=progress)
        return scores[0] if requests.single else scores

    def item_set(self, items: Any) -> ItemSet:
        """Prepares some items for `allow` and `deny`, once for any number of calls.

        Args:
            items: Item IDs, or a bool mask [N] over the catalogue's rows, such as
                `np.asarray(recommender.items["category"]) == "soap"`.

        Returns:
            The set. It belongs to the catalogue as it is: after `add_items` or `remove_items` it is refused.

        Raises:
            DataError, UnknownItemError: As for `recommend`.
        """
        catalogue = self._catalogue
        found = read_items(items, catalogue, "items")
        return found if isinstance(found, ItemSet) else catalogue.item_set(found, device_of(self.model))

    def add_items(self, items: NewItems, embeddings: ItemEmbeddings | Mapping[str, ItemEmbeddings]) -> None:
        """Adds new items, which can be recommended at once. No present item changes its codes.

        The stored item tokenizer encodes them, under the uniqueness policy of the catalogue. What the model makes of
        their codes it learned from the items that share them: it is not trained here. All or nothing: after an error
        the catalogue is as it was. Calls to `recommend` that are under way end with the catalogue they started with.

        Args:
            items: `datasets.Dataset`, pyarrow table or list of dictionaries, with "item_id" and any of the
                catalogue's other columns; a column that they lack is null. None of them changes nothing.
            embeddings: What the item tokenizer encodes, by modality, of these items; found by item ID.

        Raises:
            SettingsError: There is no item tokenizer, or no codes are left under the policy.
            DataError: A column that the catalogue doesn't have; an ID that is no string, stands twice or is in the
                catalogue already; a modality that is missing.
            ItemOrderError: An item without an embedding.
        """
        if self.item_tokenizer is None:
            raise SettingsError(
                "this recommender has no item tokenizer, so new items can't be encoded: it was made without one (pass"
                " item_tokenizer=, or fine-tune on codes that one made)"
            )
        with self._changes:
            catalogue = self._catalogue
            new = catalogue.item_table(items)
            item_ids = new["item_id"].to_pylist()
            if not item_ids:
                logger.info("no items to add")
                return
            if isinstance(embeddings, ItemEmbeddings):
                aligned: Any = embeddings.align(item_ids)
            else:
                aligned = {
                    name: vectors.align(item_ids, what=f"the {name} embeddings")
                    for name, vectors in embeddings.items()
                }
            semantic_ids = self.item_tokenizer.extend(catalogue.semantic_ids, aligned)
            self._swap(catalogue.with_items(semantic_ids, new))
        logger.info(
            "added %d items (%s); the catalogue has %d",
            len(item_ids),
            semantic_ids.report or "as encoded",
            len(semantic_ids),
        )

    def remove_items(self, item_ids: Sequence[str]) -> None:
        """Takes items out of the catalogue: they are not recommended any more, and unknown where a history has them.

        The others keep their codes. All or nothing, as `add_items`. To leave items out for a while, or in some
        requests, pass `deny` to `recommend`.

        Args:
            item_ids: Repeats are fine.

        Raises:
            DataError: A string instead of a list, or no item would be left.
            UnknownItemError: An ID that the catalogue doesn't hold.
        """
        removed, single = as_histories(item_ids)
        if not single:
            raise DataError("remove_items takes one list of item IDs, got a list of lists")
        with self._changes:
            before = len(self._catalogue)
            self._swap(self._catalogue.without_items(removed[0]))
            after = len(self._catalogue)
        logger.info("removed %d items; the catalogue has %d", before - after, after)

    def _swap(self, catalogue: Catalogue) -> None:
        """Makes a catalogue the one that calls start with, when all is ready."""
        catalogue.trie_on(device_of(self.model))
        self._catalogue = catalogue

    def recommend_file(
        self, source: Any, output_folder: str | os.PathLike[str], k: int = 10, **options: Any
    ) -> "BatchSummary":
        """Recommends for histories in files, on any number of processes: `llmrec.recommendation.batch.recommend_file`.

        Takes its arguments, and those of `recommend`.
        """
        from llmrec.recommendation.batch import recommend_file

        return recommend_file(self, source, output_folder, k, **options)

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
        folder = find_folder(str(name), revision=revision, token=token)
        arguments: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        parts = read_folder(folder, base_model=base_model, token=token, **arguments)
        if device is None:
            device = torch.accelerator.current_accelerator() or torch.device("cpu")
        parts["model"] = parts["model"].to(device).eval()
        return cls(**parts)

    def merge(self) -> "Recommender":
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
        return Recommender(
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


def _skips(on_unknown: str) -> bool:
    if on_unknown not in ("error", "skip"):
        raise SettingsError(f"on_unknown is {on_unknown!r}; choose 'error' or 'skip'")
    return on_unknown == "skip"
