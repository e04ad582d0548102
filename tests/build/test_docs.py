"""The examples of the documents do what they print."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import re

import pytest
import torch

import xattn_kernels
from support.checkout import ROOT

DOCS = ROOT / "docs"
PAGES = [page.name for page in sorted(DOCS.glob("*.md")) if ">>> " in page.read_text()]


@pytest.mark.parametrize("name", PAGES)
def test_examples(name):
    torch.manual_seed(0)
    results = doctest.testfile(str(DOCS / name), module_relative=False, verbose=False)
    assert results.attempted and not results.failed


def systems() -> list[tuple[str, str, str]]:
    """(heading, code, test) of every row of the table of systems."""
    rows = [line[2:-2].split(" | ") for line in (DOCS / "systems.md").read_text().splitlines()
            if line.startswith("| ") and not line.startswith(("| heading", "| ---"))]  # fmt: skip
    return [tuple(row) for row in rows]


def exists(name: str) -> bool:
    """Whether it is a file, an argument in brackets, or a name of this package or of torch."""
    if "/" in name:
        return (ROOT / name).is_file()
    first, *rest = name.split(".")
    if first in ("viz", "reference"):  # not imported with the package
        found = importlib.import_module(f"xattn_kernels.{first}")
    else:
        found = torch if first == "torch" else getattr(xattn_kernels, first, None)
    for part in rest:
        found = getattr(found, part, None)
    return found is not None


def test_names_of_systems():
    assert len(systems()) == 59
    for heading, code, tests in systems():
        names = re.findall(r"(?<!\()`([^`]+)`", code)
        assert all(map(exists, names)), f"{heading}: {[n for n in names if not exists(n)]}"
        assert names or "follow" in code or code.startswith('the "Source"'), heading
        for file, test in (name.split("::") for name in re.findall("`([^`]+)`", tests)):
            (path,) = (ROOT / "tests").rglob(f"{file}.py")
            tree = ast.parse(path.read_text())
            assert test in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, test
        assert "::" in tests, heading


def test_a_system_without_code_is_noticed():
    assert exists("cross_attention") and exists("torch.nn.utils.clip_grad_norm_")
    assert not exists("docs/nothing.md") and not exists("QFormer.nothing") and not exists("Nothing")


def test_performance_page_has_the_committed_times():
    file = ROOT / "benchmarks" / "results" / "intel-xeon-2-threads" / "main-float32.json"
    rows = {(r["workload"], r["provider"], r["mode"]): r for r in json.loads(file.read_text())}
    pattern = r"^\| `([^`]+)`[^|]*\| (\d+) % \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$"
    table = re.findall(pattern, (DOCS / "performance.md").read_text(), re.MULTILINE)
    assert {row[0] for row in table} == {workload for workload, _, _ in rows}
    for workload, visible, *times in table:
        columns = [(p, m) for m in ("forward", "both") for p in ("xattn-sdpa", "sdpa-flash")]
        measured = [rows[workload, provider, mode] for provider, mode in columns]
        assert times == [f"{row['ms']:.1f}" for row in measured], workload
        assert visible == f"{100 * measured[0]['visible_fraction']:.0f}", workload
