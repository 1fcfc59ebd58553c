"""The benchmark eval/benchmarks/add_items.py on a catalogue small enough for a test."""

import importlib.util

import pytest


@pytest.fixture(scope="module")
def benchmark(repository):
    path = repository / "eval" / "benchmarks" / "add_items.py"
    spec = importlib.util.spec_from_file_location("add_items", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_sides_answer_the_same(benchmark):
    result = benchmark.measure(600, 40, 16, "rq_kmeans")
    assert result["same_answer"]
    assert [row["name"] for row in result["rows"]] == ["add_items_rq_kmeans", "remove_items"]
    added, removed = result["rows"]
    assert added["reference"] > 0 < added["value"]
    assert removed["reference"] is None
    assert (added["items"], added["changed"]) == (600, 40)


def test_the_comparison_sees_another_answer(benchmark, monkeypatch):
    answers = iter([[["one"]], [["another"]]])
    monkeypatch.setattr(benchmark, "answers_of", lambda *_: next(answers))
    assert not benchmark.measure(600, 40, 16, "rq_kmeans")["same_answer"]
