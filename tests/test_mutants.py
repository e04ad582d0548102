"""Every mutant still is one: its snippet is in the source once, its tests exist."""

import ast

import pytest

from cases import BY_NAME
from mutants import MUTANTS
from mutation import ROOT, Mutant

each_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)


@each_mutant
def test_mutated_source_is_another_program(mutant):
    source = mutant.path.read_text()
    mutated = ast.parse(mutant.apply(source))
    assert ast.dump(mutated) != ast.dump(ast.parse(source))


@each_mutant
def test_tests_that_should_see_it_exist(mutant):
    assert mutant.seen_by
    for test in mutant.seen_by:
        if "::" in test:
            file, name = test.split("::")
            functions = ast.parse((ROOT / "tests" / f"test_{file}.py").read_text()).body
            names = {n.name for n in functions if isinstance(n, ast.FunctionDef)}
            assert f"test_{name.partition('[')[0]}" in names
        else:
            assert test.partition("-")[0] in BY_NAME


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("before", ["no such line", "tl.store("])
def test_a_snippet_that_is_not_there_once_is_refused(before):
    gone = Mutant("gone", "rows", "bounds_kernel", before, "", "nothing", ())
    with pytest.raises(ValueError, match="not once"):
        gone.apply(gone.path.read_text())
