"""The commands and names that the README shows exist."""

import re
import shlex

import pytest

import llmrec
from llmrec.cli import _parse

README = "README.md"


@pytest.fixture
def readme(repository):
    return (repository / README).read_text(encoding="utf-8")


def code_blocks(text):
    return re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)


def test_every_llmrec_command_is_accepted_as_it_stands(readme):
    lines = [line for block in code_blocks(readme) for line in block.splitlines() if line.startswith("llmrec ")]
    assert len(lines) >= 6
    for line in lines:
        arguments = shlex.split(line, comments=True)[1:]
        if "--help" not in arguments:
            _parse(arguments)


def test_every_file_that_a_command_names_exists(readme, repository):
    named = set(re.findall(r"(?:recipes|tokenizers|eval|accelerate_configs)/[\w/]+\.(?:py|yaml|md)", readme))
    assert len(named) >= 5
    assert [name for name in sorted(named) if not (repository / name).is_file()] == []


def test_every_name_that_the_examples_import_exists(readme):
    names = {name.strip() for line in re.findall(r"from llmrec import (.*)", readme) for name in line.split(",")}
    assert {"Recommender", "InteractionDataset"} <= names
    assert [name for name in sorted(names) if not hasattr(llmrec, name)] == []


def test_no_placeholder_was_left(readme):
    assert re.findall(r"^[A-Z]+(?:_[A-Z]+)+$", readme, flags=re.MULTILINE) == []
