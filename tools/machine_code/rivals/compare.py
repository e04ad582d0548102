"""Counts of our, the textbook's and FlexAttention's kernels, of one kind and at the same shapes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from xattn_kernels.triton_kernels.configs import ANY, HALF, lookup

from ..sass import disassemble, parse_sass, tensor_loops
from ..triton_grid import compile_only, resources
from ..triton_report import (
    PRODUCTS,
    RESULTS,
    loop_fields,
    report_file,
)
from ..triton_report import read as read_report

KERNELS = ("forward", "dq", "dkdv")
WIDTHS = (64, 128)
OURS = "many2048-D{D}-Dv{D}"


@dataclass(frozen=True)
class RivalRow:
    """One kernel of one provider; instructions per 1,000 pairs of full and of masked tiles."""

    arch: int
    D: int
    kernel: str
    provider: str
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int
    spills: int
    per_1000: float
    per_1000_masked: float
    bound: float
    limiter: str
    always: dict[str, int]


def rows_of_ours(arch: int, D: int) -> Iterator[RivalRow]:
    """Our rows, from the report's case of many queries; tiles that intervals cut are masked."""
    import triton

    for report in read_report(report_file(RESULTS, triton.__version__)):
        if report.kernel in KERNELS and (report.arch, report.case) == (arch, OURS.format(D=D)):
            fields = {k: v for k, v in asdict(report).items() if k in RivalRow.__annotations__}
            yield RivalRow(**fields, D=D, provider="ours", per_1000_masked=report.per_1000_cut)


def row_of_loops(arch: int, D: int, kernel: str, provider: str, compiled, tile: tuple, log: str):
    """The row of a compiled kernel, None if no loop does the multiply-adds of a tile.

    The shortest such loop stands for full tiles, the longest one for masked tiles.
    """
    block_q, block_k, num_warps, num_stages = tile
    macs = sum(PRODUCTS[kernel]) * D * block_q * block_k
    candidates = [
        loop_fields(arch, loop, (block_q, block_k, macs, False), num_warps, compiled.asm["ptx"])
        for loop in tensor_loops(parse_sass(disassemble(compiled.asm["cubin"])))
    ]
    whole_tiles = [fields for fields in candidates if fields["work"] == 1.0]
    if not whole_tiles:
        return None
    full, masked = whole_tiles[0], whole_tiles[-1]
    return RivalRow(
        arch, D, kernel, provider, *tile, **resources(log), per_1000=full["per_1000"],
        per_1000_masked=masked["per_1000"] if masked is not full else 0.0,
        bound=full["bound"], limiter=full["limiter"], always=full["always"],
    )  # fmt: skip


def textbook_row(arch: int, D: int, kernel: str, tile: tuple, causal: bool) -> RivalRow:
    """The row of one textbook kernel, compiled with this tile."""
    import torch

    from . import textbook

    def empty(rows: int):
        return torch.empty(16, rows, D, dtype=torch.bfloat16, device="meta")

    q, k, v, lse = empty(4096), empty(4096), empty(4096), empty(4096)[:, :, 0].float()
    block_q, block_k, num_warps, num_stages = tile
    options = dict(
        BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages
    )  # fmt: skip
    with compile_only(arch) as compiled:
        if kernel == "forward":
            textbook.forward(q, k, v, 0.125, causal, **options)
        else:
            getattr(textbook, kernel)(q, q, lse, q, k, v, 0.125, causal, **options)
    ((_, machine_code, _, log),) = compiled
    return row_of_loops(arch, D, kernel, "textbook", machine_code, tile, log)


def rows_of_textbook(arch: int, D: int) -> Iterator[RivalRow]:
    """The textbook's rows, with our tiles so that the code alone differs."""
    for kernel in KERNELS:
        ours = lookup(kernel, arch, D, D, HALF, True, ANY)
        tile = (ours.block_q, ours.block_k, ours.num_warps, ours.num_stages)
        dense, causal = (textbook_row(arch, D, kernel, tile, causal=c) for c in (False, True))
        yield replace(dense, per_1000_masked=causal.per_1000_masked)


def rows_of_flex(arch: int, D: int) -> Iterator[RivalRow]:
    """FlexAttention's rows in its default configuration; dq and dkdv are loops of one kernel."""
    from . import flex

    forward, backward = flex.compile_kernels(arch, D)
    sources = {
        "forward": (forward, "BLOCK_M", "BLOCK_N"),
        "dq": (backward, "BLOCK_M2", "BLOCK_N2"),
        "dkdv": (backward, "BLOCK_M1", "BLOCK_N1"),
    }
    for kernel, ((constants, compiled, options, log), rows, keys) in sources.items():
        tile = (constants[rows], constants[keys], options["num_warps"], options["num_stages"])
        yield row_of_loops(arch, D, kernel, "flex", compiled, tile, log)


PROVIDERS = {"ours": rows_of_ours, "textbook": rows_of_textbook, "flex": rows_of_flex}


def compare(archs: list[int], widths: list[int]) -> Iterator[list[RivalRow]]:
    """The rows of one provider, architecture and width at a time."""
    for D, arch, provider in itertools.product(widths, archs, PROVIDERS):
        yield list(PROVIDERS[provider](arch, D))


def merge(old: list[RivalRow], new: list[RivalRow]) -> list[RivalRow]:
    """`new` and the other rows of `old`, in the order of the tables."""
    order = {name: n for n, name in enumerate([*KERNELS, *PROVIDERS])}
    by_key = {(r.arch, r.D, order[r.kernel], order[r.provider]): r for r in [*old, *new]}
    return [by_key[key] for key in sorted(by_key)]


def rivals_file(folder: Path, triton: str) -> Path:
    return folder / f"rivals_triton{triton}.json"


def read(path: Path) -> tuple[list[RivalRow], dict[str, str]]:
    """The rows, and the versions of torch and Triton that made them; empty without a file."""
    record = json.loads(path.read_text()) if path.exists() else {"rows": [], "versions": {}}
    return [RivalRow(**row) for row in record["rows"]], record["versions"]


def write(rows: list[RivalRow], versions: dict[str, str], path: Path) -> None:
    """Writes the versions, then one row a line."""
    lines = ",\n".join(json.dumps(asdict(row), separators=(",", ":")) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"versions":{json.dumps(versions)},"rows":[\n{lines}\n]}}\n')
