import json

import numpy as np
import pytest

from llmrec.data.interactions import InteractionDataset
from llmrec.data.loading import load_dataset_from
from llmrec.data.splits import leave_one_out
from llmrec.errors import DataError

PREFERENCES = {"who": ["v", "nobody", "u"], "likes": [["tea", "tents"], ["?"], ["pens"]], "age": [3, 4, 5]}


@pytest.fixture
def dataset():
    users = ["u"] * 4 + ["v"] * 3 + ["w"] * 3
    return InteractionDataset.from_columns(users, list("abcdabcbcd"), name="small")


def test_attributes_follow_their_users(dataset, caplog):
    with caplog.at_level("INFO", "llmrec"):
        extended = dataset.with_user_columns(PREFERENCES, user_column="who")
    assert extended.user_columns == ("likes", "age")
    assert extended.histories["likes"][:] == [["pens"], ["tea", "tents"], None]
    assert extended.histories["age"][:] == [5, 3, None]
    assert "1 of 3 users are not in the users table" in caplog.text
    assert dataset.user_columns == ()
    assert np.array_equal(extended.flat_items, dataset.flat_items)
    assert extended.with_user_columns({"user_id": ["w"], "age": [9]}).histories["age"][:] == [None, None, 9]


def test_rows_without_an_id_are_nobodys(dataset):
    extended = dataset.with_user_columns({"user_id": [None, "w", None, "u"], "likes": ["x", "y", "z", "q"]})
    assert extended.histories["likes"][:] == ["q", None, "y"]


def test_splits_filters_and_files_keep_them(dataset, tmp_path):
    extended = dataset.with_user_columns(PREFERENCES, user_column="who")
    assert leave_one_out(extended).train.histories["likes"][:] == [["pens"], ["tea", "tents"], None]
    core = extended.k_core(2)
    assert core.histories["likes"][:] == extended.histories["likes"][:]
    kept = np.array([False] * 4 + [True] * 6)
    assert extended.select(kept, users=np.array([False, True, True])).histories["age"][:] == [3, None]
    extended.save(tmp_path / "saved")
    loaded = InteractionDataset.load(tmp_path / "saved")
    assert loaded.histories["likes"][:] == extended.histories["likes"][:]
    assert loaded.fingerprint == extended.fingerprint != dataset.fingerprint


def test_any_data_set_takes_a_file_of_users(tmp_path):
    path = tmp_path / "users.jsonl"
    rows = [{"user_id": f"user-{user:04}", "preferences": [f"likes {user}", "tea"]} for user in (3, 1)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    dataset = load_dataset_from("synthetic", num_users=2000, users=path)
    texts = dict(zip(dataset.user_ids, dataset.histories["preferences"], strict=True))
    assert texts["user-0003"] == ["likes 3", "tea"]
    assert texts["user-0002"] is None


def test_refused(dataset):
    with pytest.raises(DataError, match=r"the users table.*user_id"):
        dataset.with_user_columns({"who": ["u"], "likes": ["tea"]})
    with pytest.raises(DataError, match="user 'u' stands twice"):
        dataset.with_user_columns({"user_id": ["v", "u", "u"], "likes": ["a", "b", "c"]})
    with pytest.raises(DataError, match=r"such as \['x'\]\) is one of the data set \(such as \['u', 'v'\]\)"):
        dataset.with_user_columns({"user_id": ["x"], "likes": ["a"]})
    with pytest.raises(DataError, match="column 'items', which histories have anyway"):
        dataset.with_user_columns({"user_id": ["u"], "items": ["a"]})
