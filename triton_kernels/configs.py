"""The configuration table: tile sizes, warps and pipeline stages of every kernel.

One explicit table; nothing is tuned at run time. Its keys are the kernel, the family of
architectures, the wider head width, the size of an element, whether the call is plain, and the
query rows that share a key head; the first row that fits is taken. Rows were chosen from the
compiled code: no spilled register, and few instructions per query-key pair in the inner loop.
`python -m benchmarks.compile_grid` compiles them all and fails on a spill.
"""

from dataclasses import dataclass

ANY = 1 << 30
# wgmma or tcgen05 with 227 KiB of shared memory; mma with 163 KiB; mma with 99 KiB
FAMILIES = {90: "hopper", 100: "hopper", 103: "hopper", 80: "ampere"}
SMALL = "small"


@dataclass(frozen=True)
class Config:
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Row:
    """Applies up to `width` columns and `rows` query rows; `plain` False to calls with any flag
    (bool mask, bias, softcap, dropout, statistics), None to all."""

    families: tuple[str, ...]
    itemsize: int
    plain: bool | None
    width: int
    rows: int
    config: Config


ALL = ("hopper", "ampere", "small")
HOPPER, MMA = ("hopper",), ("ampere", "small")


def _rows(families, itemsize, plain, *table) -> list[Row]:
    return [Row(families, itemsize, plain, w, rows, Config(*c)) for w, rows, c in table]


TABLE = {
    # one tile of query rows walks its keys
    "forward": [
        *_rows(ALL, 2, True, (128, 16, (16, 64, 4, 3)), (256, 16, (16, 32, 4, 2)),
               (64, 32, (32, 64, 4, 3)), (128, 32, (32, 64, 4, 2)), (256, 32, (32, 32, 4, 1)),
               (128, 64, (64, 64, 4, 2)), (64, ANY, (128, 64, 8, 3)), (128, ANY, (128, 64, 8, 2))),
        *_rows(HOPPER, 2, True, (256, ANY, (128, 32, 8, 2))),
        *_rows(MMA, 2, True, (256, ANY, (64, 32, 8, 2))),
        *_rows(ALL, 2, False, (256, 16, (16, 32, 4, 1)), (64, ANY, (32, 32, 4, 1)),
               (128, ANY, (32, 32, 4, 1)), (256, ANY, (32, 32, 8, 1))),
        *_rows(ALL, 4, None, (128, 16, (16, 32, 4, 1)), (64, ANY, (32, 32, 4, 1)),
               (128, ANY, (32, 32, 8, 1)), (256, ANY, (16, 32, 8, 1))),
    ],
    # one tile of query rows walks its keys and keeps dq
    "dq": [
        *_rows(HOPPER, 2, True, (128, ANY, (128, 64, 8, 2)), (256, ANY, (128, 32, 8, 2))),
        *_rows(MMA, 2, True, (64, ANY, (64, 32, 4, 2)), (128, ANY, (64, 64, 8, 2)),
               (256, ANY, (64, 32, 8, 1))),
        *_rows(ALL, 2, False, (128, ANY, (32, 32, 4, 1)), (256, ANY, (32, 32, 8, 1))),
        *_rows(ALL, 4, None, (64, ANY, (32, 32, 4, 1)), (128, ANY, (32, 32, 8, 1)),
               (256, ANY, (16, 32, 8, 1))),
    ],
    # the same with dk and dv written as it goes: used while all rows fit one tile
    "fused": [
        *_rows(ALL, 2, True, (64, 16, (16, 64, 4, 3)), (128, 16, (16, 32, 4, 2)),
               (64, 32, (32, 64, 4, 2)), (128, 32, (32, 32, 4, 2)), (64, 64, (64, 64, 4, 2)),
               (128, 64, (64, 32, 8, 1)), (256, ANY, (16, 32, 4, 2)), (128, ANY, (64, 32, 8, 1))),
        *_rows(ALL, 2, False, (128, 16, (16, 32, 4, 1)), (128, ANY, (32, 32, 4, 1)),
               (256, ANY, (16, 32, 8, 1))),
        *_rows(ALL, 4, None, (64, ANY, (32, 32, 4, 1)), (128, ANY, (16, 32, 8, 1)),
               (256, ANY, (16, 16, 8, 1))),
    ],
    # one tile of keys walks the rows that reach it and keeps dk and dv
    "dkdv": [
        *_rows(HOPPER, 2, True, (64, ANY, (64, 128, 8, 2)), (128, ANY, (32, 128, 8, 2)),
               (256, ANY, (64, 32, 8, 1))),
        *_rows(MMA, 2, True, (64, ANY, (64, 32, 4, 2)), (128, ANY, (64, 32, 8, 2))),
        *_rows(("ampere",), 2, True, (256, ANY, (64, 32, 8, 1))),
        *_rows(("small",), 2, True, (256, ANY, (32, 32, 8, 1))),
        *_rows(ALL, 2, False, (64, ANY, (64, 32, 4, 2)), (128, ANY, (64, 32, 8, 1)),
               (256, ANY, (32, 16, 8, 1))),
        *_rows(ALL, 4, None, (64, ANY, (64, 32, 4, 1)), (128, ANY, (32, 32, 8, 1)),
               (256, ANY, (16, 32, 8, 1))),
    ],
    # one tile of the attention weights walks the heads
    "weights": [
        *_rows(ALL, 2, True, (128, 16, (16, 64, 4, 3)), (128, 64, (64, 64, 4, 2)),
               (128, ANY, (128, 64, 8, 2)), (256, ANY, (64, 32, 8, 2))),
        *_rows(ALL, 2, False, (128, 16, (16, 64, 4, 1)), (128, ANY, (64, 32, 4, 1)),
               (256, ANY, (64, 32, 8, 1))),
        *_rows(ALL, 4, None, (64, ANY, (32, 32, 4, 1)), (128, ANY, (32, 32, 8, 1)),
               (256, ANY, (16, 32, 8, 1))),
    ],
    # one tile of the bias walks what is summed into it
    "dbias": [
        *_rows(ALL, 2, None, (128, ANY, (64, 32, 4, 1)), (256, ANY, (64, 32, 8, 1))),
        *_rows(ALL, 4, None, (64, ANY, (32, 32, 4, 1)), (128, ANY, (32, 32, 8, 1)),
               (256, ANY, (16, 32, 8, 1))),
    ],
}  # fmt: skip


def lookup(kernel: str, arch: int, width: int, itemsize: int, plain: bool, rows: int) -> Config:
    """The configuration of `kernel`, a key of TABLE.

    arch: compute capability times ten; width: max(D, Dv), at most 256; itemsize: bytes of an
    element of q; plain: no bool mask, bias, softcap, dropout or statistics; rows: query rows that
    share a key head, Nq * Hq / Hkv.
    """
    family = FAMILIES.get(arch, SMALL)
    for row in TABLE[kernel]:
        if (
            family in row.families
            and itemsize == row.itemsize
            and row.plain in (plain, None)
            and width <= row.width
            and rows <= row.rows
        ):
            return row.config
    raise ValueError(f"no configuration of {kernel} for head width {width}, {itemsize}-byte dtype")
