import dataclasses
import json

import numpy as np
import pytest

from llmrec.errors import SettingsError
from llmrec.evaluation.evaluator import EvaluationResult
from llmrec.evaluation.report import results_table


def result(name, exclude_seen, recall, **others):
    metrics = {"recall@10": recall, "ndcg@10": recall / 2} | others
    return EvaluationResult(name, metrics, 1234, exclude_seen, np.zeros(1234, int), 1.5, "Beauty", "test", "abc")


RESULTS = [
    result("popularity", False, 0.01),
    result("popularity", True, 0.0125),
    result("SASRec", False, 0.0588, **{"mrr@10": 0.02}),
    result("SASRec", True, 0.07, **{"mrr@10": 0.03}),
]


def test_markdown():
    assert results_table(RESULTS).to_markdown() == (
        "Beauty test, 1,234 examples, full ranking\n\n"
        "| protocol | recommender | Recall@10 | NDCG@10 | MRR@10 |\n"
        "|---|---|---:|---:|---:|\n"
        "| seen items kept | popularity | 0.0100 | 0.0050 | – |\n"  # noqa: RUF001
        "| seen items kept | SASRec | 0.0588 | 0.0294 | 0.0200 |\n"
        "| seen items left out | popularity | 0.0125 | 0.0063 | – |\n"  # noqa: RUF001
        "| seen items left out | SASRec | 0.0700 | 0.0350 | 0.0300 |\n"
    )


def test_terminal_plain_text_and_json():
    from rich.console import Console

    table = results_table(RESULTS, metrics=["recall@10"])
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    for text in ("Beauty test, 1,234 examples", "Recall@10", "seen items left out", "0.0588"):
        assert text in capture.get()
    assert "NDCG@10" not in capture.get()
    assert str(table).splitlines()[2].split() == ["seen", "items", "kept", "popularity", "0.0100"]
    content = json.loads(json.dumps(table.to_json()))
    assert [one["protocol"] for one in content["results"]] == ["seen items kept", "seen items left out"] * 2
    assert "ranks" not in content["results"][0]


def test_results_on_different_examples_are_refused():
    with pytest.raises(SettingsError, match="'popularity' and 'SASRec' were evaluated on different examples"):
        results_table([RESULTS[0], dataclasses.replace(RESULTS[2], examples="xyz")])
    with pytest.raises(SettingsError, match="no results to show"):
        results_table([])
