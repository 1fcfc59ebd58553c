"""The benchmark of the trie, at a small size."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from llmrec.generation.trie import ItemTrie


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "eval" / "benchmarks" / "trie.py"
    spec = importlib.util.spec_from_file_location("trie_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_whole_run(script, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.json"
    line = ["trie.py", "--num_items", "600", "--repeats", "2", "--threads", "1", "--output", str(output)]
    monkeypatch.setattr("sys.argv", line)
    monkeypatch.setattr(script, "missed_targets", lambda rows: [])  # this machine may be busy
    assert script.main() == 0
    report = json.loads(output.read_text())
    assert report["benchmark"] == "trie"
    assert report["same_answer"]
    rows = {(row["name"], row["items"]): row for row in report["rows"]}
    names = {name for name, _ in rows}
    assert {"build", "mask_mean", "children_level_3", "allow_50%", "deny_99%", "insert_300", "remove_300"} <= names
    assert rows["build", 600]["bytes_per_item"] > 12
    processor = rows["logits_processor_vs_prefix_allowed_tokens_fn", 600]
    assert min(processor["reference"], processor["value"]) > 0
    assert "the same answers as the references: True" in capsys.readouterr().out


def test_a_wrong_trie_is_found_out(script, monkeypatch):
    codes = script.random_codes(300)
    trie = ItemTrie.from_codes(codes, script.SIZES)
    assert script.finds_what_a_comparison_finds(trie, codes)
    other = codes.copy()
    other[:, 3] = np.roll(other[:, 3], 1)
    assert not script.finds_what_a_comparison_finds(ItemTrie.from_codes(other, script.SIZES), codes)
    real = trie.allowed_codes
    monkeypatch.setattr(ItemTrie, "allowed_codes", lambda self, level, nodes, subset=None: real(level, nodes))
    assert not script.finds_what_a_comparison_finds(trie, codes)  # the sets are ignored


def test_targets(script):
    def row(name, items, value, **others):
        return {"name": name, "items": items, "value": value, **others}

    good = [
        row("build", 10_000_000, 3.0, peak_bytes=5e8, bytes_per_item=17.0),
        row("mask_level_0", 10_000, 0.02),
        row("mask_mean", 10_000, 0.020),
        row("mask_mean", 10_000_000, 0.024),
        row("deny_50%", 1_000_000, 40.0),
        row("deny_50%", 10_000_000, 4000.0),  # asked for at a million items
    ]
    assert script.spread_of([0.02, 0.024]) == pytest.approx(1 / 11)
    assert script.missed_targets(good) == []
    for place, change in (
        (0, {"value": 16.0}),
        (0, {"peak_bytes": 3e9}),
        (0, {"bytes_per_item": 26.0}),
        (1, {"value": 0.07}),
        (3, {"value": 0.03}),
        (4, {"value": 61.0}),
    ):
        bad = [one | change if number == place else one for number, one in enumerate(good)]
        assert len(script.missed_targets(bad)) == 1
