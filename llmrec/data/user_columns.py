"""Attributes of users out of any table, in the order of a data set's users."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec.data.building import as_item_table
from llmrec.data.columns import encode_ids, require_columns
from llmrec.errors import DataError

logger = logging.getLogger(__name__)

HISTORY_COLUMNS = ("user_id", "items", "timestamps")


def align_users(users: Any, user_ids: Sequence[str], *, user_column: str = "user_id") -> pa.Table:
    """The attributes of a data set's users.

    Args:
        users: Table (`datasets.Dataset`, Arrow table, data frame, dict of columns), one row a user.
        user_ids: Of the data set.
        user_column: Column of the table with the user ID.

    Returns:
        The table's other columns, one row for each of `user_ids`; null where the table lacks the user.

    Raises:
        DataError: A column is missing, or has the name of one that histories have anyway; a user stands there twice;
            none of the users is one of `user_ids`.
    """
    table = as_item_table(users)
    require_columns(table.column_names, [user_column], "the users table")
    names = [name for name in table.column_names if name != user_column]
    taken = [name for name in names if name in HISTORY_COLUMNS]
    if taken:
        raise DataError(f"the users table has a column {taken[0]!r}, which histories have anyway: rename it")
    encoded = encode_ids(table[user_column], "user ID")
    rows = np.flatnonzero(encoded.codes >= 0)  # rows without an ID are nobody's
    counts = np.bincount(encoded.codes[rows], minlength=1)
    if counts.max() > 1:
        twice = encoded.ids[int(counts.argmax())].as_py()
        raise DataError(f"user {twice!r} stands twice in the users table: give one row a user")
    found = pc.index_in(pa.array(user_ids, pa.string()), value_set=encoded.ids)
    if found.null_count == len(found):
        raise DataError(
            f"no user of the users table (such as {encoded.ids[:2].to_pylist()}) is one of the data set (such as"
            f" {list(user_ids[:2])}): name the right column of IDs"
        )
    if found.null_count:
        logger.info("%d of %d users are not in the users table", found.null_count, len(found))
    return table.select(names).take(pa.array(rows).take(found))  # in order of codes: IDs appear once
