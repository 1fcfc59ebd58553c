"""The policy extra_level with a counter whose number of codes is given, whatever the largest group is."""

from collections import Counter

import numpy as np
import pytest

from llmrec.embeddings.base import ItemEmbeddings
from llmrec.errors import SettingsError
from llmrec.item_tokenizers.rq_kmeans import RQKMeansConfig, RQKMeansTokenizer
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.uniqueness import CodeGeometry


def semantic_ids_of(codes, sizes):
    return SemanticIds(tuple(str(row) for row in range(len(codes))), np.asarray(codes).reshape(len(codes), -1), sizes)


def line(latents, *books):
    """Items and code vectors on a line."""
    books = tuple(np.array(book, dtype=np.float32)[:, None] for book in books)
    return CodeGeometry(np.array(latents, dtype=np.float32)[:, None], books)


def random_case(seed, num_items, sizes, width=4):
    draws = np.random.default_rng(seed)
    books = tuple(draws.normal(size=(size, width)).astype(np.float32) for size in sizes)
    geometry = CodeGeometry(draws.normal(size=(num_items, width)).astype(np.float32), books)
    codes = np.zeros((num_items, len(sizes)), dtype=np.int32)
    for level in range(len(sizes)):
        codes[:, level] = geometry.distances(np.arange(num_items), codes, level).argmin(1)
    return semantic_ids_of(codes, sizes), geometry


def counters_by_hand(codes):
    seen = Counter()
    numbers = []
    for item in map(tuple, codes.tolist()):
        numbers.append(seen[item])
        seen[item] += 1
    return numbers


@pytest.mark.parametrize("with_geometry", [True, False])
def test_where_groups_fit_nothing_moves_and_the_counter_has_the_size_that_was_asked_for(with_geometry, caplog):
    before, geometry = random_case(0, 60, (4, 6))
    largest = int(before.group_sizes().max())
    for size in (largest, 256):
        after = before.make_unique("extra_level", geometry=geometry if with_geometry else None, counter_size=size)
        assert after.codebook_sizes == (4, 6, size)
        assert after.policy == "extra_level"
        np.testing.assert_array_equal(after.codes[:, :2], before.codes)
        assert after.codes[:, 2].tolist() == counters_by_hand(before.codes)
        assert after.report.distortion_before == after.report.distortion_after
    without_size = before.make_unique("extra_level", geometry=geometry)
    assert without_size.codebook_sizes == (4, 6, largest)
    np.testing.assert_array_equal(without_size.codes, after.codes)
    assert without_size.report == before.make_unique("extra_level", geometry=geometry, counter_size=256).report
    assert "moved" not in caplog.text


def test_the_item_that_loses_least_moves_to_the_nearest_code_with_room(caplog):
    # Three items at code 0 (at 0), of which two may stay. Code 1 lies at 1, code 2 at 10: the item at .4 is nearest to
    # another code. Code 3 at .5 would be nearer still, but is full.
    geometry = line([0.4, 0.0, 0.1, 0.5, 0.5], [0, 1, 10, 0.5])
    before = semantic_ids_of([0, 0, 0, 3, 3], (4,))
    after = before.make_unique("extra_level", geometry=geometry, counter_size=2)
    assert after.codes.tolist() == [[1, 0], [0, 0], [0, 1], [3, 0], [3, 1]]
    assert "1 of 5 items share their codes with more others than a counter of 2 tells apart" in caplog.text
    report = after.report
    assert (report.policy, report.collisions_before, report.collisions_after, report.moved) == ("extra_level", 3, 0, 3)
    # Moved are the items at .4, and those at .1 and .5 that got the counter 1.
    assert report.distortion_before == pytest.approx((0.4**2 + 0.1**2 + 0) / 3)
    assert report.distortion_after == pytest.approx((0.6**2 + 0.1**2 + 0) / 3)


def test_without_distances_the_last_ones_move_to_the_lowest_codes_with_room():
    after = semantic_ids_of([2, 2, 2, 0, 2], (4,)).make_unique("extra_level", counter_size=2)
    assert after.codes.tolist() == [[2, 0], [2, 1], [0, 0], [0, 1], [1, 0]]  # counters in row order, whoever moved


def relocated_by_loops(codes, sizes, counter_size, geometry):
    """Every overfull group of a parent at once: who loses least goes first, each to the nearest code with room."""
    codes = codes.copy()
    last = len(sizes) - 1
    for parent in sorted({tuple(item[:-1]) for item in codes.tolist()}):
        members = [row for row, item in enumerate(codes.tolist()) if tuple(item[:-1]) == parent]
        used = Counter(int(codes[row, last]) for row in members)
        room = {code: counter_size - used[code] for code in range(sizes[last]) if used[code] < counter_size}
        distances = {}
        for row in members:
            left = geometry.latents[row].astype(np.float64)
            for level in range(last):
                left = left - geometry.codebooks[level][codes[row, level]]
            distances[row] = ((geometry.codebooks[last] - left) ** 2).sum(1)
        crowded = [row for row in members if used[int(codes[row, last])] > counter_size]
        crowded.sort(key=lambda row: min(distances[row][code] for code in room) - distances[row][codes[row, last]])
        moving = []
        for row in crowded:
            code = int(codes[row, last])
            if used[code] > counter_size:
                used[code] -= 1
                moving.append(row)
        for row in moving:
            code = min((code for code in room if room[code]), key=lambda code: distances[row][code])
            room[code] -= 1
            codes[row, last] = code
    return codes


@pytest.mark.parametrize("seed", range(5))
def test_random_groups_move_as_plain_loops_move_them(seed):
    sizes = (3, 16)
    before, geometry = random_case(seed, 60, sizes)
    assert np.bincount(before.codes[:, 0]).max() <= 16 * 3  # only last codes must give way
    overflow = int(np.maximum(before.group_sizes() - 3, 0).sum())
    assert overflow > 0
    after = before.make_unique("extra_level", geometry=geometry, counter_size=3)
    expected = relocated_by_loops(before.codes, sizes, 3, geometry)
    np.testing.assert_array_equal(after.codes[:, :2], expected)
    assert after.codes[:, 2].tolist() == counters_by_hand(expected)
    assert (expected != before.codes).any(axis=1).sum() == overflow
    np.testing.assert_array_equal(after.codes[:, 0], before.codes[:, 0])
    again = before.make_unique("extra_level", geometry=geometry, counter_size=3)
    np.testing.assert_array_equal(again.codes, after.codes)


@pytest.mark.parametrize("with_geometry", [True, False])
@pytest.mark.parametrize("num_items", [1, 20, 35, 36])
@pytest.mark.parametrize("collapsed", [True, False])
def test_every_catalogue_that_fits_gets_codes_up_to_the_last_tuple(with_geometry, num_items, collapsed, caplog):
    sizes, size = (3, 4), 3
    before, geometry = random_case(7, num_items, sizes)
    if collapsed:
        before = semantic_ids_of(np.full((num_items, 2), 2), sizes)
    after = before.make_unique("extra_level", geometry=geometry if with_geometry else None, counter_size=size)
    assert after.codebook_sizes == (3, 4, 3)
    assert len({tuple(item) for item in after.codes.tolist()}) == num_items
    assert after.codes.min() >= 0
    assert (after.codes < np.array(after.codebook_sizes)).all()
    assert after.codes[:, 2].tolist() == counters_by_hand(after.codes[:, :2])
    moved = int((after.codes[:, :2] != before.codes).any(axis=1).sum())
    assert moved >= int(np.maximum(before.group_sizes() - size, 0).sum())
    assert (f"{moved} of {num_items} items" in caplog.text) == (moved > 0)


def test_more_items_than_tuples_and_impossible_counters_are_refused():
    before = semantic_ids_of(np.zeros((9, 2), dtype=int), (2, 2))
    with pytest.raises(SettingsError, match=r"9 items can't have .* a counter of 2 give 8 tuples; raise counter_size"):
        before.make_unique("extra_level", counter_size=2)
    with pytest.raises(SettingsError, match="counter_size is 0"):
        before.make_unique("extra_level", counter_size=0)
    huge = semantic_ids_of(np.zeros((1, 3), dtype=int), (2**16,) * 3)
    with pytest.raises(SettingsError, match="64-bit key"):
        huge.make_unique("extra_level", counter_size=2**16)
    assert huge.make_unique("extra_level", counter_size=2**14).codebook_sizes == (*(2**16,) * 3, 2**14)


def test_a_counter_that_is_there_stays_in_a_level_of_another_size():
    counted = semantic_ids_of([0, 1, 0, 0], (2,)).make_unique("extra_level")
    assert counted.codebook_sizes == (2, 3)
    wider = counted.make_unique("extra_level", counter_size=8)
    assert wider.codebook_sizes == (2, 8)
    assert wider.codes.tolist() == counted.codes.tolist() == [[0, 0], [1, 0], [0, 1], [0, 2]]
    assert wider.make_unique("extra_level", counter_size=3).codebook_sizes == (2, 3)
    assert wider.make_unique("extra_level") is wider
    with pytest.raises(SettingsError, match="counter_size is 2, but these codes have counters up to 2"):
        wider.make_unique("extra_level", counter_size=2)


def test_it_is_saved_and_new_items_get_the_next_counter(tmp_path):
    after = semantic_ids_of([0, 1, 0], (2,)).make_unique("extra_level", counter_size=4)
    after.save(tmp_path / "ids.safetensors")
    loaded = SemanticIds.load(tmp_path / "ids.safetensors")
    assert (loaded.codebook_sizes, loaded.report) == ((2, 4), after.report)
    more = loaded.append(["x", "y"], [[0], [1]])
    assert more.codes[3:].tolist() == [[0, 2], [1, 1]]
    assert more.codebook_sizes == (2, 4)


def test_item_tokenizers_pass_it_on_and_other_policies_have_no_counter():
    vectors = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    items = ItemEmbeddings(tuple(f"item-{row}" for row in range(40)), vectors)
    tokenizer = RQKMeansTokenizer(RQKMeansConfig(num_codebooks=2, codebook_size=6)).fit(items, progress=False)
    quantized = tokenizer.quantize(items)
    assert quantized.semantic_ids.group_sizes().max() > 2
    assert np.bincount(quantized.semantic_ids.codes[:, 0]).max() <= 12  # so that the loops know the answer
    after = quantized.make_unique("extra_level", counter_size=2)
    expected = relocated_by_loops(quantized.semantic_ids.codes, (6, 6), 2, quantized.geometry)
    np.testing.assert_array_equal(after.codes[:, :2], expected)
    assert after.codebook_sizes == (6, 6, 2)
    for policy in ("allow", "sinkhorn"):
        with_size, without = (quantized.make_unique(policy, counter_size=size) for size in (2, None))
        assert with_size.codebook_sizes == (6, 6)
        np.testing.assert_array_equal(with_size.codes, without.codes)
