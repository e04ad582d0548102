"""Every mutant still is one: its snippet is in the source once, its tests exist."""

import ast
import re
from functools import lru_cache

import pytest

from mutants.mutation import ROOT, Mutant
from mutants.mutation import test_file as path_of
from mutants.table import MUTANTS
from support.cases import BY_NAME


@lru_cache
def functions_of(name: str) -> set[str]:
    nodes = ast.parse((ROOT / path_of(name)).read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


each_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)


@each_mutant
def test_mutated_source_is_another_program(mutant):
    source = mutant.path.read_text()
    mutated = mutant.apply(source)
    assert mutant.program(source) != mutant.program(mutated)


@each_mutant
def test_tests_that_should_see_it_exist(mutant):
    assert mutant.seen_by
    for test in mutant.seen_by:
        if "::" in test:
            file, name = test.split("::")
            assert f"test_{name.partition('[')[0]}" in functions_of(file)
        else:
            assert test.partition("-")[0] in BY_NAME


def test_the_page_is_of_these_mutants():
    page = (ROOT / "docs" / "mutants.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| `([^`]+)` \|", page, re.MULTILINE)
    assert rows == [(m.name, m.place) for m in MUTANTS], "run make mutants"
    assert "**nothing**" not in page


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("before", ["no such line", "tl.store("])
def test_a_snippet_that_is_not_there_once_is_refused(before):
    gone = Mutant("gone", "rows", "bounds_kernel", before, "", "nothing", ())
    with pytest.raises(ValueError, match="not once"):
        gone.apply(gone.path.read_text())
