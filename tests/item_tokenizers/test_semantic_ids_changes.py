"""Items that join a catalogue, and items that leave it."""

import itertools

import numpy as np
import pytest

from llmrec.errors import DataError, SettingsError, UnknownItemError
from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.item_tokenizers.uniqueness import CodeGeometry


def catalogue(codes, sizes, policy="min_cost", prefix="old"):
    ids = tuple(f"{prefix}{row}" for row in range(len(codes)))
    return SemanticIds(ids, np.asarray(codes).reshape(len(codes), -1), sizes).make_unique(policy)


def names(count):
    return [f"new{row}" for row in range(count)]


def random_geometry(seed, num_items, sizes, width=3):
    draws = np.random.default_rng(seed)
    books = tuple(draws.normal(size=(size, width)).astype(np.float32) for size in sizes)
    return CodeGeometry(draws.normal(size=(num_items, width)).astype(np.float32), books)


def check_appended(before, after, num_new):
    assert after.item_ids == before.item_ids + tuple(names(num_new))
    assert after.codes[: len(before)].tobytes() == before.codes.tobytes()
    assert after.codebook_sizes == before.codebook_sizes
    assert after.policy == before.policy
    assert (after.codes >= 0).all()
    assert (after.codes < np.array(after.codebook_sizes)).all()


@pytest.mark.parametrize("with_geometry", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_random_catalogues_stay_as_they_are_and_unique(seed, with_geometry):
    draws = np.random.default_rng(seed)
    sizes = [(4, 4, 8), (3, 5), (2, 2, 2, 16)][seed % 3]
    most = int(np.prod(sizes))
    num_old = int(draws.integers(0, most))
    num_new = most - num_old if seed < 3 else int(draws.integers(0, most - num_old + 1))
    before = catalogue(draws.integers(0, [2] * len(sizes), (num_old, len(sizes))), sizes)
    codes = draws.integers(0, sizes, (num_new, len(sizes))) // 2
    geometry = random_geometry(seed, num_new, sizes) if with_geometry else None
    after = before.append(names(num_new), codes, geometry=geometry)
    check_appended(before, after, num_new)
    assert after.is_unique
    free = {tuple(item) for item in before.codes.tolist()}
    wanted = [tuple(item) for item in codes.tolist()]
    assert after.report.collisions_before == num_new - len(set(wanted) - free)
    assert after.report.collisions_after == 0
    assert after.report.moved == (after.codes[num_old:] != codes).any(axis=1).sum()
    again = before.append(names(num_new), codes, geometry=geometry)
    np.testing.assert_array_equal(again.codes, after.codes)


@pytest.mark.parametrize("seed", range(8))
def test_colliding_new_items_are_placed_at_the_least_cost(seed):
    sizes = (1, 8)
    draws = np.random.default_rng(seed)
    before = catalogue([[0, code] for code in draws.choice(8, 3, replace=False)], sizes)
    taken = set(before.codes[:, 1].tolist())
    new = np.column_stack([np.zeros(4, dtype=int), draws.integers(0, 8, 4)])
    new[1] = new[0]
    geometry = random_geometry(seed, 4, sizes)
    after = before.append(names(4), new, geometry=geometry)
    chosen = after.codes[3:, 1]
    alone = [row for row in range(4) if (new[:, 1] == new[row, 1]).sum() == 1 and new[row, 1] not in taken]
    assert [chosen[row] for row in alone] == [new[row, 1] for row in alone]
    distances = geometry.distances(np.arange(4), new, 1)
    moving = [row for row in range(4) if row not in alone]
    free = set(range(8)) - taken - {int(new[row, 1]) for row in alone}
    best = min(
        sum(distances[row, code] for row, code in zip(moving, order, strict=True))
        for order in itertools.permutations(free, len(moving))
    )
    assert sum(distances[row, chosen[row]] for row in moving) == pytest.approx(best)


def test_one_by_one_may_cost_more_than_in_one_go():
    # Free last codes at 0 and 10; the new items lie at 1 and 0. Alone, the first takes 0 and leaves 10 to the second.
    books = (np.zeros((1, 1), dtype=np.float32), np.array([[0], [10], [0.5]], dtype=np.float32))
    before = catalogue([[0, 2]], (1, 3))
    together = before.append(["x", "y"], [[0, 2], [0, 2]], geometry=CodeGeometry(np.array([[1.0], [0.0]]), books))
    first = before.append(["x"], [[0, 2]], geometry=CodeGeometry(np.array([[1.0]]), books))
    alone = first.append(["y"], [[0, 2]], geometry=CodeGeometry(np.array([[0.0]]), books))
    assert together.codes[1:, 1].tolist() == [1, 0]
    assert alone.codes[1:, 1].tolist() == [0, 1]
    assert together.report.distortion_after == pytest.approx((81 + 0) / 2)


def test_a_full_prefix_sends_the_new_item_to_the_nearest_sibling_with_room():
    # Prefix 1 at 1.0 is full as well; prefix 2 at 3.0 has one code left, -.5.
    books = (np.array([[0], [1], [3]], dtype=np.float32), np.array([[0.0], [-0.5]], dtype=np.float32))
    before = catalogue([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]], (3, 2))
    geometry = CodeGeometry(np.array([[0.9]], dtype=np.float32), books)
    for codes, given in (([[0, 0]], geometry), ([[0, 0]], None)):
        after = before.append(["new0"], codes, geometry=given)
        check_appended(before, after, 1)
        assert after.codes[-1].tolist() == [2, 1]
    with pytest.raises(SettingsError, match="7 items can't have codes of their own"):
        after.append(["more"], [[0, 0]])


def test_extra_level_gives_the_next_counter_and_says_when_there_is_none():
    before = catalogue([[1], [0], [1], [1]], (2,), "extra_level")
    after = before.append(names(2), [[0], [0]])
    check_appended(before, after, 2)
    assert after.codes[4:].tolist() == [[0, 1], [0, 2]]
    assert (after.report.policy, after.report.collisions_before, after.report.moved) == ("extra_level", 2, 2)
    geometry = CodeGeometry(np.array([[2.0]]), (np.array([[0.0], [1.0]]),))
    with_geometry = before.append(["x"], [[0]], geometry=geometry).report
    assert with_geometry.distortion_before == with_geometry.distortion_after == pytest.approx(4.0)
    with pytest.raises(SettingsError, match=r"4 items would share .* more tokens.*min_cost"):
        before.append(["x"], [[1]])
    with pytest.raises(DataError, match="without the counter"):
        before.append(["x"], [[1, 0]])
    freed = before.remove(["old2"]).append(["x"], [[1]])
    assert freed.codes[-1].tolist() == [1, 1]


def test_allow_and_sinkhorn(caplog):
    allowed = catalogue([[0, 0], [0, 0]], (2, 2), "allow").append(["x", "y"], [[0, 0], [1, 1]])
    assert allowed.codes.tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]
    assert (allowed.policy, allowed.report.collisions_before, allowed.report.collisions_after) == ("allow", 1, 1)
    codes = np.array([[0, 0], [0, 0], [0, 1]])  # a collision that sinkhorn left
    before = SemanticIds(("a", "b", "c"), codes, (1, 4), "sinkhorn")
    with caplog.at_level("INFO", logger="llmrec"):
        after = before.append(["x", "y"], [[0, 0], [0, 1]])
    assert after.codes.tolist() == [[0, 0], [0, 0], [0, 1], [0, 2], [0, 3]]
    assert (after.policy, after.report.policy) == ("sinkhorn", "min_cost")
    assert "placed by min_cost" in caplog.text
    many = SemanticIds(("a",), np.zeros((1, 9), dtype=int), (256,) * 9).append(["b"], np.zeros((1, 9), dtype=int))
    assert (many.num_items, many.report) == (2, None)


def test_what_can_not_be_appended_or_removed_is_refused():
    before = catalogue([[0, 0], [0, 1]], (2, 2))
    with pytest.raises(DataError, match="1 of 2 new items are here already, first 'old1'"):
        before.append(["x", "old1"], [[0, 0], [0, 0]])
    with pytest.raises(DataError, match="'x' stands twice"):
        before.append(["x", "x"], [[0, 0], [0, 0]])
    with pytest.raises(DataError, match=r"must be \[1, 2\]; got \(2, 2\)"):
        before.append(["x"], [[0, 0], [0, 1]])
    with pytest.raises(DataError, match="outside the codebook sizes"):
        before.append(["x"], [[0, 2]])
    with pytest.raises(DataError, match="geometry is about 2 items, 1 are new"):
        before.append(["x"], [[0, 0]], geometry=random_geometry(0, 2, (2, 2)))
    with pytest.raises(UnknownItemError, match="'x'"):
        before.remove(["old0", "x"])


def test_removed_codes_can_be_given_again_and_all_of_it_is_saved(tmp_path):
    before = catalogue([[0, 0], [0, 1], [1, 1]], (2, 2))
    left = before.remove(["old1"])
    assert left.item_ids == ("old0", "old2")
    assert left.codes.tolist() == [[0, 0], [1, 1]]
    assert (left.policy, left.report) == ("min_cost", None)
    after = left.append(["x"], [[0, 0]])
    assert after.codes[-1].tolist() == [0, 1]
    after.save(tmp_path / "ids.safetensors")
    loaded = SemanticIds.load(tmp_path / "ids.safetensors", item_ids=after.item_ids)
    assert (loaded.codes.tolist(), loaded.policy, loaded.report) == (after.codes.tolist(), "min_cost", after.report)
    more = loaded.append(["y"], [[0, 0]])
    assert more.codes[:3].tobytes() == after.codes.tobytes()
    assert more.is_unique
    assert before.remove([]).codes.tolist() == before.codes.tolist()
    nothing = before.remove(before.item_ids)
    assert nothing.append(["x"], [[1, 0]]).codes.tolist() == [[1, 0]]


def test_nothing_appended_changes_nothing():
    before = catalogue([[0, 0], [0, 1]], (2, 2))
    assert before.append([], np.zeros((0, 2), dtype=int)).codes.tolist() == before.codes.tolist()
