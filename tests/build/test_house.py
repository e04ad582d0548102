"""What holds the repository together: imports, packaging, file sizes, documentation that runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import types
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import xattn_kernels
from support.checkout import KERNELS, PACKAGE, ROOT, python_in, run_python
from tools import evidence

README = (ROOT / "README.md").read_text()
BUILT = {"build/", "dist/"}  # what a command makes, and a checkout may lack
# Imports point from a higher floor to a lower one, or stay on their own.
FLOORS = {
    "masks": 0, "reference": 0, "core": 1, "triton_kernels": 2, "cuda_kernels": 2,
    "torch_kernels": 2, "ops": 3, "losses": 4, "modules": 4, "stability": 4, "distributed": 5,
    "integrations": 5, "viz": 5, "__main__": 6,
}  # fmt: skip


def floor_of(module: str) -> int:
    return FLOORS[module.partition(".")[0]]


def module_files() -> dict[str, Path]:
    """Module name below `xattn_kernels` -> file; a package's name stands for its __init__."""
    found = {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in python_in(PACKAGE)}
    found |= {f"triton_kernels.{f.stem}": f for f in python_in(KERNELS)}
    return {name.removesuffix(".__init__"): file for name, file in found.items()}


def imports_of(module: str, file: Path) -> tuple[set[str], set[str]]:
    """(modules of this package, names of other top-level packages) that `file` imports anywhere."""
    parts = ["xattn_kernels", *module.split(".")]
    here = parts if file.stem == "__init__" else parts[:-1]
    names = set()
    tree = ast.parse(file.read_text())
    for_annotations = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_annotations:  # it imports nothing when the program runs
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    inside = {n.partition(".")[2] for n in names if n.split(".")[0] == "xattn_kernels"}
    known = module_files()
    inside = {n if n in known else n.rpartition(".")[0] for n in inside}
    return inside, {n.split(".")[0] for n in names} - {"xattn_kernels"}


def test_imports_point_down():
    graph = {}
    for module, file in module_files().items():
        if module == "__init__":
            continue
        inside, _ = imports_of(module, file)
        assert module == "__main__" or "" not in inside, f"{module} imports the package's top"
        graph[module] = inside - {""}
        up = {other for other in graph[module] if floor_of(other) > floor_of(module)}
        assert not up, f"{module} imports upwards: {up}"
    assert not graph["masks"], f"masks stands alone, but imports {graph['masks']}"
    # raises CycleError
    list(TopologicalSorter(graph).static_order())


def test_no_backend_imports_another():
    """One may be left out, or replaced, without the others."""
    backends = {"triton_kernels", "cuda_kernels", "torch_kernels"}
    for module, file in module_files().items():
        own = module.partition(".")[0]
        if own in backends:
            inside, _ = imports_of(module, file)
            others = {m for m in inside if m.partition(".")[0] in backends - {own}}
            assert not others, f"{module} imports {others}"


def test_kernels_import_only_torch_triton_and_each_other():
    for module, file in module_files().items():
        if not module.startswith("triton_kernels"):
            continue
        inside, outside = imports_of(module, file)
        allowed = ("triton_kernels", "core")
        assert all(name.startswith(allowed) for name in inside), (module, inside)
        outside -= sys.stdlib_module_names | {"torch", "triton"}
        assert not outside, f"{file.name} imports {outside}"


def test_import_and_call_without_triton_and_gpu():
    out = run_python(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch, xattn_kernels\n"
        "q = torch.ones(1, 2, 3, 16)\n"
        "assert torch.equal(xattn_kernels.cross_attention(q, q, q), q)\n"
        "xattn_kernels.explain(xattn_kernels.cross_attention, q, q, q)",
        CUDA_VISIBLE_DEVICES="",
    )
    assert "takes 'torch'" in out and "triton is not installed" in out


@pytest.mark.parametrize("folder, limit", [("triton_kernels", 500), ("tests", 300)])
def test_files_stay_within_their_budget(folder, limit):
    lengths = {f.name: len(f.read_text().splitlines()) for f in python_in(ROOT / folder)}
    assert not {name: n for name, n in lengths.items() if n > limit}


@pytest.mark.slow
def test_tests_are_collected_without_hypothesis():
    """A machine with a GPU and no network may lack it."""
    out = run_python(
        "-c",
        "import sys; sys.modules['hypothesis'] = None\n"
        "import pytest\n"
        "sys.exit(pytest.main(['--collect-only', '-qq', '-p', 'no:cacheprovider',\n"
        f"    '--rootdir', {str(ROOT)!r}, {str(ROOT / 'tests')!r}]))",
        PYTHONPATH=str(ROOT),
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )
    assert "test_cross_attention.py" in out and "drawn by hypothesis" in out


def test_environment_report_runs():
    out = run_python("-m", "xattn_kernels")
    for word in ("xattn-kernels 0", "python", "torch", "triton", "cpu:", "torch", "eager"):
        assert word in out


def test_readme_examples_run():
    first, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in first.splitlines() if line.strip()]) <= 10
    run_python("-c", "\n".join([first, *others]))


def test_readme_is_read_in_two_minutes():
    assert len(README.splitlines()) <= 130


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "mutants.md")  # names functions, and is written by `make mutants`


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documents_name_only_what_exists(page):
    """Relative links, and paths in backticks that begin with a folder of the repository."""
    code = r"```.*?```|^    [^\n]*$"
    text = re.sub(code, "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    named = [page.parent / link for link in links if link and "://" not in link]
    for path in re.findall(r"`([\w.-]+/[\w./-]*)`", text):
        if (ROOT / path.partition("/")[0]).is_dir() and path not in BUILT:
            named.append(ROOT / path)
    assert not [str(path) for path in named if not path.exists()]


def finding_tables() -> list[tuple[str, str, str]]:
    """(op, heading, cell) of the two tables of docs/finding.md that have a row for each op."""
    cells, head = [], []
    for line in (ROOT / "docs" / "finding.md").read_text().splitlines():
        row = line.strip("| ").split(" | ")
        if line.startswith("| op |"):
            head = row
        elif not line.startswith("|"):
            head = []
        elif head and not line.startswith("| ---"):
            cells += [(row[0].strip("`"), *pair) for pair in zip(head[1:], row[1:], strict=True)]
    return cells


def test_every_part_of_an_op_is_where_the_page_says():
    functions = {
        node.name
        for node in ast.parse((PACKAGE / "reference.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    missing, cells = [], finding_tables()
    for op, heading, cell in cells:
        (folder,) = re.findall("`([^`]+)`", heading)
        for name in re.findall("`([^`]+)`", cell):
            if folder.endswith("reference.py"):
                present = name in functions
            else:
                present = name in ("mask", "row_mask") or (ROOT / folder / name).is_file()
            missing += [] if present else [(op, folder, name)]
    assert not missing
    headings = {heading for _, heading, _ in cells}
    assert len(headings) == 10 and len({op for op, _, _ in cells}) == 8


def test_the_page_has_every_op():
    listed = {op for op, _, _ in finding_tables()}
    assert listed == {f.stem for f in python_in(PACKAGE / "ops")} - {"__init__"}


def test_ci_runs_the_readme_test_command():
    assert "make test\n" in README
    assert "make test\n" in (ROOT / ".ci" / "run").read_text()


def public_members(thing) -> dict:
    """The mask constructors of a module, the methods and properties of a class."""
    if inspect.ismodule(thing):
        return {name: getattr(thing, name) for name in thing.__all__}
    documented = (classmethod, property, staticmethod, types.FunctionType)
    members = vars(thing).items() if inspect.isclass(thing) else ()
    return {k: v for k, v in members if not k.startswith("_") and isinstance(v, documented)}


def test_every_public_name_has_a_docstring():
    named = {name: getattr(xattn_kernels, name) for name in xattn_kernels.__all__}
    for name, thing in list(named.items()):
        named |= {f"{name}.{member}": value for member, value in public_members(thing).items()}
    assert not [name for name, thing in named.items() if not inspect.getdoc(thing)]


def test_evidence_page_is_what_the_committed_files_say():
    """`make evidence` writes it; a claim made by hand fails here."""
    assert evidence.PAGE.read_text() == evidence.page()


def functions_in(*folders: Path) -> list[tuple[str, ast.FunctionDef]]:
    """("file:line name", definition) of every function and method."""
    files = [file for folder in folders for file in python_in(folder)]
    return [
        (f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node)
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def is_kernel(node: ast.FunctionDef) -> bool:
    """Whether a function is compiled and launched, and no helper of such."""
    jitted = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    return jitted and node.name.endswith("_kernel")


# The drop-in for nn.MultiheadAttention has to take what torch's module takes, in its order.
AS_IN_TORCH = re.compile(r"modules/multihead_attention\.py:\d+ __init__$")


def test_no_signature_has_more_than_eight_positional_parameters():
    counts = {}
    for name, node in functions_in(PACKAGE, KERNELS):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        if not is_kernel(node) and not AS_IN_TORCH.search(name):
            counts[name] = len([n for n in names if n not in ("self", "cls")])
    assert not {name: n for name, n in counts.items() if n > 8}


def test_no_kernel_has_more_than_sixteen_parameters_or_one_that_it_does_not_read():
    kernels = {name: node for name, node in functions_in(KERNELS) if is_kernel(node)}
    assert len(kernels) >= 20
    for name, node in kernels.items():
        parameters = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
        assert len(parameters) <= 16, f"{name} has {len(parameters)} parameters"
        read = {n.id for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name)}
        assert set(parameters) <= read, f"{name} does not read {set(parameters) - read}"


def test_no_module_is_hidden_by_a_function_of_its_name():
    for name, file in module_files().items():
        package, _, leaf = f"xattn_kernels.{name}".rpartition(".")
        if name != "__init__" and file.stem != "__init__" and name != "__main__":
            importlib.import_module(f"{package}.{leaf}")
            held = getattr(sys.modules[package], leaf)
            assert inspect.ismodule(held), f"{package}.{leaf} is {type(held).__name__}"


VAGUE = {"found", "there", "own", "of", "at", "made"}


def test_names_say_what_a_value_is():
    named = set()
    for file in (*python_in(PACKAGE), *python_in(KERNELS)):
        for node in ast.walk(ast.parse(file.read_text())):
            names = {node.id} if isinstance(node, ast.Name) else set()
            names |= {node.arg} if isinstance(node, ast.arg) else set()
            named |= {f"{file.relative_to(ROOT)}:{node.lineno} {n}" for n in names & VAGUE}
    assert not named
