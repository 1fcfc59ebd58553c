"""Files that hold vectors of items: `.npy`, safetensors, Parquet. Read a block of rows at a time, mapped or in memory.

Nothing here compares items with a catalogue; `base.py` does.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmrec.errors import DataError, MissingPartError
from llmrec.files import atomic_file, atomic_folder, read_json, write_json

logger = logging.getLogger(__name__)

BLOCK_BYTES = 32 * 2**20  # of float32 values read at once
PARQUET_ROWS = 4096  # a first guess, before the width is known
SAFETENSORS_TYPES = {np.dtype(np.float32): "F32", np.dtype(bool): "BOOL"}


def block_rows(width: int) -> int:
    """Rows of `width` float32 values that make a block."""
    return max(1, BLOCK_BYTES // (4 * max(1, width)))


@dataclass
class VectorSource:
    """Vectors in a file (or in a folder of shards), not read yet.

    Attributes:
        path: What was opened.
        files: The files with the vectors.
        shape: N and D.
        blocks: Walks through the rows in order: arrays [n, D] of any float type.
        item_ids: IDs of the rows, where the file holds them.
        source: How the vectors were made, as far as the file tells.
        present: bool [N], where the file holds a mask.
        map: Maps the vectors where they are; None where they aren't float32 in the order of rows.
        column: Column or tensor that is read, part of the name of what is written from it.
    """

    path: Path
    files: list[Path]
    shape: tuple[int, int]
    blocks: Callable[[], Iterator[np.ndarray]]
    item_ids: tuple[str, ...] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    present: np.ndarray | None = None
    map: Callable[[], np.ndarray] | None = None
    column: str = "vectors"


def open_vectors(path: Path, *, id_column: str, vector_column: str) -> VectorSource:
    """Looks at a file: its shape, its IDs, how to walk through its rows.

    Raises:
        MissingPartError: No such file, or a folder without Parquet files.
        DataError: A file of another kind, or one that can't be read.
    """
    if path.is_dir():
        shards = sorted(path.glob("*.parquet"))
        if not shards:
            raise MissingPartError(f"no embeddings at {path}: the folder holds no .parquet file")
        return _open_parquet(path, shards, id_column, vector_column)
    if not path.is_file():
        raise MissingPartError(f"no embeddings at {path}")
    if path.suffix == ".npy":
        return _open_npy(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path, vector_column)
    if path.suffix == ".parquet":
        return _open_parquet(path, [path], id_column, vector_column)
    raise DataError(f"can't read embeddings from {path}: .safetensors, .npy, .parquet or a folder of these is needed")


def read_vectors(source: VectorSource) -> np.ndarray:
    """All vectors in memory, float32 [N, D]."""
    vectors = np.empty(source.shape, np.float32)
    _copy_blocks(source, vectors)
    return vectors


def map_vectors(source: VectorSource, cache_dir: str | Path | None = None) -> np.ndarray:
    """All vectors as a read-only memory map, float32 [N, D]; see `ItemEmbeddings.load` for what is written.

    Raises:
        DataError: The folder to write to can't be written, or what `read_vectors` raises.
    """
    if source.map is not None:
        return source.map()
    path = source.path.absolute()
    parent = path.parent if cache_dir is None else Path(cache_dir)
    folder = parent / f"{path.name}.{source.column}.mapped"
    of_files = [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in source.files]
    made_of = {"files": of_files, "column": source.column}
    if not _is_made_of(folder, made_of):
        logger.info("%s is written into %s as float32, to be memory-mapped", source.path, folder)
        try:
            with atomic_folder(folder) as temporary:
                written = np.lib.format.open_memmap(
                    temporary / "vectors.npy", mode="w+", dtype=np.float32, shape=source.shape
                )
                _copy_blocks(source, written)
                written.flush()
                write_json(temporary / "made_of.json", made_of)
        except PermissionError as error:
            raise DataError(f"can't write {folder}, which would be memory-mapped: choose a cache_dir") from error
    return np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)


def _is_made_of(folder: Path, made_of: Mapping[str, Any]) -> bool:
    if not (folder / "vectors.npy").is_file() or not (folder / "made_of.json").is_file():
        return False
    return bool(read_json(folder / "made_of.json") == made_of)


def _copy_blocks(source: VectorSource, target: np.ndarray) -> None:
    start = 0
    for block in source.blocks():
        target[start : start + len(block)] = block
        start += len(block)
    if start != len(target):
        raise DataError(f"{source.path} says it has {len(target)} vectors, but only {start} could be read")


def read_item_ids(path: str | Path) -> tuple[str, ...]:
    """Item IDs from a `.json` list, or from a text file with one a line.

    Raises:
        MissingPartError: No such file.
        DataError: Something else than strings or integers; a blank line; another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingPartError(f"no item IDs at {path}")
    if path.suffix == ".json":
        content = read_json(path)
        if not isinstance(content, list):
            raise DataError(f"{path} must hold a list of item IDs, in the order of the vectors")
        for row, value in enumerate(content):
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise DataError(f"{path}: entry {row} is {value!r}, not an item ID")
        return tuple(str(value) for value in content)
    if path.suffix != ".txt":
        raise DataError(f"can't read item IDs from {path}: a .json list, or .txt with one ID a line is needed")
    lines = path.read_text(encoding="utf-8").splitlines()
    if "" in lines:
        raise DataError(f"{path}: line {lines.index('') + 1} is blank; there must be one item ID a line")
    return tuple(lines)


def write_safetensors(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes float32 and bool arrays block by block: the library's own function would first copy them whole.

    The layout (https://huggingface.co/docs/safetensors): length of the header, 8 bytes; the header, JSON, padded with
    spaces to a multiple of 8; the arrays. The file appears whole or not at all.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": SAFETENSORS_TYPES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            rows = block_rows(array.shape[1] if array.ndim > 1 else 1)
            for start in range(0, len(array), rows):
                file.write(np.ascontiguousarray(array[start : start + rows]).tobytes())


def _open_npy(path: Path) -> VectorSource:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is no readable NumPy array: {error}") from error
    _check_array(path, array.shape, np.issubdtype(array.dtype, np.floating), str(array.dtype))
    can_map = array.dtype == np.dtype("<f4") and array.flags.c_contiguous
    return VectorSource(
        path,
        [path],
        (int(array.shape[0]), int(array.shape[1])),
        lambda: _blocks_of(array, *array.shape),
        source={"file": path.name},
        map=(lambda: array) if can_map else None,
    )


def _open_safetensors(path: Path, vector_column: str) -> VectorSource:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
            types = {name: file.get_slice(name).get_dtype() for name in shapes}
            ours = "item_ids" in metadata and "vectors" in shapes
            present = file.get_tensor("present") if ours and "present" in shapes else None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is no readable safetensors file: {error}") from error
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    name = "vectors" if ours else vector_column if vector_column in shapes else matrices[0] if matrices else ""
    if not name or (len(matrices) > 1 and name not in ("vectors", vector_column)):
        raise DataError(
            f"{path} was not written by ItemEmbeddings.save, and which of its tensors holds the vectors is unclear"
            f" ({', '.join(shapes) or 'there are none'}): name it with vector_column"
        )
    _check_array(path, shapes[name], types[name] in ("F32", "F16", "BF16", "F64"), types[name])
    return VectorSource(
        path,
        [path],
        (shapes[name][0], shapes[name][1]),
        lambda: _safetensors_blocks(path, name, *shapes[name]),
        item_ids=tuple(json.loads(metadata["item_ids"])) if ours else None,
        source=json.loads(metadata.get("source", "{}")) if ours else {"file": path.name},
        present=present,
        map=_safetensors_map(path, name) if types[name] == "F32" else None,
        column=name,
    )


def _safetensors_blocks(path: Path, name: str, rows: int, width: int) -> Iterator[np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:  # NumPy has no bfloat16
        tensor = file.get_slice(name)
        for start in range(0, rows, block_rows(width)):
            yield tensor[start : min(rows, start + block_rows(width))].float().numpy()


def _safetensors_map(path: Path, name: str) -> Callable[[], np.ndarray] | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    offset = 8 + length + entry["data_offsets"][0]
    if offset % 4 or not all(entry["shape"]):  # PyTorch can't take unaligned values, nor NumPy map none at all
        return None
    return lambda: np.memmap(path, np.float32, mode="r", offset=offset, shape=tuple(entry["shape"]))


def _check_array(path: Path, shape: tuple[int, ...], floats: bool, kind: str) -> None:
    if len(shape) != 2:
        raise DataError(f"embeddings must be [items, width]: {path} has shape {tuple(shape)}")
    if not floats:
        raise DataError(f"{path} holds {kind} values: vectors must be floating-point numbers")


def _blocks_of(array: np.ndarray, rows: int, width: int) -> Iterator[np.ndarray]:
    for start in range(0, rows, block_rows(width)):
        yield np.asarray(array[start : start + block_rows(width)], dtype=np.float32)


def _open_parquet(path: Path, files: list[Path], id_column: str, vector_column: str) -> VectorSource:
    item_ids: list[str] = []
    for file in files:
        item_ids.extend(_parquet_ids(file, id_column, vector_column))
    if not item_ids:
        raise DataError(f"{path} holds no items")
    first = next((block for file in files for block in _parquet_blocks(file, id_column, vector_column, 1)), None)
    width = 0 if first is None else first.shape[1]

    def blocks() -> Iterator[np.ndarray]:
        for file in files:
            yield from _parquet_blocks(
                file, id_column, vector_column, min(PARQUET_ROWS, block_rows(width)), width=width
            )

    return VectorSource(
        path,
        files,
        (len(item_ids), width),
        blocks,
        item_ids=tuple(item_ids),
        source={"file": path.name, "column": vector_column},
        column=vector_column,
    )


def _parquet_ids(file: Path, id_column: str, vector_column: str) -> list[str]:
    try:
        schema = pq.read_schema(file)
        missing = [name for name in (id_column, vector_column) if name not in schema.names]
        if missing:
            raise DataError(
                f"{file} has no column {missing[0]!r}; its columns are {', '.join(schema.names)} (choose with"
                " id_column and vector_column)"
            )
        kind = schema.field(vector_column).type
        if not _is_list(kind) or not pa.types.is_floating(kind.value_type):
            raise DataError(f"{file}: column {vector_column!r} holds {kind}, not lists of floating-point numbers")
        ids = pq.read_table(file, columns=[id_column])[id_column]
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} is no readable Parquet file: {error}") from error
    if not (pa.types.is_integer(ids.type) or pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        raise DataError(f"{file}: column {id_column!r} holds {ids.type}; item IDs are strings or integers")
    if ids.null_count:
        row = int(np.flatnonzero(ids.is_null().to_numpy())[0])
        raise DataError(f"{file}: the item of row {row} has no ID in column {id_column!r}")
    return [str(item_id) for item_id in ids.to_pylist()]


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _parquet_blocks(
    file: Path, id_column: str, vector_column: str, batch_size: int, *, width: int | None = None
) -> Iterator[np.ndarray]:
    """Vectors of one file, [n, D] of its float type; the width of its first vector must hold for all."""
    with pq.ParquetFile(file, pre_buffer=False) as reader:
        for batch in reader.iter_batches(batch_size, columns=[id_column, vector_column]):
            vectors, ids = batch.column(vector_column), batch.column(id_column)
            if vectors.null_count:
                item = ids[int(np.flatnonzero(vectors.is_null().to_numpy(zero_copy_only=False))[0])]
                raise DataError(f"{file}: item {str(item)!r} has no vector; leave it out and mask it with align")
            lengths = pc.list_value_length(vectors).to_numpy(zero_copy_only=False)
            expected = int(lengths[0]) if width is None else width
            if (lengths != expected).any():
                row = int(np.flatnonzero(lengths != expected)[0])
                raise DataError(
                    f"{file}: the vector of item {str(ids[row])!r} has {lengths[row]} values, others have {expected}"
                )
            values = vectors.flatten()
            if values.null_count:
                row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // expected
                raise DataError(f"{file}: the vector of item {str(ids[row])!r} has a null in it")
            yield values.to_numpy(zero_copy_only=False).reshape(len(batch), expected)
