import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmrec.data.interactions import InteractionDataset
from llmrec.data.recommendation import Recommendation
from llmrec.data.splits import leave_one_out
from llmrec.data.synthetic import synthetic_dataset
from llmrec.errors import DataError, MissingPartError, SettingsError
from llmrec.evaluation.baselines import PopularityRecommender
from llmrec.evaluation.evaluator import evaluate, evaluate_both, load_results, save_results


class Fixed:
    """Gives the same items to everyone and keeps what it was asked."""

    name = "fixed"

    def __init__(self, items):
        self.items, self.asked = items, []

    def recommend(self, histories, k=10, *, exclude_seen=True):
        self.asked.append((histories, k, exclude_seen))
        return [[Recommendation(item, 0.0, "") for item in self.items[:k]] for _ in histories]


@pytest.fixture
def data():
    dataset = InteractionDataset.from_columns(
        ["u"] * 4 + ["v"] * 3 + ["w"] * 3, list("abcd") + list("acb") + list("xya")
    )
    return dataset, leave_one_out(dataset)


def test_ranks_and_metrics_by_hand(data):
    dataset, splits = data
    # targets d, b, a
    result = evaluate(Fixed(["b", "q", "a"]), dataset, splits.test, ks=(1, 3))
    assert result.ranks.tolist() == [0, 1, 3]
    assert result.metrics == {
        "recall@1": pytest.approx(1 / 3),
        "ndcg@1": pytest.approx(1 / 3),
        "mrr@1": pytest.approx(1 / 3),
        "recall@3": pytest.approx(2 / 3),
        "ndcg@3": pytest.approx((1 + 1 / 2) / 3),
        "mrr@3": pytest.approx((1 + 1 / 3) / 3),
    }
    assert (result.name, result.num_examples, result.split, result.exclude_seen) == ("fixed", 3, "test", False)
    assert result.protocol == "seen items kept"
    assert "recall@3 0.6667" in str(result)


def test_what_the_recommender_is_asked(data):
    dataset, splits = data
    recommender = Fixed(["a"])
    evaluate(recommender, dataset, splits.test, ks=(5, 2), exclude_seen=True, batch_size=2)
    assert recommender.asked == [
        ([["a", "b", "c"], ["a", "c"]], 5, True),
        ([["x", "y"]], 5, True),
    ]


def test_both_protocols(data):
    dataset, splits = data
    kept, left_out = evaluate_both(PopularityRecommender(splits.train), dataset, splits.test, name="pop")
    assert (kept.exclude_seen, left_out.exclude_seen) == (False, True)
    assert kept.name == left_out.name == "pop"
    assert kept.examples == left_out.examples == splits.test.fingerprint


def test_batch_size_changes_nothing():
    dataset = synthetic_dataset(60, 60, max_length=10)
    splits = leave_one_out(dataset)
    recommender = PopularityRecommender(splits.train)
    results = [evaluate(recommender, dataset, splits.test, batch_size=size) for size in (1, 7, 1000)]
    assert results[0].metrics == results[1].metrics == results[2].metrics
    assert 0 < results[0].metrics["recall@10"] < 1


def test_what_is_refused(data):
    dataset, splits = data
    with pytest.raises(SettingsError, match="'test' are empty"):
        evaluate(Fixed(["a"]), dataset, splits.test.take([]))
    for options in ({"ks": ()}, {"ks": (0,)}, {"batch_size": 0}):
        with pytest.raises(SettingsError, match="must be at least 1"):
            evaluate(Fixed(["a"]), dataset, splits.test, **options)

    class TooFew(Fixed):
        def recommend(self, histories, k=10, *, exclude_seen=True):
            return super().recommend(histories, k)[1:]

    class TooLong(Fixed):
        def recommend(self, histories, k=10, *, exclude_seen=True):
            return super().recommend(histories, 99)

    with pytest.raises(DataError, match=r"TooFew.recommend gave 2 answers to 3 histories"):
        evaluate(TooFew(["a"]), dataset, splits.test)
    with pytest.raises(DataError, match=r"TooLong.recommend gave 4 items where 2 were asked"):
        evaluate(TooLong(list("abcd")), dataset, splits.test, ks=(2,))


def test_results_are_saved_whole(data, tmp_path):
    dataset, splits = data
    results = evaluate_both(PopularityRecommender(splits.train), dataset, splits.test)
    save_results(tmp_path / "results.json", results)
    loaded = load_results(tmp_path / "results.json")
    for before, after in zip(results, loaded, strict=True):
        assert after.to_json() == before.to_json()
        assert after.ranks.dtype == np.int64
    assert "ranks" not in results[0].to_json(with_ranks=False)
    with pytest.raises(MissingPartError):
        load_results(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(DataError, match="no format_version"):
        load_results(tmp_path / "other.json")


def test_two_processes_give_what_one_gives(tmp_path, repository):
    processes = 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("evaluate_in_processes.py")
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    common |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(processes), "PYTHONPATH": str(repository)}
    started = []
    try:
        for rank in range(processes):
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(script), str(tmp_path / f"{rank}.json")]
            started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(errors)[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    assert [one["processes"] for one in found] == [processes] * processes

    dataset = synthetic_dataset(41, 60, max_length=10)
    splits = leave_one_out(dataset)
    for number, num_examples in enumerate([41, 1, 2, 7, 3]):
        alone = evaluate(
            PopularityRecommender(splits.train),
            dataset,
            splits.test.take(np.arange(num_examples)),
            ks=(5, 30),
            exclude_seen=True,
        )
        outcomes = [one["outcomes"][number] for one in found]
        assert all(outcome["ranks"] == alone.ranks.tolist() for outcome in outcomes)
        assert all(outcome["metrics"] == alone.metrics for outcome in outcomes)
        assert len({outcome["calls"] for outcome in outcomes}) == 1
    assert alone.ranks.any()
