"""Says what saved semantic IDs look like: collisions, use of the codes, neighbours; as tables and as a page."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.commands.options import DATASET_HELP

if TYPE_CHECKING:
    from llmrec.data.interactions import InteractionDataset
    from llmrec.item_tokenizers.semantic_ids import SemanticIds

HELP = "measure semantic IDs, compare two sets of them, draw a page"
EXAMPLES = """examples:
  llmrec codes runs/codes --html runs/codes/report.html
  llmrec codes runs/codes --text text.safetensors --collaborative cf.npy --dataset data/mine --html report.html
  llmrec codes Beauty.index.json --dataset ../shared/data/beauty --compare runs/codes

Embeddings are what `llmrec embed` wrote, or a .npy array whose row i is item i. The page needs no network."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    codes_help = "a folder of `llmrec fit`, a recommender, a semantic_ids.safetensors, or a published index .json"
    parser.add_argument("codes", type=Path, metavar="FOLDER_OR_FILE", help=codes_help)
    parser.add_argument("--text", type=Path, metavar="FILE", help="text embeddings: measure neighbours, draw the map")
    parser.add_argument("--collaborative", type=Path, metavar="FILE", help="collaborative embeddings: likewise")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="a second code set of the same items")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with verdicts and plots")
    parser.add_argument(
        "--dataset", help=f"of these items: needed for an index .json, gives the map its titles: {DATASET_HELP}"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints, and writes the page where one is asked for."""
    from dataclasses import replace

    from llmrec.commands.options import read_dataset
    from llmrec.embeddings.base import ItemEmbeddings
    from llmrec.item_tokenizers.code_agreement import compare_codes
    from llmrec.item_tokenizers.diagnostics import CodeDiagnostics, diagnose
    from llmrec.item_tokenizers.report.page import write_html_report
    from llmrec.item_tokenizers.report.verdicts import judge

    dataset = read_dataset(arguments.dataset) if arguments.dataset else None
    semantic_ids = _read_codes(arguments.codes, dataset)
    files = {"text": arguments.text, "collaborative": arguments.collaborative}
    embeddings = {
        space: ItemEmbeddings.load(path, item_ids=semantic_ids.item_ids) for space, path in files.items() if path
    }
    saved = _read_diagnostics(arguments.codes)
    after = diagnose(semantic_ids, neighbours=embeddings)
    before = CodeDiagnostics.from_json(saved["before"]) if "before" in saved else after
    if "after" in saved:  # what only the fit could measure
        fitted = CodeDiagnostics.from_json(saved["after"])
        neighbours = {**fitted.neighbours, **after.neighbours}
        after = replace(after, reconstruction=fitted.reconstruction, neighbours=neighbours)

    print(after)
    if semantic_ids.report is not None:
        print(semantic_ids.report)
    if arguments.compare:
        print(f"\n{compare_codes(semantic_ids, _read_codes(arguments.compare, dataset))}")
    print()
    for verdict in judge(before, after, semantic_ids.report):
        print(f"- {verdict.name} {verdict.value}: good" if verdict.state == "good" else f"- {verdict}")
    if arguments.html:
        write_html_report(
            arguments.html,
            title=f"Codes of {arguments.codes}",
            before=before,
            after=after,
            semantic_ids=semantic_ids,
            map_embeddings=next(iter(embeddings.values()), None),
            item_titles=_titles(dataset),
            history=saved.get("fit_history"),
        )
        print(f"\npage in {arguments.html}")


def _read_codes(source: Path, dataset: "InteractionDataset | None") -> "SemanticIds":
    from llmrec.errors import SettingsError
    from llmrec.item_tokenizers.semantic_ids import SemanticIds

    if source.suffix != ".json":
        item_ids = None if dataset is None else dataset.item_ids
        return SemanticIds.load(source / "semantic_ids.safetensors" if source.is_dir() else source, item_ids=item_ids)
    if dataset is None:
        raise SettingsError(f"{source} holds no item IDs: name the data set it is about with --dataset")
    return SemanticIds.from_index_json(source, dataset.item_ids, item_keys=dataset.item_keys)


def _read_diagnostics(source: Path) -> dict[str, Any]:
    """What `llmrec fit` measured, where the codes are in its folder; else nothing."""
    from llmrec.files import read_json

    path = (source if source.is_dir() else source.parent) / "diagnostics.json"
    is_fitted = source.is_dir() or source.name == "semantic_ids.safetensors"
    return read_json(path) if is_fitted and path.is_file() else {}


def _titles(dataset: "InteractionDataset | None") -> list[str] | None:
    if dataset is None or "title" not in dataset.items.column_names:
        return None
    return [title or "" for title in dataset.items["title"]]
