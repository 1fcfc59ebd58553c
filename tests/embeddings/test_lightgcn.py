import json
import math

import datasets
import numpy as np
import pytest
import torch

from llmrec.data.interactions import InteractionDataset
from llmrec.data.splits import EvaluationSet, leave_one_out
from llmrec.data.synthetic import synthetic_dataset
from llmrec.embeddings import lightgcn_training
from llmrec.embeddings.lightgcn import LightGCN, LightGCNConfig
from llmrec.embeddings.lightgcn_training import (
    GraphNetwork,
    distinct_pairs,
    draw_negatives,
    known_examples,
    normalized_adjacency,
    validation_ndcg,
)
from llmrec.errors import DataError, MissingPartError, SettingsError

TINY = LightGCNConfig(width=8, epochs=3, batch_size=64, learning_rate=1e-2)
PAIRS = np.array([[0, 0], [0, 1], [1, 1], [1, 2], [2, 0]])  # user 3 and item 3 have no edge


def dataset_of(histories: list[list[int]], num_items: int) -> InteractionDataset:
    items = datasets.Dataset.from_dict({"item_id": [f"i{row}" for row in range(num_items)]})
    users = datasets.Dataset.from_dict(
        {"user_id": [f"u{user}" for user in range(len(histories))], "items": histories},
        features=datasets.Features(
            {"user_id": datasets.Value("string"), "items": datasets.List(datasets.Value("int32"))}
        ),
    )
    return InteractionDataset(items, users, name="made up")


@pytest.fixture(scope="module")
def splits():
    return leave_one_out(synthetic_dataset(num_users=300, num_items=60))


def test_the_adjacency_by_hand():
    found = normalized_adjacency(PAIRS, 4, 4).to_dense().numpy()
    expected = np.zeros((8, 8))
    degrees = {0: 2, 1: 2, 2: 1, 4: 2, 5: 2, 6: 1}
    for user, item in PAIRS:
        value = 1 / math.sqrt(degrees[user] * degrees[item + 4])
        expected[user, item + 4] = expected[item + 4, user] = value
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_vectors_are_the_mean_over_layers():
    config = LightGCNConfig(width=4, num_layers=2)
    network = GraphNetwork(config, PAIRS, 4, 4)
    users, items = network()
    dense = normalized_adjacency(PAIRS, 4, 4).to_dense()
    zero = torch.cat([network.user_table.weight, network.item_table.weight])
    expected = (zero + dense @ zero + dense @ dense @ zero) / 3
    torch.testing.assert_close(torch.cat([users, items]), expected)


def test_the_loss_and_its_gradient_against_dense_products():
    config = LightGCNConfig(width=4, l2_weight=0.3)
    network = GraphNetwork(config, PAIRS, 4, 4)
    users, items, negatives = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 0]), torch.tensor([3, 2, 1])
    loss = network.loss(users, items, negatives)
    loss.backward()

    user_table = network.user_table.weight.detach().clone().requires_grad_()
    item_table = network.item_table.weight.detach().clone().requires_grad_()
    dense, layer = normalized_adjacency(PAIRS, 4, 4).to_dense(), torch.cat([user_table, item_table])
    total = layer
    for _ in range(3):
        layer = dense @ layer
        total = total + layer
    vectors = total / 4
    good = (vectors[users] * vectors[4 + items]).sum(1)
    bad = (vectors[users] * vectors[4 + negatives]).sum(1)
    lengths = user_table[users].norm() ** 2 + item_table[items].norm() ** 2 + item_table[negatives].norm() ** 2
    expected = -(good - bad).sigmoid().log().mean() + 0.3 * 0.5 * lengths / 3
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(network.user_table.weight.grad, user_table.grad)
    torch.testing.assert_close(network.item_table.weight.grad, item_table.grad)


def test_negatives_are_drawn_evenly_among_items_not_taken():
    keys = PAIRS[:, 0] * 4 + PAIRS[:, 1]
    users = np.repeat([0, 1, 2], 3000)
    drawn = draw_negatives(users, keys, 4, np.random.default_rng(0))
    counts = np.stack([np.bincount(drawn[users == user], minlength=4) for user in range(3)])
    assert (counts[PAIRS[:, 0], PAIRS[:, 1]] == 0).all()
    assert counts[0, 2:] == pytest.approx([1500, 1500], abs=120)
    assert counts[2, 1:] == pytest.approx([1000, 1000, 1000], abs=120)


def test_an_item_taken_twice_is_one_edge_and_a_user_with_all_items_trains_nothing():
    train = dataset_of([[1, 0, 1], [0, 1, 2], []], 3)
    assert distinct_pairs(train).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    assert LightGCN.fit(train, TINY).item_vectors.isfinite().all()
    with pytest.raises(DataError, match="has no interactions"):
        LightGCN.fit(dataset_of([[]], 3), TINY)
    with pytest.raises(DataError, match="every user with every item"):
        LightGCN.fit(dataset_of([[0, 1], [1, 0]], 2), TINY)


def test_validation_ndcg_by_hand():
    class Fixed:
        def __call__(self):
            return torch.eye(2)[[0, 1, 0]], torch.tensor([[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0]])

    # User 0 took item 0: items 1, 2, 3 in this order. User 1 took nothing: 3, 2, 1, 0. User 2 took 1 and 2: 0, 3.
    pairs = np.array([[0, 0], [2, 1], [2, 2]])
    users, targets = np.array([1, 0, 2, 2, 1]), np.array([2, 1, 3, 2, 0])
    expected = (1 / math.log2(3) + 1 + 1 / math.log2(3) + 0 + 0) / 5  # ranks 2, 1, 2, taken already, 4
    found = validation_ndcg(Fixed(), pairs, users, targets, k=3, batch_size=2)
    assert found == pytest.approx(expected)


def test_examples_of_users_without_training_interactions_are_left_out():
    train = dataset_of([[0], [], [1]], 3)
    examples = EvaluationSet(
        "validation",
        ("u2", "u1", "stranger", "u0"),
        np.zeros(0, np.int32),
        np.zeros(5, np.int64),
        np.array([0, 1, 2, 1], np.int32),
    )
    users, targets = known_examples(train, examples)
    assert users.tolist() == [2, 0]
    assert targets.tolist() == [0, 1]
    with pytest.raises(DataError, match="none of the 2 validation examples"):
        known_examples(train, examples.take([1, 2]))


def test_it_beats_popularity_clearly():
    splits = leave_one_out(synthetic_dataset(num_users=1000, num_items=200))
    config = LightGCNConfig(learning_rate=5e-3, epochs=60, patience=8, batch_size=1024)
    model = LightGCN.fit(splits.train, config, splits.validation)
    examples, pairs = splits.test, distinct_pairs(splits.train)
    users, targets = known_examples(splits.train, examples)

    class Ranking:
        def __init__(self, users, items):
            self.vectors = users, items

        def __call__(self):
            return self.vectors

    counts = torch.from_numpy(np.bincount(splits.train.flat_items, minlength=200)).float()[:, None]
    popularity = validation_ndcg(Ranking(torch.ones(1000, 1), counts), pairs, users, targets)
    ours = validation_ndcg(Ranking(model.user_vectors, model.item_vectors), pairs, users, targets)
    assert ours > 1.6 * popularity  # the order of histories, which the data is full of, isn't used
    assert model.training_facts["validation_ndcg@10"] > 1.6 * popularity
    scores = model.scores(users[:3])
    torch.testing.assert_close(scores, model.user_vectors[users[:3]] @ model.item_vectors.T)


def test_the_seed_fixes_the_vectors_and_the_global_generator_is_left_alone(splits):
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    one = LightGCN.fit(splits.train, TINY, splits.validation)
    assert torch.equal(torch.rand(1), expected_draw)
    two = LightGCN.fit(splits.train, TINY, splits.validation)
    assert torch.equal(one.item_vectors, two.item_vectors)
    assert torch.equal(one.user_vectors, two.user_vectors)
    other = LightGCN.fit(splits.train, LightGCNConfig(**{**TINY.__dict__, "seed": 1}), splits.validation)
    assert not torch.equal(one.item_vectors, other.item_vectors)


def test_killed_and_resumed_ends_in_the_same_vectors(splits, tmp_path, monkeypatch):
    whole = LightGCN.fit(splits.train, TINY, splits.validation)
    train_epoch, epochs = lightgcn_training._train_epoch, []

    def until_killed(*args, epoch):
        if len(epochs) == 2:
            raise KeyboardInterrupt
        epochs.append(epoch)
        return train_epoch(*args, epoch=epoch)

    monkeypatch.setattr(lightgcn_training, "_train_epoch", until_killed)
    with pytest.raises(KeyboardInterrupt):
        LightGCN.fit(splits.train, TINY, splits.validation, checkpoint_dir=tmp_path)

    def resumed_epoch(*args, epoch):
        epochs.append(epoch)
        return train_epoch(*args, epoch=epoch)

    monkeypatch.setattr(lightgcn_training, "_train_epoch", resumed_epoch)
    resumed = LightGCN.fit(splits.train, TINY, splits.validation, checkpoint_dir=tmp_path)
    assert epochs == [0, 1, 2]  # none was repeated
    assert torch.equal(whole.item_vectors, resumed.item_vectors)
    assert torch.equal(whole.user_vectors, resumed.user_vectors)
    assert resumed.training_facts == whole.training_facts
    with pytest.raises(DataError, match=r"another run \(config differ"):
        LightGCN.fit(splits.train, LightGCNConfig(width=8), splits.validation, checkpoint_dir=tmp_path)


def test_the_best_epoch_is_kept_and_training_stops(splits, monkeypatch):
    values, seen = iter([0.1, 0.3, 0.2, 0.3, 0.9]), []

    def ndcg(network, *args):
        seen.append(network()[1].detach().clone())
        return next(values)

    monkeypatch.setattr(lightgcn_training, "validation_ndcg", ndcg)
    config = LightGCNConfig(**{**TINY.__dict__, "epochs": 9, "patience": 2})
    model = LightGCN.fit(splits.train, config, splits.validation)
    assert len(seen) == 4
    torch.testing.assert_close(model.item_vectors, seen[1])
    assert model.training_facts["best_epoch"] == 2
    assert model.training_facts["validation_ndcg@10"] == 0.3


def test_save_and_load(splits, tmp_path):
    model = LightGCN.fit(splits.train, TINY)
    model.save_pretrained(tmp_path / "saved")
    loaded = LightGCN.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.item_vectors, model.item_vectors)
    assert torch.equal(loaded.user_vectors, model.user_vectors)
    assert loaded.config == model.config
    assert loaded.training_facts == model.training_facts
    assert loaded.item_embeddings().fingerprint == model.item_embeddings().fingerprint
    loaded.save_pretrained(tmp_path / "saved")  # over itself

    folder = tmp_path / "saved"
    content = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"format_version": 99}, "upgrade llmrec"),
        ({"model": "SASRec"}, "not a LightGCN"),
        ({"config": {**content["config"], "width": 4}}, "has shape"),
        ({"config": {**content["config"], "colour": 1}}, "colour"),
    ):
        (folder / "config.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(DataError, match=message):
            LightGCN.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(MissingPartError, match=r"model\.safetensors"):
        LightGCN.from_pretrained(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        model.save_pretrained(tmp_path / "full")


def test_item_embeddings_name_what_they_saw_and_mask_items_nobody_took():
    train = dataset_of([[0, 1], [1, 3]], 5)
    embeddings = LightGCN.fit(train, TINY).item_embeddings()
    embeddings.check_order(train.item_ids)
    assert embeddings.present.tolist() == [True, True, False, True, False]
    np.testing.assert_allclose(embeddings.vectors[2], embeddings.vectors[[0, 1, 3]].mean(axis=0), atol=1e-6)
    assert embeddings.source["model"] == "LightGCN"
    assert embeddings.source["part"] == "training part only"
    assert embeddings.source["dataset_fingerprint"] == train.fingerprint
    json.dumps(embeddings.source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"num_layers": 1.5}, r"num_layers is 1\.5"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"l2_weight": -1.0}, "l2_weight is -1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(SettingsError, match=message):
        LightGCNConfig(**settings)
