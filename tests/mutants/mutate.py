"""Applies each mutant to a copy of the tree and runs tests there: `make mutants`.

First the tests that the mutant names; where they stay green, the whole suite of its mode but for
slow tests. A mutant that survives fails the run unless its table says why it is equivalent, and so
does one called equivalent that a test kills. The same tests have to pass on an unmutated copy.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mutants.mutation import ROOT, Mutant
from mutants.table import MUTANTS

# Interpreted tests are forked from a server that has imported what takes seconds, Triton among it
# (through _dynamo); emulated ones need a Triton that was imported without TRITON_INTERPRET.
PRELOADED = ["torch._dynamo", "hypothesis", "pytest"]
MODES = {
    "interpreter": ("forkserver", "TRITON_INTERPRET", "not emulated and not compile and not gpu"),
    "emulated": ("spawn", "XATTN_TRITON_ON_CPU", "emulated"),
}
# tests of what is installed, and of the mutants themselves
IGNORED = ("build", "mutants")
SKIPPED = shutil.ignore_patterns(
    ".git", ".venv", ".triton39", ".*_cache", "__pycache__", ".hypothesis", "build", "dist"
)
PASSED, FAILED, WRONG_MODULE = 0, 1, 90


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    killed_by: str  # a test, or "" where none did
    seconds: float

    @property
    def expected(self) -> bool:
        return bool(self.killed_by) != bool(self.mutant.equivalent)


def copy_tree(target: Path) -> None:
    """The working tree, which imports as any checkout does."""
    shutil.copytree(ROOT, target, ignore=SKIPPED, ignore_dangling_symlinks=True, symlinks=True)


def run_pytest(tree: Path, mode: str, m: Mutant, arguments: list[str], log: str) -> None:
    """In a process of its own: pytest on the tree, whose module must be the one imported."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    for _, variable, _ in MODES.values():
        os.environ.pop(variable, None)
    os.environ |= {MODES[mode][1]: "1", "PYTHONPATH": str(tree)}
    os.environ.setdefault("PTXSIM_PATH", str(ROOT.parent / "shared" / "ptxsim"))
    checkout = {str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "mutants")}
    others = (p for p in sys.path if p not in checkout)
    sys.path[:] = [str(tree), str(tree / "tests"), *others]
    for name in [name for name in sys.modules if name.split(".")[0] == "mutants"]:
        sys.modules.pop(name, None)
    import pytest

    file = importlib.import_module(m.module).__file__
    expected = "tests/support/cuda_emulation.py" if m.in_cpp else m.path.relative_to(ROOT)
    if Path(file).resolve() != (tree / expected).resolve():
        print(f"imported {file}, not that of {tree}")
        sys.exit(WRONG_MODULE)
    sys.exit(pytest.main(["-x", "-v", "--tb=line", "-p", "no:cacheprovider", *arguments]))


def tests_killing(tree: Path, m: Mutant, arguments: list[str], timeout: float) -> str:
    """The test that failed, crashed or did not end on the tree, or "" where all passed."""
    log = tree / "pytest.log"
    log.unlink(missing_ok=True)
    process = multiprocessing.get_context(MODES[m.mode][0]).Process(
        target=run_pytest, args=(tree, m.mode, m, arguments, str(log))
    )
    process.start()
    process.join(timeout)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    output, code = log.read_text(), process.exitcode
    started = re.findall(r"^tests/\w+/(test_\w+\.py::\S+)", output, re.MULTILINE)
    if hangs or code < 0:
        return f"{started[-1]} ({'does not end' if hangs else 'crash'})"
    if code == FAILED:
        ended = r"^tests/\w+/(test_\w+\.py::.+?) (?:FAILED|ERROR)"
        return re.findall(ended, output, re.MULTILINE)[0]
    if code == PASSED and re.search(r"\d+ passed", output):
        return ""
    raise RuntimeError(f"{m.name}: pytest ended with {code}\n{output[-3000:]}")


def whole_suite(mode: str) -> list[str]:
    ignored = [f"--ignore=tests/{name}" for name in IGNORED]
    return ["tests", "-m", f"not slow and {MODES[mode][2]}", *ignored]


def examine(m: Mutant, options: argparse.Namespace) -> Result:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder, "tree")
        copy_tree(tree)
        target = tree / m.path.relative_to(ROOT)
        target.write_text(m.apply(target.read_text()))
        killed_by = tests_killing(tree, m, m.selected(), options.timeout)
        if not (killed_by or m.equivalent or options.selected_only):
            killed_by = tests_killing(tree, m, whole_suite(m.mode), 20 * options.timeout)
    return Result(m, killed_by, time.monotonic() - begin)


def check_unmutated(mutants: list[Mutant], options: argparse.Namespace) -> str:
    """A test that fails without any mutation, or ""."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder, "tree")
        copy_tree(tree)
        for mode in dict.fromkeys(m.mode for m in mutants):
            chosen = [m for m in mutants if m.mode == mode]
            tests = list(dict.fromkeys(test for m in chosen for test in m.selected()))
            if failed := tests_killing(tree, chosen[0], tests, 20 * options.timeout):
                return failed
    return ""


def table(results: list[Result]) -> str:
    """The page docs/mutants.md."""
    killed = sum(bool(r.killed_by) for r in results)
    unexpected = sum(not r.expected for r in results)
    lines = [
        "# Mutants",
        "",
        "Small mutations of the kernels and their launchers, and the test that turns red. Written "
        "by `make mutants`",
        "from `tests/mutants/table.py`; it fails when a mutant survives that is not proved "
        "equivalent, or the other way round.",
        "",
        f"{len(results)} mutants: {killed} killed, {len(results) - killed} not, "
        f"{unexpected} of all unexpectedly.",
        "",
        "| mutant | in | what it breaks | killed by |",
        "| --- | --- | --- | --- |",
    ]
    for r in results:
        m = r.mutant
        proof = f"equivalent: {m.equivalent}" if m.equivalent else "**nothing**"
        killed_by = r.killed_by.replace("|", r"\|")  # would end a column
        fate = f"`{killed_by}`" if r.killed_by else proof
        lines.append(f"| {m.name} | `{m.place}` | {m.breaks} | {fate} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="mutants to run; all of them by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=300, help="seconds, of the named tests")
    parser.add_argument("--selected-only", action="store_true", help="never the whole suite")
    parser.add_argument("--no-control", action="store_true", help="trust the unmutated tree")
    parser.add_argument("--table", type=Path, help="where to write the results")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    known = {m.name: m for m in MUTANTS}
    mutants = [known[name] for name in options.names] or MUTANTS
    if not options.no_control and (failed := check_unmutated(mutants, options)):
        print(f"without any mutation {failed} fails")
        return 1
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for r in pool.map(lambda m: examine(m, options), mutants):
            mark = "" if r.expected else "  <-- unexpected"
            fate = r.killed_by or f"survived ({'equivalent' if r.mutant.equivalent else '?'})"
            print(f"{r.mutant.name:26} {r.seconds:6.1f} s  {fate}{mark}", flush=True)
            results.append(r)
    if options.table:
        options.table.write_text(table(results))
    wrong = [r.mutant.name for r in results if not r.expected]
    print(f"{len(results)} mutants, unexpected: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
