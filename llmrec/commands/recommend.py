"""Recommends the next items for one history."""

import argparse
import json
from dataclasses import asdict

from llmrec.commands.options import add_recommender_arguments

HELP = "recommend the next items for one history"
EXAMPLES = """examples:
  llmrec recommend runs/beauty_smollm2_letter/recommender --history B004756YJA B0020YLEYK -k 5
  llmrec recommend someone/beauty-smollm2-letter --history B004756YJA --json

Prints rank, item ID, score (sum of the natural log-probabilities of the item's codes) and title."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_recommender_arguments(parser)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--history", nargs="*", required=True, metavar="ID", help="item IDs, oldest first; none: an empty history"
    )
    parser.add_argument("-k", type=int, default=10, help="items wanted (default: 10)")
    parser.add_argument("--include_seen", action="store_true", help="items of the history may be recommended again")
    parser.add_argument("--num_beams", type=int, metavar="N", help="width of the search (default: max(20, 2 k))")
    parser.add_argument("--json", action="store_true", help="print JSON: a list of item_id, score, title")


def run(arguments: argparse.Namespace) -> None:
    """Loads, recommends, prints."""
    from llmrec.commands.options import load_recommender

    recommender = load_recommender(
        arguments.folder,
        revision=arguments.revision,
        base_model=arguments.base_model,
        device=arguments.device,
    )
    items = recommender.recommend(
        arguments.history,
        arguments.k,
        exclude_seen=not arguments.include_seen,
        num_beams=arguments.num_beams,
    )
    if arguments.json:
        print(json.dumps([asdict(item) for item in items], indent=2, ensure_ascii=False))
        return
    width = max((len(item.item_id) for item in items), default=0)
    for rank, item in enumerate(items, start=1):
        print(f"{rank:{len(str(len(items)))}d}  {item.item_id:<{width}}  {item.score:9.4f}  {item.title}".rstrip())
