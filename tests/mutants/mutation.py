"""A mutation of the kernels' source that the tests must notice; `mutate.py` runs the list.

A mutation that changes no result for any input says why in `equivalent`, and must survive.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

parsed = lru_cache(16)(ast.parse)


def find(name: str, module: ast.Module) -> ast.stmt:
    """The function or class of that name at the top of a module."""
    (node,) = (n for n in module.body if getattr(n, "name", "") == name)
    return node


def find_in_cpp(name: str, source: str) -> tuple[int, int]:
    """(start, end) of a function: from its name to its last brace. An overload's name is with its
    parameters."""
    parameters = "" if "(" in name else r"\([^;{}]*\)"
    head = re.compile(rf"\b{re.escape(name)}{parameters}[^;{{}}()]*(:[^;]*?)?{{")
    (found,) = (
        f for f in head.finditer(source)
        if "return" not in source[source.rfind("\n", 0, f.start()) : f.start()]
    )  # fmt: skip
    depth = 0
    for brace in re.compile("[{}]").finditer(source, found.end() - 1):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return found.start(), brace.end()
    raise ValueError(f"{name} has no last brace")


@lru_cache
def test_file(name: str) -> str:
    """The path of test_<name>.py below the repository."""
    (path,) = (ROOT / "tests").glob(f"*/test_{name}.py")
    return str(path.relative_to(ROOT))


@dataclass(frozen=True)
class Mutant:
    """`before`, which occurs once in `function` of a file, becomes `after`. The file is
    `folder`/`file`.py, or .cuh in csrc.

    `seen_by`: the tests to run first. A word is a case of `test_cross_attention.py::test_triton`,
    in float32 unless "-float16" follows; what holds "::" is a test without the words "test_".
    """

    name: str
    file: str
    function: str
    before: str
    after: str
    breaks: str
    seen_by: tuple[str, ...]
    mode: str = "interpreter"  # or "emulated": only compiled code shows it
    equivalent: str = ""
    folder: str = "triton_kernels"

    @property
    def path(self) -> Path:
        return ROOT / self.folder / f"{self.file}{'.cuh' if self.in_cpp else '.py'}"

    @property
    def place(self) -> str:
        """For people; a folder where a file's name is not enough."""
        inside = "" if self.folder == "triton_kernels" else f"{self.folder}/"
        return f"{inside}{self.file}.{self.function}"

    @property
    def in_cpp(self) -> bool:
        return self.folder == "csrc"

    @property
    def module(self) -> str:
        """As it is imported; of csrc what compiles it in tests."""
        if self.in_cpp:
            return "support.cuda_emulation"
        inside = "xattn_kernels/" * (self.folder == "triton_kernels")
        return f"{inside}{self.folder}/{self.file}".replace("/", ".")

    def apply(self, source: str) -> str:
        """The mutated source; raises where the snippet is not there exactly once."""
        first, last = self.extent(source)
        body = source[first:last]
        if body.count(self.before) != 1:
            raise ValueError(
                f"{self.name}: {self.before!r} is {body.count(self.before)} times in "
                f"{self.function} of {self.path.name}, not once"
            )
        return source[:first] + body.replace(self.before, self.after) + source[last:]

    def extent(self, source: str) -> tuple[int, int]:
        """Where `function` begins and ends."""
        if self.in_cpp:
            return find_in_cpp(self.function, source)
        lines, node = source.splitlines(keepends=True), find(self.function, parsed(source))
        first = sum(map(len, lines[: node.lineno - 1]))
        return first, first + sum(map(len, lines[node.lineno - 1 : node.end_lineno]))

    def program(self, source: str) -> str:
        """What the function does, without its layout."""
        if self.in_cpp:
            return "".join(source[slice(*self.extent(source))].split())
        return ast.dump(find(self.function, parsed(source)))

    def selected(self) -> list[str]:
        """`seen_by` as pytest names them."""
        found = []
        for test in self.seen_by:
            if "::" in test:
                file, name = test.split("::")
                found.append(f"{test_file(file)}::test_{name}")
            else:
                case, _, dtype = test.partition("-")
                case = f"interpreter-{case}-{dtype or 'float32'}"
                found.append(f"tests/ops/test_cross_attention.py::test_triton[{case}]")
        return found


def mutants(file: str, function: str, *table: tuple, **fields) -> list[Mutant]:
    """Columns: name, before, after, what it breaks, the cases or tests that should see it."""
    return [
        Mutant(name, file, function, before, after, breaks, tuple(seen_by.split()), **fields)
        for name, before, after, breaks, seen_by in table
    ]


# tests of triton_kernels that mutants name
VALUES, AUTOGRAD = "cross_attention_values::", "cross_attention_autograd::"
PADDING = VALUES + "padding_may_hold_anything"
EMPTY_ROWS = VALUES + "what_is_not_finite_stays_out_of_rows_without_keys"
SHARED = AUTOGRAD + "loops_shared_by_several_programs"
SPLIT = SHARED + "[interpreter-3-plain-short]"
SPLIT_LOW = SHARED + "[interpreter-3-bias-values-softcap-short]"
SPLIT_WHOLE = SHARED + "[interpreter-2-mask-Nk-returns-long]"
SPLIT_SCALE = SHARED + "[interpreter-4-layout-Hq-Hkv-scale-mask-short]"
WHOLE_TILES = "cross_attention_emulated::whole_tiles"
RUNS = "tiles::runs_hold_every_row_tile_of_their_part"
FLAG, WEIGHTS = "cross_attention_emulated::flag", "attention_weights::"
