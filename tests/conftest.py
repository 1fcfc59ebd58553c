"""What all tests share: real data where it is found, and tiny models, tokenizers and catalogues.

Whatever is slow to import is imported by the fixture that needs it, so that collecting stays quick.
"""

import os
from pathlib import Path
from types import ModuleType

import pytest

# One thread: sums in the same order everywhere. Set before torch is imported, and inherited by every started process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).parents[1]


def _data_folder(name: str) -> Path:
    folder = REPOSITORY.parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"the real data isn't there: ../shared/data/{name}")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def beauty_dir() -> Path:
    """Amazon 2014 Beauty in the LETTER layout, with its CF embeddings and LETTER's codes."""
    return _data_folder("beauty")


@pytest.fixture(scope="session")
def office_dir() -> Path:
    """Amazon 2018 Office Products in the MiniOneRec layout."""
    return _data_folder("office")


@pytest.fixture(scope="session")
def factories() -> ModuleType:
    """The functions of tests/factories.py."""
    import factories

    return factories


@pytest.fixture
def text_tokenizer(factories):
    """Whole words, with a padding token of its own and no start token."""
    return factories.make_text_tokenizer()


@pytest.fixture
def start_token_tokenizer(factories):
    """Whole words; prompts begin with a start token, and padding is the end-of-sequence token."""
    return factories.make_text_tokenizer(start_token=True)


@pytest.fixture
def tiny_model(factories):
    """`tiny_model(family="llama", tied=True, vocab_size=...)`: a random two-layer causal language model."""
    return factories.make_tiny_model


@pytest.fixture(scope="session")
def small_dataset(factories):
    """Sixteen users with 2 to 9 interactions with twelve items."""
    return factories.make_dataset()


@pytest.fixture(scope="session")
def small_semantic_ids(factories):
    """Distinct random codes of the twelve items, three levels."""
    return factories.make_semantic_ids()
