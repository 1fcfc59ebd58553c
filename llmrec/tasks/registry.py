"""Tasks by name, with weights: what the setting `tasks` of a training means.

`["next_item", "item_to_codes:0.5"]` is next-item prediction with all its samples and half the items of
`item_to_codes`, drawn anew each epoch (see `TaskMixture`).
"""

import logging
import math
from collections.abc import Callable, Sequence

from llmrec.data.interactions import InteractionDataset
from llmrec.errors import SettingsError
from llmrec.tasks.base import TaskSamples
from llmrec.tasks.codes_to_item import codes_to_item_samples
from llmrec.tasks.fused import fused_samples
from llmrec.tasks.item_search import item_search_samples
from llmrec.tasks.item_to_codes import item_to_codes_samples
from llmrec.tasks.mixture import TaskMixture
from llmrec.tasks.next_item import NextItemTask, training_samples
from llmrec.tasks.preference import PreferenceSamples
from llmrec.tasks.source import DEFAULT_MAX_TEXT_TOKENS, TaskSource, TextColumns

logger = logging.getLogger(__name__)

NEXT_ITEM = "next_item"
# Every task that is made of a source; next-item prediction has a form besides.
_MAKERS: dict[str, Callable[[TaskSource], TaskSamples]] = {
    "item_to_codes": item_to_codes_samples,
    "codes_to_item": codes_to_item_samples,
    "fused": fused_samples,
    "item_search": item_search_samples,
    "preference": PreferenceSamples,
}
TASKS = (NEXT_ITEM, *_MAKERS)
# Texts that a task reads: one of the columns must be there.
_READS = {
    "item_to_codes": ("title", "description"),
    "codes_to_item": ("title", "description"),
    "fused": ("title", "description"),
    "item_search": ("queries",),
    "preference": ("preferences",),
}


def read_tasks(tasks: Sequence[str]) -> dict[str, float]:
    """Names and weights out of entries such as "next_item" and "item_to_codes:0.5"; without a weight it is 1.

    Raises:
        SettingsError: No task, an unknown one, one that stands twice, or a weight that is no number above 0.
    """
    if isinstance(tasks, str) or not tasks:
        raise SettingsError(f"tasks is {tasks!r}: give a list of names, of {', '.join(TASKS)}")
    weights: dict[str, float] = {}
    for entry in tasks:
        name, _, weight = str(entry).partition(":")
        if name not in TASKS:
            raise SettingsError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
        if name in weights:
            raise SettingsError(f"the task {name!r} stands twice; give it a weight instead, such as '{name}:2'")
        weights[name] = _weight(weight, entry)
    return weights


def _weight(text: str, entry: str) -> float:
    try:
        weight = float(text) if ":" in entry else 1.0
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise SettingsError(f"the task {entry!r} has the weight {text!r}; it must be a number above 0")
    return weight


def check_columns(tasks: Sequence[str], dataset: InteractionDataset, columns: TextColumns | None = None) -> None:
    """Refuses tasks whose texts a data set doesn't have; before a model is loaded, where `build_samples` comes after.

    Raises:
        SettingsError: The message names the task, the column, and the columns that are there; and see `read_tasks`.
    """
    for name in read_tasks(tasks):
        if name in _READS:
            (columns or TextColumns()).require(_READS[name], dataset, name)


def build_samples(
    tasks: Sequence[str],
    task: NextItemTask,
    train: InteractionDataset,
    *,
    form: str = "history",
    columns: TextColumns | None = None,
    max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
    seed: int = 0,
) -> TaskSamples:
    """The training samples of some tasks.

    Args:
        tasks: Names, with weights after a colon; see `read_tasks`.
        task: Next-item prediction: its vocabulary, codes, kind of prompts (plain or chat, decoder-only or
            encoder-decoder) and `max_history` hold for all tasks.
        train: The training part, and nothing but that.
        form: Of next-item prediction, "history" or "prefix".
        columns: Where the texts of items and users are.
        max_text_tokens: Longer texts are cut there.
        seed: Of all draws.

    Returns:
        A `TaskMixture`, or the samples themselves of a single task of weight 1.

    Raises:
        SettingsError: See `read_tasks`; a task that has nothing to be made of: the message names the column; and what
            `training_samples` refuses.
        DataError: A column that holds no text.
    """
    weights = read_tasks(tasks)
    source = TaskSource(task, train, columns=columns, max_text_tokens=max_text_tokens, seed=seed)
    samples = [
        training_samples(task, train, form=form, seed=seed) if name == NEXT_ITEM else _MAKERS[name](source)
        for name in weights
    ]
    for of_task, (name, weight) in zip(samples, weights.items(), strict=True):
        logger.info("%s: %s samples, weight %g", name, f"{len(of_task):,}", weight)
    if list(weights.values()) == [1.0]:
        return samples[0]
    return TaskMixture(samples, list(weights.values()), seed=seed)
