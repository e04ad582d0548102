"""The README's evidence table, made of what ran: what the tests launched, what the grid compiled.

`make evidence` runs the suite with XATTN_EVIDENCE naming a folder, in which each test process
leaves a file (`tests/support/launches.py`), and then

    python -m tools.evidence collect FOLDER    # into results/evidence/<device>.json
    python -m tools.evidence table             # that and the grid's tables, into the README
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.harness.machine import RESULTS, ROOT, provenance, slug

BEGIN, END = "<!-- evidence: generated -->\n", "<!-- end of evidence -->\n"
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
    "indices_kernel": "indices of its bits",
    "bits_kernel": "bits of its indices",
    "turn_bits_kernel": "its bits by key",
    "gather_forward_kernel": "attention to few keys",
    "gather_dq_kernel": "its dq",
    "gather_dkdv_kernel": "its dk and dv",
    "pool_kernel": "mean keys of blocks",
    "importance_kernel": "importance of blocks",
    "gated_forward_kernel": "gated residual",
    "gated_backward_kernel": "its gradients",
    "gated_sums_kernel": "sums of its gate, weight and bias",
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
        "topk_indices_kernel": "its indices and bits",
        "gated_forward_kernel": "gated residual",
        "gated_backward_kernel": "its gradients",
        "gated_sums_kernel": "sums of its gate, weight and bias",
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
    from .machine_code.triton_grid import Row, faults

    if kernel in CUDA_KERNELS:
        return compiled_by_nvcc(kernel.removeprefix("cuda "))
    found = defaultdict(list)
    for path in sorted((RESULTS / "static").glob("compile_grid_triton*.csv")):
        clean: dict[int, bool] = {}
        for values in csv.DictReader(path.open()):
            row = Row(**{
                name: values[name] if kind == "str" else int(values[name])
                for name, kind in Row.__annotations__.items()
            })  # fmt: skip
            if row.kernel in (kernel, ""):  # a case that did not compile names no kernel
                clean[row.arch] = clean.get(row.arch, True) and not faults(row)
        version = re.search(r"triton(\d+\.\d+)", path.name)[1]
        found[", ".join(str(arch) for arch in sorted(clean) if clean[arch])].append(version)
    return "; ".join(f"sm_{archs}; Triton {' and '.join(v)}" for archs, v in found.items() if archs)


def compiled_by_nvcc(kernel: str) -> str:
    from .machine_code import cuda_grid

    rows = [row for row in cuda_grid.load(RESULTS / "static") if row.kernel == kernel]
    faulty = {row.arch for row in rows if row.faults}
    clean = sorted({row.arch for row in rows} - faulty)
    version = rows[0].nvcc.rpartition(".")[0] if rows else ""
    return f"sm_{', '.join(map(str, clean))}; nvcc {version}" if clean else ""


def table() -> str:
    """The table of every kernel, from the committed files."""
    files = [json.loads(p.read_text()) for p in sorted((RESULTS / "evidence").glob("*.json"))]
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


def replaced(readme: str) -> str:
    """The README with today's table between its markers."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    found = commands.add_parser("collect")
    found.add_argument("folder", type=Path)
    found.add_argument("--device", default="cpu")
    commands.add_parser("table")
    args = parser.parse_args()
    if args.command == "collect":
        print(collect(args.folder, args.device))
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
