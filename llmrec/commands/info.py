"""Says what is in a folder: a recommender, an item tokenizer with its codes, or a data set. Loads no model."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrec.item_tokenizers.semantic_ids import SemanticIds

HELP = "say what is in a folder"
EXAMPLES = """example:
  llmrec info runs/synthetic/recommender"""

LABEL_WIDTH = 18


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="what a recipe, `llmrec fit` or `llmrec data` saved"
    )


def run(arguments: argparse.Namespace) -> None:
    """Finds out what the folder is, and prints it."""
    from llmrec.errors import MissingPartError

    folder: Path = arguments.folder
    if not folder.is_dir():
        raise MissingPartError(f"there is no folder {folder}")
    if (folder / "recommender_config.json").is_file():
        _print_recommender(folder)
    elif (folder / "semantic_ids.safetensors").is_file():
        _print_fitted(folder)
    elif (folder / "dataset.json").is_file():
        from llmrec.data.interactions import InteractionDataset

        print(InteractionDataset.load(folder).summary())
    else:
        raise MissingPartError(
            f"{folder} is none of a recommender (recommender_config.json), a fitted item tokenizer"
            " (semantic_ids.safetensors) and a data set (dataset.json)"
        )
    print("\nfiles")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"  {_size(path.stat().st_size):>9}  {path.relative_to(folder)}")


def _print_recommender(folder: Path) -> None:
    import pyarrow.parquet as pq

    from llmrec.item_tokenizers.semantic_ids import SemanticIds
    from llmrec.recommender_folder import RecommenderConfig, find_kind

    config = RecommenderConfig.load(folder)
    kind = "LoRA and code rows" if find_kind(folder) == "adapter" else "the whole model"
    columns = pq.read_schema(folder / "items.parquet").names
    _print_rows(
        {
            "base model": f"{config.base_model}{f' @ {config.base_revision}' if config.base_revision else ''}",
            "weights": kind,
            "item tokenizer": config.item_tokenizer or "not in the folder",
            "item columns": ", ".join(columns),
            "prompt": repr(config.template),
            "items in a prompt": config.max_history,
            "scores over": config.scope,
        }
    )
    _print_codes(SemanticIds.load(folder / "semantic_ids.safetensors"))
    for heading, content in (("data", config.dataset), ("training", config.training), ("versions", config.versions)):
        if content:
            print(f"\n{heading}")
            _print_rows(content)
    if config.metrics:
        print("\nresults")
    for row in config.metrics:
        conditions = ", ".join(str(value) for name, value in row.items() if name != "metrics")
        print(f"  {conditions}")
        print(f"    {'  '.join(f'{name} {value:.4f}' for name, value in row.get('metrics', {}).items())}")


def _print_fitted(folder: Path) -> None:
    from llmrec.files import read_json
    from llmrec.item_tokenizers.semantic_ids import SemanticIds

    config = read_json(folder / "item_tokenizer" / "config.json")
    _print_rows({"item tokenizer": config.get("class")})
    _print_codes(SemanticIds.load(folder / "semantic_ids.safetensors"))
    for heading, name in (("settings", "settings"), ("fit", "fit_report")):
        print(f"\n{heading}")
        _print_rows(config.get(name, {}))


def _print_codes(semantic_ids: "SemanticIds") -> None:
    from llmrec.item_tokenizers.diagnostics import diagnose

    print(f"\n{diagnose(semantic_ids)}")
    if semantic_ids.report is not None:
        print(semantic_ids.report)


def _print_rows(rows: dict[str, Any]) -> None:
    for label, value in rows.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        print(f"  {label:<{LABEL_WIDTH}}  {text}")


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
