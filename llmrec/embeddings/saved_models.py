"""The folder that SASRec and LightGCN are saved in: config.json, model.safetensors, items.parquet."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from llmrec.errors import DataError, MissingPartError
from llmrec.files import atomic_file, atomic_folder, check_format, read_json, write_json

FORMAT_VERSION = 1
CONFIG_NAME, WEIGHTS_NAME, ITEMS_NAME = "config.json", "model.safetensors", "items.parquet"


@dataclass(frozen=True)
class SavedModel:
    """What such a folder holds.

    Attributes:
        config: The settings, of the class that was asked for.
        training: What is known of the training; JSON values.
        items: Columns of the catalogue, "item_id" among them, in row order.
        state: Tensors by name.
    """

    config: Any
    training: dict[str, Any]
    items: pa.Table
    state: dict[str, torch.Tensor]


def save_model(folder: str | Path, name: str, saved: SavedModel) -> None:
    """Writes the folder, whole or not at all.

    Args:
        folder: A new or empty one, or one that holds such a model, which is replaced.
        name: Of the model's class.
        saved: What goes into it; tensors may be on any device.

    Raises:
        DataError: The folder holds something else than a saved model, which would be lost.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ITEMS_NAME).is_file():
        raise DataError(f"{folder} holds other files, which would be lost: choose an empty or a new folder")
    content = {
        "format_version": FORMAT_VERSION,
        "model": name,
        "config": asdict(saved.config),
        "training": saved.training,
    }
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in saved.state.items()}
    with atomic_folder(folder) as temporary:
        write_json(temporary / CONFIG_NAME, content)
        with atomic_file(temporary / WEIGHTS_NAME) as file:  # safetensors alone makes it its owner's only
            save_file(state, file, metadata={"format": "pt"})
        pq.write_table(saved.items, temporary / ITEMS_NAME)


def read_model(folder: str | Path, name: str, config_class: type) -> SavedModel:
    """Reads what `save_model` wrote.

    Args:
        folder: The folder.
        name: Of the model's class that it must hold.
        config_class: The dataclass of its settings.

    Raises:
        MissingPartError: A file is missing.
        DataError: The folder holds another kind of model, a later format, or settings that the class doesn't have.
    """
    folder = Path(folder)
    content = read_json(folder / CONFIG_NAME)
    check_format(content, FORMAT_VERSION, folder / CONFIG_NAME)
    if content.get("model") != name:
        raise DataError(f"{folder} holds a {content.get('model')!r}, not a {name}")
    for part in (WEIGHTS_NAME, ITEMS_NAME):
        if not (folder / part).is_file():
            raise MissingPartError(f"{folder / part} is missing")
    unknown = set(content["config"]) - {entry.name for entry in fields(config_class)}
    if unknown:
        raise DataError(f"{folder / CONFIG_NAME} has settings that {name} doesn't know: {sorted(unknown)}")
    return SavedModel(
        config_class(**content["config"]),
        content["training"],
        pq.read_table(folder / ITEMS_NAME),
        load_file(folder / WEIGHTS_NAME),
    )
