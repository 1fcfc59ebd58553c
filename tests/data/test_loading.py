import json

import pytest

from llmrec.data.interactions import InteractionDataset
from llmrec.data.loading import load_dataset_from
from llmrec.errors import MissingPartError, SettingsError


def test_synthetic():
    dataset = load_dataset_from("synthetic", num_users=20, num_items=40)
    assert (dataset.name, dataset.num_users, dataset.num_items) == ("synthetic", 20, 40)


def test_saved_folder_letter_and_file(tmp_path):
    original = InteractionDataset.from_columns(["u", "u"], ["a", "b"], [2, 1], name="mine")
    original.save(tmp_path / "saved")
    assert load_dataset_from(tmp_path / "saved").fingerprint == original.fingerprint
    letter = tmp_path / "letter"
    letter.mkdir()
    (letter / "Toys.inter.json").write_text(json.dumps({"0": [3, 1]}))
    for path in (letter, letter / "Toys", str(letter / "Toys.inter.json")):
        assert load_dataset_from(path).item_ids == ("3", "1")
    (tmp_path / "x.csv").write_text("who,item_id\nu,a\n")
    (tmp_path / "items.csv").write_text("item_id,title\na,A\n")
    dataset = load_dataset_from(tmp_path / "x.csv", items=tmp_path / "items.csv", user_column="who", delimiter=None)
    assert dataset.titles == ("A",)


def test_nothing_there(tmp_path):
    with pytest.raises(MissingPartError, match="there is no data set 'nowhere': give 'synthetic'"):
        load_dataset_from("nowhere")
    with pytest.raises(MissingPartError, match=r"holds neither dataset.json"):
        load_dataset_from(tmp_path)


def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="synthetic takes no option 'user_column'; it takes num_users"):
        load_dataset_from("synthetic", user_column="x")
    InteractionDataset.from_columns(["u"], ["a"]).save(tmp_path / "saved")
    with pytest.raises(SettingsError, match="takes no option 'items'; it takes none"):
        load_dataset_from(tmp_path / "saved", items="x.csv")
    (tmp_path / "x.csv").write_text("user_id,item_id\nu,a\n")
    with pytest.raises(SettingsError, match="takes no option 'colour'; it takes items, user_column"):
        load_dataset_from(tmp_path / "x.csv", colour="red")
