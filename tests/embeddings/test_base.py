import numpy as np
import pytest

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
