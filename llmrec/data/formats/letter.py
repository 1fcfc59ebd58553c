"""The layout of LETTER and LC-Rec: X.inter.json (user to item numbers, oldest first) and X.item.json (number to item).

X.index.json, the codes, is read by `item_tokenizers/semantic_ids.py`; its keys are the column "item_key" made here.
"""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llmrec.data.formats.json_lines import attribute_column
from llmrec.errors import DataError, MissingPartError
from llmrec.files import read_json

logger = logging.getLogger(__name__)


def read_letter(folder_or_prefix: str | os.PathLike[str], *, name: str | None = None) -> dict[str, Any]:
    """Reads the two files into the arguments of `InteractionDataset.from_columns`.

    An item's ID is its "asin" where it has one, else its number as a string. The numbers stay in the column
    "item_key". These files have no timestamps: the order of the lists is the order in time.

    Args:
        folder_or_prefix: Folder with one X.inter.json, or the path up to X, or the path of X.inter.json.
        name: Name of the data set; X by default.

    Raises:
        MissingPartError: There is no X.inter.json.
        DataError: A file is not of this layout, or an item ID stands twice.
    """
    interactions_path = _interactions_path(Path(folder_or_prefix))
    prefix = interactions_path.name.removesuffix(".inter.json")
    histories = read_json(interactions_path)
    if not isinstance(histories, dict) or not all(isinstance(history, list) for history in histories.values()):
        raise DataError(f"{interactions_path} must hold a JSON object of user to list of item numbers")
    lengths = np.fromiter((len(history) for history in histories.values()), np.int64, len(histories))
    users = pa.array(list(histories), pa.string()).take(pa.array(np.repeat(np.arange(len(histories)), lengths)))
    taken = [str(item) for history in histories.values() for item in history]
    columns: dict[str, Any] = {"name": name or prefix, "source": str(interactions_path), "user_ids": users}
    items_path = interactions_path.with_name(f"{prefix}.item.json")
    if not items_path.is_file():
        logger.warning("%s is missing: the items have no titles", items_path)
        return columns | {"item_ids": pa.array(taken, pa.string())}
    items = read_json(items_path)
    if not isinstance(items, dict) or not all(isinstance(item, dict) for item in items.values()):
        raise DataError(f"{items_path} must hold a JSON object of item number to attributes")
    table, outside_id = _item_table(items, items_path)
    return columns | {
        "item_ids": pa.array([outside_id.get(item, item) for item in taken], pa.string()),
        "items": table,
    }


def _interactions_path(given: Path) -> Path:
    if given.is_dir():
        found = sorted(given.glob("*.inter.json"))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError(f"{given} holds several data sets ({names}): pass the path of one, without .inter.json")
        if not found:
            raise MissingPartError(f"{given} holds no X.inter.json, the histories of the LETTER layout")
        return found[0]
    path = given if given.name.endswith(".inter.json") else given.with_name(f"{given.name}.inter.json")
    if not path.is_file():
        raise MissingPartError(f"{path} is missing, the histories of the LETTER layout")
    return path


def _item_table(items: dict[str, dict[str, Any]], path: Path) -> tuple[pa.Table, dict[str, str]]:
    """The items as a table, and item number to outside ID."""
    outside_id = {key: str(item.get("asin") or key) for key, item in items.items()}
    if len(set(outside_id.values())) < len(items):
        seen: set[str] = set()
        twice = next(one for one in outside_id.values() if one in seen or seen.add(one))  # type: ignore[func-returns-value]
        raise DataError(f"{path} has the item ID {twice!r} twice: every asin must be unique")
    columns: dict[str, Any] = {"item_id": list(outside_id.values()), "item_key": list(items)}
    for attribute in dict.fromkeys(attribute for item in items.values() for attribute in item):
        if attribute not in ("asin", "item_id", "item_key"):
            columns[attribute] = attribute_column([item.get(attribute) for item in items.values()])
    return pa.table(columns), outside_id
