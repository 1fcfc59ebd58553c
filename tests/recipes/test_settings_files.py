"""Every settings file is read by the class that reads it in use, so that none outlives a renamed field."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from llmrec.commands.evaluate import EvaluationSettings
from llmrec.errors import SettingsError
from llmrec.item_tokenizers.fitting import FitSettings
from llmrec.item_tokenizers.trained import TrainedTokenizer
from llmrec.training import finetune, joint_run
from llmrec.training.checks import check_settings

ROOT = Path(__file__).parents[2]


def _is_joint(path):
    """Whether recipes/train_joint.py reads a settings file, and not recipes/finetune.py."""
    return "cycle" in yaml.safe_load(path.read_text())


def _read_recipe(path):
    arguments, training, model_arguments = (joint_run if _is_joint(path) else finetune).parse(["--config", str(path)])
    if model_arguments.load_in_4bit or model_arguments.load_in_8bit:
        pytest.importorskip("bitsandbytes")
    check_settings(arguments, training, model_arguments)
    codes = ROOT / arguments.item_tokenizer
    if codes.suffix == ".yaml":  # the run fits it, so it must be for the same data
        settings = FitSettings.from_yaml(codes)
        assert settings.dataset == arguments.dataset
        if _is_joint(path):
            assert isinstance(settings.new_tokenizer(), TrainedTokenizer)
            assert settings.uniqueness_policy == arguments.uniqueness
    else:
        assert not _is_joint(path), "joint training goes on from an item tokenizer that learns, not from its codes"


def _read_devices(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1


READERS = {
    "recipes": (_read_recipe, 13),
    "tokenizers": (FitSettings.from_yaml, 13),
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
    files = [(read, _files(folder)[0]) for folder, (read, _) in READERS.items()]
    files.append((_read_recipe, next(path for path in _files("recipes") if not _is_joint(path))))  # the first is one
    assert _is_joint(files[0][1])
    for number, (read, path) in enumerate(files):
        copy = tmp_path / f"{number}.yaml"
        copy.write_text(path.read_text() + "\nno_such_setting: 1\n")
        with pytest.raises((SettingsError, ValueError), match="no_such_setting"):
            read(copy)


def test_each_recipe_reads_its_own_files_only():
    """A file of joint training that `finetune` took would train without a word about what it left out."""
    joint = [path for path in _files("recipes") if _is_joint(path)]
    assert {path.name for path in joint} >= {"etegrec_t5.yaml", "etegrec_llama.yaml"}
    for path in joint:
        with pytest.raises(SettingsError, match="cycle"):
            finetune.parse(["--config", str(path)])
