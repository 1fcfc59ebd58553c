import numpy as np
import pytest

from llmrec.errors import SettingsError
from llmrec.item_tokenizers.clustering import constrained_kmeans, kmeans_centres


def generator():
    return np.random.default_rng(0)


def blobs(sizes, width=4, spread=0.05):
    draws = np.random.default_rng(1)
    centres = 10 * np.eye(len(sizes), width)
    return np.concatenate([
        centre + draws.normal(scale=spread, size=(size, width)) for centre, size in zip(centres, sizes, strict=True)
    ]).astype(np.float32)  # fmt: skip


def test_kmeans_finds_separate_blobs():
    centres = kmeans_centres(blobs([30, 30, 30, 30]), 4, generator())
    assert sorted(centres.argmax(1).tolist()) == [0, 1, 2, 3]
    np.testing.assert_allclose(centres.max(1), 10, atol=0.1)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_kmeans_with_fewer_vectors_than_centres(count):
    vectors = np.random.default_rng(2).normal(size=(count, 4)).astype(np.float32)
    centres = kmeans_centres(vectors, 8, generator())
    assert centres.shape == (8, 4)
    assert len(np.unique(centres, axis=0)) == 8
    for vector in vectors:  # every vector is a centre
        assert np.abs(centres - vector).max(1).min() < 1e-6
    assert np.isfinite(kmeans_centres(np.ones((50, 4), dtype=np.float32), 8, generator())).all()


@pytest.mark.parametrize(("least", "most"), [(5, 60), (25, 26), (0, 40), (25, 60)])
def test_sizes_keep_to_their_limits(least, most):
    vectors = np.random.default_rng(3).normal(size=(256, 8)).astype(np.float32) ** 3  # far from balanced
    centres, labels = constrained_kmeans(vectors, 10, generator(), min_size=least, max_size=most)
    sizes = np.bincount(labels, minlength=10)
    assert sizes.sum() == 256
    assert least <= sizes.min()
    assert sizes.max() <= most
    for cluster in np.flatnonzero(sizes):
        np.testing.assert_allclose(centres[cluster], vectors[labels == cluster].mean(0), atol=1e-5)
    again = constrained_kmeans(vectors, 10, generator(), min_size=least, max_size=most)[1]
    np.testing.assert_array_equal(labels, again)


def test_constraints_that_do_not_bind_change_nothing():
    labels = constrained_kmeans(blobs([30, 20, 10]), 3, generator(), min_size=1, max_size=60)[1]
    groups = [set(labels[:30]), set(labels[30:50]), set(labels[50:])]
    assert [len(group) for group in groups] == [1, 1, 1]
    assert len(set.union(*groups)) == 3


def test_the_nearest_stay_when_a_cluster_is_full():
    vectors = np.array([[0.0], [0.1], [0.2], [3.0], [10.0]], dtype=np.float32)
    labels = constrained_kmeans(vectors, 2, generator(), min_size=1, max_size=3)[1]
    assert labels[0] == labels[1] == labels[2]
    assert labels[3] == labels[4] != labels[0]


@pytest.mark.parametrize("count", [1, 5, 31, 32, 33, 1000, 70_000])
def test_any_number_of_items_fits_the_initialisation_rule(count):
    """The authors' rule fails under 512 and over 51,200 items for 256 codes."""
    vectors = np.random.default_rng(4).normal(size=(count, 2)).astype(np.float32)
    size = 32
    limits = {"min_size": count // (2 * size), "max_size": -(-2 * count // size)}
    centres, labels = constrained_kmeans(vectors, size, generator(), iterations=3, **limits)
    assert centres.shape == (size, 2)
    assert np.bincount(labels, minlength=size).max() <= limits["max_size"]


def test_impossible_limits_are_refused():
    with pytest.raises(SettingsError, match="don't fit into 2 clusters of 0 to 2"):
        constrained_kmeans(np.zeros((5, 1)), 2, generator(), min_size=0, max_size=2)
