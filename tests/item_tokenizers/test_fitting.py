import runpy
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmrec.data.loading import load_dataset_from
from llmrec.embeddings.collaborative import SASRec
from llmrec.errors import MissingPartError, SettingsError
from llmrec.files import read_json
from llmrec.item_tokenizers.base import ItemTokenizer
from llmrec.item_tokenizers.fitting import FitSettings, embeddings_of, fit_from_settings
from llmrec.item_tokenizers.semantic_ids import SemanticIds

ROOT = Path(__file__).parents[2]
SETTINGS_FILES = sorted((ROOT / "tokenizers").rglob("*.yaml"))

SHORT = """
method: {method}
dataset: synthetic
dataset_options: {{num_users: 60, num_items: 50}}
embeddings:
  text: {{from: text, encoder: tfidf, width: 16}}
{more}
item_tokenizer: {{num_codebooks: 3, codebook_size: 8, codebook_dim: 8, hidden_sizes: [16], epochs: 2{settings}}}
"""
TEXT = "embeddings: {text: {from: text}}"


def test_every_settings_file_is_read():
    assert len(SETTINGS_FILES) == 13
    for path in SETTINGS_FILES:
        settings = FitSettings.from_yaml(path)
        assert settings.index or settings.new_tokenizer().codebook_sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"method: letter\ndataset: synthetic\n{TEXT}",
            "letter needs embeddings of text and collaborative, found text",
        ),
        ("method: rq_vae\ndataset: synthetic", "rq_vae needs embeddings of one modality, found none"),
        (
            "method: rq_vae\ndataset: synthetic\nembeddings: {text: {from: text}, cf: {from: sasrec}}",
            "one modality, found text, cf",
        ),
        ("method: simcit\ndataset: synthetic", "one or more modalities, found none"),
        ("method: vae\ndataset: synthetic", "unknown method 'vae'; known: rq_vae"),
        ("method: rq_vae", "dataset must be set"),
        (f"method: rq_vae\ndataset: synthetic\ncolour: red\n{TEXT}", "unknown setting 'colour'"),
        (f"method: rq_vae\ndataset: synthetic\n{TEXT}\nitem_tokenizer: {{beta: 1}}", "unknown setting 'beta'"),
        (
            f"method: rq_vae\ndataset: synthetic\n{TEXT}\nitem_tokenizer: {{learning_rate: 1e-4}}",
            r"write 1\.0e-4",
        ),
        ("method: rq_vae\ndataset: synthetic\nembeddings: {text: {encoder: tfidf}}", "say where it comes from"),
        (f"method: rq_vae\ndataset: synthetic\n{TEXT}\nindex: x.json", "given_codes, and only it, has an index"),
        ("method: given_codes\ndataset: synthetic", "given_codes, and only it, has an index"),
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
    more = "  collaborative: {from: sasrec, width: 16, epochs: 1, reduce_to: 8}"
    path.write_text(SHORT.format(method="letter", more=more, settings=", num_clusters: 2"))
    done = run_script("--config", path, "--output_dir", out)
    assert done.returncode == 0, done.stderr
    assert "collision rate" in done.stdout
    assert "0 after" in done.stdout
    names = ["diagnostics.json", "item_tokenizer", "report.html", "sasrec", "semantic_ids.safetensors"]
    assert sorted(file.name for file in out.iterdir()) == names
    semantic_ids = SemanticIds.load(out / "semantic_ids.safetensors")
    assert semantic_ids.is_unique
    assert semantic_ids.codes.shape == (50, 3)
    tokenizer = ItemTokenizer.from_pretrained(out / "item_tokenizer")
    assert tokenizer.widths["collaborative"] == 8
    assert np.all(semantic_ids.codes < 8)


def test_two_processes_write_what_one_writes(tmp_path):
    path = tmp_path / "settings.yaml"
    more = "  collaborative: {from: sasrec, width: 8, epochs: 1}"
    path.write_text(SHORT.format(method="letter", more=more, settings=", num_clusters: 2"))
    one = run_script("--config", path, "--output_dir", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp.yaml"]
    script = [str(ROOT / "tokenizers" / "fit.py"), "--config", str(path), "--output_dir", str(tmp_path / "two")]
    command = [sys.executable, *launch, "--main_process_port", port, *script]
    two = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert (tmp_path / "two" / "report.html").is_file(), two.stderr[-3000:]
    assert two.stdout.count("saved in") == 1  # the main process alone writes and prints
    found, expected = (read_json(tmp_path / name / "diagnostics.json")["fit_history"] for name in ("two", "one"))
    assert found[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-4)
    codes = [SemanticIds.load(tmp_path / name / "semantic_ids.safetensors").codes for name in ("one", "two")]
    assert (codes[0] == codes[1]).mean() > 0.99


def test_figures_reach_the_trackers_and_the_report(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        SHORT.format(method="rq_vae", more="", settings=", evaluate_every: 1") + "log_with: [tensorboard]\n"
    )
    fit_from_settings(FitSettings.from_yaml(path), tmp_path / "out", progress=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    assert {"loss", "loss_reconstruction", "collision_rate", "used_a", "perplexity_c"} <= set(found.Tags()["scalars"])
    steps = [event.step for event in found.Scalars("collision_rate")]
    history = read_json(tmp_path / "out" / "diagnostics.json")["fit_history"]
    assert steps == [figures["epoch"] for figures in history] == [1, 2]
    losses = [event.value for event in found.Scalars("loss")]
    assert losses == pytest.approx([figures["loss"] for figures in history], rel=1e-5)


@pytest.mark.parametrize("resume", [False, True])
def test_a_fitted_item_tokenizer_finds_its_embeddings_again_and_none_is_trained_anew(tmp_path, monkeypatch, resume):
    path = tmp_path / "settings.yaml"
    more = "  collaborative: {from: sasrec, width: 16, epochs: 1, reduce_to: 8}"
    path.write_text(SHORT.format(method="letter", more=more, settings=", num_clusters: 2"))
    settings = FitSettings.from_yaml(path)
    dataset = load_dataset_from(settings.dataset, **settings.dataset_options)
    fitted = fit_from_settings(settings, tmp_path / "out", dataset=dataset, progress=False, resume=resume)

    def train(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(SASRec, "fit", train)
    again = load_dataset_from(settings.dataset, **settings.dataset_options)
    found = embeddings_of(settings, again, tmp_path / "out")
    assert {name: of.width for name, of in found.items()} == {"text": 16, "collaborative": 8}
    saved = SASRec.from_pretrained(tmp_path / "out" / "sasrec").item_embeddings()
    np.testing.assert_array_equal(found["collaborative"].vectors, saved.reduce(8).vectors)
    np.testing.assert_array_equal(fitted.tokenizer.encode(found).codes, fitted.semantic_ids.codes)

    other = load_dataset_from(settings.dataset, num_users=59, num_items=50)
    longer = replace(settings, embeddings=settings.embeddings | {"collaborative": {"from": "sasrec", "epochs": 2}})
    for of_settings, of_dataset, folder in (
        (settings, other, "out"), (longer, dataset, "out"), (settings, dataset, "elsewhere")
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="trained again"):
            embeddings_of(of_settings, of_dataset, tmp_path / folder)
    with pytest.raises(SettingsError, match="settings of 'given_codes' name no embeddings"):
        embeddings_of(FitSettings("given_codes", "synthetic", index="x.json"), dataset, tmp_path)


def test_published_codes_are_measured_and_saved_like_fitted_ones(tmp_path, beauty_dir, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = FitSettings.from_yaml(ROOT / "tokenizers" / "beauty" / "published_letter.yaml")
    fitted = fit_from_settings(settings, tmp_path, progress=False)
    assert [level.used for level in fitted.before.levels] == [197, 256, 256, 256]
    assert fitted.before.collision_rate == pytest.approx(13 / 12_101)
    tokenizer = ItemTokenizer.from_pretrained(tmp_path / "item_tokenizer")
    assert np.array_equal(tokenizer.semantic_ids.codes, fitted.semantic_ids.codes)


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
