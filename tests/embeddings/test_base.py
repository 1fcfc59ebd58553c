import logging
import stat
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file

from llmrec.embeddings import base, vector_files
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import DataError, ItemOrderError, MissingPartError, SettingsError


def embeddings(num_items: int, width: int, seed: int = 0) -> ItemEmbeddings:
    vectors = np.random.default_rng(seed).normal(size=(num_items, width))
    return ItemEmbeddings(tuple(f"item {row}" for row in range(num_items)), vectors, {"made": "by a test"})


def test_save_and_load_are_equal(tmp_path):
    given = embeddings(5, 3)
    given.save(tmp_path / "vectors.safetensors")
    found = ItemEmbeddings.load(tmp_path / "vectors.safetensors", item_ids=given.item_ids)
    assert found.item_ids == given.item_ids
    assert np.array_equal(found.vectors, given.vectors)
    assert found.source == {"made": "by a test"}
    assert found.fingerprint == given.fingerprint


def test_another_catalogue_is_refused(tmp_path):
    given = embeddings(3, 2)
    given.save(tmp_path / "vectors.safetensors")
    with pytest.raises(ItemOrderError, match="row 1: the catalogue has item 'item 2'"):
        ItemEmbeddings.load(tmp_path / "vectors.safetensors", item_ids=["item 0", "item 2", "item 1"])


def test_a_plain_array_needs_item_ids_of_its_length(tmp_path):
    np.save(tmp_path / "vectors.npy", np.ones((2, 3), dtype=np.float32))
    with pytest.raises(DataError, match="pass item_ids"):
        ItemEmbeddings.load(tmp_path / "vectors.npy")
    with pytest.raises(DataError, match=r"\(2, 3\) for 3 item IDs"):
        ItemEmbeddings.load(tmp_path / "vectors.npy", item_ids=["a", "b", "c"])
    assert ItemEmbeddings.load(tmp_path / "vectors.npy", item_ids=["a", "b"]).width == 3


def test_missing_file_and_values_that_are_not_numbers(tmp_path):
    with pytest.raises(MissingPartError, match="no embeddings at"):
        ItemEmbeddings.load(tmp_path / "nothing.safetensors")
    with pytest.raises(DataError, match=r"first item 'b' \(row 1\)"):
        ItemEmbeddings(("a", "b"), np.array([[1.0], [np.nan]]))


def test_reduce_keeps_inner_products_of_low_rank_vectors_exactly():
    basis = embeddings(20, 3).vectors @ embeddings(3, 8, seed=1).vectors  # rank 3 in 8 dimensions
    given = ItemEmbeddings(tuple(map(str, range(20))), basis)
    reduced = given.reduce(3)
    assert reduced.width == 3
    np.testing.assert_allclose(reduced.vectors @ reduced.vectors.T, basis @ basis.T, atol=1e-4)
    assert reduced.source["reduced_from_width"] == 8


def test_reduce_by_hand():
    # Orthogonal columns of lengths 5, 2 and 10: the two longest stay, longest first, with a positive sign.
    vectors = np.array([[3, 0, 0], [4, 0, 0], [0, 2, 0], [0, 0, -10]], dtype=np.float32)
    reduced = ItemEmbeddings(tuple("abcd"), vectors).reduce(2)
    np.testing.assert_allclose(reduced.vectors, [[0, 3], [0, 4], [0, 0], [-10, 0]], atol=1e-6)


def test_reduce_is_as_close_as_any_matrix_of_that_rank():
    given = embeddings(30, 6)
    reduced = given.reduce(4)
    gram = given.vectors @ given.vectors.T
    error = np.linalg.norm(reduced.vectors @ reduced.vectors.T - gram)
    eigenvalues = np.sort(np.linalg.eigvalsh(gram.astype(np.float64)))[::-1]
    assert error == pytest.approx(np.linalg.norm(eigenvalues[4:6]), rel=1e-4)  # Eckart and Young


def test_reduce_with_fewer_items_than_dimensions():
    given = embeddings(3, 10)
    reduced = given.reduce(5)
    assert reduced.vectors.shape == (3, 5)
    np.testing.assert_allclose(reduced.vectors @ reduced.vectors.T, given.vectors @ given.vectors.T, atol=1e-4)
    assert not reduced.vectors[:, 3:].any()


@pytest.mark.parametrize("width", [0, 4])
def test_reduce_refuses_other_widths(width):
    with pytest.raises(SettingsError, match="choose 1 to 3"):
        embeddings(5, 3).reduce(width)


def test_reduce_from_the_gram_matrix_equals_the_decomposition(monkeypatch):
    given = embeddings(50, 12)
    monkeypatch.setattr(base, "block_rows", lambda width: 7)
    reduced = given.reduce(5).vectors
    left, singular, right = np.linalg.svd(given.vectors.astype(np.float64), full_matrices=False)
    largest = np.abs(right[:5]).argmax(axis=1)
    signs = np.sign(right[np.arange(5), largest])
    np.testing.assert_allclose(reduced, left[:, :5] * (singular[:5] * signs), atol=1e-5)


# Masks


def test_rows_of_absent_items_become_the_mean_and_the_mask_is_saved(tmp_path):
    vectors = np.array([[1, 2], [np.nan, np.inf], [3, 6]], dtype=np.float32)
    given = ItemEmbeddings(("a", "b", "c"), vectors, present=[True, False, True])
    assert given.vectors.tolist() == [[1, 2], [2, 4], [3, 6]]
    assert np.isnan(vectors[1, 0])  # the array that was given stays as it is
    given.save(tmp_path / "vectors.safetensors")
    found = ItemEmbeddings.load(tmp_path / "vectors.safetensors")
    assert found.present.tolist() == [True, False, True]
    assert found.fingerprint == given.fingerprint
    assert ItemEmbeddings(given.item_ids, given.vectors).fingerprint != given.fingerprint
    assert ItemEmbeddings(("a",), np.ones((1, 2)), present=[True]).present is None
    assert "1 without their own" in repr(given)


def test_masks_that_make_no_sense():
    with pytest.raises(DataError, match="must be bool, one value for each item"):
        ItemEmbeddings(("a", "b"), np.ones((2, 2)), present=[True])
    with pytest.raises(DataError, match="must be bool"):
        ItemEmbeddings(("a", "b"), np.ones((2, 2)), present=[0, 1])
    with pytest.raises(DataError, match="no item is present"):
        ItemEmbeddings(("a",), np.full((1, 2), np.nan), present=[False])
    with pytest.raises(DataError, match=r"first item 'a' \(row 0\)"):  # present, so it must be finite
        ItemEmbeddings(("a", "b"), np.array([[np.nan], [np.nan]]), present=[True, False])


def test_an_item_with_two_vectors_is_refused():
    with pytest.raises(DataError, match="item 'a' has two vectors, in rows 0 and 2"):
        ItemEmbeddings(("a", "b", "a"), np.ones((3, 2)))


def test_reduce_looks_at_present_items_alone():
    vectors = np.zeros((40, 3), np.float32)
    vectors[:20, 0], vectors[20:, 1] = 1, 100
    reduced = ItemEmbeddings(tuple(map(str, range(40))), vectors, present=np.arange(40) < 20).reduce(1)
    np.testing.assert_allclose(reduced.vectors[:20, 0], 1, atol=1e-6)
    np.testing.assert_allclose(reduced.vectors[20:, 0], 0, atol=1e-6)
    assert not reduced.present[20:].any()


def test_select():
    given = ItemEmbeddings(("a", "b", "c"), np.array([[1.0], [2.0], [3.0]]), {"x": 1}, [True, False, True])
    chosen = given.select([2, 1])
    assert (chosen.item_ids, chosen.vectors.tolist(), chosen.source) == (("c", "b"), [[3], [2]], {"x": 1})
    assert chosen.present.tolist() == [True, False]
    assert given.select(np.array([False, True, False])).present.tolist() == [False]
    assert given.select(slice(0, 2)).item_ids == ("a", "b")
    assert given.select(np.array([True, False, True])).present is None
    assert len(given.select([])) == 0
    for rows in ([3], np.array([True, False])):
        with pytest.raises(DataError, match="can't select these rows of 3 items"):
            given.select(rows)


def test_align(caplog):
    given = ItemEmbeddings(("a", "b", "c", "d"), np.array([[1.0], [2.0], [4.0], [9.0]]), {"x": 1})
    assert given.align(given.item_ids) is given
    with caplog.at_level(logging.INFO, logger="llmrec"):
        aligned = given.align(["c", "a"])
    assert aligned.item_ids == ("c", "a")
    assert aligned.vectors.tolist() == [[4], [1]]
    assert aligned.present is None
    assert "2 of 4 items aren't in the catalogue" in caplog.text
    with pytest.raises(
        ItemOrderError, match=r"mine have no vector for 1 of the 3 items .* first 'new'.*missing=\"mask"
    ):
        given.align(["c", "new", "a"], what="mine")
    masked = given.align(["c", "new", "a"], missing="mask")
    assert masked.vectors.tolist() == [[4], [2.5], [1]]
    assert masked.present.tolist() == [True, False, True]
    with pytest.raises(ItemOrderError, match=r"2 of the 2 items .* look like 'a'"):
        given.align(["1", "2"], missing="mask")
    with pytest.raises(SettingsError, match="missing is 'drop'"):
        given.align(["a"], missing="drop")


# Memory maps


def test_a_memory_map_is_never_copied_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_files, "BLOCK_BYTES", 2**18)
    vectors = np.random.default_rng(0).normal(size=(40_000, 64)).astype(np.float32)  # 10 MB
    item_ids = tuple(map(str, range(len(vectors))))
    np.save(tmp_path / "vectors.npy", vectors)
    expected = ItemEmbeddings(item_ids, vectors)
    fingerprint, reduced = expected.fingerprint, expected.reduce(2).vectors
    tracemalloc.start()
    given = ItemEmbeddings.load(tmp_path / "vectors.npy", item_ids=item_ids, memory_map=True)
    assert given.fingerprint == fingerprint
    np.testing.assert_allclose(given.reduce(2).vectors, reduced, atol=1e-4)
    given.save(tmp_path / "saved.safetensors")
    again = ItemEmbeddings.load(tmp_path / "saved.safetensors", memory_map=True)
    part = given.select(slice(10, 30_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9_000_000 + 2 * 4 * 40_000  # IDs and their sets, blocks; not 10 MB more
    for one in (given, again, part):
        assert isinstance(one.vectors, np.memmap)
        assert not one.vectors.flags.writeable
    assert again.fingerprint == fingerprint
    assert np.array_equal(load_file(tmp_path / "saved.safetensors")["vectors"], vectors)  # as the library reads it
    usual = (tmp_path / "vectors.npy").stat().st_mode
    assert stat.S_IMODE((tmp_path / "saved.safetensors").stat().st_mode) == stat.S_IMODE(usual)


def test_a_mapped_row_that_is_masked_must_be_finite(tmp_path):
    np.save(tmp_path / "vectors.npy", np.array([[1.0], [np.nan]], dtype=np.float32))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    with pytest.raises(DataError, match=r"item 'b' .* is masked and its row of the memory-mapped file"):
        ItemEmbeddings(("a", "b"), mapped, present=[True, False])
