"""Compiles ours and the rivals and writes the comparison."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .compare import compare, rivals_file, write


def main() -> int:
    import torch
    import triton

    parser = argparse.ArgumentParser(prog="benchmarks.rivals", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90], choices=(80, 90))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for rivals_triton<version>.json")
    args = parser.parse_args()
    rows = compare(args.arch, args.jobs)
    for r in rows:
        tile = f"{r.block_q}x{r.block_k}, {r.num_warps} warps, {r.num_stages} stages"
        print(
            f"sm_{r.arch} D={r.D} {r.kernel} {r.provider} ({tile}): {r.per_1000:g} per 1,000 pairs,"
            f" {r.per_1000_masked:g} masked, {r.registers} registers, {r.spills} spilled"
        )
    if args.out:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        write(rows, versions, rivals_file(args.out, triton.__version__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
