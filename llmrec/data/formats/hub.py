"""Reads interactions from whatever `datasets.load_dataset` reads: the Hub, or local files and folders."""

from typing import Any

import datasets

from llmrec.data.building import WithoutMetadata
from llmrec.data.columns import require_columns
from llmrec.data.formats.files import DEFAULT_TIMESTAMP_COLUMN
from llmrec.errors import DataError


def read_hub(
    path: str,
    *,
    config: str | None = None,
    split: str = "train",
    data_files: Any = None,
    items_path: str | None = None,
    items_config: str | None = None,
    items_split: str = "train",
    items_data_files: Any = None,
    revision: str | None = None,
    user_column: str = "user_id",
    item_column: str = "item_id",
    timestamp_column: str | None = DEFAULT_TIMESTAMP_COLUMN,
    timestamp_unit: str | None = None,
    title_column: str = "title",
    items_without_metadata: WithoutMetadata = "drop",
    name: str | None = None,
) -> dict[str, Any]:
    """Reads a `datasets` source into the arguments of `InteractionDataset.from_columns`.

    Args:
        path: What `datasets.load_dataset` takes: a Hub ID, a local folder, or a builder such as "csv" with
            `data_files`.
        config: Configuration of the source that holds the interactions.
        split: Its split.
        data_files: Its files, where they are to be named.
        items_path: Source of the items; None with `items_config` or `items_data_files` means the same source, without
            either that there is no items table.
        items_config: Configuration that holds the items.
        items_split: Its split.
        items_data_files: Its files.
        revision: Commit, tag or branch of the Hub repository, of both where they are the same.
        user_column: Column with the user ID.
        item_column: Column of both tables with the item ID.
        timestamp_column: As in `files.read_files`.
        timestamp_unit: As in `files.read_files`.
        title_column: Column of the items with the title.
        items_without_metadata: "drop" or "keep", see `building.build_interactions`.
        name: Name of the data set; the last part of `path` by default.

    Raises:
        DataError: The source, configuration, split or column does not exist.
    """
    table = _load(path, config, split, data_files, revision)
    required = [user_column, item_column]
    if timestamp_column not in (None, DEFAULT_TIMESTAMP_COLUMN):
        required.append(str(timestamp_column))
    require_columns(table.column_names, required, path)
    wanted = [*required, *([timestamp_column] if timestamp_column in table.column_names else [])]
    columns = table.select_columns(list(dict.fromkeys(wanted))).with_format("arrow")[:]
    arguments: dict[str, Any] = {
        "user_ids": columns[user_column],
        "item_ids": columns[item_column],
        "timestamps": columns[timestamp_column] if timestamp_column in columns.column_names else None,
        "item_column": item_column,
        "title_column": title_column,
        "timestamp_unit": timestamp_unit,
        "items_without_metadata": items_without_metadata,
        "name": name or path.rstrip("/").split("/")[-1],
        "source": path,
    }
    if items_path or items_config or items_data_files:
        same = items_path is None or items_path == path
        source = path if items_path is None else items_path
        items = _load(source, items_config, items_split, items_data_files, revision if same else None)
        require_columns(
            items.column_names, [item_column, *([title_column] if title_column != "title" else [])], source
        )
        arguments["items"] = items
    return arguments


def _load(path: str, config: str | None, split: str, data_files: Any, revision: str | None) -> datasets.Dataset:
    try:
        loaded = datasets.load_dataset(path, config, split=split, data_files=data_files, revision=revision)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise DataError(
            f"datasets.load_dataset can't read {path!r} (configuration {config}, split {split!r}): {error}"
        ) from error
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(f"{path!r} gives a {type(loaded).__name__}: name one split with split=")
    return loaded
