import numpy as np
import pytest
import torch

from llmrec.errors import DataError, SettingsError
from llmrec.generation import item_sets
from llmrec.generation.trie import ItemTrie

# Six items of three levels; rows 1 and 4 share a tuple. Leaves: 002 (row 5), 010 (row 2), 013 (rows 1, 4), 200 (row
# 3), 201 (row 0).
CODES = np.array([[2, 0, 1], [0, 1, 3], [0, 1, 0], [2, 0, 0], [0, 1, 3], [0, 0, 2]])
SIZES = (3, 2, 4)


@pytest.fixture
def trie() -> ItemTrie:
    return ItemTrie.from_codes(CODES, SIZES)


def roots(count):
    return torch.zeros(count, dtype=torch.int64)


def test_a_shared_leaf_is_denied_only_with_all_its_items(trie):
    subset = trie.subset(deny=[np.array([5, 5, 1]), np.array([4, 1, 2, 5]), np.array([], dtype=np.int64)])
    assert subset.denied.tolist() == [[0, 5, 5], [0, 1, 2], [5, 5, 5]]
    assert subset.num_requests == 3
    assert trie.has_items_left(0, roots(3), subset).tolist() == [[True, True], [False, True], [True, True]]
    # two rows a request, at depth 1: nodes of code 0 and code 2
    left = trie.has_items_left(1, torch.tensor([0, 1, 0, 1, 0, 1]), subset)
    assert left.tolist() == [[False, True], [True, False], [False, False], [True, False], [True, True], [True, False]]
    assert trie.subset(deny=[np.array([1]), np.array([], dtype=np.int64)]) is None  # row 4 keeps the leaf


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint32, np.uint64])
def test_rows_of_any_integer_type_that_may_be_read_only(trie, dtype, recwarn):
    rows = np.array([4, 1, 5], dtype=dtype)
    rows.flags.writeable = False
    assert trie.subset(deny=[rows]).denied.tolist() == [[0, 2]]
    assert trie.subset(allow=trie.item_set(rows), deny=[rows[:1]]).denied is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_sets, "MOST_DENIED_ROWS", 1)
        assert trie.subset(deny=[rows]).allowed.tolist() == [[0, 0, 1, 1, 2, 3]]
    assert not recwarn.list


def test_an_allowed_set_by_hand(trie):
    allowed = trie.item_set(np.array([4, 0, 4]))
    assert allowed.rows.tolist() == [True, False, False, False, True, False]
    assert allowed.leaves_before.tolist() == [0, 0, 0, 1, 1, 2]
    assert allowed.leaves_before.dtype == torch.int32
    for same in (allowed.rows, [0, 4], np.array([0, 4], dtype=np.uint8)):
        assert torch.equal(trie.item_set(same).leaves_before, allowed.leaves_before)
    subset = trie.subset(allow=allowed)
    assert subset.num_requests is None  # it serves any number of requests
    assert subset.allowed.data_ptr() == allowed.leaves_before.data_ptr()  # and isn't copied
    assert trie.has_items_left(1, torch.tensor([0, 1, 0]), subset).tolist() == [
        [False, True],
        [True, False],
        [False, True],
    ]
    assert trie.allowed_codes(2, torch.tensor([1, 2]), subset).tolist() == [
        [False, False, False, True],
        [False, True, False, False],
    ]


def test_a_mask_changed_afterwards_changes_no_set(trie):
    mask = np.ones(6, dtype=bool)
    everything = trie.item_set(mask)
    mask[:] = False
    assert everything.rows.all()


def test_nothing_left_out_is_no_subset(trie):
    everything, nothing = trie.item_set(np.arange(6)), trie.item_set([])
    assert trie.subset() is None
    assert trie.subset(allow=everything) is None
    assert trie.subset(allow=[None, everything]) is None
    assert trie.subset(allow=[], deny=[]) is None
    assert trie.subset(allow=[None, None], deny=[np.array([]), np.array([4])]) is None
    assert not trie.has_items_left(0, roots(2), trie.subset(allow=nothing)).any()
    subset = trie.subset(allow=[nothing, everything])
    assert trie.has_items_left(0, roots(2), subset).tolist() == [[False, False], [True, True]]


def test_a_denied_item_that_is_not_allowed_is_not_left_out_twice(trie):
    # Of the shared leaf only row 4 is allowed: row 1 doesn't matter, row 4 takes the leaf.
    allowed = trie.item_set([4, 2])
    node = torch.tensor([0])  # code 0: leaves 0, 1, 2 below codes 0 and 1
    for denied, left in (([1], True), ([1, 5, 3], True), ([4], True), ([4, 2], False), ([4, 1, 2, 5], False)):
        subset = trie.subset(allow=allowed, deny=[np.array(denied)])
        assert trie.has_items_left(1, node, subset).tolist() == [[False, left]]
    both = trie.item_set([1, 4])
    assert trie.has_items_left(0, roots(1), trie.subset(allow=both, deny=[np.array([4])])).any()
    assert not trie.has_items_left(0, roots(1), trie.subset(allow=both, deny=[np.array([4, 1])])).any()


@pytest.mark.parametrize("crowded", [True, False])
@pytest.mark.parametrize("most_denied", [0, 8, 4096])
@pytest.mark.parametrize("shared", [True, False])
def test_random_sets_against_a_loop_over_items(crowded, most_denied, shared, monkeypatch):
    """Every node of every depth, four requests with two rows each; lists, tables and both."""
    monkeypatch.setattr(item_sets, "MOST_DENIED_ROWS", most_denied)
    generator = np.random.default_rng(0)
    sizes = (4, 4, 5)
    codes = generator.integers(0, sizes, (100, 3))
    codes = codes if crowded else np.unique(codes, axis=0)
    trie = ItemTrie.from_codes(codes, sizes)
    assert (trie.shared_starts is not None) == crowded
    for _ in range(20):
        masks = [generator.random(len(codes)) < generator.choice([0.05, 0.5, 1.0]) for _ in range(4)]
        if shared:
            masks = [masks[0]] * 4
        denied = [generator.integers(0, len(codes), generator.integers(0, 60)) for _ in range(4)]
        sets = [None if mask.all() else trie.item_set(mask) for mask in masks]
        subset = trie.subset(allow=sets[0] if shared else sets, deny=denied)
        left = [mask & ~np.isin(np.arange(len(codes)), rows) for mask, rows in zip(masks, denied, strict=True)]
        for level in range(3):
            rows = generator.integers(0, len(codes), 8)  # two of each request
            nodes, _ = trie.walk(torch.from_numpy(codes[rows, :level]))
            expected = np.zeros((8, sizes[level]), dtype=bool)
            for place, row in enumerate(rows):
                below = left[place // 2] & (codes[:, :level] == codes[row, :level]).all(axis=1)
                expected[place, codes[below, level]] = True
            assert np.array_equal(trie.allowed_codes(level, nodes, subset).numpy(), expected)
            children, has_left = trie.children(level, nodes), trie.has_items_left(level, nodes, subset)
            assert not (has_left & ~children.valid).any()
            for place in range(8):
                assert set(children.codes[place][has_left[place]].tolist()) == set(np.flatnonzero(expected[place]))


def test_a_set_given_to_several_requests_is_there_once(trie):
    first, second = trie.item_set([0]), trie.item_set([1, 2])
    subset = trie.subset(allow=[first, second, first, None])
    assert subset.allowed.shape == (3, 6)
    assert subset.set_of_request.tolist() == [0, 1, 0, 2]
    assert subset.num_requests == 4
    assert trie.has_items_left(0, roots(4), subset).tolist() == [
        [False, True],
        [True, False],
        [False, True],
        [True, True],
    ]
    many = np.arange(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(item_sets, "MOST_DENIED_ROWS", 3)
        assert trie.subset(deny=[many, many, np.array([0])]).allowed.shape == (2, 6)


def test_to_another_device(trie):
    subset = trie.subset(allow=[trie.item_set([0]), None], deny=[np.array([0]), np.array([1])])
    assert {part.device.type for part in vars(subset.to("meta")).values()} == {"meta"}
    assert trie.subset(allow=trie.item_set([0])).to("cpu").denied is None


def test_sets_that_can_not_be_meant_are_refused(trie):
    with pytest.raises(DataError, match=r"mask over 6 items .* shape \(5,\)"):
        trie.item_set(np.ones(5, dtype=bool))
    with pytest.raises(DataError, match="no catalogue row 6"):
        trie.item_set([0, 6])
    with pytest.raises(DataError, match="no catalogue row -1"):
        trie.subset(deny=[np.array([-1])])
    with pytest.raises(DataError, match="integers on one axis, got float64"):
        trie.item_set([0.5])
    with pytest.raises(SettingsError, match="2 allowed sets and 1 denied"):
        trie.subset(allow=[None, None], deny=[np.array([1])])
    other = ItemTrie.from_codes(CODES[::-1], SIZES)
    with pytest.raises(SettingsError, match="prepared for another catalogue"):
        trie.subset(allow=other.item_set([0]))
    assert trie.subset(allow=ItemTrie.from_codes(CODES, SIZES).item_set([0])) is not None  # an equal trie's will do
