import json
import logging

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from llmrec.data.interactions import InteractionDataset
from llmrec.errors import DataError, MissingPartError, SettingsError


def histories(dataset):
    return {user: [dataset.item_ids[row] for row in dataset.history(n)] for n, user in enumerate(dataset.user_ids)}


def small(**options):
    users = ["u", "v", "u", "u", "v"]
    return InteractionDataset.from_columns(users, ["a", "b", "c", "a", "a"], [30, 5, 10, 20, 5], **options)


def random_dataset(seed, num_users=40, num_items=25, num_rows=500):
    generator = np.random.default_rng(seed)
    users, items = generator.integers(0, num_users, num_rows), generator.integers(0, num_items, num_rows)
    return InteractionDataset.from_columns(users, items, generator.integers(0, 50, num_rows)), (users, items)


def test_histories_are_oldest_first_and_ties_keep_the_rows():
    dataset = small()
    assert histories(dataset) == {"u": ["c", "a", "a"], "v": ["b", "a"]}
    assert dataset.item_ids == ("a", "b", "c")
    assert dataset.flat_items.tolist() == [2, 0, 0, 1, 0]
    assert dataset.flat_items.dtype == np.int32
    assert dataset.flat_timestamps.tolist() == [10, 20, 30, 5, 5]
    assert dataset.offsets.tolist() == [0, 3, 5]
    assert (dataset.num_users, dataset.num_items, dataset.num_interactions) == (2, 3, 5)
    assert dataset.titles == dataset.item_ids
    assert dataset.item_index.rows(["c"]).tolist() == [2]
    assert isinstance(dataset.histories, datasets.Dataset)
    assert dataset.histories[1] == {"user_id": "v", "items": [1, 0], "timestamps": [5, 5]}
    assert str(dataset.histories.features["items"].feature.dtype) == "int32"


def test_agrees_with_a_plain_loop_on_random_data():
    generator = np.random.default_rng(3)
    for _ in range(5):
        rows = [
            (f"u{generator.integers(9)}", f"i{generator.integers(7)}", int(generator.integers(6))) for _ in range(80)
        ]
        expected = {}
        for user, item, _time in sorted(rows, key=lambda row: row[2]):  # stable
            expected.setdefault(user, []).append(item)
        users, items, times = zip(*rows, strict=True)
        dataset = InteractionDataset.from_columns(users, items, times)
        assert histories(dataset) == expected
        assert dataset.user_ids == tuple(dict.fromkeys(users))
        assert dataset.item_ids == tuple(dict.fromkeys(items))


@pytest.mark.parametrize("kind", ["dict", "pandas", "arrow", "datasets"])
def test_items_of_any_table(kind):
    columns = {"item_id": ["z", "a", "c", "b"], "title": ["Z", "A", None, "B"], "price": [1, 2, 3, 4]}
    make = {"dict": dict, "pandas": pd.DataFrame, "arrow": pa.table, "datasets": datasets.Dataset.from_dict}[kind]
    dataset = small(items=make(columns))
    assert dataset.item_ids == ("z", "a", "c", "b")  # order of the table, items that nobody took included
    assert dataset.titles == ("Z", "A", "", "B")
    assert dataset.items["price"][:] == [1, 2, 3, 4]
    assert histories(dataset) == {"u": ["c", "a", "a"], "v": ["b", "a"]}


def test_a_shuffled_datasets_table_is_read_in_its_shuffled_order():
    items = datasets.Dataset.from_dict({"item_id": ["a", "b", "c"]}).select([2, 0, 1])
    assert small(items=items).item_ids == ("c", "a", "b")


def test_duplicate_items_and_items_without_an_id_are_dropped_and_counted(caplog):
    items = {"item_id": ["b", "a", "b", None, "c", "a"], "title": ["first", "A", "second", "-", "C", "AA"]}
    dataset = small(items=items)
    assert dataset.item_ids == ("b", "a", "c")
    assert dataset.titles == ("first", "A", "C")
    assert dataset.drops == {
        "item without an ID in the items table": 1,
        "duplicate item in the items table (the first stays)": 2,
    }
    assert "dropped 2 of 6 rows of the items table: duplicate" in caplog.text


def test_interactions_with_items_without_metadata():
    items = {"item_id": ["a", "b"], "title": ["A", "B"]}
    dropped = small(items=items)
    assert histories(dropped) == {"u": ["a", "a"], "v": ["b", "a"]}
    assert dropped.drops == {"interaction with an item without metadata": 1}
    kept = small(items=items, items_without_metadata="keep")
    assert kept.item_ids == ("a", "b", "c")
    assert kept.titles == ("A", "B", "")
    assert histories(kept) == histories(small())
    with pytest.raises(DataError, match=r"item IDs look like \['a', 'b'\], those of the items table like \['q'\]"):
        small(items={"item_id": ["q"]})
    with pytest.raises(DataError, match="choose 'drop' or 'keep'"):
        small(items=items, items_without_metadata="guess")


def test_each_dropped_row_is_counted_once_and_leaves_nothing_behind():
    dataset = InteractionDataset.from_columns(
        ["u", None, "w", "u", "x"], ["a", None, "", "b", "c"], ["2020-01-01", "?", "2020-01-01", "2020-01-02", ""]
    )
    assert dataset.drops == {"missing user ID": 1, "missing item ID": 1, "missing timestamp": 1}
    assert dataset.user_ids == ("u",)
    assert dataset.item_ids == ("a", "b")


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="1 user IDs, 2 item IDs"):
        InteractionDataset.from_columns(["u"], ["a", "b"])
    with pytest.raises(DataError, match="2 user IDs, 2 item IDs, 1 timestamps"):
        InteractionDataset.from_columns(["u", "u"], ["a", "b"], [1])
    with pytest.raises(DataError, match="is empty: it has no rows"):
        InteractionDataset.from_columns([], [])
    with pytest.raises(DataError, match="no column 'item_id'"):
        small(items={"id": ["a"]})
    with pytest.raises(DataError, match="items is a list"):
        small(items=["a"])


def test_the_constructor_refuses_histories_outside_the_catalogue():
    items = datasets.Dataset.from_dict({"item_id": ["a"]})
    with pytest.raises(DataError, match="point to item rows 0 to 1, but the catalogue has 1"):
        InteractionDataset(items, datasets.Dataset.from_dict({"user_id": ["u"], "items": [[0, 1]]}))
    with pytest.raises(DataError, match="histories has no column 'items'"):
        InteractionDataset(items, datasets.Dataset.from_dict({"user_id": ["u"]}))


def test_k_core_repeats_until_nothing_changes():
    # c has one user, so at k = 2 it goes; then w has one interaction left and goes; then b has one left and goes
    users = ["u", "u", "v", "v", "u", "w", "w"]
    items = ["a", "d", "a", "d", "b", "b", "c"]
    core = InteractionDataset.from_columns(users, items).k_core(2)
    assert histories(core) == {"u": ["a", "d"], "v": ["a", "d"]}
    assert core.item_ids == ("a", "d")
    assert core.drops == {"outside the 2-core": 3}


@pytest.mark.parametrize("seed", range(5))
def test_k_core_agrees_with_a_plain_loop(seed):
    dataset, (users, items) = random_dataset(seed, num_items=60)
    rows = list(zip(users.tolist(), items.tolist(), strict=True))
    while True:
        by_user = {user: sum(row[0] == user for row in rows) for user, _ in rows}
        by_item = {item: sum(row[1] == item for row in rows) for _, item in rows}
        left = [row for row in rows if by_user[row[0]] >= 6 and by_item[row[1]] >= 6]
        if left == rows:
            break
        rows = left
    core = dataset.k_core(6)
    assert 0 < len(rows) < dataset.num_interactions
    assert sorted((int(u), int(i)) for u, history in histories(core).items() for i in history) == sorted(rows)
    assert core.flat_timestamps is not None
    for number in range(core.num_users):
        times = core.flat_timestamps[core.offsets[number] : core.offsets[number + 1]]
        assert (np.diff(times) >= 0).all()


def test_k_core_edges():
    dataset = small(items={"item_id": ["a", "b", "c", "z"]})
    assert dataset.k_core(1).item_ids == ("a", "b", "c")  # nobody took z
    with pytest.raises(DataError, match=r"nothing is left .* 9-core"):
        dataset.k_core(9)
    with pytest.raises(DataError, match="k is 0"):
        dataset.k_core(0)


def test_repeats():
    dataset = InteractionDataset.from_columns(["u"] * 5 + ["v"], ["a", "a", "b", "a", "b", "b"])
    assert histories(dataset.without_repeats()) == {"u": ["a", "b"], "v": ["b"]}
    assert dataset.without_repeats().drops == {"repeat (drop_later)": 3}
    assert histories(dataset.without_repeats("drop_consecutive")) == {"u": ["a", "b", "a", "b"], "v": ["b"]}
    assert dataset.without_repeats("keep") is dataset
    with pytest.raises(SettingsError, match="choose 'keep', 'drop_later'"):
        dataset.without_repeats("first")


def test_save_and_load(tmp_path):
    dataset = small(
        items={"item_id": ["a", "b", "c"], "title": ["ä", None, "C"], "tags": [["x"], [], None]}, name="shop"
    )
    dataset.drops["missing user ID"] = 3
    dataset.save(tmp_path / "saved")
    dataset.save(tmp_path / "saved")  # over an earlier one
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "dataset.json",
        "histories.parquet",
        "items.parquet",
    ]
    loaded = InteractionDataset.load(tmp_path / "saved")
    assert histories(loaded) == histories(dataset)
    assert loaded.titles == ("ä", "", "C")
    assert loaded.items["tags"][:] == [["x"], [], None]
    assert loaded.flat_timestamps.tolist() == dataset.flat_timestamps.tolist()
    assert (loaded.name, loaded.drops) == ("shop", {"missing user ID": 3})
    assert loaded.fingerprint == dataset.fingerprint


def test_save_does_not_replace_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds no data set"):
        small().save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_load_refuses_what_is_not_whole(tmp_path):
    small().save(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "dataset.json").read_text())
    (tmp_path / "saved" / "dataset.json").write_text(json.dumps(content | {"format_version": 99}))
    with pytest.raises(DataError, match="format 99"):
        InteractionDataset.load(tmp_path / "saved")
    small().save(tmp_path / "saved")
    (tmp_path / "saved" / "histories.parquet").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"histories.parquet is damaged"):
        InteractionDataset.load(tmp_path / "saved")
    (tmp_path / "saved" / "histories.parquet").unlink()
    with pytest.raises(MissingPartError, match=r"histories.parquet is missing"):
        InteractionDataset.load(tmp_path / "saved")
    with pytest.raises(MissingPartError, match=r"dataset.json is missing"):
        InteractionDataset.load(tmp_path)


def test_the_fingerprint_is_of_the_content():
    assert small().fingerprint == small(name="other").fingerprint
    others = [
        small(items={"item_id": ["a", "b", "c"], "title": ["1", "2", "3"]}),
        InteractionDataset.from_columns(["u", "v"], ["a", "b"]),
        InteractionDataset.from_columns(["u", "v"], ["a", "b"], [1, 2]),
        InteractionDataset.from_columns(["u", "v"], ["b", "a"]),
    ]
    assert len({small().fingerprint, *(other.fingerprint for other in others)}) == 5


def test_summary():
    dataset = small(items={"item_id": ["a", "b", "c", "z"]})
    dataset.drops["missing user ID"] = 1234
    summary = dataset.summary()
    assert (summary.num_users, summary.num_items, summary.num_interactions) == (2, 4, 5)
    assert summary.density == 5 / 8
    assert (summary.shortest_history, summary.mean_history, summary.longest_history) == (2, 2.5, 3)
    assert (summary.untaken_items, summary.repeats) == (1, 1)
    assert (summary.first_time, summary.last_time) == ("1970-01-01T00:00:05Z", "1970-01-01T00:00:30Z")
    text = str(summary)
    for line in ("interactions  ", "62.5", "dropped: missing user ID", "1,234"):
        assert line in text
    assert summary.to_table().row_count == len(summary.rows()) == 9
    assert json.loads(json.dumps(summary.to_json()))["drops"] == {"missing user ID": 1234}
    assert "none: order of rows" in str(InteractionDataset.from_columns(["u"], ["a"]).summary())


def test_order_of_rows_is_said_in_the_log(caplog):
    with caplog.at_level(logging.INFO, "llmrec"):
        InteractionDataset.from_columns(["u"], ["a"])
    assert "order of its rows is taken" in caplog.text
