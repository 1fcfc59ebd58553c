import json

import pytest

from llmrec.data.formats.minionerec import list_as_text
from llmrec.data.interactions import InteractionDataset
from llmrec.data.loading import load_dataset_from
from llmrec.errors import DataError, MissingPartError

ITEMS = {str(number): {"title": f"title {number}", "description": "['Soft.', 'Blue']"} for number in range(30)}


def write(folder, parts, items=ITEMS, prefix="Pens"):
    (folder / f"{prefix}.item.json").write_text(json.dumps(items))
    for part, rows in parts.items():
        lines = ["user_id,history_item_title,item_title,history_item_id,item_id"]
        lines += [f'{user},"[\'a, ""b""\']","c, d","{history}",{target}' for user, history, target in rows]
        (folder / f"{prefix}.{part}.csv").write_text("\n".join(lines) + "\n")
    return folder


def histories(dataset):
    return {
        user: [int(dataset.item_ids[item]) for item in dataset.history(row)]
        for row, user in enumerate(dataset.user_ids)
    }


def test_rows_of_three_parts_chain_to_whole_histories(tmp_path, caplog):
    long = list(range(14))
    rows = [("long", long[max(0, at - 10) : at], long[at]) for at in range(1, 14)]
    rows.insert(4, ("short", [7, 7], 7))
    parts = {"train": rows[:9], "valid": rows[9:10], "test": [*rows[10:], ("late", [5], 3)]}
    dataset = InteractionDataset.from_minionerec(write(tmp_path, parts))
    assert histories(dataset) == {"long": long, "short": [7, 7, 7], "late": [5, 3]}
    assert dataset.name == "Pens"
    assert dataset.num_items == 30
    assert dataset.flat_timestamps is None
    assert dataset.titles[3] == "title 3"
    assert dataset.items["description"][:2] == ["Soft. Blue", "Soft. Blue"]
    assert dataset.items["item_key"][:] == [str(number) for number in range(30)]
    assert caplog.text == ""


def test_what_does_not_chain_is_said_and_counted(tmp_path, caplog):
    ten = list(range(10, 20))
    rows = [
        ("hole", [1], 2),
        ("hole", ten, 20),  # ten items since, none known: appended after a hole
        ("bridged", [1, 2], 3),
        ("bridged", [3, *ten[1:]], 4),  # begins with the last known one: the rows between are filled in
        ("wrong", [1, 2], 3),
        ("wrong", [1, 2, 4], 5),  # not cut, and not what is known
        ("wrong", [1, 2, 3], 6),
    ]
    dataset = InteractionDataset.from_minionerec(write(tmp_path, {"valid": rows[:3], "test": rows[3:]}))
    assert histories(dataset) == {
        "hole": [1, 2, *ten, 20],
        "bridged": [1, 2, 3, *ten[1:], 4],
        "wrong": [1, 2, 3, 6],
    }
    assert "Pens.train.csv is missing" in caplog.text
    assert "1 of 7 rows have histories that begin after a hole" in caplog.text
    assert "left out 1 of 7 rows" in caplog.text


def test_item_ids_are_asins_where_the_file_has_them(tmp_path):
    items = {"0": {"asin": "B0", "title": "zero"}, "1": {"title": "one"}}
    dataset = InteractionDataset.from_minionerec(write(tmp_path, {"test": [("u", [1], 0)]}, items))
    assert dataset.item_ids == ("B0", "1")
    assert dataset.history(0).tolist() == [1, 0]
    with pytest.raises(DataError, match="'B0' twice"):
        InteractionDataset.from_minionerec(write(tmp_path, {}, {"0": {"asin": "B0"}, "1": {"asin": "B0"}}))


def test_descriptions_are_read_as_data_never_run():
    assert list_as_text("[' Soft. ', \"It's\"]") == "Soft. It's"
    assert list_as_text("[]") == ""
    for text in ("", "plain", "[unclosed", "[print('run')]", "[Old] pen", None, 3):
        assert list_as_text(text) == text


def test_what_is_not_this_layout_is_refused(tmp_path):
    with pytest.raises(MissingPartError, match=r"holds no X\.item\.json"):
        InteractionDataset.from_minionerec(tmp_path)
    with pytest.raises(MissingPartError, match=r"Pens\.item\.json is missing"):
        InteractionDataset.from_minionerec(tmp_path / "Pens")
    write(tmp_path, {})
    with pytest.raises(MissingPartError, match=r"holds no X\.item\.json with"):
        InteractionDataset.from_minionerec(tmp_path)
    with pytest.raises(MissingPartError, match=r"none of .*Pens\.train\.csv"):
        InteractionDataset.from_minionerec(tmp_path / "Pens")
    with pytest.raises(DataError, match=r"row 1: user 'u', history 'x'"):
        InteractionDataset.from_minionerec(write(tmp_path, {"test": [("u", "x", 1)]}))
    (tmp_path / "Pens.test.csv").write_text("user_id,item_id\nu,1\n")
    with pytest.raises(DataError, match="history_item_id"):
        InteractionDataset.from_minionerec(tmp_path)
    with pytest.raises(DataError, match="item number to attributes"):
        InteractionDataset.from_minionerec(write(tmp_path, {"test": [("u", [1], 2)]}, ["x"]))
    write(tmp_path, {"test": [("u", [1], 2)]}, prefix="Inks")
    with pytest.raises(DataError, match=r"several data sets \(Inks.item.json, Pens.item.json\)"):
        load_dataset_from(tmp_path)


def test_loading_finds_the_layout(tmp_path):
    write(tmp_path, {"test": [("u", [1], 2)]})
    for path in (tmp_path, tmp_path / "Pens", tmp_path / "Pens.item.json"):
        assert histories(load_dataset_from(path)) == {"u": [1, 2]}
    assert load_dataset_from(tmp_path, name="mine").name == "mine"


def test_office(office_dir, caplog):
    dataset = load_dataset_from(office_dir)
    assert (dataset.num_users, dataset.num_items, dataset.num_interactions) == (3_231, 3_459, 22_447)
    assert "Office_Products.train.csv is missing" in caplog.text
    assert "rows" not in caplog.text  # every row chains
    assert histories(dataset)["A994"] == [2122, 243, 811, 812, 2280, 1750]
    assert dataset.items[1]["description"] == "An Amazon Brand."
    assert set(dataset.items.column_names) >= {"title", "description", "brand"}
