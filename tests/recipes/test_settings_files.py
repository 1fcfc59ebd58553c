"""Every settings file is read by the class that reads it in use, so that none outlives a renamed field."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from llmrec.commands.evaluate import EvaluationSettings
from llmrec.errors import SettingsError
from llmrec.item_tokenizers.fitting import FitSettings
from llmrec.training.finetune import parse

ROOT = Path(__file__).parents[2]


def _read_recipe(path):
    arguments, _, _ = parse(["--config", str(path)])
    codes = ROOT / arguments.item_tokenizer
    if codes.suffix == ".yaml":  # the run fits it, so it must be for the same data
        assert FitSettings.from_yaml(codes).dataset == arguments.dataset


def _read_devices(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1


READERS = {
    "recipes": (_read_recipe, 2),
    "tokenizers": (FitSettings.from_yaml, 11),
    "eval": (EvaluationSettings.from_yaml, 3),
    "accelerate_configs": (_read_devices, 4),
}


def _files(folder):
    return sorted(path for suffix in ("yaml", "yml") for path in (ROOT / folder).rglob(f"*.{suffix}"))


@pytest.mark.parametrize("folder", READERS)
def test_there_are_settings_files(folder):
    """At least those known when this was written: a glob that finds nothing tests nothing."""
    assert len(_files(folder)) >= READERS[folder][1]


@pytest.mark.parametrize(
    ("folder", "path"),
    [pytest.param(folder, path, id=str(path.relative_to(ROOT))) for folder in READERS for path in _files(folder)],
)
def test_a_settings_file_is_read(folder, path):
    READERS[folder][0](path)


def test_no_settings_file_lies_where_nothing_reads_it():
    known = {path for folder in READERS for path in _files(folder)}
    folders = [
        path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".") and path.name != "runs"
    ]
    found = {path for folder in folders for suffix in ("yaml", "yml") for path in folder.rglob(f"*.{suffix}")}
    assert found == known


def test_a_renamed_setting_would_be_noticed(tmp_path):
    for folder, (read, _) in READERS.items():
        copy = tmp_path / f"{folder}.yaml"
        copy.write_text(_files(folder)[0].read_text() + "\nno_such_setting: 1\n")
        with pytest.raises((SettingsError, ValueError), match="no_such_setting"):
            read(copy)
