"""Reads interactions, filters and splits them, prints what is in them, and saves the data set."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.commands.options import DATASET_HELP, add_items_argument, add_k_core_argument

if TYPE_CHECKING:
    from llmrec.data.interactions import InteractionDataset
    from llmrec.data.splits import DatasetSplits, EvaluationSet

HELP = "read, filter, split and save a data set"
EXAMPLES = """examples:
  llmrec data synthetic --split leave_one_out
  llmrec data ratings.csv --items movies.csv --item_column movie --k_core 5 --output data/movies
  llmrec data ratings.csv --split by_time --fractions 0.8 0.1 0.1 --output data/movies

With --split, OUTPUT/train is a data set of the training part alone, and OUTPUT/validation.parquet and
OUTPUT/test.parquet hold one example a row: user_id, history (item IDs, oldest first), target."""

READER_OPTIONS = ("items", "user_column", "item_column", "timestamp_column", "title_column", "name")
BY_TIME = ("validation_from", "test_from", "fractions")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", metavar="SOURCE", help=DATASET_HELP)
    add_items_argument(parser)
    for column, default in (("user", "user_id"), ("item", "item_id"), ("timestamp", "timestamp"), ("title", "title")):
        parser.add_argument(f"--{column}_column", metavar="NAME", help=f"column of the {column} (default: {default})")
    parser.add_argument("--name", help="name of the data set (default: the file's)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another option of the reader, such as delimiter=; or timestamp_unit=ms or encoding=latin-1",
    )
    parser.add_argument(
        "--repeats",
        choices=("keep", "drop_later", "drop_consecutive"),
        default="keep",
        help="items that a user took more than once: keep them (default), keep the first time only, or the first of"
        " several in a row; done before --k_core",
    )
    add_k_core_argument(parser)
    parser.add_argument("--split", choices=("leave_one_out", "by_time"), help="also split it")
    parser.add_argument("--validation_from", metavar="TIME", help="by_time: ISO 8601 in UTC, or seconds since 1970")
    parser.add_argument("--test_from", metavar="TIME", help="by_time: likewise")
    parser.add_argument(
        "--fractions",
        type=float,
        nargs=3,
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="by_time: shares of the interactions, in place of the two moments",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="save the data set here")


def run(arguments: argparse.Namespace) -> None:
    """Reads, filters, prints, splits, saves."""
    from llmrec.commands.options import read_dataset
    from llmrec.errors import SettingsError

    by_time = {name: getattr(arguments, name) for name in BY_TIME if getattr(arguments, name) is not None}
    if by_time and arguments.split != "by_time":
        raise SettingsError(f"--{next(iter(by_time))} is of use with --split by_time only")
    named = {name: getattr(arguments, name) for name in READER_OPTIONS if getattr(arguments, name) is not None}
    dataset = read_dataset(arguments.source, **named, **_reader_options(arguments.option, named))
    dataset = dataset.without_repeats(arguments.repeats)
    if arguments.k_core:
        dataset = dataset.k_core(arguments.k_core)
    print(dataset.summary())
    splits = _split(dataset, arguments.split, by_time) if arguments.split else None
    if splits is not None:
        print(
            f"{splits.method}: {splits.train.num_interactions:,} interactions to train on,"
            f" {len(splits.validation):,} validation and {len(splits.test):,} test examples"
        )
    if arguments.output is not None:
        dataset.save(arguments.output)
        if splits is not None:
            _save_parts(splits, arguments.output)
        print(f"saved in {arguments.output}")


def _reader_options(texts: list[str], named: dict[str, Any]) -> dict[str, Any]:
    """The options NAME=VALUE; a value is read as in YAML, so that 5 is a number and true a truth value."""
    import yaml

    from llmrec.errors import SettingsError

    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise SettingsError(f"--option is {text!r}: write NAME=VALUE")
        if name in named or name in options:
            raise SettingsError(f"the option {name} is given twice")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            options[name] = value
    return options


def _split(dataset: "InteractionDataset", method: str, by_time: dict[str, Any]) -> "DatasetSplits":
    from llmrec.data.splits import leave_one_out, split_by_time

    if method == "leave_one_out":
        return leave_one_out(dataset)
    moments = {name: _instant(value) for name, value in by_time.items() if name != "fractions"}
    fractions = tuple(by_time["fractions"]) if "fractions" in by_time else None
    return split_by_time(dataset, **moments, fractions=fractions)  # type: ignore[arg-type]


def _instant(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _save_parts(splits: "DatasetSplits", folder: Path) -> None:
    splits.train.save(folder / "train")
    for examples in (splits.validation, splits.test):
        _save_examples(examples, splits.dataset, folder / f"{examples.name}.parquet")


def _save_examples(examples: "EvaluationSet", dataset: "InteractionDataset", path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llmrec.files import atomic_file

    item_ids = pa.array(dataset.item_ids, pa.string())
    histories = pa.ListArray.from_arrays(
        pa.array(examples.offsets, pa.int32()), item_ids.take(pa.array(examples.flat_histories))
    )
    targets = item_ids.take(pa.array(examples.targets))
    table = pa.table({"user_id": list(examples.user_ids), "history": histories, "target": targets})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
