"""A query in, the codes of an item out: LC-Rec's item prediction from intentions, in our own words.

Two kinds. A query alone, as a search engine gets it: one sample for each item that has queries. A query of a user
whose history is known: one sample a user and epoch, whose target is drawn among those items of the training history
that have queries and anything before them. Which query of an item is shown is drawn too.

The first template of each kind is what `Recommender.search` asks with.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmrec.errors import DataError, SettingsError
from llmrec.tasks.base import TaskSamples
from llmrec.tasks.mixture import TaskMixture
from llmrec.tasks.prompt_frame import PromptFrame
from llmrec.tasks.slots import Slot, TextSlot
from llmrec.tasks.source import DEFAULT_MAX_TEXT_TOKENS, OneTargetAUser, TaskSource
from llmrec.tasks.templated import Draw, Kind, TemplatedSamples
from llmrec.tasks.texts import read_texts, tokenize_texts
from llmrec.vocabulary import CodeVocabulary

NAME = "item_search"
DEFAULT_SEARCH_TEMPLATE = 'Search query: "{query}"\nBest matching item:'
DEFAULT_HISTORY_SEARCH_TEMPLATE = 'Items chosen by one person, oldest first: {history}\nSearch query: "{query}"\nItem:'
_SEARCH = (
    DEFAULT_SEARCH_TEMPLATE,
    'A visitor types "{query}" into the search field of our shop. First result:',
    'Find the item that somebody means who says: "{query}"',
    'Request: "{query}"\nItem code:',
    'Which of our items serves this wish best? "{query}"',
    'Return the top hit of the catalogue for "{query}".',
    'A customer describes what is wanted: "{query}" Recommend one item:',
    'As a product search engine, answer "{query}" with the code of an item.',
)
_SEARCH_WITH_HISTORY = (
    DEFAULT_HISTORY_SEARCH_TEMPLATE,
    'A user who took {history} now types "{query}". First result for this user:',
    'Past choices: {history}\nWish: "{query}"\nItem code:',
    'Someone with the order history {history} says: "{query}" Recommend one item:',
    'Answer the query "{query}" for a customer whose choices so far are {history}.',
    'Personal search. History: {history}. Query: "{query}". Top hit:',
    'Which item fits both the request "{query}" and a person who chose {history}?',
    'The user of the items {history} is looking for "{query}". Find the right item:',
)
SEARCH = Kind(_SEARCH, ("query",), "{codes}", ("codes",))
SEARCH_WITH_HISTORY = Kind(_SEARCH_WITH_HISTORY, ("query", "history"), "{codes}", ("codes",))


class QuerySamples(TemplatedSamples):
    """A query of an item in, its codes out.

    Args:
        source: Items and their queries.

    Raises:
        SettingsError: No item has queries.
    """

    def __init__(self, source: TaskSource):
        super().__init__(NAME, source.frame, [SEARCH], seed=source.seed)
        self._queries = source.queries
        self._items = source.keep(self._queries.counts > 0, NAME, "items", "no queries")
        self._codes = source.item_slot(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def draw(self, epoch: int) -> Draw:
        """A query of each item, and a template."""
        drawn = self.draw_among(self._queries.counts[self._items], epoch, "query")
        query = TextSlot(self._queries, self._queries.row_offsets[self._items] + drawn)
        templates = self.draw_among(len(SEARCH.prompts), epoch, "template")
        return Draw(templates, {"query": query, "codes": self._codes})


class HistoryQuerySamples(TemplatedSamples):
    """Codes of a history and a query of the next item in, the codes of the next item out.

    Args:
        source: Items, their queries, and histories.

    Raises:
        SettingsError: No user has an item with queries after another item.
    """

    def __init__(self, source: TaskSource):
        super().__init__(f"{NAME} with history", source.frame, [SEARCH_WITH_HISTORY], seed=source.seed)
        self._source, self._queries = source, source.queries
        candidates = self._queries.counts[source.train.flat_items] > 0
        self._targets = OneTargetAUser(source, candidates, name=self.name, lacking="no second item with queries")

    def __len__(self) -> int:
        return len(self._targets)

    def draw(self, epoch: int) -> Draw:
        """A target of each user, one of its queries, and a template."""
        starts, ends = self._targets.places(self.draw_among(self._targets.counts, epoch, "target"))
        items = self._source.train.flat_items[ends]
        drawn = self.draw_among(self._queries.counts[items], epoch, "query")
        slots: dict[str, Slot] = {
            "history": self._source.history_slot(starts, ends),
            "query": TextSlot(self._queries, self._queries.row_offsets[items] + drawn),
            "codes": self._source.item_slot(items),
        }
        return Draw(self.draw_among(len(SEARCH_WITH_HISTORY.prompts), epoch, "template"), slots)


def item_search_samples(source: TaskSource) -> TaskSamples:
    """Both kinds.

    Raises:
        SettingsError: The items have no column of queries, no item has any, or none of them is in a training history
            after another item.
    """
    return TaskMixture([QuerySamples(source), HistoryQuerySamples(source)], [1.0, 1.0], seed=source.seed, name=NAME)


class SearchPrompts:
    """Makes the prompts of searches, as training showed them.

    Args:
        text_tokenizer: With the code tokens in it.
        vocabulary: Where they are.
        frame: What stands around prompts.
        template: With "{query}" in it, for a query alone.
        history_template: With "{query}" and "{history}", for a query of someone whose history is known; None where
            the model wasn't trained with any.
        max_query_tokens: Longer queries are cut there.

    Raises:
        SettingsError: A template lacks a slot, or has it twice.
    """

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerBase,
        vocabulary: CodeVocabulary,
        frame: PromptFrame,
        *,
        template: str = DEFAULT_SEARCH_TEMPLATE,
        history_template: str | None = DEFAULT_HISTORY_SEARCH_TEMPLATE,
        max_query_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
    ):
        self._text_tokenizer = text_tokenizer
        self._vocabulary = vocabulary
        self._max_query_tokens = max_query_tokens
        self._alone = frame.prompt(template, SEARCH.shown)
        self._with_history = None
        if history_template is not None:
            self._with_history = frame.prompt(history_template, SEARCH_WITH_HISTORY.shown)

    def prompts(self, queries: Sequence[str], histories: Sequence[list[int]]) -> list[list[int]]:
        """Token IDs that end right where the codes of an item begin.

        Args:
            queries: What is searched for, one text a request.
            histories: Code tokens of each request's history; where it is empty the query is asked alone.

        Raises:
            DataError: A query without any text.
            SettingsError: A history, where there is no template for one.
        """
        if self._with_history is None and any(histories):
            raise SettingsError(
                "a history is given, but the model wasn't trained to search with one (its config has no"
                " search_history_template): leave history out"
            )
        texts = read_texts(queries, "query")
        tokens = tokenize_texts(
            texts, self._text_tokenizer, self._vocabulary, max_tokens=self._max_query_tokens, what="queries"
        )
        without = np.flatnonzero(tokens.counts == 0)
        if len(without):
            raise DataError(f"the query {queries[without[0]]!r} has no text to search for")
        return [self._prompt(tokens.text(number), history) for number, history in enumerate(histories)]

    def _prompt(self, query: list[int], history: list[int]) -> list[int]:
        template = self._with_history if self._with_history is not None and history else self._alone
        return template.fill({"query": query, "history": history}.__getitem__)
