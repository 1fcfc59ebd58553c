import dataclasses
import json

import numpy as np
import pytest

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import ItemOrderError
from llmrec.item_tokenizers import neighbours
from llmrec.item_tokenizers.neighbours import nearest_items, neighbour_agreement
from llmrec.item_tokenizers.semantic_ids import SemanticIds

IDS = tuple("abcd")
# Two pairs of like directions; lengths differ and must not matter: the inner product of a and b is the smallest of a.
VECTORS = np.array([[1.0, 0.0], [0.1, 0.01], [0.0, 5.0], [2.0, 9.0]], dtype=np.float32)
CODES = np.array([[0, 1], [0, 0], [1, 2], [2, 2]])


def _plain_nearest(vectors, queries, k, usable):
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -np.inf)
    cosines[:, ~usable] = -np.inf
    return np.argsort(-cosines[queries], axis=1, kind="stable")[:, :k]


def test_agreement_by_hand():
    found = neighbour_agreement(SemanticIds(IDS, CODES, (3, 3)), ItemEmbeddings(IDS, VECTORS), num_neighbours=1)
    # Neighbours: a-b (first code equal, second not) and c-d (second code equal, first not), both ways.
    assert (found.num_items, found.num_queries, found.num_neighbours) == (4, 4, 1)
    assert found.shared_prefix == (0.5, 0.0)
    assert found.equal_codes == (0.5, 0.5)
    assert found.code_overlap == 0.5
    # Of six pairs of items one shares the first code, one the second, none both.
    assert found.chance == (pytest.approx(1 / 6), 0.0)
    assert found.equal_codes_chance == (pytest.approx(1 / 6), pytest.approx(1 / 6))
    assert found.lift == (pytest.approx(3.0), None)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["lift"] == [pytest.approx(3.0), None]


def test_nearest_items_equal_a_plain_sort_in_any_blocks(monkeypatch):
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(203, 6)).astype(np.float32)
    usable = generator.random(203) < 0.8
    queries = np.flatnonzero(usable)[::3]
    expected = _plain_nearest(vectors, queries, 7, usable)
    for item_block, query_block in ((8192, 1024), (50, 9), (5, 64)):
        monkeypatch.setattr(neighbours, "ITEM_BLOCK", item_block)
        monkeypatch.setattr(neighbours, "QUERY_BLOCK", query_block)
        assert (nearest_items(vectors, queries, 7, usable=usable) == expected).all()


def test_masked_items_and_vectors_of_zeros_are_left_out():
    codes = SemanticIds((*IDS, "e", "f"), np.vstack([CODES, [[0, 1], [0, 1]]]), (3, 3))
    # e would be a's nearest and f is no direction: with either the figures of the four would change.
    present = np.array([True] * 4 + [False, True])
    embeddings = ItemEmbeddings(codes.item_ids, np.vstack([VECTORS, [[1.0, 0.0], [0.0, 0.0]]]), present=present)
    alone = neighbour_agreement(SemanticIds(IDS, CODES, (3, 3)), ItemEmbeddings(IDS, VECTORS), num_neighbours=1)
    assert neighbour_agreement(codes, embeddings, num_neighbours=1) == alone


def test_few_items():
    one = neighbour_agreement(SemanticIds(("a",), CODES[:1], (3, 3)), ItemEmbeddings(("a",), VECTORS[:1]))
    assert (one.num_queries, one.num_neighbours, one.shared_prefix, one.code_overlap) == (0, 0, (0.0, 0.0), 0.0)
    two = neighbour_agreement(SemanticIds(IDS[:2], CODES[:2], (3, 3)), ItemEmbeddings(IDS[:2], VECTORS[:2]))
    assert (two.num_neighbours, two.shared_prefix, two.chance) == (1, (1.0, 0.0), (1.0, 0.0))


def test_a_sample_is_seeded_and_near_the_whole():
    generator = np.random.default_rng(1)
    centres = generator.normal(size=(20, 8))
    groups = np.repeat(np.arange(20), 30)
    ids = tuple(map(str, range(600)))
    embeddings = ItemEmbeddings(ids, centres[groups] + 0.05 * generator.normal(size=(600, 8)))
    codes = SemanticIds(ids, np.stack([groups // 2, generator.integers(0, 10, 600)], axis=1), (10, 10))
    whole = neighbour_agreement(codes, embeddings)
    sample = neighbour_agreement(codes, embeddings, max_queries=100, seed=3)
    assert (sample.num_queries, sample.num_items) == (100, 600)
    assert sample == neighbour_agreement(codes, embeddings, max_queries=100, seed=3)
    assert whole.shared_prefix[0] == sample.shared_prefix[0] == 1.0
    assert whole.chance[0] == sample.chance[0] == pytest.approx((10 * 60 * 59) / (600 * 599))
    assert whole.equal_codes[1] == pytest.approx(0.1, abs=0.03)  # codes that know nothing lie at chance
    assert sample.equal_codes[1] != whole.equal_codes[1]
    assert "100 of 600 items" in _text(sample)


def test_a_memory_map_is_read_as_it_is(tmp_path):
    np.save(tmp_path / "vectors.npy", VECTORS)
    mapped = ItemEmbeddings(IDS, np.load(tmp_path / "vectors.npy", mmap_mode="r"))
    codes = SemanticIds(IDS, CODES, (3, 3))
    assert neighbour_agreement(codes, mapped) == neighbour_agreement(codes, ItemEmbeddings(IDS, VECTORS))


def test_another_order_is_refused():
    with pytest.raises(ItemOrderError, match=r"the CF vectors .* differ first at row 0"):
        neighbour_agreement(SemanticIds(IDS, CODES, (3, 3)), ItemEmbeddings(IDS[::-1], VECTORS), what="the CF vectors")


def _text(found):
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found.to_table("text"))
    return console.export_text()
