"""The benchmark eval/benchmarks/unique_codes.py on a catalogue small enough for a test."""

import importlib.util

import numpy as np
import pytest

from llmrec.item_tokenizers.semantic_ids import SemanticIds


@pytest.fixture(scope="module")
def benchmark(repository):
    path = repository / "eval" / "benchmarks" / "unique_codes.py"
    spec = importlib.util.spec_from_file_location("unique_codes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", ["crowded", "crowded_memory_mapped_vectors", "random_extra_level"])
def test_cases(benchmark, case):
    found = benchmark.run_case(case, num_items=3_000, repeats=1)
    assert found["valid"]
    assert len(found["seconds"]) == 1
    moved = int(found["report"].split(" after, ")[1].split()[0].replace(",", ""))
    assert moved == 0 if case == "random_extra_level" else moved > 200


def test_references_agree(benchmark):
    assert benchmark.against_dictionary(3_000, repeats=1)["same"]
    assert benchmark.same_cost(1_000)


def test_the_check_finds_what_is_wrong(benchmark):
    before = SemanticIds(("a", "b", "c"), np.array([[0, 0], [0, 0], [1, 1]]), (2, 3))
    good = before.make_unique()
    assert benchmark.valid(before, good)
    for wrong in ([[0, 0], [0, 0], [1, 1]], [[0, 0], [0, 1], [1, 2]], [[0, 0], [1, 0], [1, 1]]):
        assert not benchmark.valid(before, SemanticIds(good.item_ids, np.array(wrong), (2, 3)))
