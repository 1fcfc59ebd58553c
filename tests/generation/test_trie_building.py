import numpy as np
import pytest

from llmrec.generation import trie_building
from llmrec.generation.trie_building import build_arrays, code_type, drop_rows, merge_codes, sort_codes


def in_order(codes):
    """Rows by tuple, equal tuples by row."""
    return sorted(range(len(codes)), key=lambda row: (codes[row].tolist(), row))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
@pytest.mark.parametrize(
    "sizes",
    [(3, 1, 4), (100, 100), (2**20, 2**20, 2**17), (2**20, 2**20, 2**21), (2**31, 2**31, 2**31)],
    ids=["collisions", "two levels", "tuple and row in 63 bits", "tuple in 63 bits", "beyond 64 bits"],
)
def test_sorting_and_merging(sizes, dtype):
    generator = np.random.default_rng(0)
    bounds = [min(size, int(np.iinfo(dtype).max)) for size in sizes]
    codes = generator.integers(0, bounds, (60, len(sizes))).astype(dtype)
    codes[30:40] = codes[10:20]  # equal tuples, also between the old and the new
    ordered = sort_codes(codes, sizes)
    assert ordered.rows.tolist() == in_order(codes)
    assert ordered.rows.dtype == np.int32
    for level, size in enumerate(sizes):
        assert ordered.columns[level].tolist() == codes[ordered.rows, level].tolist()
        assert ordered.columns[level].dtype == code_type(size)
    merged = merge_codes(sort_codes(codes[:25], sizes), codes[25:], sizes)
    assert merged.rows.tolist() == ordered.rows.tolist()
    assert all(map(np.array_equal, merged.columns, ordered.columns))
    assert [column.dtype for column in merged.columns] == [column.dtype for column in ordered.columns]


def test_rows_that_stay_are_numbered_in_their_order():
    codes = np.array([[1], [0], [1], [0], [2]])
    left = drop_rows(sort_codes(codes, (3,)), np.array([True, False, False, False, True]))
    assert left.columns[0].tolist() == [0, 0, 1]
    assert left.rows.tolist() == [0, 2, 1]  # rows 1, 3 and 2 before


def test_tables_are_bits_and_only_where_they_are_small(monkeypatch):
    codes = np.array([[0, 0], [0, 9], [1, 3], [1, 4], [1, 9]])
    monkeypatch.setattr(trie_building, "_TABLE_BYTES_PER_ITEM", 1)
    tables = build_arrays(sort_codes(codes, (2, 10)), (2, 10)).tables  # 1 and 2 x 2 bytes, for 5 items
    assert tables[0].tolist() == [[0b11]]
    assert tables[1].tolist() == [[1, 2], [8 + 16, 2]]
    assert build_arrays(sort_codes(codes[:3], (2, 10)), (2, 10)).tables[1] is None
    monkeypatch.setattr(trie_building, "_BLOCK_BYTES", 10)  # a node at a time
    assert np.array_equal(build_arrays(sort_codes(codes, (2, 10)), (2, 10)).tables[1], tables[1])


def test_fingerprints_tell_catalogues_apart():
    codes = np.array([[0, 1], [1, 0], [1, 1]])

    def fingerprint(codes, sizes=(2, 2)):
        return build_arrays(sort_codes(codes, sizes), sizes).fingerprint

    assert fingerprint(codes) == fingerprint(codes.copy())
    others = [
        fingerprint(codes[::-1]),
        fingerprint(codes[:2]),
        fingerprint(codes, (2, 3)),
        fingerprint(codes[[0, 1, 1]]),
    ]
    assert len({fingerprint(codes), *others}) == 5
