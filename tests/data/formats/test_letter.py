import json

import pytest

from llmrec.data.interactions import InteractionDataset
from llmrec.errors import DataError, MissingPartError


def write(folder, histories, items=None, prefix="Toys"):
    (folder / f"{prefix}.inter.json").write_text(json.dumps(histories))
    if items is not None:
        (folder / f"{prefix}.item.json").write_text(json.dumps(items))
    return folder


ITEMS = {
    "0": {"asin": "B0", "title": "zero"},
    "1": {"title": "one", "price": 3},
    "2": {"asin": "B2", "price": "cheap"},
}


@pytest.mark.parametrize("suffix", ["", "Toys", "Toys.inter.json"])
def test_folder_prefix_and_file(tmp_path, suffix):
    dataset = InteractionDataset.from_letter(write(tmp_path, {"7": [2, 0], "3": [1]}, ITEMS) / suffix)
    assert dataset.name == "Toys"
    assert dataset.item_ids == ("B0", "1", "B2")
    assert dataset.titles == ("zero", "one", "")
    assert dataset.items["item_key"][:] == ["0", "1", "2"]
    assert dataset.items["price"][:] == [None, "3", "cheap"]
    assert dataset.user_ids == ("7", "3")
    assert [dataset.history(user).tolist() for user in range(2)] == [[2, 0], [1]]
    assert dataset.flat_timestamps is None


def test_without_item_file_the_numbers_are_the_ids(tmp_path, caplog):
    dataset = InteractionDataset.from_letter(write(tmp_path, {"0": [5, 3]}), name="mine")
    assert dataset.item_ids == ("5", "3") == dataset.titles
    assert dataset.name == "mine"
    assert "Toys.item.json is missing" in caplog.text


def test_items_without_metadata(tmp_path):
    folder = write(tmp_path, {"0": [0, 9, 2]}, ITEMS)
    dropped = InteractionDataset.from_letter(folder)
    assert dropped.history(0).tolist() == [0, 2]
    assert dropped.drops == {"interaction with an item without metadata": 1}
    kept = InteractionDataset.from_letter(folder, items_without_metadata="keep")
    assert kept.item_ids == ("B0", "1", "B2", "9")
    assert kept.history(0).tolist() == [0, 3, 2]


def test_what_is_not_this_layout_is_refused(tmp_path):
    with pytest.raises(MissingPartError, match=r"holds no X.inter.json"):
        InteractionDataset.from_letter(tmp_path)
    with pytest.raises(MissingPartError, match=r"Toys.inter.json is missing"):
        InteractionDataset.from_letter(tmp_path / "Toys")
    with pytest.raises(DataError, match="user to list of item numbers"):
        InteractionDataset.from_letter(write(tmp_path, {"0": 3}))
    with pytest.raises(DataError, match="item number to attributes"):
        InteractionDataset.from_letter(write(tmp_path, {"0": [3]}, ["x"]))
    with pytest.raises(DataError, match="'B0' twice"):
        InteractionDataset.from_letter(write(tmp_path, {"0": [1]}, {"0": {"asin": "B0"}, "1": {"asin": "B0"}}))
    write(tmp_path, {"0": [1]}, prefix="Games")
    with pytest.raises(DataError, match=r"several data sets \(Games.inter.json, Toys.inter.json\)"):
        InteractionDataset.from_letter(tmp_path)


def test_an_empty_file_of_histories_is_refused(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        InteractionDataset.from_letter(write(tmp_path, {}, ITEMS))
