"""Bank conflicts of shared memory, counted while the PTX simulator executes a few cases.

A wavefront is one cycle's access of up to 128 bytes; an access whose threads meet in a bank takes
more wavefronts than its bytes need. What wgmma and asynchronous copies move is not counted. Needs
`ptxsim`, on sys.path or in $PTXSIM_PATH.

    PTXSIM_PATH=... python -m benchmarks.shared_conflicts --out benchmarks/results/static
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

CASES = {
    "many-D64": (256, 64),
    "many-D128": (256, 128),
    "few-D96": (64, 96),
    "decode-D128": (1, 128),
}
KEYS = 256
ARCHS = (80, 90)


@dataclass(frozen=True)
class ConflictRow:
    """Wavefronts of one launch and of the same accesses without conflicts."""

    arch: int
    case: str
    kernel: str
    load: int
    load_ideal: int
    store: int
    store_ideal: int


def run_case(arch: int, case: str) -> list[ConflictRow]:
    """Forward and backward of a case in the simulator."""
    import ptxsim
    import torch

    from xattn_kernels.triton_kernels import cross_attention, cross_attention_backward

    rows, D = CASES[case]
    torch.manual_seed(0)
    q = torch.randn(1, 2, rows, D, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 2, KEYS, D, dtype=torch.bfloat16)
    start = torch.zeros(1, rows, dtype=torch.int32)
    operands = (q, k, v, None, None, start, start + KEYS - 16, None, None)
    options = (D**-0.5, 0.0, 0.0)
    with ptxsim.triton_on_cpu(arch=arch) as session:
        *saved, _ = cross_attention.forward(*operands, *options, False, False)
        needs = [True, True, True, False, False]
        cross_attention_backward.backward(
            saved[0], None, None, *operands, *saved, *options, False, needs
        )
    return [
        ConflictRow(arch, case, name.removesuffix("_kernel"), *stats.shared_wavefronts)
        for name, _, stats in session.launches
        if name in ("forward_kernel", "dq_kernel", "dkdv_kernel")
    ]


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
    sys.path += [place for place in (os.environ.get("PTXSIM_PATH"),) if place]
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
