"""Bank conflicts of shared memory, counted while the PTX simulator executes a few cases.

A wavefront is one cycle's access of up to 128 bytes; an access whose threads meet in a bank takes
more wavefronts than its bytes need. The accesses of wgmma and of asynchronous copies are not
counted. It needs `ptxsim` on sys.path, in $PTXSIM_PATH or in ../shared/ptxsim.

    python -m tools.machine_code.shared_conflicts --out benchmarks/results/static
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness.machine import ROOT
from xattn_kernels import (
    KeyInterval,
    attention_weights,
    cross_attention,
    gated_residual_norm,
)

KEYS = 256
ARCHS = (80, 90)
PTXSIM_FOLDERS = (os.environ.get("PTXSIM_PATH"), str(ROOT.parent / "shared" / "ptxsim"))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16).requires_grad_()


def attend(rows: int, D: int, biased: bool = False, **options) -> None:
    """Runs forward and backward of 2 heads, with the last 16 keys masked."""
    q, k, v = normal(1, 2, rows, D), normal(1, 2, KEYS, D), normal(1, 2, KEYS, D)
    start = torch.zeros(1, rows, dtype=torch.int32)
    mask = KeyInterval(start, start + KEYS - 16)
    bias = normal(1, 2, rows, KEYS) if biased else None
    out = cross_attention(q, k, v, mask=mask, bias=bias, backend="triton", **options)
    out.backward(torch.randn_like(out))


def weigh(rows: int, D: int) -> None:
    """Runs forward and backward of the attention weights of 2 heads."""
    weights = attention_weights(normal(1, 2, rows, D), normal(1, 2, KEYS, D), backend="triton")
    weights.backward(torch.randn_like(weights))


def gate(rows: int, dim: int, norm: str) -> None:
    """Runs forward and backward of a gated residual with a norm."""
    x, h, weight = normal(rows, dim), normal(rows, dim), normal(dim)
    y, normed = gated_residual_norm(x, h, normal(dim), weight, norm=norm, backend="triton")
    torch.autograd.backward((y, normed), (torch.randn_like(y), torch.randn_like(y)))


CASES: dict[str, Callable[[], None]] = {
    "many-D64": partial(attend, 256, 64),
    "many-D128": partial(attend, 256, 128),
    "few-D96": partial(attend, 64, 96),
    "decode-D128": partial(attend, 1, 128),
    "many-D64-bias-dropout": partial(attend, 256, 64, True, dropout_p=0.1, seed=1),
    "many-D64-weights": partial(weigh, 256, 64),
    "gated-layer-1024": partial(gate, 64, 1024, "layer"),
    "gated-rms-96": partial(gate, 64, 96, "rms"),
}


@dataclass(frozen=True)
class ConflictRow:
    """The wavefronts of one launch, and those of the same accesses without conflicts."""

    arch: int
    case: str
    kernel: str
    load: int
    load_ideal: int
    store: int
    store_ideal: int


def run_case(arch: int, case: str) -> list[ConflictRow]:
    """The rows of the launches of a case that use shared memory, in the simulator."""
    import ptxsim

    torch.manual_seed(0)
    with ptxsim.triton_on_cpu(arch=arch) as session:
        CASES[case]()
    launches = [
        ConflictRow(arch, case, name.removesuffix("_kernel"), *stats.shared_wavefronts)
        for name, _, stats in session.launches
    ]
    return [row for row in launches if row.load or row.store]


def conflicts_file(folder: Path, triton: str) -> Path:
    return folder / f"shared_conflicts_triton{triton}.json"


def read(path: Path) -> list[ConflictRow]:
    return [ConflictRow(**row) for row in json.loads(path.read_text())]


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHS))
    parser.add_argument("--out", type=Path, help="folder for shared_conflicts_triton<version>.json")
    args = parser.parse_args()
    sys.path += [folder for folder in PTXSIM_FOLDERS if folder]
    os.environ["XATTN_TRITON_ON_CPU"] = "1"
    rows = [row for arch in args.arch for case in CASES for row in run_case(arch, case)]
    for r in rows:
        print(
            f"sm_{r.arch} {r.case} {r.kernel}: loads {r.load} of {r.load_ideal} wavefronts, "
            f"stores {r.store} of {r.store_ideal}"
        )
    if args.out:
        lines = ",\n".join(json.dumps(asdict(row), separators=(",", ":")) for row in rows)
        conflicts_file(args.out, triton.__version__).write_text(f"[\n{lines}\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
