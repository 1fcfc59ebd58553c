from itertools import permutations

import numpy as np
import pytest

from llmrec.errors import SettingsError
from llmrec.item_tokenizers import code_assignment
from llmrec.item_tokenizers.code_assignment import assign_min_cost
from llmrec.item_tokenizers.semantic_ids import POLICIES, SemanticIds
from llmrec.item_tokenizers.uniqueness import CodeGeometry


def semantic_ids_of(codes, sizes):
    return SemanticIds(tuple(str(row) for row in range(len(codes))), np.asarray(codes), sizes)


def nearest(geometry):
    codes = np.zeros((len(geometry.latents), len(geometry.codebooks)), dtype=np.int32)
    rows = np.arange(len(codes))
    for level in range(codes.shape[1]):
        codes[:, level] = geometry.distances(rows, codes, level).argmin(1)
    return codes


def random_geometry(seed, num_items, sizes, width=6):
    generator = np.random.default_rng(seed)
    books = [generator.normal(size=(size, width)).astype(np.float32) / (1 + level) for level, size in enumerate(sizes)]
    return CodeGeometry(generator.normal(size=(num_items, width)).astype(np.float32), tuple(books))


def test_minimum_cost_by_hand():
    # One prefix, last codes at 0, 1, 2, 3 on a line. Item 3 holds code 1 alone and must keep it. Items 0, 1, 2 all
    # have code 0; free are 0, 2, 3. Costs of (0, 2, 3): .01 3.61 8.41 / .04 3.24 7.84 / .09 2.89 7.29.
    # Best: item 0 stays (.01), then 3.24 + 7.29 = 10.53 against 7.84 + 2.89 = 10.73.
    codebooks = (np.zeros((1, 1), dtype=np.float32), np.array([[0], [1], [2], [3]], dtype=np.float32))
    geometry = CodeGeometry(np.array([[0.1], [0.2], [0.3], [1.1]], dtype=np.float32), codebooks)
    before = semantic_ids_of(nearest(geometry), (1, 4))
    assert before.codes[:, 1].tolist() == [0, 0, 0, 1]
    after = before.make_unique(geometry=geometry)
    assert after.codes[3].tolist() == [0, 1]
    total = sum((float(geometry.latents[row, 0]) - after.codes[row, 1]) ** 2 for row in range(3))
    best = min(
        sum((x - code) ** 2 for x, code in zip((0.1, 0.2, 0.3), order, strict=True))
        for order in permutations((0, 2, 3))
    )
    assert total == pytest.approx(best, abs=1e-5)
    report = after.report
    assert (report.policy, report.collisions_before, report.collisions_after, report.moved) == ("min_cost", 2, 0, 2)
    moved = [row for row in range(3) if after.codes[row, 1] != 0]
    assert report.distortion_before == pytest.approx(np.mean([geometry.latents[row, 0] ** 2 for row in moved]))
    assert report.distortion_after > report.distortion_before


@pytest.mark.parametrize("seed", range(5))
def test_random_catalogues_become_unique_and_only_last_codes_of_colliding_items_move(seed):
    sizes = (4, 3, 24)
    geometry = random_geometry(seed, 60, sizes)
    before = semantic_ids_of(nearest(geometry), sizes)
    assert np.bincount(before.codes[:, 0] * 3 + before.codes[:, 1]).max() <= 24  # no prefix overflows
    assert before.collision_rate > 0.1
    after = before.make_unique(geometry=geometry)
    assert after.is_unique
    np.testing.assert_array_equal(after.codes[:, :2], before.codes[:, :2])
    _, inverse, counts = np.unique(before.keys(), return_inverse=True, return_counts=True)
    np.testing.assert_array_equal(after.codes[counts[inverse] == 1], before.codes[counts[inverse] == 1])
    np.testing.assert_array_equal(before.make_unique(geometry=geometry).codes, after.codes)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_assignment_of_huge_groups_is_unique_and_never_cheaper(seed, monkeypatch):
    sizes = (4, 3, 24)
    geometry = random_geometry(seed, 60, sizes)
    before = semantic_ids_of(nearest(geometry), sizes)
    optimal = before.make_unique(geometry=geometry)
    monkeypatch.setattr(code_assignment, "GREEDY_ABOVE", 0)
    greedy = before.make_unique(geometry=geometry)
    assert greedy.is_unique
    optimal_cost, greedy_cost = (
        (geometry.residuals(np.arange(60), ids.codes, 3) ** 2).sum() for ids in (optimal, greedy)
    )
    assert optimal_cost <= greedy_cost + 1e-5


@pytest.mark.parametrize("with_geometry", [True, False])
@pytest.mark.parametrize("num_items", [1, 40, 63, 64])
def test_overfull_prefixes_move_to_siblings_up_to_the_last_tuple(with_geometry, num_items):
    sizes = (4, 4, 4)
    geometry = random_geometry(1, num_items, sizes)
    for codes in (nearest(geometry), np.zeros((num_items, 3), dtype=np.int32)):
        after = semantic_ids_of(codes, sizes).make_unique(geometry=geometry if with_geometry else None)
        assert after.is_unique
        assert after.codebook_sizes == sizes


def test_more_items_than_tuples_name_the_remedy():
    with pytest.raises(SettingsError, match="extra_level"):
        assign_min_cost(np.zeros((9, 2), dtype=np.int32), (2, 4), None)
    after = semantic_ids_of(np.zeros((9, 2), dtype=np.int32), (2, 4)).make_unique("extra_level")
    assert after.codebook_sizes == (2, 4, 9)
    assert after.codes[:, 2].tolist() == list(range(9))


def test_overflow_moves_the_item_that_loses_least():
    # Three items at prefix 0, which has two last codes. Siblings: 1 at distance 1, 2 at distance 10. The item at .4
    # is nearest to sibling 1, so it is the one that moves, and its last code is chosen on the new residual.
    codebooks = (np.array([[0], [1], [10]], dtype=np.float32), np.array([[0.0], [-0.6]], dtype=np.float32))
    geometry = CodeGeometry(np.array([[0.0], [0.1], [0.4]], dtype=np.float32), codebooks)
    after = semantic_ids_of(np.zeros((3, 2), dtype=np.int32), (3, 2)).make_unique(geometry=geometry)
    assert after.codes[2].tolist() == [1, 1]
    assert sorted(after.codes[:2].tolist()) == [[0, 0], [0, 1]]


def test_without_geometry_the_first_of_a_group_keeps_its_codes():
    after = semantic_ids_of([[0, 2], [0, 2], [0, 0], [0, 2]], (1, 5)).make_unique()
    assert after.codes[:, 1].tolist() == [2, 1, 0, 3]
    assert after.report.distortion_before is None


def test_extra_level_counts_in_row_order():
    after = semantic_ids_of([[1], [0], [1], [1], [0]], (2,)).make_unique("extra_level")
    assert after.codes.tolist() == [[1, 0], [0, 0], [1, 1], [1, 2], [0, 1]]
    assert after.codebook_sizes == (2, 3)
    assert after.report.moved == 3


def test_sinkhorn_separates_residuals_that_differ_but_far_from_the_nearest_code():
    sizes = (2, 64)
    geometry = random_geometry(3, 40, sizes, width=16)
    before = semantic_ids_of(nearest(geometry), sizes)
    sinkhorn = before.make_unique("sinkhorn", geometry=geometry)
    optimal = before.make_unique(geometry=geometry)
    assert before.report is None
    assert sinkhorn.report.collisions_after < sinkhorn.report.collisions_before
    assert sinkhorn.report.distortion_after > optimal.report.distortion_after  # methods.md 12.2
    with pytest.raises(SettingsError, match="needs the vectors"):
        before.make_unique("sinkhorn")
    twins = CodeGeometry(np.ones((2, 16), dtype=np.float32), geometry.codebooks)
    left = semantic_ids_of(nearest(twins), sizes).make_unique("sinkhorn", geometry=twins)
    assert not left.is_unique  # identical residuals are never told apart
    assert left.report.collisions_after == 1


def test_every_policy_reports_what_it_cost():
    geometry = random_geometry(3, 40, (2, 24), width=16)
    before = semantic_ids_of(nearest(geometry), (2, 24))
    reports = {policy: before.make_unique(policy, geometry=geometry).report for policy in POLICIES}
    assert {report.collisions_before for report in reports.values()} == {40 - before.num_distinct}
    assert reports["allow"].moved == 0
    assert reports["allow"].collisions_after == 40 - before.num_distinct
    assert reports["allow"].distortion_before is None
    counted = reports["extra_level"]  # a counter stands for no vector: nothing gets further away
    assert (counted.moved, counted.collisions_after) == (40 - before.num_distinct, 0)
    assert counted.distortion_before == counted.distortion_after > 0
    for policy in ("min_cost", "sinkhorn"):
        assert reports[policy].distortion_after > reports[policy].distortion_before > 0


def test_greedy_gives_the_nearest_items_their_nearest_code(monkeypatch):
    # Last codes at 0, 1, 5. Nearest first: item 1 (.1) takes 0, item 2 (.3) takes 1, item 0 (.4) is left with 5.
    monkeypatch.setattr(code_assignment, "GREEDY_ABOVE", 2)
    codebooks = (np.zeros((1, 1), dtype=np.float32), np.array([[0], [1], [5]], dtype=np.float32))
    geometry = CodeGeometry(np.array([[0.4], [0.1], [0.3]], dtype=np.float32), codebooks)
    assert assign_min_cost(np.zeros((3, 2), dtype=int), (1, 3), geometry)[:, 1].tolist() == [2, 0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_blocks_of_any_size_and_mapped_vectors_give_the_same_codes(seed, monkeypatch, tmp_path):
    sizes = (3, 3, 12)
    geometry = random_geometry(seed, 100, sizes)
    codes = nearest(geometry) // 2
    whole = assign_min_cost(codes, sizes, geometry)
    without = assign_min_cost(codes, sizes, None)
    np.save(tmp_path / "latents.npy", geometry.latents)
    mapped = CodeGeometry(np.load(tmp_path / "latents.npy", mmap_mode="r"), geometry.codebooks)
    monkeypatch.setattr(code_assignment, "BLOCK_DISTANCES", 1)
    np.testing.assert_array_equal(assign_min_cost(codes, sizes, mapped), whole)
    np.testing.assert_array_equal(assign_min_cost(codes, sizes, None), without)


def dictionary_reference(codes, size):
    held, late = {}, []
    for row, item in enumerate(map(tuple, codes.tolist())):
        if item in held:
            late.append((item, row))
        else:
            held[item] = row
    after = codes.copy()
    for item, row in sorted(late):
        code = next(code for code in range(size) if (*item[:-1], code) not in held)
        held[(*item[:-1], code)] = row
        after[row, -1] = code
    return after


@pytest.mark.parametrize("seed", range(3))
def test_without_geometry_the_answer_is_that_of_a_dictionary_of_tuples(seed):
    codes = np.random.default_rng(seed).integers(0, (6, 5, 40), (600, 3))
    assert np.bincount(codes[:, 0] * 5 + codes[:, 1]).max() <= 40
    after = semantic_ids_of(codes, (6, 5, 40)).make_unique()
    assert after.report.moved > 50
    np.testing.assert_array_equal(after.codes, dictionary_reference(codes, 40))


@pytest.mark.parametrize("with_geometry", [True, False])
def test_prefixes_with_room_keep_their_items_when_another_overflows(with_geometry):
    codes = np.concatenate([np.zeros((10, 2), dtype=int), [[2, code] for code in range(4)], [[3, 0]]])
    geometry = random_geometry(0, 15, (5, 4)) if with_geometry else None
    after = assign_min_cost(codes, (5, 4), geometry)
    assert len(np.unique(after, axis=0)) == 15
    assert (after[:10, 0] == 0).sum() == 4
    np.testing.assert_array_equal(after[10:14], codes[10:14])
    if not with_geometry:
        assert after[:, 0].tolist() == [0] * 4 + [1] * 4 + [3] * 2 + [2] * 4 + [3]


def test_ten_thousand_equal_items_are_told_apart():
    sizes = (16, 32, 32)
    geometry = random_geometry(0, 10_000, sizes)
    equal = CodeGeometry(np.repeat(geometry.latents[:1], 10_000, axis=0), geometry.codebooks)
    after = semantic_ids_of(nearest(equal), sizes).make_unique(geometry=equal)
    assert after.is_unique
    # They fill the nearest prefixes, all but the last one whole.
    distances = equal.distances(np.arange(1), np.zeros((1, 3), dtype=int), 0)[0]
    filled = np.bincount(after.codes[:, 0], minlength=16)[np.argsort(distances)]
    assert filled.tolist() == [1024] * 9 + [10_000 - 9 * 1024] + [0] * 6


def test_equal_vectors_get_the_nearest_free_codes_of_their_prefix():
    codebooks = (np.zeros((1, 1), dtype=np.float32), np.array([[9], [1], [0], [2], [7]], dtype=np.float32))
    geometry = CodeGeometry(np.array([[0.1], [0.1], [0.1], [1.0]], dtype=np.float32), codebooks)
    after = assign_min_cost(nearest(geometry), (1, 5), geometry)
    assert after[:, 1].tolist() == [2, 3, 4, 1]


def test_large_random_catalogue_is_quick():
    codes = np.random.default_rng(0).integers(0, 64, (300_000, 4))
    before = semantic_ids_of(codes, (64,) * 4)
    after = before.make_unique()
    assert before.num_distinct < 300_000
    assert after.is_unique
    assert after.report.moved == 300_000 - before.num_distinct
