"""Options that several commands share, and loading a recommender with them. Imports nothing heavy."""

import argparse
import sys
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrec.data.interactions import InteractionDataset
    from llmrec.recommender import Recommender

DATASET_HELP = (
    "'synthetic', a data set that `llmrec data` saved, a folder in the LETTER layout, a .csv, .tsv, .jsonl or .parquet"
    " file, or 'hub:' and what datasets.load_dataset takes"
)


def add_items_argument(parser: argparse.ArgumentParser) -> None:
    """The option that names the file of the items."""
    parser.add_argument("--items", metavar="FILE", help="file of the items, where the data set is a file")


def add_k_core_argument(parser: argparse.ArgumentParser) -> None:
    """The option that filters users and items."""
    parser.add_argument(
        "--k_core",
        type=int,
        default=0,
        metavar="K",
        help="keep users and items with at least K interactions each; 0 keeps all (default)",
    )


def add_recommender_arguments(parser: argparse.ArgumentParser) -> None:
    """The recommender folder, and how it is loaded."""
    parser.add_argument("folder", metavar="FOLDER", help="a recommender folder, or its name on the Hub")
    parser.add_argument("--base_model", metavar="NAME", help="take an adapter's base model from this folder or name")
    parser.add_argument("--device", help="a torch device; by default the first GPU, else the CPU")


def read_dataset(source: str, *, k_core: int = 0, **options: Any) -> "InteractionDataset":
    """Reads what a name or path stands for (options that are None are left out) and filters it."""
    from llmrec.data.loading import load_dataset_from

    dataset = load_dataset_from(source, **options)
    return dataset.k_core(k_core) if k_core else dataset


def check_device(device: str | None) -> None:
    """Refuses a device that torch doesn't know or this machine doesn't have.

    Raises:
        SettingsError: With what torch says.
    """
    import torch

    from llmrec.errors import SettingsError

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device is {device!r}: {str(error).splitlines()[0]}") from error


def load_recommender(name: str, **options: Any) -> "Recommender":
    """`Recommender.from_pretrained`, with transformers' progress bars where somebody can see them.

    Standard output is kept for the answer: DeepSpeed, where it is installed, logs there when it is imported.
    """
    with redirect_stdout(sys.stderr):
        from transformers.utils import logging as transformers_logging

        from llmrec.recommender import Recommender

        check_device(options.get("device"))
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        return Recommender.from_pretrained(name, **options)
