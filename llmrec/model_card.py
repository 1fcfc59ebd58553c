"""The model card that is saved and pushed with a recommender: `README.md`.

Filled from the config and the semantic IDs alone: what isn't in them isn't claimed.
"""

import json
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.recommender_folder import RecommenderConfig, installed_versions

_BODY = """---
{front_matter}
---

# {title}

A generative recommender, made with llmrec: {base} that writes the next item of a history as a tuple of
{num_levels} codes. Generation is held to codes of real items, so every answer is an item of the catalogue.

## How to use

```python
from llmrec import Recommender

model = Recommender.from_pretrained("{name}")
model.recommend([{example}], k=10)
{search}```

A history is a list of item IDs, oldest first; the answer is a list of item ID, score (a sum of natural
log-probabilities) and title, best first. Items of the history are left out unless `exclude_seen=False`.

## Data

{data}

## Method

{method}

## Settings

{settings}

## Results

{results}

## Limits

- It recommends only the {num_items:,} items it was made with; others need codes first.
- The prompt shows the latest {max_history} items of a history, and nothing else about a user.
- What was popular in the training data is recommended more often, and biases in the data come out again.
- Scores order the items of one answer. They are no probabilities of a purchase, and not comparable between models.
"""


def model_card(
    config: RecommenderConfig, semantic_ids: SemanticIds, *, is_adapter: bool, name: str = "<folder>"
) -> str:
    """The text of the model card, YAML front matter included.

    Args:
        config: Its `dataset`, `training` and `metrics` are shown as they are given, and left out where empty.
        semantic_ids: Codes of the catalogue.
        is_adapter: Whether the folder holds an adapter, which needs its base model.
        name: What `from_pretrained` takes: the Hub ID, or the folder.
    """
    dataset_name = str(config.dataset.get("name", "an unnamed data set"))
    title = name.rpartition("/")[2] if name != "<folder>" else f"{dataset_name} recommender"
    return _BODY.format(
        front_matter=_front_matter(config, title, is_adapter),
        title=title,
        base=f"`{config.base_model}`" + (_adapted_by(config) if is_adapter else ""),
        num_levels=semantic_ids.num_levels,
        name=name,
        example=", ".join(json.dumps(item_id, ensure_ascii=False) for item_id in semantic_ids.item_ids[:2]),
        search="" if config.search_template is None else 'model.search("what somebody is looking for", k=10)\n',
        data=_bullets(config.dataset) or "Nothing was recorded about the data.",
        method=_bullets(_method(config, semantic_ids)),
        settings=_bullets(config.training) or "Nothing was recorded about the training.",
        results=_results(config),
        num_items=semantic_ids.num_items,
        max_history=config.max_history,
    )


def _adapted_by(config: RecommenderConfig) -> str:
    what = " with trained rows of the codes alone" if config.training.get("trained") == "rows" else " with LoRA"
    bits = config.training.get("base_bits")
    if not bits:
        return what
    return (
        f"{what} (trained on the base in {bits} bits; on an unquantised base, the default when it is loaded, scores"
        " differ a little)"
    )


def _front_matter(config: RecommenderConfig, title: str, is_adapter: bool) -> str:
    has_lora = is_adapter and config.training.get("trained") != "rows"
    on_hub = not config.base_model.startswith("package:") and config.base_model.count("/") == 1
    evaluations = [
        EvalResult(
            task_type="recommendation",
            task_name="Next-item recommendation",
            dataset_type=str(row.get("dataset", config.dataset.get("name", "unknown"))),
            dataset_name=str(row.get("dataset", config.dataset.get("name", "unknown"))),
            dataset_split=row.get("split"),
            metric_type=metric.lower(),
            metric_name=f"{metric} ({row['protocol']})" if "protocol" in row else metric,
            metric_value=value,
        )
        for row in config.metrics
        if row.get("model", "llmrec") == "llmrec"
        for metric, value in row.get("metrics", {}).items()
    ]
    data = ModelCardData(
        library_name="llmrec",
        pipeline_tag="text-generation",
        base_model=config.base_model if on_hub else None,
        tags=["recommendation", "generative-recommendation", "semantic-ids", *(["lora"] if has_lora else [])],
        datasets=config.dataset.get("hub_id"),
        model_name=title if evaluations else None,
        eval_results=evaluations or None,
    )
    return data.to_yaml().strip()


def _method(config: RecommenderConfig, semantic_ids: SemanticIds) -> dict[str, Any]:
    sizes = ", ".join(str(size) for size in config.codebook_sizes)
    return {
        "base model": config.base_model + (f" at {config.base_revision}" if config.base_revision else ""),
        "item tokenizer": config.item_tokenizer or "not part of this model",
        "codes": f"{semantic_ids.num_levels} levels of {sizes} codes; equal codes: policy `{semantic_ids.policy}`",
        "collision rate": f"{semantic_ids.collision_rate:.2%} of {semantic_ids.num_items:,} items",
        "prompt": f"`{config.template}`, the latest {config.max_history} items",
        "scores normalised over": f"the {config.scope}",
        "versions": ", ".join(f"{package} {version}" for package, version in installed_versions().items()),
    }


def _bullets(entries: dict[str, Any]) -> str:
    return "\n".join(f"- {key.replace('_', ' ')}: {_text(value)}" for key, value in entries.items())


def _text(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        return f"`{json.dumps(value, ensure_ascii=False)}`"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)


def _results(config: RecommenderConfig) -> str:
    """One table: a row for every entry of `metrics`, a column for every condition and metric that occurs."""
    if not config.metrics:
        return "Not measured."
    conditions = list(dict.fromkeys(key for row in config.metrics for key in row if key != "metrics"))
    metrics = list(dict.fromkeys(key for row in config.metrics for key in row.get("metrics", {})))
    lines = ["| " + " | ".join([*conditions, *metrics]) + " |", "|" + "---|" * (len(conditions) + len(metrics))]
    for row in config.metrics:
        values = [_text(row[key]) if key in row else "" for key in conditions]
        for metric in metrics:
            value = row.get("metrics", {}).get(metric)
            values.append(f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value))
        lines.append("| " + " | ".join(value.replace("|", "\\|").replace("\n", " ") for value in values) + " |")
    return "\n".join(lines)
