from types import ModuleType

import pytest
import tiny as shared


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The helpers of tests/tiny.py."""
    return shared
