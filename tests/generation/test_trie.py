import numpy as np
import pytest
import torch

from llmrec.errors import DataError, MissingPartError
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.semantic_ids import SemanticIds

# Six items of three levels; rows 1 and 4 share a tuple.
CODES = np.array([[2, 0, 1], [0, 1, 3], [0, 1, 0], [2, 0, 0], [0, 1, 3], [0, 0, 2]])
SIZES = (3, 2, 4)


@pytest.fixture
def trie() -> ItemTrie:
    return ItemTrie.from_codes(CODES, SIZES)


def test_arrays_of_a_small_catalogue(trie):
    # Sorted distinct tuples: 002 (row 5), 010 (row 2), 013 (rows 1, 4), 200 (row 3), 201 (row 0).
    assert [array.tolist() for array in trie.codes] == [[0, 2], [0, 1, 0], [2, 0, 3, 0, 1]]
    assert [array.tolist() for array in trie.starts] == [[0, 2], [0, 2, 3], [0, 1, 3, 5]]
    assert [array.tolist() for array in trie.leaf_starts] == [[0, 5], [0, 3, 5], [0, 1, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert trie.items.tolist() == [5, 2, 1, 4, 3, 0]
    assert trie.item_starts.tolist() == [0, 1, 2, 4, 5, 6]
    assert trie.leaf_of_item.tolist() == [4, 2, 1, 3, 2, 0]
    assert trie.branching == (2, 2, 2)
    assert (trie.num_items, trie.num_leaves, trie.num_nodes(2)) == (6, 5, 3)


def test_children_are_padded_and_marked(trie):
    children = trie.children(1, torch.tensor([0, 1]))
    assert children.valid.tolist() == [[True, True], [True, False]]
    assert children.codes[0].tolist() == [0, 1]
    assert children.nodes[0].tolist() == [0, 1]
    assert (children.codes[1, 0], children.nodes[1, 0]) == (0, 2)
    assert children.nodes.max() < trie.num_nodes(2)  # padding is a node too: it can be gathered with


def test_walk_finds_exactly_the_prefixes_of_items(trie):
    every_tuple = torch.cartesian_prod(*(torch.arange(-1, size + 1) for size in SIZES))
    nodes, exists = trie.walk(every_tuple)
    known = {tuple(codes) for codes in CODES.tolist()}
    for codes, node, found in zip(every_tuple.tolist(), nodes.tolist(), exists.tolist(), strict=True):
        assert found == (tuple(codes) in known)
        if found:
            rows = trie.items[trie.item_starts[node] : trie.item_starts[node + 1]].tolist()
            assert rows == [row for row in range(len(CODES)) if CODES[row].tolist() == codes]
    assert trie.walk(torch.empty(3, 0, dtype=torch.int64))[1].all()


def test_a_shared_leaf_is_denied_only_with_all_its_items(trie):
    denied = trie.denied_leaves([np.array([5, 5, 1]), np.array([4, 1, 2, 5]), np.array([], dtype=np.int64)])
    assert denied.tolist() == [[0, 5, 5], [0, 1, 2], [5, 5, 5]]
    root = torch.zeros(3, dtype=torch.int64)
    assert trie.has_items_left(0, root, denied).tolist() == [[True, True], [False, True], [True, True]]
    # two rows a request, at depth 1: nodes of code 0 and code 2
    left = trie.has_items_left(1, torch.tensor([0, 1, 0, 1, 0, 1]), denied)
    assert left.tolist() == [[False, True], [True, False], [False, False], [True, False], [True, True], [True, False]]
    assert trie.denied_leaves([np.array([1]), np.array([], dtype=np.int64)]) is None  # row 4 keeps the leaf


@pytest.mark.parametrize("num_levels", [1, 2, 4])
def test_random_catalogues_against_a_set_of_tuples(num_levels):
    generator = np.random.default_rng(num_levels)
    sizes = tuple(generator.integers(2, 9, num_levels).tolist())
    codes = generator.integers(0, sizes, (60, num_levels))
    trie = ItemTrie.from_semantic_ids(SemanticIds(tuple(f"i{row}" for row in range(60)), codes, sizes))
    assert trie.num_leaves == len({tuple(row) for row in codes.tolist()})
    nodes = torch.zeros(1, dtype=torch.int64)
    prefixes: list[tuple[int, ...]] = [()]
    for level in range(num_levels):
        children = trie.children(level, nodes)
        prefixes = [
            (*prefix, code)
            for prefix, of_node, valid in zip(prefixes, children.codes.tolist(), children.valid, strict=True)
            for code in torch.tensor(of_node)[valid].tolist()
        ]
        nodes = children.nodes[children.valid]
        assert prefixes == sorted({tuple(row[: level + 1]) for row in codes.tolist()})
    for leaf, prefix in enumerate(prefixes):
        rows = trie.items[trie.item_starts[leaf] : trie.item_starts[leaf + 1]].tolist()
        assert rows == [row for row in range(60) if tuple(codes[row]) == prefix]
        assert (trie.leaf_of_item[rows] == leaf).all()


def test_tuples_beyond_64_bits_are_sorted_too():
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 2**20, (50, 4))
    trie = ItemTrie.from_codes(codes, (2**20,) * 4)
    assert trie.items.tolist() == sorted(range(50), key=lambda row: codes[row].tolist())


def test_save_and_load(trie, tmp_path):
    trie.save(tmp_path / "trie.safetensors")
    loaded = ItemTrie.load(tmp_path / "trie.safetensors")
    assert loaded.codebook_sizes == trie.codebook_sizes
    assert loaded.branching == trie.branching
    for name in ("codes", "starts", "leaf_starts"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(loaded, name), getattr(trie, name), strict=True))
    assert torch.equal(loaded.leaf_of_item, trie.leaf_of_item)
    with pytest.raises(MissingPartError, match=r"no trie at .*absent"):
        ItemTrie.load(tmp_path / "absent")


def test_codes_that_make_no_trie_are_refused():
    with pytest.raises(DataError, match="at least one item"):
        ItemTrie.from_codes(np.empty((0, 3), dtype=int), SIZES)
    with pytest.raises(DataError, match=r"row 1 has codes \[0, 2, 0\]"):
        ItemTrie.from_codes(np.array([[0, 0, 0], [0, 2, 0]]), SIZES)
