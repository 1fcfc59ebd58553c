import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from llmrec.errors import DataError, MissingPartError
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.semantic_ids import SemanticIds

# Six items of three levels; rows 1 and 4 share a tuple.
CODES = np.array([[2, 0, 1], [0, 1, 3], [0, 1, 0], [2, 0, 0], [0, 1, 3], [0, 0, 2]])
SIZES = (3, 2, 4)


@pytest.fixture
def trie() -> ItemTrie:
    return ItemTrie.from_codes(CODES, SIZES)


def same(first: ItemTrie, second: ItemTrie) -> bool:
    """Whether two tries are equal in everything."""
    ours, theirs = first._named_arrays(), second._named_arrays()
    return (
        (first.codebook_sizes, first.branching, first.fingerprint)
        == (second.codebook_sizes, second.branching, second.fingerprint)
        and ours.keys() == theirs.keys()
        and all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    )


def random_catalogue(seed, num_items=60, num_levels=3, largest=9):
    generator = np.random.default_rng(seed)
    sizes = tuple(generator.integers(1, largest, num_levels).tolist())
    return generator.integers(0, sizes, (num_items, num_levels)), sizes


def test_arrays_of_a_small_catalogue(trie):
    # Sorted distinct tuples: 002 (row 5), 010 (row 2), 013 (rows 1, 4), 200 (row 3), 201 (row 0).
    assert [array.tolist() for array in trie.codes] == [[0, 2], [0, 1, 0], [2, 0, 3, 0, 1]]
    assert [array.tolist() for array in trie.starts] == [[0, 2], [0, 2, 3], [0, 1, 3, 5]]
    assert [array.tolist() for array in trie.leaf_starts] == [[0, 5], [0, 3, 5], [0, 1, 3, 5]]
    assert trie.items.tolist() == [5, 2, 1, 4, 3, 0]
    assert trie.shared_starts.tolist() == trie.item_starts.tolist() == [0, 1, 2, 4, 5, 6]
    assert trie.leaf_of_item.tolist() == [4, 2, 1, 3, 2, 0]
    assert trie.branching == (2, 2, 2)
    assert (trie.num_items, trie.num_leaves) == (6, 5)
    assert [trie.num_nodes(depth) for depth in range(4)] == [1, 2, 3, 5]


def test_what_unique_items_need_is_all_that_is_stored():
    trie = ItemTrie.from_codes(CODES[:4], SIZES)
    assert trie.shared_starts is None
    assert trie.item_starts.tolist() == [0, 1, 2, 3, 4]
    # 1, 2, 2 and 4 nodes. Items and their leaves 4 x 4 each, codes 2 + 2 + 4, starts 2, 3 and 3 x 4, starts of leaves
    # 2 and 3 x 4, tables of 1, 2 and 2 bytes. The starts of leaves of depth 2 are the last of the starts.
    assert trie.num_bytes == 16 + 16 + 8 + 32 + 20 + 5
    assert trie.leaf_starts[2] is trie.starts[2]


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(256, torch.uint8), (257, torch.int16), (32768, torch.int16), (32769, torch.int32)],
)
def test_codes_have_the_narrowest_type_that_holds_them(size, dtype):
    codes = np.array([[size - 1], [0], [size - 2]])
    trie = ItemTrie.from_codes(codes, (size,))
    assert trie.codes[0].dtype == dtype
    assert trie.codes[0].tolist() == [0, size - 2, size - 1]
    children = trie.children(0, torch.tensor([0]))
    assert children.codes.dtype == children.nodes.dtype == torch.int64
    assert children.codes.tolist() == [[0, size - 2, size - 1]]
    nodes, exists = trie.child(0, torch.zeros(5, dtype=torch.int64), torch.tensor([size - 1, size, -1, 0, 1 - size]))
    assert exists.tolist() == [True, False, False, True, False]
    assert nodes[[0, 3]].tolist() == [2, 0]


def test_children_are_padded_and_marked(trie):
    children = trie.children(1, torch.tensor([0, 1]))
    assert children.valid.tolist() == [[True, True], [True, False]]
    assert children.codes[0].tolist() == [0, 1]
    assert children.nodes[0].tolist() == [0, 1]
    assert (children.codes[1].tolist(), children.nodes[1].tolist()) == ([0, 0], [2, 2])  # the last child again


def test_walk_finds_exactly_the_prefixes_of_items(trie):
    every_tuple = torch.cartesian_prod(*(torch.arange(-1, size + 1) for size in SIZES))
    nodes, exists = trie.walk(every_tuple)
    known = {tuple(codes) for codes in CODES.tolist()}
    for codes, node, found in zip(every_tuple.tolist(), nodes.tolist(), exists.tolist(), strict=True):
        assert found == (tuple(codes) in known)
        assert 0 <= node < trie.num_leaves
        if found:
            assert trie.items_of(node).tolist() == [row for row in range(len(CODES)) if CODES[row].tolist() == codes]
    assert trie.walk(torch.empty(3, 0, dtype=torch.int64))[1].all()


@pytest.mark.parametrize("num_levels", [1, 2, 4])
def test_random_catalogues_against_a_set_of_tuples(num_levels):
    codes, sizes = random_catalogue(num_levels, num_levels=num_levels)
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
        rows = trie.items_of(leaf).tolist()
        assert rows == [row for row in range(60) if tuple(codes[row]) == prefix]
        assert (trie.leaf_of_item[rows] == leaf).all()
    leaves = trie.leaf_of_item.long()
    assert trie.codes_of(leaves).tolist() == codes.tolist()
    paths = trie.nodes_of(leaves)
    assert paths.shape == (60, num_levels + 1)
    for depth in range(num_levels + 1):
        assert torch.equal(paths[:, depth], trie.walk(torch.from_numpy(codes)[:, :depth])[0])


def allowed_by_hand(codes, sizes, prefixes):
    """Bool [R, K], by a loop over the items."""
    level = prefixes.shape[1]
    allowed = np.zeros((len(prefixes), sizes[level]), dtype=bool)
    for row, prefix in enumerate(prefixes):
        allowed[row, codes[(codes[:, :level] == prefix).all(axis=1), level]] = True
    return allowed


@pytest.mark.parametrize("sizes", [(7, 5, 9), (3, 300, 4), (9, 9, 40_000)])
@pytest.mark.parametrize("tables", [True, False])
def test_allowed_codes_against_a_loop_over_items(sizes, tables, monkeypatch):
    monkeypatch.setattr("llmrec.generation.trie_building._BLOCK_BYTES", 4 * sizes[1])  # several blocks
    if not tables:
        monkeypatch.setattr("llmrec.generation.trie_building._TABLE_BYTES_PER_ITEM", 0)
    generator = np.random.default_rng(0)
    codes = generator.integers(0, sizes, (200, 3))
    trie = ItemTrie.from_codes(codes, sizes)
    assert (trie.tables[1] is not None) == tables
    for level in range(3):
        prefixes = codes[generator.integers(0, 200, 30), :level]
        nodes, exists = trie.walk(torch.from_numpy(prefixes))
        assert exists.all()
        allowed = trie.allowed_codes(level, nodes)
        assert allowed.dtype == torch.bool
        assert np.array_equal(allowed.numpy(), allowed_by_hand(codes, sizes, prefixes))
        next_codes = torch.from_numpy(generator.integers(-1, sizes[level] + 1, (30, 20)))
        for at, one in enumerate(next_codes.unbind(1)):
            child, found = trie.child(level, nodes, one)
            inside = (one >= 0) & (one < sizes[level])
            assert torch.equal(found, inside & allowed.gather(1, one.clamp(0, sizes[level] - 1)[:, None])[:, 0]), at
            assert torch.equal(trie.codes[level][child[found]].long(), one[found])


def test_where_all_codes_follow_all_nodes_a_child_is_a_product():
    sizes = (2, 3, 4)
    codes = np.array([[a, b, c] for a in range(2) for b in range(3) for c in range(1, 4)])
    trie = ItemTrie.from_codes(codes, sizes)
    assert [trie.num_nodes(depth) for depth in range(4)] == [1, 2, 6, 18]
    nodes, exists = trie.child(1, torch.tensor([1, 1, 0, 0]), torch.tensor([2, 3, -1, 0]))
    assert exists.tolist() == [True, False, False, True]
    assert nodes[exists].tolist() == [5, 0]
    assert nodes.max() < 6
    leaves, exists = trie.walk(torch.tensor([[1, 2, 3], [1, 2, 0], [2, 0, 1]]))
    assert exists.tolist() == [True, False, False]
    assert leaves[0] == 17


def test_tuples_beyond_64_bits_are_sorted_too():
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 2**20, (50, 4))
    trie = ItemTrie.from_codes(codes, (2**20,) * 4)
    assert trie.items.tolist() == sorted(range(50), key=lambda row: codes[row].tolist())


@pytest.mark.parametrize("largest", [4, 9, 2**21])
@pytest.mark.parametrize("seed", range(10))
def test_insert_equals_building_anew(seed, largest):
    codes, sizes = random_catalogue(seed, largest=largest)
    assert same(ItemTrie.from_codes(codes[:40], sizes).insert(codes[40:]), ItemTrie.from_codes(codes, sizes))
    assert same(ItemTrie.from_codes(codes[:1], sizes).insert(codes[1:]), ItemTrie.from_codes(codes, sizes))


@pytest.mark.parametrize("largest", [4, 9, 2**21])
@pytest.mark.parametrize("seed", range(10))
def test_remove_equals_building_anew(seed, largest):
    codes, sizes = random_catalogue(seed, largest=largest)
    removed = np.random.default_rng(seed).integers(0, 60, 25)  # with repeats
    left = ItemTrie.from_codes(np.delete(codes, removed, axis=0), sizes)
    assert same(ItemTrie.from_codes(codes, sizes).remove(removed), left)
    one = ItemTrie.from_codes(codes, sizes).remove(np.arange(59))
    assert same(one, ItemTrie.from_codes(codes[59:], sizes))


def test_insert_and_remove_change_whether_items_are_unique(trie):
    assert trie.shared_starts is not None
    alone = trie.remove([4])
    assert alone.shared_starts is None
    assert same(alone, ItemTrie.from_codes(np.delete(CODES, 4, axis=0), SIZES))
    again = alone.insert(CODES[[4]])
    assert again.items_of(2).tolist() == [1, 5]
    assert trie.items.tolist() == [5, 2, 1, 4, 3, 0]  # as it was
    assert same(trie.remove(np.empty(0)), trie)


def test_changes_that_make_no_trie_are_refused(trie):
    with pytest.raises(DataError, match="all 6 items would be removed"):
        trie.remove(np.arange(6))
    with pytest.raises(DataError, match="no catalogue row 6"):
        trie.remove([6])
    with pytest.raises(DataError, match="no catalogue row -1"):
        trie.remove([-1])
    with pytest.raises(DataError, match=r"row 0 has codes \[0, 0, 4\]"):
        trie.insert(np.array([[0, 0, 4]]))


@pytest.mark.parametrize("num_items", [6, 4])
def test_save_and_load(num_items, tmp_path):
    trie = ItemTrie.from_codes(CODES[:num_items], SIZES)
    trie.save(tmp_path / "trie.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = ItemTrie.load(tmp_path / "trie.safetensors")
        assert loaded.subset(allow=loaded.item_set([0]), deny=[np.array([1])]) is not None
        assert same(loaded.insert(CODES), trie.insert(CODES))
    assert same(loaded, trie)
    assert [path.name for path in tmp_path.iterdir()] == ["trie.safetensors"]


def test_files_that_hold_no_trie_are_refused(trie, tmp_path):
    path = tmp_path / "trie.safetensors"
    with pytest.raises(MissingPartError, match=r"no trie at .*absent"):
        ItemTrie.load(tmp_path / "absent")
    trie.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="no whole safetensors file"):
        ItemTrie.load(path)
    array = {"items": np.zeros(1, dtype=np.int32)}
    save_file(array, path)
    with pytest.raises(DataError, match="not written by"):
        ItemTrie.load(path)
    save_file(array, path, {"format_version": "1", "codebook_sizes": "3 2"})
    with pytest.raises(DataError, match="format 1"):
        ItemTrie.load(path)
    save_file(array, path, {"format_version": "9", "codebook_sizes": "3 2"})
    with pytest.raises(DataError, match="upgrade llmrec"):
        ItemTrie.load(path)


def test_a_loaded_trie_is_not_read_before_it_is_used(tmp_path):
    """In a process of its own: the memory of a trie of 12 MB grows by its pages as they are used."""
    codes = np.random.default_rng(0).integers(0, 256, (1_000_000, 4))
    ItemTrie.from_codes(codes, (256,) * 4).save(tmp_path / "trie.safetensors")
    script = """if True:
        import sys
        import torch
        from llmrec.generation.trie import ItemTrie

        def resident():
            lines = open("/proc/self/status").read().splitlines()
            return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

        ItemTrie.load(sys.argv[1]).allowed_codes(3, torch.arange(5))  # what the first call of anything takes
        before = resident()
        trie = ItemTrie.load(sys.argv[1])
        after = resident()
        trie.items.sum() + trie.leaf_of_item.sum()
        print(trie.num_bytes // 1024, after - before, resident() - after)
    """
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "trie.safetensors")],
        check=True,
        capture_output=True,
        text=True,
    )
    whole, loading, using = map(int, done.stdout.split())
    assert loading < whole / 10
    assert using > 7000  # the two arrays


def test_nothing_in_a_step_is_read_back_from_the_device(trie):
    """Fake tensors have no values: whatever would read one raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    subset = trie.subset(allow=[trie.item_set([0, 1]), None], deny=[np.array([1]), np.array([2])])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        nodes = mode.from_tensor(torch.zeros(4, dtype=torch.int64))
        for level in range(3):
            assert trie.children(level, nodes).codes.shape == (4, 2)
            assert trie.has_items_left(level, nodes, subset).shape == (4, 2)
            assert trie.allowed_codes(level, nodes).shape == (4, SIZES[level])
            assert trie.allowed_codes(level, nodes, subset).shape == (4, SIZES[level])
        assert trie.walk(mode.from_tensor(torch.zeros(4, 3, dtype=torch.int64)))[0].shape == (4,)


def test_to_a_device_keeps_everything(trie):
    assert trie.to("cpu") is trie
    moved = trie.to("meta")
    assert moved.device.type == "meta"
    assert {array.device.type for array in moved._named_arrays().values()} == {"meta"}
    assert moved.children(1, torch.zeros(3, dtype=torch.int64, device="meta")).codes.shape == (3, 2)
    assert (moved.fingerprint, moved.num_leaves) == (trie.fingerprint, 5)


def test_codes_that_make_no_trie_are_refused():
    with pytest.raises(DataError, match="at least one item"):
        ItemTrie.from_codes(np.empty((0, 3), dtype=int), SIZES)
    with pytest.raises(DataError, match=r"row 1 has codes \[0, 2, 0\]"):
        ItemTrie.from_codes(np.array([[0, 0, 0], [0, 2, 0]]), SIZES)
    with pytest.raises(DataError, match=r"row 0 has codes \[0, -1, 0\]"):
        ItemTrie.from_codes(np.array([[0, -1, 0]]), SIZES)
    with pytest.raises(DataError, match="32-bit integers"):
        ItemTrie.from_codes(np.array([[0, 2**33]]), (2, 2**34))
    with pytest.raises(DataError, match="integer codes, got float64"):
        ItemTrie.from_codes(np.zeros((2, 3)), SIZES)
