"""Finds out what a path or name means, and reads it: the one way in for settings files and the command line."""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrec.data.formats.files import read_files, read_table
from llmrec.data.formats.hub import read_hub
from llmrec.data.formats.minionerec import is_minionerec
from llmrec.data.interactions import InteractionDataset
from llmrec.data.synthetic import synthetic_dataset
from llmrec.errors import MissingPartError, SettingsError


def load_dataset_from(path_or_name: str | os.PathLike[str], **options: Any) -> InteractionDataset:
    """Reads a data set from what a path or name stands for.

    Args:
        path_or_name: "synthetic"; a folder written by `InteractionDataset.save`; a folder or prefix in the LETTER
            layout (X.inter.json) or the MiniOneRec layout (X.item.json and X.train.csv, X.valid.csv, X.test.csv); a
            file or a folder of .parquet files; "hub:<what datasets.load_dataset takes>".
        options: Passed on to what reads it: `synthetic_dataset`, `from_letter`, `from_minionerec`, `from_files`
            (`items=` and the names of columns, for instance) or `from_hub`. A saved folder takes none. All take
            `users=`: a file with one row a user, column "user_id", whose further columns become attributes of the
            users (`InteractionDataset.with_user_columns`).

    Raises:
        MissingPartError: Nothing is there.
        SettingsError: An option that this reader doesn't have.
        DataError: What is there can't be read.
    """
    users = options.pop("users", None)
    dataset = _load(os.fspath(path_or_name), {name: value for name, value in options.items() if value is not None})
    if users is None:
        return dataset
    return dataset.with_user_columns(read_table(users, None, ["user_id"], ["user_id"]))


def _load(text: str, options: dict[str, Any]) -> InteractionDataset:
    if text == "synthetic":
        return synthetic_dataset(**_checked(options, synthetic_dataset, text))
    if text.startswith("hub:"):
        return InteractionDataset.from_hub(text.removeprefix("hub:"), **_checked(options, read_hub, text))
    path = Path(text)
    if (path / "dataset.json").is_file():
        _checked(options, InteractionDataset.load, text)
        return InteractionDataset.load(path)
    letter_file = path.with_name(f"{path.name}.inter.json")
    if (
        path.name.endswith(".inter.json")
        or letter_file.is_file()
        or (path.is_dir() and any(path.glob("*.inter.json")))
    ):
        return InteractionDataset.from_letter(path, **_checked(options, InteractionDataset.from_letter, text))
    if is_minionerec(path):
        return InteractionDataset.from_minionerec(path, **_checked(options, InteractionDataset.from_minionerec, text))
    if not path.exists():
        raise MissingPartError(
            f"there is no data set {text!r}: give 'synthetic', a saved data set, a folder with X.inter.json (LETTER)"
            " or X.item.json and X.train.csv (MiniOneRec), a .csv, .tsv, .jsonl or .parquet file, or 'hub:' and a name"
            " on the Hub"
        )
    if path.is_dir() and not any(path.glob("*.parquet")):
        raise MissingPartError(
            f"the folder {text} holds neither dataset.json nor X.inter.json nor X.item.json with X.train.csv nor"
            " .parquet files"
        )
    return InteractionDataset.from_files(path, **_checked(options, read_files, text))


def _checked(options: dict[str, Any], reader: Callable[..., Any], what: str) -> dict[str, Any]:
    known = list(inspect.signature(reader).parameters)[0 if reader is synthetic_dataset else 1 :]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise SettingsError(
            f"{what} takes no option {unknown[0]!r}; it takes {', '.join(known) if known else 'none'}: remove the"
            " others"
        )
    return options
