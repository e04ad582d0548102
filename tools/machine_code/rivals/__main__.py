"""Compiles the rivals, takes ours from the static report, and writes the comparison."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .compare import (
    WIDTHS,
    compare,
    merge,
    read,
    rivals_file,
    write,
)


def main() -> int:
    import torch
    import triton

    parser = argparse.ArgumentParser(prog="tools.machine_code.rivals", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=[80, 90], choices=(80, 90))
    parser.add_argument("--width", type=int, nargs="*", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--out", type=Path, help="folder for rivals_triton<version>.json")
    args = parser.parse_args()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    for rows in compare(args.arch, args.width):
        for r in rows:
            tile = f"{r.block_q}x{r.block_k}, {r.num_warps} warps, {r.num_stages} stages"
            print(
                f"sm_{r.arch} D={r.D} {r.kernel} {r.provider} ({tile}): {r.per_1000:g} per 1,000"
                f" pairs, {r.per_1000_masked:g} masked, {r.registers} registers,"
                f" {r.spills} bytes spilled",
                flush=True,
            )
        if args.out:
            path = rivals_file(args.out, triton.__version__)
            write(merge(read(path)[0], rows), versions, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
