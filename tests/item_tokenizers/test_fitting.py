import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmrec.errors import MissingPartError, SettingsError
from llmrec.item_tokenizers.base import ItemTokenizer
from llmrec.item_tokenizers.fitting import FitSettings
from llmrec.item_tokenizers.semantic_ids import SemanticIds

ROOT = Path(__file__).parents[2]
SETTINGS_FILES = sorted((ROOT / "tokenizers").rglob("*.yaml"))

SHORT = """
method: {method}
dataset: synthetic
dataset_options: {{num_users: 60, num_items: 50}}
text: {{encoder: tfidf, width: 16}}
{more}
item_tokenizer: {{num_codebooks: 3, codebook_size: 8, codebook_dim: 8, hidden_sizes: [16], epochs: 2{settings}}}
"""


def test_every_settings_file_is_read():
    assert len(SETTINGS_FILES) == 5
    for path in SETTINGS_FILES:
        settings = FitSettings.from_yaml(path)
        assert settings.new_tokenizer().codebook_sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: letter\ndataset: synthetic", "needs collaborative"),
        ("method: rq_vae\ndataset: synthetic\ncollaborative: sasrec", "takes no collaborative"),
        ("method: vae\ndataset: synthetic", "unknown method 'vae'; known: letter, rq_vae"),
        ("method: rq_vae", "dataset must be set"),
        ("method: rq_vae\ndataset: synthetic\ncolour: red", "unknown setting 'colour'"),
        ("method: rq_vae\ndataset: synthetic\nitem_tokenizer: {beta: 1}", "unknown setting 'beta'"),
        ("method: rq_vae\ndataset: synthetic\nitem_tokenizer: {learning_rate: 1e-4}", r"write 1\.0e-4"),
        ("method: rq_vae\ndataset: synthetic\nsasrec: {epochs: 1}", "sasrec settings are given"),
        ("- a list", "name: value"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(tmp_path, text, message):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        FitSettings.from_yaml(path)
    with pytest.raises(MissingPartError):
        FitSettings.from_yaml(tmp_path / "none.yaml")


def run_script(*arguments):
    command = [sys.executable, str(ROOT / "tokenizers" / "fit.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_the_script_fits_saves_and_prints(tmp_path):
    path, out = tmp_path / "settings.yaml", tmp_path / "out"
    more = "collaborative: sasrec\ncollaborative_width: 8\nsasrec: {width: 16, epochs: 1}"
    path.write_text(SHORT.format(method="letter", more=more, settings=", num_clusters: 2"))
    done = run_script("--config", path, "--output_dir", out)
    assert done.returncode == 0, done.stderr
    assert "collision rate" in done.stdout
    assert "0 after" in done.stdout
    names = ["diagnostics.json", "item_tokenizer", "sasrec", "semantic_ids.safetensors"]
    assert sorted(file.name for file in out.iterdir()) == names
    semantic_ids = SemanticIds.load(out / "semantic_ids.safetensors")
    assert semantic_ids.is_unique
    assert semantic_ids.codes.shape == (50, 3)
    tokenizer = ItemTokenizer.from_pretrained(out / "item_tokenizer")
    assert tokenizer.widths["collaborative"] == 8
    assert np.all(semantic_ids.codes < 8)


def test_the_script_says_in_one_line_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text(SHORT.format(method="rq_vae", more="", settings=", colour: red"))
    main = runpy.run_path(str(ROOT / "tokenizers" / "fit.py"))["main"]
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: item_tokenizer (RQVAEConfig): unknown setting 'colour'")
    assert len(error.splitlines()) == 1


def test_the_script_has_help():
    done = run_script("--help")
    assert done.returncode == 0
    assert "tokenizers/beauty/letter.yaml" in done.stdout
