"""The benchmarks of joint training, on made-up results and on a catalogue small enough for a test."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import factories
import numpy as np
import pytest
from scipy import stats

from llmrec.data.splits import leave_one_out
from llmrec.evaluation.evaluator import EvaluationResult
from llmrec.tiny_model import build
from llmrec.training.joint_report import write_history

FOLDER = Path(__file__).parents[2] / "eval" / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    import joint_ablation
    import joint_cost

    yield SimpleNamespace(ablation=joint_ablation, cost=joint_cost)
    sys.path.remove(str(FOLDER))


def runs(seed, *, shift=0, seeds=3):
    """Ranks of 40 users in some runs, both protocols; better by `shift` places."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(seeds):
        ranks = generator.integers(1 + 5, 30, 40) - shift
        made.append([EvaluationResult("llmrec", {}, 40, seen, ranks, 0.0) for seen in (True, False)])
    return made


def test_rows_of_the_ablation(scripts):
    results = {"joint": runs(0, shift=5), "frozen": runs(1)}
    rows = {row["name"]: row for row in scripts.ablation.rows_of(results)}
    assert len(rows) == 8
    row = rows["joint_recall@10_seen_left_out"]
    of_joint, of_frozen = (
        np.array([[1.0 if 1 <= rank <= 10 else 0.0 for rank in run[0].ranks] for run in results[arm]])
        for arm in ("joint", "frozen")
    )
    assert row["value"] == pytest.approx(of_joint.mean())
    assert row["reference"] == pytest.approx(of_frozen.mean())
    assert row["ratio"] == pytest.approx(of_joint.mean() / of_frozen.mean())
    assert row["deviation"] == pytest.approx(of_joint.mean(axis=1).std(ddof=1))
    paired = stats.ttest_rel(of_joint.mean(axis=0), of_frozen.mean(axis=0)).pvalue
    assert row["p_value"] == pytest.approx(paired)
    assert paired < 0.01
    assert rows["frozen_ndcg@10_seen_kept"]["p_value"] == 1.0
    assert rows["frozen_ndcg@10_seen_kept"]["ratio"] == pytest.approx(1.0)
    table = scripts.ablation.table(list(rows.values()), {"joint": "20% to 1%"})
    assert table.count("\n") == 3
    assert f"| joint | {row['value']:.4f} ± {row['deviation']:.4f} | {row['ratio'] - 1:+.1%} (p =" in table
    assert table.splitlines()[2].endswith("| 20% to 1% |")


def test_changes_are_means_over_seeds(scripts, tmp_path):
    for seed, shares in ((0, (0.4, 0.2, 0.0)), (1, (0.2, 0.1, 0.02))):
        (tmp_path / f"joint_{seed}").mkdir()
        records = [{"cycle": cycle, "share_changed": share} for cycle, share in enumerate(shares)]
        write_history(tmp_path / f"joint_{seed}" / "joint_history.json", records)
    assert scripts.ablation.changes_of(tmp_path, "joint", [0, 1]) == "30% to 1%"
    assert scripts.ablation.changes_of(tmp_path, "frozen", [0, 1]) == ""


def test_a_run_that_is_done_is_read(scripts, tmp_path, monkeypatch):
    """Nothing is fitted or trained: there is no such settings file."""
    from llmrec.evaluation.evaluator import save_results

    (tmp_path / "no_psa_1").mkdir()
    save_results(tmp_path / "no_psa_1" / "results.json", runs(0, seeds=1)[0])
    found = scripts.ablation.run("no_psa", 1, tmp_path / "nothing.yaml", tmp_path, quick=False)
    assert [result.exclude_seen for result in found] == [True, False]


def test_cost_of_a_cycle(scripts, tmp_path, monkeypatch, capsys):
    splits = leave_one_out(factories.make_dataset())
    monkeypatch.setattr(scripts.cost, "leave_one_out", lambda dataset: splits)
    monkeypatch.setattr(scripts.cost, "load_dataset_from", lambda name: None)
    monkeypatch.setattr(scripts.cost, "build", lambda name, titles, folder: build(name, ["a brush"], folder))
    output = tmp_path / "cost.json"
    assert scripts.cost.main(["--quick", "--output", str(output), "--threads", "1"]) == 0
    report = json.loads(output.read_text())
    assert report["same_answer"]
    (row,) = report["rows"]
    assert 0 < row["value"] <= row["reference"]
    assert row["tokens_read"] <= row["tokens_of_an_epoch"]
    assert row["ratio"] == pytest.approx(row["reference"] / row["value"])
    assert f"| T5 | {row['seconds_reading']:,.1f} s |" in capsys.readouterr().out
