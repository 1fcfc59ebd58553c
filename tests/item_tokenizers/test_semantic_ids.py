import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmrec.errors import DataError, ItemOrderError, MissingPartError, SettingsError
from llmrec.item_tokenizers.semantic_ids import SemanticIds, code_token

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
CODES = np.array([[1, 0, 2], [0, 3, 1], [1, 0, 2], [0, 3, 0], [1, 0, 2]])


def make(codes=CODES, sizes=(2, 4, 3), **arguments):
    return SemanticIds(tuple(f"item{row}" for row in range(len(codes))), np.asarray(codes), sizes, **arguments)


def test_keys_are_mixed_radix_and_count_collisions():
    semantic_ids = make()
    # (1, 0, 2) -> 1 * 12 + 0 * 3 + 2 = 14;  (0, 3, 1) -> 9 + 1 = 10;  (0, 3, 0) -> 9
    assert semantic_ids.keys().tolist() == [14, 10, 14, 9, 14]
    assert semantic_ids.codes.dtype == np.int32
    assert not semantic_ids.is_unique
    assert semantic_ids.num_distinct == 3
    assert semantic_ids.collision_rate == pytest.approx(2 / 5)
    assert semantic_ids.group_sizes().tolist() == [1, 1, 3]


def test_rows_of_gives_all_items_of_a_tuple_and_none_for_unknown_ones():
    found = make().rows_of([[1, 0, 2], [0, 3, 0], [0, 0, 0], [5, 0, 0], [0, -1, 12]])
    assert [rows.tolist() for rows in found] == [[0, 2, 4], [3], [], [], []]
    with pytest.raises(DataError, match="must be"):
        make().rows_of([[1, 0]])


def test_code_tokens():
    assert code_token(0, 12) == "<a_12>"
    assert make().tokens(1) == ["<a_0>", "<b_3>", "<c_1>"]
    with pytest.raises(SettingsError, match="level 26"):
        code_token(26, 0)


def test_wrong_arrays_are_refused():
    with pytest.raises(DataError, match="outside the codebook sizes"):
        make([[0, 4, 0]])
    with pytest.raises(DataError, match="integers"):
        make([[0.5, 1.0, 0.0]])
    with pytest.raises(DataError, match="3 level"):
        make(sizes=(2, 4))
    with pytest.raises(DataError, match="policy"):
        make(policy="best")
    with pytest.raises(SettingsError, match="64-bit"):
        make(np.zeros((2, 8), dtype=int), (256,) * 8).keys()


@pytest.mark.parametrize("policy", ["min_cost", "extra_level", "allow"])
def test_saved_and_loaded_equal(tmp_path, policy):
    path = tmp_path / "ids.safetensors"
    saved = SemanticIds(("é", "b,c", "", "d", "日本"), CODES, (2, 4, 3)).make_unique(policy)
    saved.save(path)
    loaded = SemanticIds.load(path, item_ids=saved.item_ids)
    assert loaded.item_ids == saved.item_ids
    assert loaded.codebook_sizes == saved.codebook_sizes
    assert saved.report is not None
    assert (loaded.policy, loaded.report) == (policy, saved.report)
    np.testing.assert_array_equal(loaded.codes, saved.codes)
    with pytest.raises(ItemOrderError, match="row 0"):
        SemanticIds.load(path, item_ids=("x", *saved.item_ids[1:]))


def test_files_of_others_are_refused(tmp_path):
    with pytest.raises(MissingPartError):
        SemanticIds.load(tmp_path / "none.safetensors")
    save_file({"codes": CODES}, tmp_path / "foreign.safetensors")
    with pytest.raises(DataError, match="format_version"):
        SemanticIds.load(tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(DataError, match="not a safetensors file"):
        SemanticIds.load(tmp_path / "text.safetensors")


def test_an_empty_catalogue_has_no_collisions(tmp_path):
    empty = make(np.zeros((0, 3), dtype=int))
    assert (empty.is_unique, empty.collision_rate, empty.rows_of([[0, 0, 0]])[0].tolist()) == (True, 0.0, [])
    empty.make_unique().save(tmp_path / "ids.safetensors")
    assert SemanticIds.load(tmp_path / "ids.safetensors").num_items == 0


def write_index(tmp_path, content):
    path = tmp_path / "x.index.json"
    path.write_text(json.dumps(content))
    return path


def test_index_files_are_read_by_key_not_by_order(tmp_path):
    path = write_index(tmp_path, {"1": ["<a_3>", "<b_0>"], "0": ["<a_1>", "<b_2>"]})
    semantic_ids = SemanticIds.from_index_json(path, ["first", "second"])
    assert semantic_ids.codes.tolist() == [[1, 2], [3, 0]]
    assert semantic_ids.codebook_sizes == (4, 4)
    other = SemanticIds.from_index_json(path, ["second", "first"], item_keys=["1", "0"], codebook_sizes=(4, 3))
    assert other.codes.tolist() == [[3, 0], [1, 2]]
    assert other.codebook_sizes == (4, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0": ["<a_1>"], "1": ["<a_1>", "<b_1>", "<c_1>"]}, "item '0'"),
        ({"0": ["<a_1>", "<c_1>"], "1": ["<a_1>", "<b_1>", "<c_1>"]}, "only the last one may be missing"),
        ({"0": [], "1": ["<a_1>"]}, "item '0'"),
        ({"0": 5, "1": ["<a_1>"]}, "item '0'"),
        ({"0": ["<b_1>", "<a_1>"], "1": ["<a_1>", "<b_1>"]}, "item '0'"),
        ({"0": ["<a_1>", "<b_1>"], "2": ["<a_1>", "<b_1>"]}, "first '1'"),
        ({"0": ["<a_1>"], "1": ["<a_1>"], "2": ["<a_1>"]}, "of 3 items, the catalogue 2"),
        ([], "holds no index"),
    ],
)
def test_malformed_index_files_are_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        SemanticIds.from_index_json(write_index(tmp_path, content), ["first", "second"])


@pytest.mark.parametrize(("token", "first"), [("<{}_{}>", 0), ("<|{}_{}|>", 1)])
def test_a_counter_on_colliding_items_alone(tmp_path, token, first):
    # MiniOneRec's constrained variant: codes and ranks start at 1; elsewhere ranks start at 0 and are shifted.
    rows = {"0": (3, 1), "1": (2, 4, first), "2": (2, 4, first + 1), "3": (2, 4, first + 2), "4": (1, 4)}
    content = {key: [token.format("abc"[level], code) for level, code in enumerate(row)] for key, row in rows.items()}
    path = write_index(tmp_path, content)
    semantic_ids = SemanticIds.from_index_json(path, list("vwxyz"))
    assert semantic_ids.codes.tolist() == [[3, 1, 0], [2, 4, 1], [2, 4, 2], [2, 4, 3], [1, 4, 0]]
    assert semantic_ids.codebook_sizes == (5, 5, 4)
    assert (semantic_ids.policy, semantic_ids.report) == ("extra_level", None)
    assert semantic_ids.make_unique("extra_level") is semantic_ids
    assert SemanticIds.from_index_json(path, list("vwxyz"), codebook_sizes=8).codebook_sizes == (8, 8, 4)
    assert SemanticIds.from_index_json(path, list("vwxyz"), policy="min_cost").policy == "min_cost"
    assert semantic_ids.append(["new"], [[3, 1]]).codes[-1].tolist() == [3, 1, 1]
    with pytest.raises(DataError, match=r"code number 4 at level 1, .* start at 1: give one more"):
        SemanticIds.from_index_json(path, list("vwxyz"), codebook_sizes=4)


def test_items_that_collide_without_a_counter_are_not_called_unique(tmp_path):
    content = {"0": ["<a_0>"], "1": ["<a_0>"], "2": ["<a_0>", "<b_1>"]}
    semantic_ids = SemanticIds.from_index_json(write_index(tmp_path, content), list("xyz"))
    assert semantic_ids.codes.tolist() == [[0, 0], [0, 0], [0, 1]]
    assert (semantic_ids.policy, semantic_ids.report.collisions_after) == ("allow", 1)


@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not here")
def test_published_index_files():
    letter = DATA / "beauty" / "Beauty.letter-index.json"
    semantic_ids = SemanticIds.from_index_json(letter, [str(row) for row in range(12_101)])
    assert semantic_ids.codebook_sizes == (256,) * 4
    assert semantic_ids.num_distinct == 12_088
    assert [len(np.unique(level)) for level in semantic_ids.codes.T] == [197, 256, 256, 256]
    assert semantic_ids.codes[0].tolist() == [183, 70, 232, 6]
    unique = SemanticIds.from_index_json(letter, semantic_ids.item_ids, policy="min_cost")
    assert unique.is_unique
    assert (unique.report.collisions_before, unique.report.moved) == (13, 13)
    np.testing.assert_array_equal(unique.codes[:, :3], semantic_ids.codes[:, :3])
    office = DATA / "office" / "Office_Products.index.json"
    semantic_ids = SemanticIds.from_index_json(office, [str(row) for row in range(3_459)])
    assert (semantic_ids.num_levels, semantic_ids.num_distinct) == (3, 3_444)
    assert (semantic_ids.policy, semantic_ids.report.collisions_after) == ("allow", 15)
    assert semantic_ids.make_unique("extra_level").codebook_sizes == (256, 256, 256, 2)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "ids.safetensors"
    make().save(path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make(CODES[:2]).save(path)
    assert SemanticIds.load(path).num_items == 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["ids.safetensors"]
