import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from llmrec.embeddings import vector_files
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, ItemOrderError, MissingPartError

VECTORS = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
IDS = [f"i{row}" for row in range(7)]


def write_parquet(path, vectors=VECTORS, ids=IDS, *, kind=None, columns=("item_id", "embedding"), rows=3):
    kind = kind or pa.list_(pa.float32())
    table = pa.table({columns[0]: ids, columns[1]: pa.array([list(vector) for vector in vectors], kind)})
    pq.write_table(table, path, row_group_size=rows)


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64()),
        pa.list_(pa.float16()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 3),
        pa.list_(pa.float16(), 3),
    ],
    ids=str,
)
def test_parquet_of_any_float_type(tmp_path, kind, memory_map, monkeypatch):
    monkeypatch.setattr(vector_files, "PARQUET_ROWS", 2)
    vectors = VECTORS.astype(np.float16) if "halffloat" in str(kind) else VECTORS
    write_parquet(tmp_path / "vectors.parquet", vectors, kind=kind)
    found = ItemEmbeddings.load(tmp_path / "vectors.parquet", item_ids=IDS, memory_map=memory_map)
    assert found.item_ids == tuple(IDS)
    assert np.array_equal(found.vectors, vectors.astype(np.float32))
    assert isinstance(found.vectors, np.memmap) == memory_map
    with pytest.raises(ItemOrderError, match="row 0"):
        ItemEmbeddings.load(tmp_path / "vectors.parquet", item_ids=IDS[::-1])


def test_a_folder_of_shards_in_the_order_of_their_names(tmp_path):
    columns = ("asin", "vector")
    write_parquet(tmp_path / "b.parquet", VECTORS[4:], IDS[4:], columns=columns)
    write_parquet(tmp_path / "a.parquet", VECTORS[:4], IDS[:4], columns=columns)
    found = ItemEmbeddings.load(tmp_path, id_column="asin", vector_column="vector")
    assert found.item_ids == tuple(IDS)
    assert np.array_equal(found.vectors, VECTORS)
    write_parquet(tmp_path / "c.parquet", VECTORS[:1, :2], ["other"], columns=columns)
    with pytest.raises(DataError, match=r"c\.parquet: the vector of item 'other' has 2 values, others have 3"):
        ItemEmbeddings.load(tmp_path, id_column="asin", vector_column="vector")


def test_numbers_as_ids(tmp_path):
    write_parquet(tmp_path / "vectors.parquet", ids=list(range(7)))
    assert ItemEmbeddings.load(tmp_path / "vectors.parquet").item_ids == tuple("0123456")


def test_a_mapped_copy_is_made_once_and_again_when_the_files_change(tmp_path, monkeypatch):
    path = tmp_path / "vectors.parquet"
    write_parquet(path)
    copies, copy = [], vector_files._copy_blocks
    monkeypatch.setattr(vector_files, "_copy_blocks", lambda *args: copies.append(1) or copy(*args))
    for _ in range(2):
        found = ItemEmbeddings.load(path, memory_map=True)
    assert len(copies) == 1
    assert not found.vectors.flags.writeable
    assert (tmp_path / "vectors.parquet.embedding.mapped" / "vectors.npy").is_file()
    write_parquet(path, VECTORS + 1)
    os.utime(path, (1, 1))
    assert np.array_equal(ItemEmbeddings.load(path, memory_map=True).vectors, VECTORS + 1)
    assert np.array_equal(found.vectors, VECTORS)  # an older map keeps its content
    assert len(copies) == 2
    elsewhere = ItemEmbeddings.load(path, memory_map=True, cache_dir=tmp_path / "cache")
    assert elsewhere.vectors.filename.is_relative_to(tmp_path / "cache")


def test_a_run_that_was_cut_off_leaves_no_mapped_copy(tmp_path):
    write_parquet(tmp_path / "vectors.parquet", [*VECTORS[:6], VECTORS[6, :2]])
    with pytest.raises(DataError, match="'i6' has 2 values"):
        ItemEmbeddings.load(tmp_path / "vectors.parquet", memory_map=True)
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.parquet"]


@pytest.mark.parametrize(
    ("vectors", "ids", "message"),
    [
        ([[1.0, 2.0], [3.0]], ["a", "b"], "the vector of item 'b' has 1 values, others have 2"),
        ([[1.0, 2.0], None], ["a", "b"], "item 'b' has no vector"),
        ([[1.0, 2.0], [3.0, None]], ["a", "b"], "the vector of item 'b' has a null in it"),
        ([[1.0, 2.0], [3.0, float("nan")]], ["a", "b"], "first item 'b'"),
        ([[1.0], [2.0]], ["a", "a"], "item 'a' has two vectors, in rows 0 and 1"),
        ([[1.0], [2.0]], ["a", None], "the item of row 1 has no ID"),
        ([], [], "holds no items"),
    ],
)
def test_broken_parquet_says_which_item(tmp_path, vectors, ids, message):
    table = pa.table({"item_id": pa.array(ids, pa.string()), "embedding": pa.array(vectors, pa.list_(pa.float64()))})
    pq.write_table(table, tmp_path / "vectors.parquet")
    with pytest.raises(DataError, match=message):
        ItemEmbeddings.load(tmp_path / "vectors.parquet")


def test_parquet_of_something_else(tmp_path):
    path = tmp_path / "vectors.parquet"
    write_parquet(path)
    with pytest.raises(DataError, match="no column 'asin'; its columns are item_id, embedding"):
        ItemEmbeddings.load(path, id_column="asin")
    with pytest.raises(DataError, match="column 'item_id' holds string, not lists"):
        ItemEmbeddings.load(path, id_column="embedding", vector_column="item_id")
    pq.write_table(pa.table({"item_id": ["a"], "embedding": [[1, 2]]}), path)
    with pytest.raises(DataError, match="not lists of floating-point numbers"):
        ItemEmbeddings.load(path)
    path.write_bytes(b"half a file")
    with pytest.raises(DataError, match="no readable Parquet file"):
        ItemEmbeddings.load(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingPartError, match=r"holds no \.parquet file"):
        ItemEmbeddings.load(tmp_path / "empty")


@pytest.mark.parametrize("memory_map", [False, True])
def test_foreign_safetensors(tmp_path, memory_map):
    path = tmp_path / "vectors.safetensors"
    save_file({"steps": np.ones(3, np.float32), "weight": VECTORS}, path)
    found = ItemEmbeddings.load(path, item_ids=IDS, memory_map=memory_map)
    assert np.array_equal(found.vectors, VECTORS)
    assert isinstance(found.vectors, np.memmap) == memory_map
    assert found.source == {"file": "vectors.safetensors"}
    save_torch({"weight": torch.from_numpy(VECTORS).bfloat16(), "embedding": torch.from_numpy(VECTORS).half()}, path)
    found = ItemEmbeddings.load(path, item_ids=IDS, memory_map=memory_map)
    assert np.array_equal(found.vectors, VECTORS.astype(np.float16))
    found = ItemEmbeddings.load(path, item_ids=IDS, memory_map=memory_map, vector_column="weight")
    assert np.array_equal(found.vectors, torch.from_numpy(VECTORS).bfloat16().float().numpy())
    with pytest.raises(DataError, match="pass item_ids"):
        ItemEmbeddings.load(path)
    save_file({"one": VECTORS, "two": VECTORS}, path)
    with pytest.raises(DataError, match=r"is unclear \(one, two\)"):
        ItemEmbeddings.load(path, item_ids=IDS)
    path.write_bytes(b"half a file")
    with pytest.raises(DataError, match="no readable safetensors file"):
        ItemEmbeddings.load(path, item_ids=IDS)


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("array", [VECTORS, VECTORS.astype(np.float64), np.asfortranarray(VECTORS)], ids=str)
def test_numpy_files(tmp_path, array, memory_map):
    np.save(tmp_path / "vectors.npy", array)
    found = ItemEmbeddings.load(tmp_path / "vectors.npy", item_ids=IDS, memory_map=memory_map)
    assert np.array_equal(found.vectors, VECTORS)
    assert isinstance(found.vectors, np.memmap) == memory_map
    assert found.vectors.flags.c_contiguous


def test_numpy_files_that_cannot_work(tmp_path):
    path = tmp_path / "vectors.npy"
    for array, message in (
        (np.ones(7, np.float32), r"shape \(7,\)"),
        (np.ones((7, 2), np.int64), "holds int64 values"),
        (np.array([[None]]), "no readable NumPy array"),
    ):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(DataError, match=message):
            ItemEmbeddings.load(path, item_ids=IDS)
    path.write_bytes(b"half a file")
    with pytest.raises(DataError, match="no readable NumPy array"):
        ItemEmbeddings.load(path, item_ids=IDS)
    (tmp_path / "vectors.csv").write_text("1,2")
    with pytest.raises(DataError, match="can't read embeddings from"):
        ItemEmbeddings.load(tmp_path / "vectors.csv", item_ids=IDS)


def test_ids_files(tmp_path):
    np.save(tmp_path / "vectors.npy", VECTORS)
    (tmp_path / "ids.json").write_text(json.dumps(IDS))
    (tmp_path / "ids.txt").write_text("\n".join(IDS) + "\n")
    for name in ("ids.json", "ids.txt"):
        found = ItemEmbeddings.load(tmp_path / "vectors.npy", ids_file=tmp_path / name)
        assert found.item_ids == tuple(IDS)
    with pytest.raises(ItemOrderError, match="row 0"):
        ItemEmbeddings.load(tmp_path / "vectors.npy", ids_file=tmp_path / "ids.json", item_ids=IDS[::-1])
    for name, content, message in (
        ("short.txt", "i0\ni1", r"shape \(7, 3\) for 2 item IDs"),
        ("blank.txt", "i0\n\ni1", "line 2 is blank"),
        ("map.json", "{}", "must hold a list of item IDs"),
        ("none.json", "[null]", "entry 0 is None"),
        ("ids.csv", "i0", r"can't read item IDs from"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            ItemEmbeddings.load(tmp_path / "vectors.npy", ids_file=tmp_path / name)
    with pytest.raises(MissingPartError, match="no item IDs at"):
        ItemEmbeddings.load(tmp_path / "vectors.npy", ids_file=tmp_path / "no.txt")
    ItemEmbeddings(tuple(IDS), VECTORS).save(tmp_path / "own.safetensors")
    with pytest.raises(DataError, match="item IDs of its own"):
        ItemEmbeddings.load(tmp_path / "own.safetensors", ids_file=tmp_path / "ids.json")
