"""The fixture of the examples' tests."""

from types import ModuleType

import pytest

from support import example_programs


@pytest.fixture(scope="module")
def example(request) -> ModuleType:
    """The example that the test file is named after."""
    return example_programs.load(request.path.stem.removeprefix("test_example_"))
