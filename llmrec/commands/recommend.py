"""Recommends the next items: for one history, or for all users of files."""

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.commands.options import add_recommender_arguments

if TYPE_CHECKING:
    from llmrec.recommender import Recommender

HELP = "recommend the next items for one history, or for files of them"
EXAMPLES = """examples:
  llmrec recommend runs/beauty_smollm2_letter/recommender --history B004756YJA B0020YLEYK -k 5
  llmrec recommend someone/beauty-smollm2-letter --history B004756YJA --deny sold_out.txt --json
  llmrec recommend runs/beauty_smollm2_letter/recommender --input users.parquet --output runs/answers

On several devices: accelerate launch -m llmrec.cli recommend FOLDER --input "users-*.parquet" --output runs/answers

--history prints rank, item ID, score (sum of the natural log-probabilities of the item's codes) and title. --input
writes a folder of .parquet files with the columns of the input, item_ids and scores. The same command again goes on
where a stopped one was."""

FILE_OPTIONS = ("output", "history_column", "keep", "rows_per_part", "batch_size")  # of --input alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_recommender_arguments(parser)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--history", nargs="*", metavar="ID", help="item IDs, oldest first; none: an empty history")
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files, folders or patterns: .parquet, or .jsonl of one object a line (.jsonl.gz too), a history a row",
    )
    parser.add_argument("-k", type=int, default=10, help="items wanted (default: 10)")
    parser.add_argument("--include_seen", action="store_true", help="items of the history may be recommended again")
    parser.add_argument("--allow", type=Path, metavar="FILE", help="recommend only these items: one ID a line")
    parser.add_argument("--deny", type=Path, metavar="FILE", help="never recommend these items: one ID a line")
    parser.add_argument("--num_beams", type=int, metavar="N", help="width of the search (default: max(20, 2 k))")
    parser.add_argument(
        "--temperature", type=float, help="draw the items instead of taking the best; above 1 more evenly"
    )
    parser.add_argument("--seed", type=int, help="of the draw (default: 0)")
    parser.add_argument(
        "--on_unknown",
        choices=["error", "skip"],
        help="what to do about item IDs that the catalogue doesn't hold (default: error)",
    )
    parser.add_argument(
        "--json", action="store_true", help="with --history, print JSON: a list of item_id, score, title"
    )
    files = parser.add_argument_group("with --input")
    files.add_argument("--output", type=Path, metavar="FOLDER", help="where the answers go; needed")
    files.add_argument("--history_column", metavar="COLUMN", help="with lists of item IDs (default: history)")
    files.add_argument("--keep", nargs="*", metavar="COLUMN", help="columns the answer has too (default: all others)")
    files.add_argument("--rows_per_part", type=int, metavar="N", help="users in a file of the answer (default: 4096)")
    files.add_argument("--batch_size", type=int, metavar="N", help="histories searched at once (default: 16)")


def run(arguments: argparse.Namespace) -> None:
    """Loads, recommends, prints or writes."""
    _check_form(arguments)
    options = _search_options(arguments)
    if arguments.input is not None:
        _recommend_file(arguments, options)
        return
    items = _load(arguments, arguments.device).recommend(arguments.history, arguments.k, **options)
    if arguments.json:
        print(json.dumps([asdict(item) for item in items], indent=2, ensure_ascii=False))
        return
    width = max((len(item.item_id) for item in items), default=0)
    for rank, item in enumerate(items, start=1):
        print(f"{rank:{len(str(len(items)))}d}  {item.item_id:<{width}}  {item.score:9.4f}  {item.title}".rstrip())


def _check_form(arguments: argparse.Namespace) -> None:
    """Refuses options of the other form.

    Raises:
        SettingsError: Which.
    """
    from llmrec.errors import SettingsError

    if arguments.input is None:
        for name in FILE_OPTIONS:
            if getattr(arguments, name) is not None:
                raise SettingsError(f"--{name} is of use only with --input")
    elif arguments.output is None:
        raise SettingsError("--input needs an --output: the folder of the answers")
    elif arguments.json:
        raise SettingsError("--json is of use only with --history: --input writes Parquet")


def _search_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of `recommend` that both forms have."""
    given = {name: getattr(arguments, name) for name in ("num_beams", "temperature", "seed", "on_unknown")}
    given |= {name: _read_item_ids(getattr(arguments, name)) for name in ("allow", "deny") if getattr(arguments, name)}
    options = {name: value for name, value in given.items() if value is not None}
    return {"exclude_seen": not arguments.include_seen, **options}


def _read_item_ids(path: Path) -> list[str]:
    """The lines of a text file, blank ones left out.

    Raises:
        MissingPartError: There is no such file.
        DataError: It is no text.
    """
    from llmrec.errors import DataError, MissingPartError

    if not path.is_file():
        raise MissingPartError(f"there is no file {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}; write one item ID a line") from error
    return [line.strip() for line in lines if line.strip()]


def _recommend_file(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    with redirect_stdout(sys.stderr):  # see load_recommender
        from llmrec.data.histories.plan import find_history_files
        from llmrec.processes import Processes
        from llmrec.recommendation.batch import recommend_file

        find_history_files(arguments.input)  # before the model is loaded
        processes = Processes.launched()
        recommender = _load(arguments, arguments.device or (processes.device if processes.count > 1 else None))
    columns = {"history_column": arguments.history_column, "keep_columns": arguments.keep}
    sizes = {"rows_per_part": arguments.rows_per_part, "batch_size": arguments.batch_size}
    given = {name: value for name, value in {**columns, **sizes}.items() if value is not None}
    summary = recommend_file(
        recommender, arguments.input, arguments.output, arguments.k, processes=processes, **options, **given
    )
    if processes.is_main:
        print(summary)


def _load(arguments: argparse.Namespace, device: Any) -> "Recommender":
    from llmrec.commands.options import load_recommender

    return load_recommender(
        arguments.folder, revision=arguments.revision, base_model=arguments.base_model, device=device
    )
