import json
import math

import datasets
import numpy as np
import pytest
import torch

from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import EvaluationSet, leave_one_out
from llmrec.embeddings import sasrec_training
from llmrec.embeddings.collaborative import SASRec, SASRecConfig
from llmrec.embeddings.sasrec_training import training_windows, validation_ndcg
from llmrec.errors import DataError, ItemOrderError, MissingPartError, SettingsError, UnknownItemError

NUM_ITEMS = 12
TINY = SASRecConfig(width=16, num_layers=1, epochs=3, batch_size=16, dropout=0.2, learning_rate=5e-3, patience=10)


def chain_dataset(num_users: int = 60, length: int = 7, seed: int = 0) -> InteractionDataset:
    """Every item is followed by the next one, around a circle: the next item is certain."""
    starts = np.random.default_rng(seed).integers(NUM_ITEMS, size=num_users)
    histories = [[int(start + step) % NUM_ITEMS for step in range(length)] for start in starts]
    items = datasets.Dataset.from_dict(
        {"item_id": [f"i{row}" for row in range(NUM_ITEMS)], "title": [f"Item {row}" for row in range(NUM_ITEMS)]}
    )
    table = datasets.Dataset.from_dict({"user_id": [f"u{user}" for user in range(num_users)], "items": histories})
    return InteractionDataset(items, table, name="chain")


@pytest.fixture(scope="module")
def splits():
    return leave_one_out(chain_dataset())


@pytest.fixture(scope="module")
def model(splits):
    return SASRec.fit(splits.train, SASRecConfig(width=16, epochs=15, batch_size=16, dropout=0.1, learning_rate=1e-2))


def test_it_learns_what_comes_next(model):
    for item in range(NUM_ITEMS):
        best = model.recommend([f"i{(item - 1) % NUM_ITEMS}", f"i{item}"], k=1)[0]
        assert best.item_id == f"i{(item + 1) % NUM_ITEMS}"
        assert best.title == f"Item {(item + 1) % NUM_ITEMS}"
        assert best.score > math.log(0.5)


def test_one_and_many_agree(model):
    histories = [["i0"], ["i3", "i4", "i5"], [], ["i7", "i8"]]
    together = model.recommend(histories, k=5)
    for history, answer in zip(histories, together, strict=True):
        alone = model.recommend(history, k=5)
        assert [entry.item_id for entry in alone] == [entry.item_id for entry in answer]
        assert [entry.score for entry in alone] == pytest.approx([entry.score for entry in answer], abs=1e-4)


def test_scores_are_log_probabilities_in_order(model):
    scores = [entry.score for entry in model.recommend(["i1", "i2"], k=NUM_ITEMS, exclude_seen=False)]
    assert scores == sorted(scores, reverse=True)
    assert sum(math.exp(score) for score in scores) == pytest.approx(1, abs=1e-4)


def test_seen_items_are_left_out_even_those_too_old_to_be_read(splits):
    model = SASRec(SASRecConfig(width=8, max_history=2), splits.train.item_ids)
    history = [f"i{row}" for row in range(NUM_ITEMS - 2)]
    assert {entry.item_id for entry in model.recommend(history, k=50)} == {"i10", "i11"}
    assert len(model.recommend(history, k=50, exclude_seen=False)) == NUM_ITEMS
    assert model.recommend([f"i{row}" for row in range(NUM_ITEMS)], k=3) == []


def test_only_the_latest_items_are_read(splits):
    model = SASRec(SASRecConfig(width=8, max_history=2), splits.train.item_ids)
    ours, same, other = model.log_probabilities([np.array([5, 1, 2]), np.array([1, 2]), np.array([2, 1])])
    torch.testing.assert_close(ours, same)
    assert not torch.allclose(ours, other)


def test_a_position_does_not_see_what_comes_after_it(splits):
    model = SASRec(SASRecConfig(width=8), splits.train.item_ids).eval()
    states = model(torch.tensor([[1, 2, 3, 4], [1, 2, 7, 8]]))
    torch.testing.assert_close(states[0, :2], states[1, :2])
    assert not torch.allclose(states[0, 2:], states[1, 2:])


def test_an_empty_history_is_answered_by_training_counts(splits, model):
    counts = np.bincount(splits.train.flat_items, minlength=NUM_ITEMS)
    answer = model.recommend([], k=NUM_ITEMS)
    for entry in answer:
        expected = (counts[int(entry.item_id[1:])] + 1) / (counts.sum() + NUM_ITEMS)
        assert entry.score == pytest.approx(math.log(expected), abs=1e-5)
    assert answer[0].item_id == f"i{counts.argmax()}"


def test_bad_requests(model):
    with pytest.raises(UnknownItemError, match="'nobody knows'"):
        model.recommend(["i1", "nobody knows"])
    with pytest.raises(SettingsError, match="k is 0"):
        model.recommend(["i1"], k=0)


def test_the_seed_fixes_the_weights_and_the_global_generator_is_left_alone(splits):
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    one = SASRec.fit(splits.train, TINY, splits.validation).state_dict()
    assert torch.equal(torch.rand(1), expected_draw)
    two = SASRec.fit(splits.train, TINY, splits.validation).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = SASRec.fit(splits.train, SASRecConfig(**{**TINY.__dict__, "seed": 1}), splits.validation).state_dict()
    assert not torch.equal(one["item_table.weight"], other["item_table.weight"])


@pytest.mark.parametrize("kill_after", [1, 2])
def test_killed_and_resumed_ends_in_the_same_weights(splits, tmp_path, monkeypatch, kill_after):
    whole = SASRec.fit(splits.train, TINY, splits.validation)

    train_epoch, epochs = sasrec_training._train_epoch, []

    def until_killed(*args, epoch, **kwargs):
        if len(epochs) == kill_after:
            raise KeyboardInterrupt
        epochs.append(epoch)
        return train_epoch(*args, epoch=epoch, **kwargs)

    monkeypatch.setattr(sasrec_training, "_train_epoch", until_killed)
    with pytest.raises(KeyboardInterrupt):
        SASRec.fit(splits.train, TINY, splits.validation, checkpoint_dir=tmp_path)

    def resumed_epoch(*args, epoch, **kwargs):
        epochs.append(epoch)
        return train_epoch(*args, epoch=epoch, **kwargs)

    monkeypatch.setattr(sasrec_training, "_train_epoch", resumed_epoch)
    resumed = SASRec.fit(splits.train, TINY, splits.validation, checkpoint_dir=tmp_path)
    assert epochs == [0, 1, 2]  # none was repeated
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert resumed.training_facts == whole.training_facts
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}

    again = SASRec.fit(splits.train, TINY, splits.validation, checkpoint_dir=tmp_path)
    assert epochs == [0, 1, 2]  # a finished run is only read
    assert torch.equal(again.item_table.weight, whole.item_table.weight)


def test_a_checkpoint_of_another_run_is_refused(splits, tmp_path):
    SASRec.fit(splits.train, TINY, checkpoint_dir=tmp_path)
    with pytest.raises(DataError, match=r"another run \(config differ"):
        SASRec.fit(splits.train, SASRecConfig(**{**TINY.__dict__, "seed": 1}), checkpoint_dir=tmp_path)
    other = leave_one_out(chain_dataset(seed=1)).train
    with pytest.raises(DataError, match="dataset_fingerprint"):
        SASRec.fit(other, TINY, checkpoint_dir=tmp_path)


def test_the_best_epoch_is_kept_and_training_stops(splits, monkeypatch):
    config = SASRecConfig(**{**TINY.__dict__, "epochs": 9, "patience": 2})
    values = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    tables = []

    def ndcg(model, examples):
        tables.append(model.item_table.weight.detach().clone())
        return next(values)

    monkeypatch.setattr(sasrec_training, "validation_ndcg", ndcg)
    model = SASRec.fit(splits.train, config, splits.validation)
    assert len(tables) == 4
    assert torch.equal(model.item_table.weight, tables[1])
    assert model.training_facts["best_epoch"] == 2
    assert model.training_facts["epochs"] == 4
    assert model.training_facts["validation_ndcg@10"] == 0.3


def test_validation_ndcg_by_hand():
    class Fixed:
        def log_probabilities(self, histories):
            # item 3 is best, then 2, 1, 0; after the history [1] the other way round
            order = torch.tensor([0.0, 1.0, 2.0, 3.0])
            return torch.stack([-order if list(history) == [1] else order for history in histories])

    examples = EvaluationSet(
        "validation",
        ("a", "b", "c"),
        np.array([0, 2, 1, 3], np.int32),
        np.array([0, 2, 3, 4]),
        np.array([3, 1, 0], np.int32),
    )
    expected = (1 + 1 / math.log2(3) + 0) / 3  # ranks 1, 2 and 4
    assert validation_ndcg(Fixed(), examples, k=3, batch_size=2) == pytest.approx(expected)


def test_windows_hold_every_prediction_once():
    items = datasets.Dataset.from_dict({"item_id": [str(row) for row in range(9)]})
    histories = datasets.Dataset.from_dict({"user_id": ["a", "b", "c"], "items": [[0, 1, 2, 3, 4, 5, 6], [7], [8, 0]]})
    windows = training_windows(InteractionDataset(items, histories), max_history=3)
    assert [window.tolist() for window in windows] == [[3, 4, 5, 6], [0, 1, 2, 3], [8, 0]]


def test_nothing_to_learn_from():
    items = datasets.Dataset.from_dict({"item_id": ["a", "b"]})
    histories = datasets.Dataset.from_dict({"user_id": ["u"], "items": [[0]]})
    with pytest.raises(DataError, match="no next item to learn from"):
        SASRec.fit(InteractionDataset(items, histories), TINY)


def test_save_and_load_give_the_same_answers(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "items.parquet",
        "model.safetensors",
    ]
    loaded = SASRec.from_pretrained(tmp_path / "saved")
    histories = [["i0"], ["i3", "i4"], []]
    assert loaded.recommend(histories, k=20) == model.recommend(histories, k=20)
    assert loaded.config == model.config
    assert loaded.training_facts == model.training_facts
    loaded.save_pretrained(tmp_path / "saved")  # over itself


def test_incomplete_or_foreign_folders_are_refused(model, tmp_path):
    folder = tmp_path / "saved"
    with pytest.raises(MissingPartError, match=r"config\.json is missing"):
        SASRec.from_pretrained(folder)
    model.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"format_version": 99}, "upgrade llmrec"),
        ({"model": "LightGCN"}, "not a SASRec"),
        ({"config": {**content["config"], "width": 8}}, "has shape"),
        ({"config": {**content["config"], "num_layers": 3}}, "lacks"),
        ({"config": {**content["config"], "num_layers": 1}}, "too many"),
        ({"config": {**content["config"], "colour": 1}}, "colour"),
    ):
        (folder / "config.json").write_text(json.dumps({**content, **change}))
        with pytest.raises((DataError, MissingPartError), match=message):
            SASRec.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingPartError, match=r"model\.safetensors"):
        SASRec.from_pretrained(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        model.save_pretrained(tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").exists()


def test_item_embeddings_are_the_rows_of_the_items(splits, model):
    embeddings = model.item_embeddings()
    embeddings.check_order(splits.train.item_ids)
    assert np.array_equal(embeddings.vectors, model.item_table.weight.detach().numpy())
    assert embeddings.source["part"] == "training part only"
    assert embeddings.source["dataset"] == splits.train.name
    assert embeddings.source["dataset_fingerprint"] == splits.train.fingerprint
    json.dumps(embeddings.source)


def test_inner_product_scores_follow_the_paper_where_there_is_no_temperature(splits):
    model = SASRec(SASRecConfig(width=8, temperature=None), splits.train.item_ids).eval()
    history = np.array([1, 2, 3])
    scores = model(torch.tensor([[1, 2, 3]]))[0, -1] @ model.item_table.weight.T
    torch.testing.assert_close(model.log_probabilities([history])[0], scores.log_softmax(0))
    cosine = SASRec(SASRecConfig(width=8, temperature=0.5), splits.train.item_ids).eval()
    state = cosine(torch.tensor([[1, 2, 3]]))[0, -1]
    assert state.norm().item() == pytest.approx(2)  # 1 / temperature


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 10, "num_heads": 4}, "width is 10, which 4 heads"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"loss_dtype": "float8"}, "loss_dtype is 'float8'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(SettingsError, match=message):
        SASRecConfig(**settings)


def test_titles_of_another_number():
    with pytest.raises(ItemOrderError, match="1 titles for 2 items"):
        SASRec(SASRecConfig(width=8), ["a", "b"], ["A"])
