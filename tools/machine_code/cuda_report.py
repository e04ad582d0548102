"""The machine code of the CUDA kernels as numbers, in the terms of `triton_report`.

    python -m tools.machine_code.cuda_report --out benchmarks/results/static

It counts plain bfloat16 attention of width 64, forward and backward, and the choice of top keys;
wider kernels skip columns by branches, so no single way through their loops is the one that runs.
The blocks and the shared memory of a kernel are those of a call's plan. No GPU is needed, but nvcc
on PATH and Triton's disassembler. The pairs of an iteration follow from its products.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from xattn_kernels import KeyInterval, cross_attention, topk_attention
from xattn_kernels.cuda_kernels import launch

from . import cuda_grid
from .ceilings import blocks_per_multiprocessor, bound, cycles
from .sass import (
    count_units,
    disassemble,
    main_loop,
    parse_sass,
)
from .triton_grid import ARCHS
from .triton_report import (
    PARTS,
    KernelReport,
    read,
    write,
)

CASE, WIDTH = "cuda-D64", 64
PRODUCTS = {"cross_attention_forward": 2, "dq": 3, "dkdv": 4, "topk_selection": 1}


def plans() -> dict[str, tuple[int, int]]:
    """(warps, dynamic shared memory) of the kernels of PRODUCTS in a call, by C++ name."""
    launches = {}

    def note(op, params, device) -> None:
        for name, _, block, shared, _ in getattr(launch.extension(), f"{op}_plan")(params):
            if cuda_grid.function_of(name).removesuffix("_kernel") in PRODUCTS:
                launches[name] = (block[0] // 32, shared)

    q, k, v = (torch.zeros(1, 1, 64, WIDTH, dtype=torch.bfloat16) for _ in "qkv")
    bounds = torch.tensor([0, 64], dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with (
        mock.patch.dict(os.environ, XATTN_CUDA_ON_CPU="1"),
        mock.patch.object(launch, "submit", note),
    ):
        out = cross_attention(*leaves, mask=KeyInterval(*bounds), backend="cuda")
        torch.autograd.grad(out, leaves, out.detach())
        topk_attention(q.detach(), k.detach(), v.detach(), 8, backend="cuda")
    # the attention to the chosen keys is another variant
    return {name: plan for name, plan in launches.items() if "false" not in name}


def report(arch: int, name: str, num_warps: int, dynamic: int) -> KernelReport:
    """The report of one kernel, with `dynamic` bytes of dynamic shared memory."""
    kernel = cuda_grid.function_of(name).removesuffix("_kernel")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        source.write_text(cuda_grid.source_of(name))
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
        command += ["-I", str(cuda_grid.CSRC), str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} for sm_{arch}:\n{done.stderr}")
        loop = main_loop(parse_sass(disassemble(cubin.read_bytes())))
    used = cuda_grid.ENTRY.search(done.stderr)
    registers, shared = int(used["registers"]), int(used["shared"] or 0) + dynamic
    products = sum(i.macs for i in loop.always) * num_warps
    pairs = products // (PRODUCTS[kernel] * WIDTH)
    whole = len(loop.always) * num_warps
    fraction, limiter = bound(arch, cycles(arch, loop, num_warps, products, False), products, False)
    return KernelReport(
        arch=arch, case=CASE, kernel=kernel, registers=registers,
        spills=int(used["spills"]), stack=int(used["stack"]), shared=shared,
        blocks_per_sm=blocks_per_multiprocessor(arch, num_warps, registers, shared, 0),
        num_warps=num_warps, num_stages=2, block_q=16 * num_warps,
        block_k=pairs // (16 * num_warps), tiles=1, per_1000=round(whole * 1000 / pairs, 1),
        per_1000_cut=round((whole + len(loop.sometimes) * num_warps) * 1000 / pairs, 1),
        work=1.0, bound=round(fraction, 3), limiter=limiter,
        **{part: count_units(getattr(loop, part)) for part in PARTS},
    )  # fmt: skip


def path_of(folder: Path) -> Path:
    return folder / f"cuda_report_nvcc{cuda_grid.nvcc_version()}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for cuda_report_nvcc<version>.json")
    args = parser.parse_args()
    if launch.extension() is None:
        print("the package is built without its CUDA kernels, whose plans this needs")
        return 2
    tasks = [(arch, name, *plan) for name, plan in plans().items() for arch in args.arch]
    with ThreadPoolExecutor(args.jobs) as pool:
        reports = list(pool.map(lambda task: report(*task), tasks))
    for r in reports:
        print(f"sm_{r.arch} {r.kernel}: {r.per_1000} / {r.per_1000_cut}, {r.bound:.0%} {r.limiter}")
    if args.out:
        old = [r for r in read(path_of(args.out)) if r.arch not in args.arch]
        write([*old, *reports], path_of(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
