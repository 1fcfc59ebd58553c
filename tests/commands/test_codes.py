import dataclasses
import json

import numpy as np
import pytest

from llmrec import cli
from llmrec.data.loading import load_dataset_from
from llmrec.embeddings.base import ItemEmbeddings
from llmrec.files import write_json
from llmrec.item_tokenizers.diagnostics import Reconstruction, diagnose
from llmrec.item_tokenizers.semantic_ids import SemanticIds


@pytest.fixture
def run(capsys):
    """Runs `llmrec codes`; returns exit status, output and errors."""

    def run(*words):
        status = cli.main(["codes", *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def folder(tmp_path):
    """What `llmrec fit` leaves behind, of eight items of which two collided."""
    ids = tuple("abcdefgh")
    codes = np.stack([np.arange(8) // 2, np.arange(8) % 2], axis=1)
    codes[1] = codes[0]
    raw = SemanticIds(ids, codes, (4, 4))
    unique = raw.make_unique()
    unique.save(tmp_path / "fit" / "semantic_ids.safetensors")
    by_image = {"image": ItemEmbeddings(ids, np.random.default_rng(1).normal(size=(8, 3)))}
    after = dataclasses.replace(
        diagnose(unique, neighbours=by_image), reconstruction=Reconstruction((3.0, 2.0), (0.3, 0.2), 10.0)
    )
    content = {"before": dataclasses.asdict(diagnose(raw)), "after": dataclasses.asdict(after)}
    history = [{"epoch": 0, "loss": 2.0}, {"epoch": 5, "loss": 1.0}]
    write_json(tmp_path / "fit" / "diagnostics.json", {"format_version": 1, **content, "fit_history": history})
    ItemEmbeddings(ids, np.random.default_rng(0).normal(size=(8, 3))).save(tmp_path / "text.safetensors")
    return tmp_path / "fit"


def test_a_fitted_folder(run, folder, tmp_path):
    page = tmp_path / "page.html"
    status, out, err = run(folder, "--text", tmp_path / "text.safetensors", "--html", page)
    assert (status, err) == (0, "")
    assert "Codes of 8 items (policy min_cost)" in out
    assert "min_cost: 1 collisions before, 0 after" in out
    assert "- Collisions as fitted 12.5%: bad." in out  # from diagnostics.json
    assert "- Error left 20.0%: good" in out
    assert "Codes shared with the 7 nearest: text" in out
    assert "Codes shared with the 7 nearest: image" in out  # from there too
    assert str(page) in out
    text = page.read_text()
    assert "While fitting" in text
    assert "Map of items" in text


def test_a_file_alone(run, folder, tmp_path):
    (folder / "semantic_ids.safetensors").rename(tmp_path / "mine.safetensors")
    status, out, _ = run(tmp_path / "mine.safetensors")
    assert status == 0
    assert "Collisions as fitted" not in out
    assert "Collisions left 0%: good" in out


def test_comparison_with_a_published_index(run, beauty_dir, tmp_path):
    index = beauty_dir / "Beauty.letter-index.json"
    status, out, _ = run(index, "--dataset", beauty_dir, "--compare", index, "--html", tmp_path / "page.html")
    assert status == 0
    assert "collision rate 0.11%: 12,088 different tuples, 24 items share one, largest group 3" in out
    assert "all codes equal: 100.00% of the items" in out
    assert "- Codes used 77.0%: good" in out
    assert (tmp_path / "page.html").stat().st_size < 100_000  # no embeddings, no map


def test_mistakes(run, folder, tmp_path):
    write_json(tmp_path / "index.json", {"0": ["<a_1>"]})
    assert "name the data set it is about with --dataset" in run(tmp_path / "index.json")[2]
    status, _, err = run(tmp_path / "missing")
    assert status == 2
    assert "no semantic IDs at" in err
    other = SemanticIds(tuple("hgfedcba"), np.arange(8)[:, None], (8,))
    other.save(tmp_path / "other.safetensors")
    assert "the second code set" in run(folder, "--compare", tmp_path / "other.safetensors")[2]
    content = json.loads((folder / "diagnostics.json").read_text())
    del content["before"]["levels"]
    write_json(folder / "diagnostics.json", content)
    assert "no diagnostics of codes" in run(folder)[2]


def test_an_index_is_read_by_its_keys_whatever_the_order_of_the_items(run, tmp_path):
    write_json(tmp_path / "X.inter.json", {"0": [0, 1, 2], "1": [2, 1, 0]})
    write_json(tmp_path / "X.item.json", {key: {"title": f"item {key}"} for key in ("2", "0", "1")})
    write_json(tmp_path / "index.json", {"0": ["<a_0>"], "1": ["<a_1>"], "2": ["<a_2>"]})
    dataset = load_dataset_from(tmp_path)
    assert dataset.item_keys == ("2", "0", "1")
    expected = SemanticIds(dataset.item_ids, np.array([[2], [0], [1]]), (3,))
    expected.save(tmp_path / "expected.safetensors")
    status, out, err = run(
        tmp_path / "index.json", "--dataset", tmp_path, "--compare", tmp_path / "expected.safetensors"
    )
    assert (status, err) == (0, "")
    assert "all codes equal: 100.00% of the items" in out
