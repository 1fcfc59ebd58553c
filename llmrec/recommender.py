"""Recommender: histories of item IDs in, item IDs out.

Joins what the other modules hold apart: the fine-tuned model, the text tokenizer, the codes of the items, their trie
and the prompt. It is saved as one folder, pushed to the Hub and loaded from either (`llmrec.recommender_parts`).
Nothing here trains.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmrec.data.recommendation import as_histories
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, SettingsError
from llmrec.generation.item_sets import ItemSet
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.processes import device_of
from llmrec.recommendation.catalogue import Catalogue, NewItems
from llmrec.recommendation.catalogue_search import CatalogueSearch
from llmrec.recommendation.item_filters import ItemFilters, read_items
from llmrec.recommendation.request_batches import Requests
from llmrec.recommendation.search_settings import SearchSettings
from llmrec.recommender_parts import RecommenderParts
from llmrec.tasks.item_search import SearchPrompts

if TYPE_CHECKING:
    from llmrec.item_tokenizers.base import ItemTokenizer
    from llmrec.recommendation.batch import BatchSummary

logger = logging.getLogger(__name__)


class Recommender(RecommenderParts):
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
            max_query_tokens=self.config.max_query_tokens,
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
            The set. It belongs to the catalogue as it is: after `add_items`, `remove_items` or `replace_codes` it is
            refused.

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

    def replace_codes(self, semantic_ids: SemanticIds, item_tokenizer: "ItemTokenizer | None" = None) -> None:
        """Gives all items other codes, for training in which codes change.

        A model that was trained on other codes must be trained on: to it these codes are other items. All or nothing,
        as `add_items`; calls to `recommend` that are under way end with the codes they started with, and item sets
        that were made before are refused.

        Args:
            semantic_ids: Of the items of the catalogue in its order, from codebooks of the same sizes.
            item_tokenizer: What made them, which `add_items` will encode with; None keeps the one that is there (one
                that is trained in place knows of it already).

        Raises:
            ItemOrderError: The codes are about other items, or in another order.
            SettingsError: The codebooks have other sizes, or the item tokenizer makes codes of other sizes.
        """
        if item_tokenizer is not None:
            sizes = semantic_ids.codebook_sizes
            of_items = sizes[:-1] if semantic_ids.policy == "extra_level" else sizes
            if item_tokenizer.codebook_sizes not in (sizes, of_items):
                raise SettingsError(
                    f"the item tokenizer has codebooks of sizes {item_tokenizer.codebook_sizes}, the semantic IDs"
                    f" {sizes} (policy {semantic_ids.policy}): pass the item tokenizer that made these codes"
                )
        with self._changes:
            self._swap(self._catalogue.with_codes(semantic_ids))
            if item_tokenizer is not None:
                self.item_tokenizer = item_tokenizer
        logger.info("replaced the codes of %d items (%s)", len(semantic_ids), semantic_ids.report or "as given")

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


def _skips(on_unknown: str) -> bool:
    if on_unknown not in ("error", "skip"):
        raise SettingsError(f"on_unknown is {on_unknown!r}; choose 'error' or 'skip'")
    return on_unknown == "skip"
