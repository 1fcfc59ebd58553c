"""What a call asks for, and its requests in batches of like length that fit into memory.

Knows nothing of models: `in_batches` is handed a function that answers some requests.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm

from llmrec.data.recommendation import as_histories
from llmrec.errors import DataError, SettingsError
from llmrec.processes import Processes
from llmrec.recommendation.catalogue import Catalogue
from llmrec.recommendation.item_filters import known_rows
from llmrec.tasks.item_search import SearchPrompts

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Requests:
    """The histories of one call, B of them.

    Attributes:
        histories: Item IDs as given, oldest first.
        rows: Their catalogue rows, int64 each, without unknown items.
        prompts: Token IDs, none empty.
        single: Whether one history was given outside a list; it is answered outside a list too.
    """

    histories: list[list[str]]
    rows: list[np.ndarray]
    prompts: list[list[int]]
    single: bool

    @classmethod
    def read(cls, history: Any, catalogue: Catalogue, *, skip_unknown: bool) -> "Requests":
        """Reads one history or many.

        Raises:
            DataError: Something else was given; see `as_histories`.
            UnknownItemError: An item that the catalogue doesn't hold, unless they are skipped.
            SettingsError: The prompt of an empty history would be empty.
        """
        histories, single = as_histories(history)
        what = f"{len(histories)} histories"
        rows = known_rows(histories, catalogue.item_index, what, skip_unknown=skip_unknown)
        prompts = [catalogue.task.prompt(of_user) for of_user in rows]
        if not all(prompts):
            raise SettingsError(
                f"an empty history makes an empty prompt with the template {catalogue.task.template!r}: give it some"
                " text"
            )
        return cls(histories, rows, prompts, single)

    @classmethod
    def of_queries(
        cls, query: Any, history: Any, catalogue: Catalogue, search_prompts: SearchPrompts, *, skip_unknown: bool
    ) -> "Requests":
        """Reads one query or many, with or without the histories of those who ask.

        Raises:
            DataError: A query that is no text, or has none; something other than histories.
            UnknownItemError: An item that the catalogue doesn't hold, unless they are skipped.
            SettingsError: Not one history a query.
        """
        single = isinstance(query, str)
        queries = [query] if single or not isinstance(query, Iterable) else list(query)
        for one in queries:
            if not isinstance(one, str):
                raise DataError(f"the query {one!r} is a {type(one).__name__}: pass a text, or a list of texts")
        histories: list[list[str]] = [[] for _ in queries]
        if history is not None:
            histories, one_history = as_histories(history)
            if one_history is not single or len(histories) != len(queries):
                asked = "one query" if single else f"{len(queries)} queries"
                given = "one history" if one_history else f"{len(histories)} histories"
                raise SettingsError(
                    f"{asked} with {given}: pass one history for one query, or a list of as many histories as queries"
                )
        what = f"{len(histories)} histories"
        rows = known_rows(histories, catalogue.item_index, what, skip_unknown=skip_unknown)
        shown = [catalogue.task.history_tokens(of_user) for of_user in rows]
        return cls(histories, rows, search_prompts.prompts(queries, shown), single)

    def rows_to_score(self, items: Any, catalogue: Catalogue, *, skip_unknown: bool) -> list[np.ndarray]:
        """Catalogue rows of the items that each request asks the scores of: int64 each, -1 for unknown items.

        Args:
            items: Item IDs, the same for all requests; or a list of such lists, one a request.
            catalogue: Whose items they are.
            skip_unknown: Let unknown items be -1; the log counts them.

        Raises:
            DataError: Something else was given, or lists for one history.
            UnknownItemError: An item that the catalogue doesn't hold, unless they are skipped.
            SettingsError: Not as many lists as histories.
        """
        lists, shared = as_histories(items)
        if not shared and self.single:
            raise DataError("one history takes one list of items to score, got a list of lists")
        if not shared and len(lists) != len(self.histories):
            raise SettingsError(
                f"{len(lists)} lists of items to score for {len(self.histories)} histories: pass one list for all, or"
                " one a history"
            )
        index = catalogue.item_index
        if skip_unknown:
            known_rows(lists, index, "the items to score", skip_unknown=True)  # counts and logs
            rows = [
                np.array(
                    [index.rows([item_id])[0] if item_id in index else -1 for item_id in item_ids], dtype=np.int64
                )
                for item_ids in lists
            ]
        else:
            rows = [index.rows(item_ids) for item_ids in lists]
        return rows * len(self.histories) if shared else rows


def in_batches(
    answer_some: Callable[[list[int]], Sequence[Answer]],
    lengths: Sequence[int],
    *,
    batch_size: int,
    description: str,
    progress: bool | None,
    together: bool = False,
) -> list[Answer]:
    """Answers requests in batches of like length, longest first.

    A batch that runs out of memory is split in halves, and the rest of the call goes on with the smaller size; the
    log says so once a split. The answers don't change: no search is made narrower, only fewer are made at once.

    A model that is sharded over processes computes only where all of them make the same forwards (`together`). They
    all call this, each with requests of its own, and make as many batches as the one that needs most: the others
    answer their first request again, and forget it. A batch that runs out of memory ends such a call, since by then
    the other processes wait in the middle of a forward.

    Args:
        answer_some: Answers the requests of some numbers, in their order.
        lengths: Tokens of each request.
        batch_size: Requests at once, at most.
        description: Of the progress bar.
        progress: Whether to show it; None: for many batches, where standard error is a terminal.
        together: Whether all processes call this at once and have to make equally many batches.

    Returns:
        One answer a request, in the order of the requests.

    Raises:
        SettingsError: `batch_size` is below 1, or one request alone (with `together`, any batch) runs out of memory.
    """
    if batch_size < 1:
        raise SettingsError(f"batch_size is {batch_size}; at least 1 request is searched at a time")
    left = sorted(range(len(lengths)), key=lambda request: -lengths[request])
    answers: dict[int, Answer] = {}
    hide = (len(left) <= batch_size or None) if progress is None else not progress
    num_fillers = _batches_missing(-(-len(left) // batch_size)) if together else 0
    with tqdm(total=len(left), desc=description, unit="request", disable=hide) as bar:
        while left:
            batch = left[:batch_size]
            found = _answer_if_it_fits(answer_some, batch)
            if found is None:
                batch_size = _smaller(len(batch), lengths[batch[0]], together)
                continue
            answers.update(zip(batch, found, strict=True))
            left = left[len(batch) :]
            bar.update(len(batch))
    for _ in range(num_fillers):
        answer_some([0])
    return [answers[request] for request in range(len(lengths))]


def _batches_missing(num_batches: int) -> int:
    """How many more than this process another one makes."""
    processes = Processes.launched()
    return int(processes.gather_array(np.array([num_batches])).max()) - num_batches


def _answer_if_it_fits(
    answer_some: Callable[[list[int]], Sequence[Answer]], batch: list[int]
) -> Sequence[Answer] | None:
    """None where memory ran out. By then the error is gone, and with its traceback the tensors that it held."""
    try:
        return answer_some(batch)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        logger.debug("out of memory: %s", error)
        return None


def _is_out_of_memory(error: Exception) -> bool:
    # On CPUs torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _smaller(num_requests: int, longest: int, together: bool) -> int:
    if together:
        raise SettingsError(
            f"out of memory with {num_requests} requests at once (up to {longest} tokens each), and the model is"
            " shared out over processes, which can't go on with fewer on their own: call with a smaller batch_size"
        )
    if num_requests == 1:
        raise SettingsError(
            f"out of memory with a single request, of {longest} tokens: search with fewer num_beams, show fewer items"
            " of the history (max_history), load the model in a smaller dtype, or free memory"
        )
    size = num_requests // 2
    logger.warning(
        "out of memory with %d requests at once (up to %d tokens each): going on with %d at once; the answers are"
        " the same, num_beams stays",
        num_requests,
        longest,
        size,
    )
    return size
