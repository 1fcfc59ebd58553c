"""What a job of batch recommendation is: its manifest, and the folder that its parts are in.

The manifest says what the parts are the answers to: input, columns, settings, recommender. Each part carries the
manifest's hash. So a run that goes on knows which parts are its own, and refuses a folder that isn't its own.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from llmrec.data.histories.plan import HistoryPlan
from llmrec.errors import DataError, SettingsError
from llmrec.files import check_format, read_json, write_json
from llmrec.processes import is_sharded

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
# Names that start with "_" are none of the data to those who read the folder as one table.
MANIFEST_NAME = "_manifest.json"
SUCCESS_NAME = "_SUCCESS"
ANSWER_COLUMNS = (pa.field("item_ids", pa.list_(pa.string())), pa.field("scores", pa.list_(pa.float32())))

# Settings of `recommend` that change no answer: a run may go on with others. (`on_unknown` says where it stops.)
_FREE_OPTIONS = ("batch_size", "on_unknown", "progress")
_MANIFEST_KEY = b"llmrec.manifest"  # in the schema of every part


@dataclass(frozen=True, eq=False)
class BatchJob:
    """What all processes of a job must agree on.

    Attributes:
        folder: Of the parts.
        plan: Its runs are the parts.
        schema: Of a part; its metadata has the hash of the manifest.
        missing: Numbers of the parts that aren't there yet.
    """

    folder: Path
    plan: HistoryPlan
    schema: pa.Schema
    missing: tuple[int, ...]

    def path(self, part: int) -> Path:
        """File of a part; the order of the names is that of the parts."""
        return self.folder / _part_name(part, len(self.plan.runs))


def _part_name(part: int, count: int) -> str:
    width = max(5, len(str(count)))
    return f"part-{part:0{width}d}-of-{count:0{width}d}.parquet"


def make_manifest(
    plan: HistoryPlan, recommender: Any, k: int, options: Mapping[str, Any], rows_per_part: int
) -> dict[str, Any]:
    """All that the answers depend on, as JSON; `options` as of `describe_options`."""
    return {
        "format_version": FORMAT_VERSION,
        "inputs": [asdict(file) for file in plan.files],
        "history_column": plan.history_column,
        "keep_columns": {field.name: str(field.type) for field in plan.kept},
        "rows_per_part": rows_per_part,
        "num_parts": len(plan.runs),
        "recommender": {"class": type(recommender).__name__, "fingerprint": fingerprint_of(recommender)},
        "k": k,
        "options": dict(options),
    }


def _compared(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on, each under the name that a message gives it."""
    inputs = {f"input {number}": [file["num_rows"], file["sha256"]] for number, file in enumerate(manifest["inputs"])}
    names = ("history_column", "keep_columns", "rows_per_part", "num_parts", "recommender", "k")
    return {**inputs, **{name: manifest[name] for name in names}, **manifest["options"]}


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    try:
        left, right = _compared(found), _compared(wanted)
    except (KeyError, TypeError):
        return ["the manifest lacks entries"]
    names = [name for name in dict.fromkeys([*right, *left]) if left.get(name) != right.get(name)]
    return [
        name
        if name.startswith("input ") or name == "recommender"
        else f"{name}: {left.get(name)!r} there, {right.get(name)!r} now"
        for name in names
    ]


def describe_options(recommender: Any, k: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults, as JSON; those that change no answer left out.

    Raises:
        SettingsError: `recommend` has no such option, or its value can't be written down.
    """
    signature = inspect.signature(recommender.recommend)
    try:
        signature.bind([], k, **options)
    except TypeError as error:
        raise SettingsError(
            f"{type(recommender).__name__}.recommend can't be called with these options: {error}"
        ) from error
    settings = list(signature.parameters.values())[2:]  # the first two are histories and k
    defaults = {setting.name: setting.default for setting in settings if setting.default is not setting.empty}
    given = {**defaults, **options}
    return {name: _describe(name, value) for name, value in given.items() if name not in _FREE_OPTIONS}


def _describe(name: str, value: Any) -> Any:
    """A value as JSON; a set of items as a hash."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    items = getattr(value, "rows", value)  # of an `ItemSet`
    if hasattr(items, "__array__") or (isinstance(items, list) and items and isinstance(items[0], bool | np.bool_)):
        items = np.asarray(items)
        items = items.tolist() if items.dtype != bool else items
    if isinstance(items, np.ndarray):
        content, count = np.packbits(items).tobytes(), f"{int(items.sum())} of {items.size}"
    elif isinstance(items, list) and all(isinstance(item, str) for item in items):
        content, count = json.dumps(sorted(set(items))).encode(), str(len(set(items)))
    else:
        raise SettingsError(
            f"{name} is {value!r}: recommend_file takes numbers, text, and one set of items for all users (item IDs, a"
            " mask, or an ItemSet)"
        )
    return f"{count} items, sha256 {hashlib.sha256(content).hexdigest()}"


def as_reusable(value: Any) -> Any:
    """A collection that can be gone through again and again."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable) or hasattr(value, "__array__"):
        return value
    return list(value)


def fingerprint_of(recommender: Any) -> str:
    """A hash of all that the answers of a recommender depend on.

    Of a `Recommender` or a torch module the weights (each tensor goes through main memory once), the codes and IDs of
    the items, and the settings of prompt and scores. An object without these parts is known by its class alone, unless
    it has a string `fingerprint` of its own.
    """
    own = getattr(recommender, "fingerprint", None)
    if isinstance(own, str):
        return own
    digest = hashlib.sha256(type(recommender).__name__.encode())
    model = _model_of(recommender)
    if model is not None:
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    semantic_ids = getattr(recommender, "semantic_ids", None)
    if semantic_ids is not None:
        digest.update(np.asarray(semantic_ids.codes, dtype=np.int64).tobytes())
    item_ids = getattr(semantic_ids or recommender, "item_ids", ())
    digest.update(json.dumps(list(item_ids)).encode())
    config = getattr(recommender, "config", None)
    for name in ("template", "max_history", "codebook_sizes", "first_token_id", "scope"):
        digest.update(f"{name} {getattr(config, name, None)!r}".encode())
    return digest.hexdigest()


def _model_of(recommender: Any) -> nn.Module | None:
    model = recommender if isinstance(recommender, nn.Module) else getattr(recommender, "model", None)
    return model if isinstance(model, nn.Module) else None


def check_not_sharded(recommender: Any) -> None:
    """Refuses a model of whose parameters this process has only a share.

    Raises:
        SettingsError: It is one of ZeRO-3, FSDP or tensor parallelism.
    """
    model = _model_of(recommender)
    if model is None:
        return
    if is_sharded(model):
        raise SettingsError(
            "the model is sharded over processes (ZeRO-3, FSDP or tensor parallel), but each process answers users of"
            " its own: load the whole recommender in every process, with Recommender.from_pretrained(..., device=...)"
        )


# The folder


def prepare_job(folder: Path, plan: HistoryPlan, manifest: dict[str, Any]) -> BatchJob:
    """Looks which parts are there, removes what a killed run left, writes the manifest. For the main process.

    Raises:
        SettingsError: The folder has parts of another job, or a kept column is called like one of the answer.
        DataError: It has other Parquet files, or a manifest of something else.
    """
    for column in ANSWER_COLUMNS:
        if column.name in plan.kept.names:
            raise SettingsError(
                f"the input has a column {column.name!r}, and so has the answer: leave it out of the columns to keep"
            )
    if folder.exists() and not folder.is_dir():
        raise DataError(f"can't write the folder {folder}: a file of that name exists; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    count = len(plan.runs)
    _check_folder(folder, manifest, {_part_name(part, count) for part in range(count)})
    for left in [*folder.glob(".part-*.parquet.*"), *folder.glob(f".{SUCCESS_NAME}.*")]:
        left.unlink(missing_ok=True)

    key = hashlib.sha256(json.dumps(_compared(manifest), sort_keys=True).encode()).hexdigest().encode()
    sizes = {folder / _part_name(part, count): run.num_rows for part, run in enumerate(plan.runs)}
    is_done = [_is_done(path, num_rows, key) for path, num_rows in sizes.items()]
    for path, done in zip(sizes, is_done, strict=True):
        if not done:
            path.unlink(missing_ok=True)
            (folder / SUCCESS_NAME).unlink(missing_ok=True)
    write_json(folder / MANIFEST_NAME, manifest)
    if any(is_done):
        logger.info("%d of %d parts are in %s already", sum(is_done), count, folder)
    schema = pa.schema([*plan.kept, *ANSWER_COLUMNS], {_MANIFEST_KEY: key})
    return BatchJob(folder, plan, schema, tuple(part for part, done in enumerate(is_done) if not done))


def _check_folder(folder: Path, manifest: dict[str, Any], names: set[str]) -> None:
    """Refuses a folder with Parquet files that are no parts of this job."""
    present = sorted(path.name for path in folder.glob("*.parquet"))
    path = folder / MANIFEST_NAME
    if present and path.is_file():
        found = read_json(path)
        check_format(found if isinstance(found, dict) else {}, FORMAT_VERSION, path)
        if different := _differences(found, manifest):
            raise SettingsError(
                f"{folder} holds {len(present)} parts of another job; what differs: {'; '.join(different)}. Call it as"
                " that job was called, to finish it; or remove the folder; or choose another one"
            )
    for name in present:
        if name not in names or not path.is_file():
            raise DataError(
                f"{folder} holds {name}, which is no part of this job and would be read with the answers: remove it,"
                " or choose another folder"
            )


def _is_done(path: Path, num_rows: int, key: bytes) -> bool:
    """Whether a part is there, whole, and of the job with this hash."""
    if not path.is_file():
        return False
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        logger.warning("%s is damaged and is made again: %s", path, str(error).splitlines()[0])
        return False
    if metadata.num_rows != num_rows or (metadata.metadata or {}).get(_MANIFEST_KEY) != key:
        logger.warning("%s is no part of this job and is made again", path)
        return False
    return True
