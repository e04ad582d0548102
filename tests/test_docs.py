"""The examples of the documents do what they print."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [page.name for page in sorted(DOCS.glob("*.md")) if ">>> " in page.read_text()]


@pytest.mark.parametrize("name", PAGES)
def test_examples(name):
    torch.manual_seed(0)
    results = doctest.testfile(str(DOCS / name), module_relative=False, verbose=False)
    assert results.attempted and not results.failed
