"""The machine code of every kernel as numbers: resources, and the main loop's instructions by unit.

Every case of the compile grid is compiled once, without a GPU; the same pass can write the grid's
table. `sass` defines the main loop and which of its instructions every iteration executes,
`ceilings` defines occupancy and the bound. The measure that compares
tiles of different sizes is instructions per 1,000 query-key pairs: the warp instructions of one
iteration, of all warps of a block, over the pairs that the iteration covers.

    python -m tools.machine_code.triton_report --jobs 2 --out benchmarks/results/static

With only some of the grid selected the rows of the rest of the file stay as they are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

from benchmarks.harness import machine

from . import triton_grid as compile_grid
from .ceilings import blocks_per_multiprocessor, bound, cycles
from .sass import (
    Instruction,
    MainLoop,
    count_units,
    disassemble,
    heaviest_loops,
    main_loop,
    parse_ptx,
    parse_sass,
)
from .triton_grid import (
    ARCHS,
    Case,
    cases,
    compile_kernels,
    faults,
    resources,
)

RESULTS = machine.RESULTS / "static"
# for one tile [block_q, block_k] the number of products over D, and of those over Dv
PRODUCTS = {
    "forward": (1, 1),
    "dq": (2, 1),
    "fused": (3, 2),
    "dkdv": (2, 2),
    "weights": (1, 0),
    "mass": (1, 0),
    "dbias": (1, 1),
    "select": (1, 0),
    "gather_dkdv": (2, 2),
}
PTX_TENSOR = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
PARTS = ("always", "one_warp", "sometimes", "cut")  # of a main loop, see `sass`
GROWTH = 1.03  # the growth of instructions per pair beyond which a kernel counts as worse


@dataclass(frozen=True)
class KernelReport:
    """The numbers of one kernel of one case, in the order of the file."""

    arch: int
    case: str
    kernel: str
    registers: int
    spills: int  # bytes stored and loaded
    stack: int  # bytes
    shared: int  # bytes
    blocks_per_sm: int
    num_warps: int
    num_stages: int
    block_q: int = 0
    block_k: int = 0
    tiles: int = 0  # of one iteration; 0 for a kernel without tiles of query-key pairs
    per_1000: float = 0.0  # instructions per 1,000 pairs of a tile that no interval cuts
    per_1000_cut: float = 0.0  # of a tile that is cut
    work: float = 0.0  # multiply-adds of tensor cores over those needed; 0 where it does not show
    bound: float = 0.0  # fraction of the tensor cores' peak; 0 without tensor cores
    limiter: str = ""  # the unit that sets it
    always: dict[str, int] = field(default_factory=dict)  # instructions of one iteration per unit
    one_warp: dict[str, int] = field(default_factory=dict)
    sometimes: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)  # of the loop over tiles that are cut

    @property
    def key(self) -> tuple[int, str, str]:
        return self.arch, self.case, self.kernel


def kernel_name(name: str, kernel) -> str:
    """The kernel's name in the configuration table: that of the function without "_kernel"."""
    source = kernel.src
    names = [source.fn.arg_names[index] for (index, *_), v in source.constants.items() if v is None]
    if name == "dq_kernel" and "dk" not in names:
        return "fused"
    return name.removesuffix("_kernel")


def tiles_per_iteration(loop: MainLoop, ptx: str) -> int:
    """The number of times that the assembler unrolled the loop: its products over those in PTX."""

    def is_product(i: Instruction) -> bool:
        return i.opcode.startswith(PTX_TENSOR)

    code = parse_ptx(ptx)
    source = next(iter(heaviest_loops(code, is_product)), None)
    if source is None:
        return 1
    before = sum(is_product(i) for n in source.exclusive for i in code.blocks[n])
    after = sum(i.unit == "tensor" for i in loop.always + loop.one_warp)
    return max(1, round(after / before))


def loop_fields(arch: int, loop: MainLoop, tile: tuple, num_warps: int, ptx: str) -> dict:
    """The fields that describe a main loop; `tile` is (block_q, block_k, multiply-adds, tf32)."""
    block_q, block_k, macs, tf32 = tile
    counts = {part: count_units(getattr(loop, part)) for part in PARTS}
    if not macs:
        return counts
    tiles = tiles_per_iteration(loop, ptx)
    issued = len(loop.always) * num_warps + len(loop.one_warp)
    cut = issued + len(loop.sometimes) * num_warps
    if loop.cut:
        cut = len(loop.cut) * num_warps + len(loop.one_warp)
    thousands = tiles * block_q * block_k / 1000
    numbers = counts | {
        "tiles": tiles,
        "per_1000": round(issued / thousands, 1),
        "per_1000_cut": round(cut / thousands, 1),
    }
    if any(i.unit == "tensor" for i in loop.always + loop.one_warp):
        unit_cycles = cycles(arch, loop, num_warps, tiles * macs, tf32)
        fraction, limiter = bound(arch, unit_cycles, tiles * macs, tf32)
        numbers |= {"bound": round(fraction, 3), "limiter": limiter}
        if not loop.one_warp:
            done = sum(i.macs for i in loop.always) * num_warps
            numbers["work"] = round(done / (tiles * macs), 3)
    return numbers


def describe(arch: int, case: str, name: str, kernel, tile: tuple, log: str) -> KernelReport:
    """The report of one compiled kernel; `tile` as in `loop_fields`."""
    loop = main_loop(parse_sass(disassemble(kernel.asm["cubin"])))
    used, metadata = resources(log), kernel.metadata
    stack = re.search(r"(\d+) bytes stack frame", log)
    of_loop = {} if loop is None else loop_fields(
        arch, loop, tile, metadata.num_warps, kernel.asm["ptx"]
    )  # fmt: skip
    return KernelReport(
        arch=arch, case=case, kernel=name, **used, stack=int(stack[1]) if stack else 0,
        shared=metadata.shared, num_warps=metadata.num_warps, num_stages=metadata.num_stages,
        blocks_per_sm=blocks_per_multiprocessor(
            arch, metadata.num_warps, used["registers"], metadata.shared, metadata.tmem_size
        ),
        block_q=tile[0], block_k=tile[1], **of_loop,
    )  # fmt: skip


def report_case(task: tuple[int, Case]) -> tuple[list[compile_grid.Row], list[KernelReport]]:
    """The rows of both tables for one case on one architecture, from one compilation."""
    arch, case = task
    rows, compiled = compile_kernels(task)
    reports = []
    for function, kernel, options, log in compiled:
        name = kernel_name(function, kernel)
        over_d, over_dv = PRODUCTS.get(name, (0, 0))
        block_q, block_k = options.get("BLOCK_Q", 0), options.get("BLOCK_K", 0)
        macs = over_d * case.D + over_dv * case.Dv
        tile = (block_q, block_k, block_q * block_k * macs, options.get("PRECISION") == "tf32")
        reports.append(describe(arch, case.name, name, kernel, tile, log))
    return rows, reports


def regressions(old: KernelReport, new: KernelReport) -> list[str]:
    """Sentences on what a change has made worse in a kernel."""
    where, worse = f"sm_{new.arch} {new.case} {new.kernel}", []
    if new.spills > old.spills:
        worse.append(f"{where}: {old.spills} spilled bytes became {new.spills}")
    products, left = (r.always.get("tensor", 0) + r.one_warp.get("tensor", 0) for r in (old, new))
    if products and not left:
        worse.append(f"{where}: the main loop lost its {products} tensor-core instructions")
    if old.cut and not new.cut:
        worse.append(f"{where}: the loop over whole tiles is gone, every tile is masked")
    tiles = (("whole", old.per_1000, new.per_1000), ("cut", old.per_1000_cut, new.per_1000_cut))
    counts = [(f"per 1,000 pairs of a {tile} tile", *pairs) for tile, *pairs in tiles]
    if not products:  # there are none, or as in dbias a branch skips them in some turns
        totals = (
            sum(n for part in (r.always, r.one_warp, r.sometimes) for n in part.values())
            for r in (old, new)
        )
        counts = [("per turn of the main loop", *totals)]
    for what, before, after in counts:
        if after > before * GROWTH:
            worse.append(
                f"{where}: {before:g} instructions {what} became {after:g}, {old.always} became "
                f"{new.always}"
            )
    return worse


def all_regressions(old: list[KernelReport], new: list[KernelReport]) -> list[str]:
    """The regressions of every kernel; those with one key, such as the two dq of attention weights,
    are matched by their order."""
    before = defaultdict(list)
    for report in old:
        before[report.key].append(report)
    worse = []
    for report in new:
        if before[report.key]:
            worse += regressions(before[report.key].pop(0), report)
    return worse


def report_file(folder: Path, triton: str) -> Path:
    return folder / f"static_report_triton{triton}.json"


def read(path: Path) -> list[KernelReport]:
    """The rows of a report, none where there is no file."""
    return [KernelReport(**row) for row in json.loads(path.read_text())] if path.exists() else []


def write(reports: Iterable[KernelReport], path: Path) -> None:
    """Writes one row a line, without fields that have their default."""
    optional = {
        f.name: f.default_factory() if f.default is MISSING else f.default
        for f in fields(KernelReport)
        if f.default is not MISSING or f.default_factory is not MISSING
    }
    lines = []
    for report in sorted(reports, key=lambda report: report.key):
        row = {k: v for k, v in asdict(report).items() if k not in optional or v != optional[k]}
        lines.append(json.dumps(row, separators=(",", ":")))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def merge(old: list[KernelReport], new: list[KernelReport]) -> list[KernelReport]:
    """`new`, and those rows of `old` whose case is in the grid and was not compiled again."""
    names = {case.name for case in cases()}
    again = {(report.arch, report.case) for report in new}
    kept = [r for r in old if r.case in names and (r.arch, r.case) not in again]
    return kept + new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHS))
    parser.add_argument("--case", nargs="*", help="only the cases of these names")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--every", type=int, default=1, help="only each n-th task: a sample")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for static_report_triton<version>.json")
    parser.add_argument(
        "--grid", action="store_true", help="write the compile grid's table as well"
    )
    args = parser.parse_args()
    named = [c for c in cases() if args.match in c.name and (not args.case or c.name in args.case)]
    tasks = [(arch, c) for c in named for arch in args.arch][:: args.every]
    rows, reports, n_faults = [], [], 0
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for n, (grid, new) in enumerate(pool.imap_unordered(report_case, tasks), 1):
            rows += grid
            reports += new
            for row in grid:
                if why := faults(row):
                    n_faults += 1
                    print(f"sm_{row.arch} {row.case} {row.kernel}: {'; '.join(why)}", flush=True)
            print(f"\r{n}/{len(tasks)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if args.out:
        path = report_file(args.out, rows[0].triton)
        old = read(path)
        for worse in all_regressions(old, reports):
            print(worse)
        write(merge(old, reports), path)
        if args.grid:
            compile_grid.write(rows, args.out)
    print(f"{len(reports)} rows, kernels of {len(tasks)} calls, {n_faults} with faults")
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
