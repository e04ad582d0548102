"""Compiles csrc/ for every architecture and tabulates what the assembler reports of each kernel.

    python -m tools.machine_code.cuda_grid --out benchmarks/results/static

It needs no GPU, but nvcc on PATH. The table has every kernel that the extension ships, with its
registers, stack, spilled bytes and static shared memory.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.harness.machine import ROOT

from .triton_grid import ARCHS

CSRC = ROOT / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))
ENTRY = re.compile(
    r"properties for (?P<symbol>\S+)\s+(?P<stack>\d+) bytes stack frame, "
    r"(?P<spills>\d+) bytes spill.*?\n"
    r".*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?"
)
# each length in a mangled symbol, and the text after it
NAME = re.compile(r"(?<!\d)(?=(?P<length>\d+)(?P<rest>[a-z]\w*))")


@dataclass(frozen=True)
class CudaRow:
    """One kernel of one architecture; `symbol` is its mangled name with all template arguments,
    `code` the result of `code()` when it was compiled."""

    code: str
    nvcc: str
    arch: int
    source: str
    kernel: str
    symbol: str
    registers: int
    stack: int
    spills: int
    shared: int

    @property
    def faults(self) -> list[str]:
        counts = {"bytes of stack": self.stack, "bytes spilled": self.spills}
        return [f"{n} {what}" for what, n in counts.items() if n]


def kernel_of(symbol: str) -> str:
    """The name of the function in a mangled symbol, without namespaces and template arguments."""
    for match in NAME.finditer(symbol):
        name = match["rest"][: int(match["length"])]
        if name.endswith("_kernel"):
            return name
    raise ValueError(f"{symbol} names no kernel")


def function_of(name: str) -> str:
    """The function's name in a C++ expression with namespaces and template arguments."""
    return name.partition("<")[0].rpartition("::")[2]


def source_of(name: str) -> str:
    """C++ source with the kernel of that name alone, and a function `kernel` that returns it."""
    file = next(f for f in CSRC.glob("*.cuh") if f" {function_of(name)}(" in f.read_text())
    return f"""#include "{file.name}"
using namespace xattn;
void* kernel() {{ return (void*)&{name}; }}
"""


def code() -> str:
    """A digest of csrc/ without comments and white space, by which a table of another source is
    recognised."""
    files = sorted(file for kind in ("*.cu", "*.cuh", "*.h") for file in CSRC.glob(kind))
    text = "\n".join(re.sub(r"//.*", "", file.read_text()) for file in files)
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:12]


def compile_source(source: Path, arch: int) -> list[CudaRow]:
    """The rows of the kernels of one file; raises RuntimeError if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v"]
        command += ["-c", str(source), "-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{done.stderr}")
    versions = (code(), nvcc_version())
    return [
        CudaRow(
            *versions, arch, source.name, kernel_of(entry["symbol"]), entry["symbol"],
            *(int(entry[name] or 0) for name in ("registers", "stack", "spills", "shared")),
        )
        for entry in ENTRY.finditer(done.stderr)
    ]  # fmt: skip


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", text)[1]


def path_of(folder: Path) -> Path:
    return folder / "cuda_grid.csv"


def write(rows: list[CudaRow], folder: Path) -> None:
    with path_of(folder).open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(CudaRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            asdict(r) for r in sorted(rows, key=lambda r: (r.source, r.symbol, r.arch))
        )


def load(folder: Path) -> list[CudaRow]:
    types = CudaRow.__annotations__
    with path_of(folder).open() as file:
        return [
            CudaRow(**{n: int(t) if types[n] == "int" else t for n, t in row.items()})
            for row in csv.DictReader(file)
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for cuda_grid.csv")
    args = parser.parse_args()
    tasks = [(source, arch) for source in SOURCES for arch in ARCHS]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for task in pool.map(lambda t: compile_source(*t), tasks) for row in task]
    for row in rows:
        if row.faults:
            print(f"sm_{row.arch} {row.symbol}: {', '.join(row.faults)}")
    if args.out:
        write(rows, args.out)
    n_faults = sum(bool(row.faults) for row in rows)
    print(f"{len(rows)} kernels, {n_faults} with faults")
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
