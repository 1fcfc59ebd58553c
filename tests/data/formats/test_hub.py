"""The `datasets` source, with local files: no network."""

import pytest

from llmrec.data.interactions import InteractionDataset
from llmrec.data.loading import load_dataset_from
from llmrec.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "shop"
    source.mkdir()
    (source / "train.csv").write_text("user,item_id,time\nu,1,20\nu,2,10\n")
    (source / "items.csv").write_text("item_id,title\n2,two\n1,one\n3,three\n")
    return source


def test_local_files(folder):
    options = {"user_column": "user", "timestamp_column": "time", "data_files": str(folder / "train.csv")}
    dataset = InteractionDataset.from_hub("csv", items_data_files=str(folder / "items.csv"), name="shop", **options)
    assert dataset.item_ids == ("2", "1", "3")
    assert dataset.titles == ("two", "one", "three")
    assert dataset.history(0).tolist() == [0, 1]
    without_items = load_dataset_from("hub:csv", **options)
    assert without_items.item_ids == ("1", "2")
    assert without_items.name == "csv"


def test_what_is_not_there_is_refused(folder):
    files = {"data_files": str(folder / "train.csv")}
    with pytest.raises(DataError, match=r"has no column 'user_id'; its columns are 'user', 'item_id', 'time'"):
        InteractionDataset.from_hub("csv", **files)
    with pytest.raises(DataError, match=r"can't read 'csv'.*split 'later'"):
        InteractionDataset.from_hub("csv", split="later", **files)
    with pytest.raises(DataError, match="can't read"):
        InteractionDataset.from_hub(str(folder / "nowhere"))
