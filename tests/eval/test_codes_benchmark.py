"""The yardstick for codes: the recommender it trains, and the script around it."""

import importlib.util
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrec.data.splits import EvaluationSet, leave_one_out
from llmrec.data.synthetic import synthetic_dataset
from llmrec.errors import DataError, SettingsError
from llmrec.generation.trie import ItemTrie
from llmrec.item_tokenizers.semantic_ids import SemanticIds

FOLDER = Path(__file__).parents[2] / "eval" / "benchmarks"


@pytest.fixture(scope="module")
def recommender():
    """The module code_recommender.py, which codes.py imports as a sibling."""
    sys.path.insert(0, str(FOLDER))
    import code_recommender

    yield code_recommender
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def script(recommender):
    spec = importlib.util.spec_from_file_location("codes_benchmark", FOLDER / "codes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(recommender):
    """Settings of a tiny recommender."""
    return recommender.RecommenderSettings(
        width=16, feed_forward=32, max_history=6, epochs=2, batch_size=32, num_beams=40
    )


# Levels of different sizes; nodes with one child at the second and third level; two groups of equal codes.
CODES = np.array([[0, 0, 3], [0, 1, 1], [0, 1, 2], [2, 4, 0], [1, 3, 3], [1, 3, 3], [1, 3, 0], [1, 2, 2], [0, 0, 3]])
SIZES = (3, 5, 4)


def model_of(recommender, settings, codes=CODES, sizes=SIZES, seed=0):
    torch.manual_seed(seed)
    model = recommender.CodeRecommender(codes, sizes, replace(settings, code_scale=1.0)).eval()
    return model, ItemTrie.from_codes(codes, sizes)


@torch.no_grad()
def score_of_every_item(model, state, codes):
    """Log-probability of every item's codes, normalised over the codes that real items have there; plain loops."""
    start, tokens = model.start_tokens(state[None]), model.tokens()
    scores = []
    for item in codes:
        total = 0.0
        for level, code in enumerate(item):
            prefix = torch.tensor([[int(item[one]) + model.offsets[one] for one in range(level)]]).long().view(1, -1)
            logits = model.level_logits(start, tokens, prefix)[0]
            valid = sorted({int(other[level]) for other in codes if (other[:level] == item[:level]).all()})
            total += float(logits[code] - torch.logsumexp(logits[valid], 0))
        scores.append(total)
    return torch.tensor(scores)


def test_histories_packed_into_rows_do_not_see_each_other(recommender, small):
    model, _ = model_of(recommender, small)
    draws = np.random.default_rng(0)
    windows = [draws.integers(0, len(CODES), length).astype(np.int32) for length in (3, 7, 2, 4, 4, 2, 2, 6)]
    items, starts, places, targets = recommender.pack(windows, 6)
    assert items.shape == starts.shape
    assert items.shape[1] == 6
    assert len(items) % 4 == 0
    assert targets.tolist() == [int(item) for window in windows for item in window[1:]]
    states = model.read(items, starts).flatten(0, 1)[places]
    done = 0
    for window in windows:
        alone = model.read(
            torch.from_numpy(window[:-1].astype(np.int64))[None], torch.zeros(1, len(window) - 1).long()
        )
        torch.testing.assert_close(states[done : done + len(window) - 1], alone[0], atol=1e-5, rtol=1e-5)
        done += len(window) - 1
    assert done == len(states)


def test_a_state_knows_nothing_of_later_items(recommender, small):
    model, _ = model_of(recommender, small)
    items = torch.tensor([[0, 1, 2, 3]])
    changed = torch.tensor([[0, 1, 7, 3]])
    before, after = (model.read(one, torch.zeros_like(one))[0] for one in (items, changed))
    torch.testing.assert_close(before[:2], after[:2])
    assert (before[2:] - after[2:]).abs().max() > 1e-2


def test_the_loss_is_normalised_over_real_items(recommender, small):
    model, trie = model_of(recommender, small)
    states = torch.randn(11, 16)
    positions, targets = torch.tensor([1, 4, 4, 9, 10, 0]), torch.tensor([0, 3, 5, 7, 2, 8])
    loss = model.loss(states, positions, targets, trie)
    expected = [
        -score_of_every_item(model, states[place], CODES)[item] for place, item in zip(positions, targets, strict=True)
    ]
    assert float(loss.detach()) == pytest.approx(float(torch.stack(expected).mean()), abs=1e-4)


def test_without_a_choice_there_is_no_loss(recommender, small):
    codes = np.array([[1, 2, 3]] * 4)
    model, trie = model_of(recommender, small, codes)
    assert model.loss(torch.randn(3, 16), torch.arange(3), torch.tensor([0, 1, 3]), trie).item() == 0.0
    dataset = synthetic_dataset(num_users=40, num_items=100, seed=1)
    same = np.zeros((100, 2), np.int64)
    trained = recommender.train_recommender(dataset, same, (2, 3), settings=small, seed=0)
    examples = examples_of([np.array([4, 2, 1])] * 100, np.arange(100))
    ranks = recommender.target_ranks(trained, ItemTrie.from_codes(same, (2, 3)), examples, seed=0)
    assert sorted(ranks) == list(range(1, 101))  # a guess


@pytest.mark.parametrize(("codes", "sizes"), [(CODES, SIZES), (np.arange(9)[:, None][::-1], (10,))])
def test_search_equals_scoring_every_item(recommender, small, codes, sizes):
    model, trie = model_of(recommender, small, codes, sizes)
    states = torch.randn(4, 16)
    leaves = model.search(states, model.tokens(), trie, 10)
    for row, state in zip(leaves, states, strict=True):
        scores = score_of_every_item(model, state, codes)
        firsts = trie.items[trie.item_starts[:-1].long()].long()  # an item of each leaf
        assert row[: trie.num_leaves].tolist() == scores[firsts].argsort(descending=True).tolist()
        assert row[trie.num_leaves :].tolist() == [-1] * (10 - trie.num_leaves)
    assert model.search(states, model.tokens(), trie, 2).shape == (4, 2)


def examples_of(histories, targets):
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in histories])])
    users = tuple(str(number) for number in range(len(targets)))
    return EvaluationSet("test", users, np.concatenate(histories).astype(np.int32), offsets, np.array(targets))


def test_items_of_equal_codes_share_the_places_of_their_leaf(recommender, small):
    model, trie = model_of(recommender, small)
    examples = examples_of([np.array([4, 2, 1])] * len(CODES), np.arange(len(CODES)))
    ranks = recommender.target_ranks(model, trie, examples, seed=0, batch_size=4)
    assert sorted(ranks) == list(range(1, len(CODES) + 1))  # each place has one item, also within a leaf
    assert abs(ranks[4] - ranks[5]) == abs(ranks[0] - ranks[8]) == 1
    orders = {tuple(recommender.places_in_leaves(trie, seed)[[4, 5]].tolist()) for seed in range(10)}
    assert orders == {(0, 1), (1, 0)}  # by lot, not always the first of the catalogue

    narrow = replace(small, num_beams=2, code_scale=1.0)
    torch.manual_seed(0)
    few = recommender.CodeRecommender(CODES, SIZES, narrow).eval()
    found = recommender.target_ranks(few, trie, examples, seed=0)
    assert sorted(found[found > 0]) == list(range(1, np.count_nonzero(found) + 1))
    assert 2 <= np.count_nonzero(found) <= 4


def test_ranks_do_not_depend_on_the_batch(recommender, small):
    model, trie = model_of(recommender, small)
    draws = np.random.default_rng(1)
    histories = [draws.integers(0, 9, length) for length in (1, 9, 3, 6, 2, 12, 5)]
    examples = examples_of(histories, draws.integers(0, 9, 7))
    together = recommender.target_ranks(model, trie, examples, seed=0)
    alone = [recommender.target_ranks(model, trie, examples.take([number]), seed=0)[0] for number in range(7)]
    assert together.tolist() == alone
    cut = examples_of([one[-6:] for one in histories], examples.targets)
    assert recommender.target_ranks(model, trie, cut, seed=0).tolist() == alone  # the last max_history items count


def test_dropout_from_the_pool(recommender):
    dropout = recommender.PooledDropout(0.2)
    values = torch.ones(400, 500)
    torch.manual_seed(0)
    first, second = dropout(values), dropout(values)
    assert set(first.unique().tolist()) == {0.0, 1.25}
    assert float((first == 0).float().mean()) == pytest.approx(0.2, abs=0.005)
    assert float(((first == 0) & (second == 0)).float().mean()) == pytest.approx(0.04, abs=0.005)
    assert dropout.eval()(values) is values


@pytest.fixture(scope="module")
def series():
    """A made-up data set, and codes that tell its items' brand, category, adjective and number in the series."""
    dataset = synthetic_dataset(num_users=800, num_items=200, seed=1)
    words = np.array([title.split() for title in dataset.titles])
    columns = [np.unique(words[:, column], return_inverse=True)[1] for column in (2, 0, 1, 3)]
    codes = np.stack(columns, axis=1)
    return dataset, SemanticIds(dataset.item_ids, codes, tuple(int(size) for size in codes.max(axis=0) + 1))


def test_codes_that_mean_something_win(recommender, script, series):
    dataset, codes = series
    splits = leave_one_out(dataset)
    settings = recommender.RecommenderSettings(width=32, feed_forward=64, max_history=15, epochs=6, batch_size=64)
    figures = {
        name: script.measure(name, one, splits, splits.test, settings, 0, "cpu")["metrics"]["recall@10"]
        for name, one in (("meaning", codes), ("shuffled", script.shuffled_codes(codes, 0)))
    }
    assert figures["meaning"] > 2 * figures["shuffled"]
    assert figures["shuffled"] > 0.0


def test_a_seed_gives_the_same_figures(script, small, series):
    _, codes = series
    splits = leave_one_out(synthetic_dataset(num_users=200, num_items=200, seed=1))
    runs = [script.measure("codes", codes, splits, splits.test, small, seed, "cpu") for seed in (0, 0, 1)]
    assert runs[0]["found"] == runs[1]["found"] != runs[2]["found"]
    ranks = script.ranks_of(runs[0])
    assert len(ranks) == len(splits.test)
    assert float(((ranks > 0) & (ranks <= 10)).mean()) == pytest.approx(runs[0]["metrics"]["recall@10"])


def test_nothing_to_learn_from(recommender, small, series):
    dataset, codes = series
    with pytest.raises(DataError, match=r"no user of .* has two training interactions"):
        recommender.train_recommender(
            dataset.select(np.zeros(dataset.num_interactions, bool)),
            codes.codes,
            codes.codebook_sizes,
            settings=small,
            seed=0,
        )


def test_random_and_shuffled_codes(script):
    item_ids = [str(row) for row in range(60)]
    drawn = script.random_codes(item_ids, (4, 4, 4), 0)
    assert drawn.is_unique
    assert drawn.codebook_sizes == (4, 4, 4)
    assert (drawn.codes == script.random_codes(item_ids, (4, 4, 4), 0).codes).all()
    assert (drawn.codes != script.random_codes(item_ids, (4, 4, 4), 1).codes).any()
    dealt = script.shuffled_codes(drawn, 0)
    assert Counter(map(tuple, dealt.codes.tolist())) == Counter(map(tuple, drawn.codes.tolist()))
    assert (dealt.codes != drawn.codes).any()
    with pytest.raises(SettingsError, match="27 code tuples for 60 items"):
        script.random_codes(item_ids, (3, 3, 3), 0)


def test_paired_comparison_by_hand(script):
    def result(seed, found):
        return {"seed": seed, "num_examples": 4, "found": found}

    first = [result(0, "0:1"), result(1, "0:1"), result(5, "1:1 2:1 3:1")]
    second = [result(0, "0:1 1:1"), result(1, "1:1 2:11"), result(7, "")]
    # Of seeds 0 and 1: recall@10 a user 1 0 0 0 against 1/2 1 0 0, differences -1/2, 1, 0, 0.
    found = script.compare(first, second, "recall@10")
    assert found["difference"] == pytest.approx(1 / 8)
    assert found["standard_error"] == pytest.approx(np.std([-0.5, 1, 0, 0], ddof=1) / 2)
    assert 0.6 < found["p_value"] < 0.8
    assert script.compare(first[2:], second[2:], "recall@10") is None
    same = script.compare(first[:1], first[:1], "ndcg@10")
    assert same == {"difference": 0.0, "standard_error": 0.0, "p_value": 1.0}


@pytest.fixture
def saved(series, tmp_path):
    """The data set and its codes on disk, as a folder and as an index."""
    _, codes = series
    synthetic_dataset(num_users=120, num_items=200, seed=1).save(tmp_path / "data")
    codes.save(tmp_path / "fitted" / "semantic_ids.safetensors")
    index = {str(row): codes.tokens(row) for row in range(len(codes))}
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path


def test_the_script_and_its_second_run(script, recommender, small, saved, monkeypatch, capsys):
    monkeypatch.setattr(recommender, "RecommenderSettings", lambda: small)
    output = saved / "out.json"
    line = ["--dataset", str(saved / "data"), "--output", str(output), "--random_sizes", "9", "9", "9", "--codes"]
    line += [f"ours={saved / 'fitted'}", f"index={saved / 'index.json'}", "random", "shuffled:ours"]
    assert script.main([*line, "--seeds", "0"]) == 0
    report = json.loads(output.read_text())
    assert report["benchmark"] == "codes"
    assert {"machine", "versions", "settings", "split"} <= set(report)
    assert len(report["runs"]) == 4
    assert report["code_sets"]["random"]["collision_rate"] == 0.0
    assert report["code_sets"]["ours"]["used"] == list(report["code_sets"]["ours"]["codebook_sizes"])
    by_name = {row["name"]: row for row in report["rows"]}
    assert len(by_name) == 8
    assert by_name["index ndcg@10"]["difference"] == pytest.approx(
        by_name["index ndcg@10"]["value"] - by_name["ours ndcg@10"]["value"]
    )
    assert by_name["ours recall@10"]["deviation"] is None

    trained = []
    monkeypatch.setattr(
        script, "measure", lambda *given, real=script.measure: (trained.append(given[0]), real(*given))[1]
    )
    assert script.main([*line, "--seeds", "0", "2"]) == 0
    assert trained == ["ours", "index", "random", "shuffled:ours"]  # the second seed only
    again = json.loads(output.read_text())
    assert report["runs"].items() <= again["runs"].items()
    row = next(row for row in again["rows"] if row["name"] == "ours ndcg@10")
    assert row["seeds"] == [0, 2]
    assert row["value"] == pytest.approx(np.mean(row["values"]))
    assert row["deviation"] == pytest.approx(np.std(row["values"], ddof=1))
    printed = capsys.readouterr().out
    assert "shuffled:ours" in printed
    assert "not to be compared" not in printed

    trained.clear()
    assert script.main([*line, "--seeds", "0", "--split", "validation", "--quick"]) == 0
    assert len(trained) == 4  # other examples and settings: nothing is taken over
    assert "not to be compared" in capsys.readouterr().out


def test_what_cannot_work_is_one_line(script, saved, capsys):
    base = ["--dataset", str(saved / "data"), "--codes"]
    (saved / "other.json").write_text("{}")
    for words, message in (
        (["colour"], "'colour' is no code set"),
        (["shuffled:ours"], "is no code set"),
        (["random", "random"], "two code sets are called 'random'"),
        ([f"ours={saved / 'nothing'}"], "no semantic IDs at"),
        (["random", "--seeds", "1", "1"], "seeds are"),
        (["random", "--output", str(saved / "other.json")], "not written by this benchmark"),
    ):
        assert script.main([*base, *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert len(error.splitlines()) == 1
