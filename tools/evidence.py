"""Writes docs/evidence.md from what ran: what the tests launched, and what the grids compiled.

`make evidence` runs the suite with XATTN_EVIDENCE naming a folder, in which each test process
leaves a file (`tests/support/launches.py`), and then

    python -m tools.evidence collect FOLDER    # into results/evidence/<device>.json, and the page
    python -m tools.evidence page              # the page alone, from the committed files
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import torch

from benchmarks.harness.machine import RESULTS, ROOT, provenance, slug

from .machine_code.triton_grid import Row, faults

PAGE = ROOT / "docs" / "evidence.md"
EMULATED = re.compile(r"sm_\d+")
KERNELS = {
    "forward_kernel": "forward",
    "merge_kernel": "merge of splits",
    "delta_kernel": "delta",
    "dq_kernel": "dq, also with dk and dv",
    "dkdv_kernel": "dk and dv",
    "bounds_kernel": "bounds of row tiles",
    "dbias_kernel": "dbias",
    "weights_kernel": "attention weights",
    "mass_kernel": "received mass",
    "select_kernel": "choice of the top keys",
    "candidates_kernel": "choice among the top keys of parts",
    "indices_kernel": "indices of the chosen keys, from bits",
    "bits_kernel": "bits of the chosen keys, from indices",
    "turn_bits_kernel": "bits of the chosen keys, turned by key",
    "gather_forward_kernel": "attention to few keys",
    "gather_dq_kernel": "dq of attention to few keys",
    "gather_dkdv_kernel": "dk and dv of attention to few keys",
    "pool_kernel": "mean keys of blocks",
    "importance_kernel": "importance of blocks",
    "gated_forward_kernel": "gated residual",
    "gated_backward_kernel": "gradients of the gated residual",
    "gated_sums_kernel": "sums of the gradients of gate, weight and bias",
}
CUDA_KERNELS = {
    f"cuda {kernel}": f"{name}, CUDA C++"
    for kernel, name in {
        "cross_attention_forward_kernel": "forward",
        "merge_kernel": "merge of splits",
        "row_terms_kernel": "delta",
        "dq_kernel": "dq",
        "dkdv_kernel": "dk and dv",
        "tile_bounds_kernel": "bounds of row tiles",
        "dbias_kernel": "dbias",
        "sum_splits_kernel": "sums of splits",
        "topk_selection_kernel": "choice of the top keys",
        "topk_indices_kernel": "indices and bits of the chosen keys",
        "gated_forward_kernel": "gated residual",
        "gated_backward_kernel": "gradients of the gated residual",
        "gated_sums_kernel": "sums of the gradients of gate, weight and bias",
    }.items()
}


def collect(folder: Path, device: str) -> Path:
    """Merges what the test processes left in `folder` into one committed file per kind of GPU, or
    one for all processors, on which it makes no difference."""
    launched: dict[str, dict[str, set]] = defaultdict(lambda: defaultdict(set))
    for path in folder.glob("*.json"):
        for kernel, mode, dtype in json.loads(path.read_text()):
            launched[kernel][mode].add(dtype)
    if not launched:
        raise SystemExit(f"{folder} has no file of a test process; set XATTN_EVIDENCE={folder}")
    kernels = {
        kernel: {mode: sorted(dtypes) for mode, dtypes in sorted(modes.items())}
        for kernel, modes in sorted(launched.items())
    }
    name = "cpu" if torch.device(device).type == "cpu" else slug(device)
    path = RESULTS / "evidence" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**provenance(device), "kernels": kernels}, indent=1) + "\n")
    return path


def compiled(kernel: str) -> str:
    """The architectures for which every compiled variant is without a fault, by Triton version."""
    if kernel in CUDA_KERNELS:
        return compiled_by_nvcc(kernel.removeprefix("cuda "))
    versions = defaultdict(list)
    for version, rows in triton_grids().items():
        clean: dict[int, bool] = {}
        for row in rows:
            if row.kernel in (kernel, ""):  # a case that did not compile names no kernel
                clean[row.arch] = clean.get(row.arch, True) and not faults(row)
        versions[", ".join(str(arch) for arch in sorted(clean) if clean[arch])].append(version)
    return "; ".join(
        f"sm_{archs}; Triton {' and '.join(v)}" for archs, v in versions.items() if archs
    )


@lru_cache(None)
def triton_grids() -> dict[str, list[Row]]:
    """The rows of each committed grid, by the version of Triton without its last number."""
    grids = {}
    for path in sorted((RESULTS / "static").glob("compile_grid_triton*.csv")):
        rows = []
        for values in csv.DictReader(path.open()):
            rows.append(Row(**{
                name: values[name] if kind == "str" else int(values[name])
                for name, kind in Row.__annotations__.items()
            }))  # fmt: skip
        grids[re.search(r"triton(\d+\.\d+)", path.name)[1]] = rows
    return grids


def compiled_by_nvcc(kernel: str) -> str:
    from .machine_code import cuda_grid

    rows = [row for row in cuda_grid.load(RESULTS / "static") if row.kernel == kernel]
    faulty = {row.arch for row in rows if row.faults}
    clean = sorted({row.arch for row in rows} - faulty)
    version = rows[0].nvcc.rpartition(".")[0] if rows else ""
    return f"sm_{', '.join(map(str, clean))}; nvcc {version}" if clean else ""


INTRODUCTION = """# Evidence

Generated by `make evidence` from `benchmarks/results/evidence/` and `benchmarks/results/static/`.
The table of kernels says by which means each one was checked, and with which dtypes. {gpus}

| column | what happened | how it is judged |
| --- | --- | --- |
| interpreted | A passing test ran the kernel in Triton's interpreter. | The error against float64 is at most twice that of eager PyTorch in the same dtype, plus a floor by the size of what is summed. |
| emulated | A passing test ran the compiled PTX instruction by instruction on a CPU. | The same rule holds; the emulator also checks bounds, races, reads of unwritten memory and asynchronous copies. |
| compiled ahead of time | Every variant of the kernel in the grid was compiled for the architecture. | No register is spilled, the shared memory fits, and kernels with products use the tensor cores where the dtype allows it. |
| ran on a GPU | A passing test ran the kernel on that device. | The rule of the first row holds. |

## Runs

| machine | torch | Triton | commit | date |
| --- | --- | --- | --- | --- |
"""  # noqa: E501


def evidence_files() -> list[dict]:
    """What is committed of each machine on which the suite ran."""
    return [json.loads(p.read_text()) for p in sorted((RESULTS / "evidence").glob("*.json"))]


def has_gpu(files: list[dict]) -> bool:
    modes = {mode for file in files for kernel in file["kernels"].values() for mode in kernel}
    return any(mode != "interpreter" and not EMULATED.fullmatch(mode) for mode in modes)


def page() -> str:
    """The whole of docs/evidence.md."""
    files = evidence_files()
    gpus = "Nothing has run on a GPU yet, and no speed on one is claimed."
    lines = [INTRODUCTION.format(gpus="" if has_gpu(files) else gpus).rstrip()]
    for file in files:
        facts = (file[name] for name in ("device", "torch", "triton", "commit", "date"))
        lines.append(f"| {' | '.join(facts)} |")
    lines += ["", "## Kernels", "", table(files), "## Compile grids", "", grids()]
    return "\n".join(lines)


def grids() -> str:
    """How many kernels of how many calls the committed Triton grids hold, and their faults."""
    lines = [
        "`make compile-grid` compiles every row of the configuration table for every architecture,",
        "with each flag alone and with all flags together. `make static-report` also counts the",
        "instructions of every main loop, for [static_report.md](static_report.md).",
        "",
        "| Triton | calls | architectures | compiled kernels | with spills or another fault |",
        "| --- | --- | --- | --- | --- |",
    ]
    for version, rows in triton_grids().items():
        calls, archs = {r.case for r in rows}, {r.arch for r in rows}
        faulty = sum(bool(faults(r)) for r in rows)
        lines.append(f"| {version} | {len(calls)} | {len(archs)} | {len(rows)} | {faulty} |")
    return "\n".join(lines) + "\n"


def table(files: list[dict]) -> str:
    """The table of every kernel, from the committed files."""
    lines = [
        "| kernel | interpreted | emulated | compiled ahead of time | ran on a GPU |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kernel, name in (KERNELS | CUDA_KERNELS).items():
        interpreted, emulated, gpus = set(), defaultdict(set), []
        for file in files:
            for mode, dtypes in file["kernels"].get(kernel, {}).items():
                if mode == "interpreter":
                    interpreted.update(dtypes)
                elif EMULATED.fullmatch(mode):
                    emulated[mode].update(dtypes)
                else:
                    gpus.append(f"{mode}, {file['date'][:10]}, {file['commit']}")
        archs = "; ".join(f"{mode}: {', '.join(sorted(d))}" for mode, d in sorted(emulated.items()))
        cells = (", ".join(sorted(interpreted)), archs, compiled(kernel), "; ".join(gpus))
        lines.append(f"| {name} | {' | '.join(cell or 'no' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    found = commands.add_parser("collect")
    found.add_argument("folder", type=Path)
    found.add_argument("--device", default="cpu")
    commands.add_parser("page")
    args = parser.parse_args()
    if args.command == "collect":
        print(collect(args.folder, args.device))
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
