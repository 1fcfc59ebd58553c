"""The layout of MiniOneRec: X.item.json (number to item) and X.train.csv, X.valid.csv, X.test.csv.

The CSV files hold one row a target: a user, at most ten items before it, and the target, in the order of time; the
three files are a chronological split. Whole histories are put together again from the rows. X.index.json, the codes,
is read by `item_tokenizers/index_files.py`; its keys are the column "item_key" made here.
"""

import ast
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmrec.data.formats.delimited import read_delimited
from llmrec.data.formats.json_lines import attribute_column
from llmrec.errors import DataError, MissingPartError
from llmrec.files import read_json

logger = logging.getLogger(__name__)

PARTS = ("train", "valid", "test")
_COLUMNS = ("user_id", "history_item_id", "item_id")


def read_minionerec(folder_or_prefix: str | os.PathLike[str], *, name: str | None = None) -> dict[str, Any]:
    """Reads the files into the arguments of `InteractionDataset.from_columns`.

    An item's ID is its "asin" where it has one, else its number as a string. The numbers stay in the column
    "item_key". Descriptions, which are Python lists written as text, become plain text. These files have no
    timestamps: the order of the rows is the order in time. The published split isn't kept: it is by time over all
    users, and its histories are cut at ten items.

    Args:
        folder_or_prefix: Folder with one X.item.json and at least one of the CSV files, or the path up to X. Missing
            CSV files are said in the log: what only they hold is missing in the histories.
        name: Name of the data set; X by default.

    Raises:
        MissingPartError: There is no X.item.json, or no CSV file.
        DataError: A file is not of this layout, or an item ID stands twice.
    """
    prefix = _prefix(Path(folder_or_prefix))
    items_path = Path(f"{prefix}.item.json")
    items = read_json(items_path)
    if not isinstance(items, dict) or not all(isinstance(item, dict) for item in items.values()):
        raise DataError(f"{items_path} must hold a JSON object of item number to attributes")
    outside_id = {key: str(item.get("asin") or key) for key, item in items.items()}
    twice = [item_id for item_id, count in Counter(outside_id.values()).items() if count > 1]
    if twice:
        raise DataError(f"{items_path} has the item ID {twice[0]!r} twice: every asin must be unique")
    histories = _histories(prefix)
    users = [user for user, history in histories.items() for _ in history]
    taken = [outside_id.get(item, item) for history in histories.values() for item in history]
    return {
        "name": name or prefix.name,
        "source": f"{prefix}.*.csv",
        "user_ids": pa.array(users, pa.string()),
        "item_ids": pa.array(taken, pa.string()),
        "items": _item_table(items, outside_id),
    }


def is_minionerec(folder_or_prefix: str | os.PathLike[str]) -> bool:
    """Whether a folder, or a path up to X, is in this layout.

    Raises:
        DataError: A folder with several such data sets.
    """
    try:
        return bool(_parts(_prefix(Path(folder_or_prefix))))
    except MissingPartError:
        return False


def list_as_text(value: Any) -> Any:
    """A Python list written as text becomes its entries, joined by spaces; anything else stays as it is.

    Example:
        >>> list_as_text("['Soft pen.', 'Blue']")
        'Soft pen. Blue'
    """
    if not isinstance(value, str) or not value.startswith("["):
        return value
    try:
        entries = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
    return " ".join(str(entry).strip() for entry in entries) if isinstance(entries, list) else value


def _prefix(given: Path) -> Path:
    """The path up to X."""
    if not given.is_dir():
        prefix = given.with_name(given.name.removesuffix(".item.json"))
        if Path(f"{prefix}.item.json").is_file():
            return prefix
        raise MissingPartError(f"{prefix}.item.json is missing, the items of the MiniOneRec layout")
    found = sorted(
        path for path in given.glob("*.item.json") if _parts(path.with_name(path.name[: -len(".item.json")]))
    )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{given} holds several data sets ({names}): pass the path of one, without .item.json")
    if not found:
        raise MissingPartError(f"{given} holds no X.item.json with X.train.csv, X.valid.csv or X.test.csv")
    return found[0].with_name(found[0].name.removesuffix(".item.json"))


def _parts(prefix: Path) -> list[Path]:
    paths = [Path(f"{prefix}.{part}.csv") for part in PARTS]
    return [path for path in paths if path.is_file()]


def _item_table(items: dict[str, dict[str, Any]], outside_id: dict[str, str]) -> pa.Table:
    columns: dict[str, Any] = {"item_id": list(outside_id.values()), "item_key": list(items)}
    for attribute in dict.fromkeys(attribute for item in items.values() for attribute in item):
        if attribute not in ("asin", "item_id", "item_key"):
            values = [item.get(attribute) for item in items.values()]
            readable = [list_as_text(value) for value in values] if attribute == "description" else values
            columns[attribute] = attribute_column(readable)
    return pa.table(columns)


def _histories(prefix: Path) -> dict[str, list[str]]:
    """User to item numbers, oldest first, out of the rows of all parts."""
    paths = _parts(prefix)
    if not paths:
        raise MissingPartError(
            f"none of {prefix}.train.csv, .valid.csv and .test.csv is there: histories come from them"
        )
    missing = [part for part in PARTS if Path(f"{prefix}.{part}.csv") not in paths]
    if missing:
        names = " and ".join(f"{prefix.name}.{part}.csv" for part in missing)
        logger.warning("%s is missing: histories hold what the other parts know; put it beside them", names)
    rows = [row for path in paths for row in _rows(path)]
    cut_at = max((len(row.history) for row in rows), default=0)
    histories: dict[str, list[str]] = {}
    holes = contradictions = 0
    for row in rows:
        known = histories.setdefault(row.user, [])
        overlap = _overlap(known, row.history, cut_at)
        if overlap is None:
            contradictions += 1
            continue
        holes += bool(known) and overlap == 0
        known += [*row.history[overlap:], row.target]
    if holes:
        logger.warning(
            "%d of %d rows have histories that begin after a hole: items are missing there", holes, len(rows)
        )
    if contradictions:
        logger.warning("left out %d of %d rows: they contradict earlier rows of the user", contradictions, len(rows))
    return histories


@dataclass(frozen=True)
class _Row:
    user: str
    history: list[str]
    target: str


def _rows(path: Path) -> list[_Row]:
    table = read_delimited(path, columns=_COLUMNS, required=_COLUMNS, text_columns=_COLUMNS)
    rows = []
    for number, (user, history, target) in enumerate(
        zip(*(table[name].to_pylist() for name in _COLUMNS), strict=True)
    ):
        try:
            before = json.loads(history or "")
        except json.JSONDecodeError:
            before = None
        if user is None or target is None or not isinstance(before, list):
            raise DataError(
                f"{path}, row {number + 1}: user {user!r}, history {history!r}, item {target!r}; expected a user, a"
                " list of item numbers like [3, 14] and an item number"
            )
        rows.append(_Row(user, [str(item) for item in before], target))
    return rows


def _overlap(known: list[str], history: list[str], cut_at: int) -> int | None:
    """How many of the first items of a row's history are the last known ones of its user.

    Args:
        known: What earlier rows told, oldest first; empty for a new user.
        history: Of the row.
        cut_at: Length of the longest history of the files. A shorter one wasn't cut: it begins where the user does.

    Returns:
        The number; None where the row contradicts what is known.
    """
    if len(history) < cut_at:
        return len(known) if history[: len(known)] == known else None
    lengths = range(min(len(known), len(history)), 0, -1)
    return next((length for length in lengths if known[-length:] == history[:length]), 0)
