"""The configuration table: tile sizes, warps and pipeline stages of every kernel.

One explicit table; nothing is tuned at run time. Its keys are the kernel, the family of
architectures, the wider head width, the size of an element, whether the call is plain, and the
query rows that share a key head; the first row that fits is taken. Rows were chosen from the
compiled code: no spilled register, and few instructions per query-key pair in the inner loop.
`python -m tools.machine_code.triton_grid` compiles them all and fails on a spill.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

ANY = 1 << 30
# wgmma or tcgen05 with 227 KiB of shared memory; mma with 163 KiB; mma with 99 KiB, where what the
# compiler makes for 12.0 takes a few registers more than for 8.6 and 8.9
FAMILIES = {90: "hopper", 100: "blackwell", 103: "blackwell", 80: "ampere", 86: "ada", 89: "ada"}


@dataclass(frozen=True)
class Config:
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread; None leaves the choice to the compiler


@dataclass(frozen=True)
class Row:
    """Applies up to `width` columns and `rows` query rows; `plain` False to calls with any flag
    (bool mask, bias, softcap, dropout, statistics, scales of a group), `chunked` True to widths
    that are not a power of two and take several loads; None to both. `exact` rows want widths that
    are multiples of 16: a mask of the last load's columns takes registers. `bits` rows are for
    plain calls whose mask is bits, which other rows take as well."""

    families: tuple[str, ...]
    itemsize: int
    plain: bool | None
    chunked: bool | None
    width: int
    rows: int
    config: Config | None
    exact: bool = False
    bits: bool = False


ALL = ("hopper", "blackwell", "ampere", "ada", "small")
HOPPER, BLACKWELL, AMPERE = ("hopper",), ("blackwell",), ("ampere",)
WGMMA, MMA = ("hopper", "blackwell"), ("ampere", "ada", "small")
NOT_HOPPER, LARGE, SMALL = ("blackwell", *MMA), ("blackwell", "ampere"), ("ada", "small")
NOT_SMALL = ("hopper", *LARGE)
HALF, FLOAT32 = 2, 4


def register_bound(num_warps: int) -> int:
    """Registers that a thread can have in a block with a multiprocessor to itself."""
    return min(255, 65536 // (32 * num_warps))


def _rows(families, itemsize, plain, chunked, *table, exact=False, bits=False) -> list[Row]:
    """Left alone, ptxas guesses how many blocks share a multiprocessor and spills a few registers
    to fit them; told the bound it does not guess. Plain 16-bit kernels seldom spill, and the guess
    leaves room for more blocks of them."""
    bound = not (itemsize == HALF and plain)
    return [
        Row(families, itemsize, plain, chunked, width, rows, tile and Config(
            *tile[:4], register_bound(tile[2]) if bound or len(tile) > 4 else None),
            exact, bits)
        for width, rows, tile in table
    ]  # fmt: skip


BOUND = (True,)  # behind a tile of a plain 16-bit kernel that does spill to fit the guess

# columns: widest head, most query rows, (block_q, block_k, num_warps, num_stages)
TABLE = {
    # one tile of query rows walks its keys
    "forward": [
        *_rows(MMA, HALF, True, True, (64, 64, (64, 64, 4, 1)), (256, 64, (64, 32, 8, 2))),
        *_rows(ALL, HALF, True, None, (128, 16, (16, 64, 4, 3)), (256, 16, (16, 32, 4, 2))),
        *_rows(WGMMA, HALF, True, True, (128, 32, (32, 32, 4, 2)), bits=True),
        *_rows(ALL, HALF, True, None, (64, 32, (32, 64, 4, 3)), (128, 32, (32, 64, 4, 2))),
        *_rows(WGMMA, HALF, True, True, (256, 32, (32, 16, 4, 1))),
        *_rows(SMALL, HALF, True, None, (64, 64, (64, 64, 4, 2)), (128, 64, (64, 32, 4, 2))),
        *_rows(ALL, HALF, True, None, (256, 32, (32, 32, 4, 1))),
        *_rows(AMPERE, HALF, True, None, (64, 64, (64, 64, 4, 2)), (128, 64, (64, 32, 4, 2)),
               bits=True),
        *_rows(NOT_SMALL, HALF, True, None, (128, 64, (64, 64, 4, 2))),
        *_rows(BLACKWELL, HALF, True, None, (64, ANY, (128, 64, 8, 2)), bits=True),
        *_rows(NOT_SMALL, HALF, True, None, (64, ANY, (128, 64, 4, 2))),
        *_rows(HOPPER, HALF, True, None, (128, ANY, (128, 64, 8, 2)), bits=True),
        *_rows(SMALL, HALF, True, None, (64, ANY, (128, 64, 8, 2, *BOUND)),
               (128, ANY, (128, 32, 8, 2, *BOUND)), bits=True),
        *_rows(HOPPER, HALF, True, None, (128, ANY, (128, 128, 8, 2))),
        *_rows(NOT_HOPPER, HALF, True, None, (128, ANY, (128, 64, 8, 2))),
        *_rows(WGMMA, HALF, True, None, (256, ANY, (128, 32, 8, 2))),
        *_rows(MMA, HALF, True, True, (256, ANY, (128, 32, 8, 2))),
        *_rows(MMA, HALF, True, None, (256, ANY, (64, 32, 8, 2))),
        *_rows(ALL, HALF, False, None, (256, 16, (16, 32, 4, 1)), (128, ANY, (32, 32, 4, 1))),
        *_rows(HOPPER, HALF, False, None, (256, ANY, (32, 16, 8, 1))),
        *_rows(NOT_HOPPER, HALF, False, None, (256, ANY, (32, 32, 8, 1))),
        *_rows(ALL, FLOAT32, False, True, (128, 16, (16, 16, 4, 1)), (128, ANY, (32, 16, 8, 1))),
        *_rows(ALL, FLOAT32, None, True, (128, 16, (16, 16, 4, 1)), (128, ANY, (32, 32, 8, 1)),
               (256, ANY, (16, 16, 8, 1))),
        *_rows(ALL, FLOAT32, False, False, (64, ANY, (32, 32, 8, 1))),
        *_rows(ALL, FLOAT32, None, None, (128, 16, (16, 32, 4, 1)), (64, ANY, (32, 32, 4, 1)),
               (128, ANY, (32, 32, 8, 1))),
        *_rows(ALL, FLOAT32, False, None, (256, ANY, (16, 16, 8, 1))),
        *_rows(ALL, FLOAT32, True, None, (256, ANY, (16, 32, 8, 1))),
    ],
    # one tile of query rows walks its keys and keeps dq
    "dq": [
        *_rows(AMPERE, HALF, True, True, (128, ANY, (128, 64, 8, 2)), exact=True),
        *_rows(AMPERE, HALF, True, True, (64, ANY, (128, 64, 8, 2)), (256, ANY, (128, 32, 8, 2))),
        *_rows(BLACKWELL, HALF, True, None, (128, ANY, (128, 64, 8, 2, *BOUND)),
               (256, ANY, (128, 32, 8, 2, *BOUND))),
        *_rows(HOPPER, HALF, True, None, (128, ANY, (128, 64, 8, 2)), (256, ANY, (128, 32, 8, 2))),
        *_rows(SMALL, HALF, True, True, (64, ANY, (128, 64, 8, 2)), (128, ANY, (128, 32, 8, 2)),
               (256, ANY, (64, 16, 8, 1))),
        *_rows(MMA, HALF, True, None, (64, ANY, (128, 64, 8, 2)), (128, ANY, (128, 32, 8, 2)),
               (256, ANY, (32, 32, 8, 1))),
        *_rows(ALL, HALF, False, True, (128, ANY, (16, 32, 8, 1))),
        *_rows(ALL, HALF, False, None, (128, ANY, (32, 32, 4, 1)), (256, ANY, (16, 32, 8, 1))),
        *_rows(ALL, FLOAT32, False, None, (64, ANY, (16, 32, 4, 1)), (128, ANY, (16, 32, 8, 1)),
               (256, ANY, (16, 16, 8, 1))),
        *_rows(ALL, FLOAT32, True, True, (64, ANY, (32, 32, 8, 1)), (128, ANY, (32, 32, 4, 1)),
               (256, ANY, (16, 16, 4, 1))),
        *_rows(ALL, FLOAT32, True, None, (64, ANY, (32, 32, 4, 1)), (128, ANY, (32, 16, 8, 1)),
               (256, ANY, (16, 32, 8, 1))),
    ],
    # the same with dk and dv written as it goes: used while all rows fit one tile; None: never
    "fused": [
        *_rows(BLACKWELL, HALF, True, True, (128, 16, (16, 16, 4, 1)), (128, 32, (32, 16, 8, 1))),
        *_rows(("hopper", *MMA), HALF, True, True, (128, 16, (16, 16, 4, 1)),
               (128, 32, (32, 16, 4, 1, *BOUND))),
        *_rows(ALL, HALF, True, True, (128, ANY, (64, 16, 8, 1)), (256, ANY, (16, 16, 4, 1))),
        *_rows(WGMMA, HALF, True, None, (64, 16, (16, 64, 4, 3)), (64, 32, (32, 64, 8, 2))),
        *_rows(ALL, HALF, True, None, (128, 16, (16, 32, 4, 2)), (128, 32, (32, 32, 4, 2))),
        *_rows(HOPPER, HALF, True, None, (64, 64, (64, 32, 4, 3))),
        *_rows(BLACKWELL, HALF, True, None, (64, 64, (64, 64, 4, 2))),
        *_rows(AMPERE, HALF, True, None, (64, ANY, (64, 32, 8, 1)), (128, ANY, (64, 16, 8, 1)),
               bits=True),
        *_rows(ALL, HALF, True, None, (128, ANY, (64, 32, 8, 1)), (256, ANY, (16, 32, 8, 1))),
        *_rows(ALL, HALF, False, True, (128, 16, (16, 16, 4, 1))),
        *_rows(ALL, HALF, False, None, (128, 16, (16, 32, 4, 1)), (128, ANY, (32, 16, 4, 1)),
               (256, ANY, (16, 16, 8, 1))),
        *_rows(ALL, FLOAT32, False, None, (256, ANY, None)),
        *_rows(ALL, FLOAT32, None, True, (64, ANY, (16, 32, 8, 1))),
        *_rows(HOPPER, FLOAT32, None, None, (64, ANY, (32, 16, 8, 1))),
        *_rows(NOT_HOPPER, FLOAT32, None, None, (64, ANY, (32, 32, 8, 1))),
        *_rows(ALL, FLOAT32, None, None, (128, ANY, (16, 32, 8, 1)), (256, ANY, None)),
    ],
    # one tile of keys walks the rows that reach it and keeps dk and dv
    "dkdv": [
        *_rows(BLACKWELL, HALF, True, True, (128, ANY, (64, 128, 8, 1, *BOUND)),
               (160, ANY, (64, 64, 8, 1, *BOUND))),
        *_rows(AMPERE, HALF, True, False, (64, ANY, (32, 128, 8, 2)), exact=True, bits=True),
        *_rows(("ampere", "ada"), HALF, True, None, (96, ANY, (16, 128, 8, 2)), bits=True),
        *_rows(("small",), HALF, True, None, (64, ANY, (16, 128, 8, 2)),
               (96, ANY, (16, 128, 8, 1)), bits=True),
        *_rows(AMPERE, HALF, True, False, (64, ANY, (64, 128, 8, 2)), exact=True),
        *_rows(AMPERE, HALF, True, None, (64, ANY, (32, 128, 8, 2))),
        *_rows((*WGMMA, *SMALL), HALF, True, None, (64, ANY, (64, 128, 8, 2))),
        *_rows(HOPPER, HALF, True, None, (128, ANY, (32, 128, 8, 2))),
        *_rows(("ampere", "ada"), HALF, True, True, (96, ANY, (32, 128, 8, 2)), exact=True),
        *_rows(MMA, HALF, True, None, (128, ANY, (16, 128, 8, 2))),
        *_rows(("hopper", *MMA), HALF, True, True, (256, ANY, (16, 128, 8, 2))),
        *_rows(BLACKWELL, HALF, True, None, (128, ANY, (64, 128, 8, 1, *BOUND))),
        *_rows(NOT_SMALL, HALF, True, None, (256, ANY, (64, 32, 8, 1))),
        *_rows(SMALL, HALF, True, None, (256, ANY, (32, 32, 8, 1, *BOUND))),
        *_rows(ALL, HALF, False, True, (128, ANY, (32, 16, 4, 1))),
        *_rows(ALL, HALF, False, None, (64, ANY, (32, 32, 8, 1)), (128, ANY, (64, 32, 8, 1)),
               (256, ANY, (32, 16, 8, 1))),
        *_rows(ALL, FLOAT32, False, False, (64, ANY, (16, 32, 8, 1))),
        *_rows(ALL, FLOAT32, True, True, (128, ANY, (16, 16, 4, 1))),
        *_rows(ALL, FLOAT32, False, True, (128, ANY, (32, 16, 8, 1))),
        *_rows(ALL, FLOAT32, None, None, (64, ANY, (32, 32, 8, 1)), (128, ANY, (16, 32, 8, 1))),
        *_rows(ALL, FLOAT32, False, None, (256, ANY, (16, 16, 8, 1))),
        *_rows(ALL, FLOAT32, True, True, (256, ANY, (16, 32, 8, 1))),
        *_rows(SMALL, FLOAT32, True, False, (256, ANY, (16, 16, 8, 1))),
        *_rows(NOT_SMALL, FLOAT32, True, False, (256, ANY, (32, 16, 8, 1))),
    ],
    # one tile of the attention weights walks the heads
    "weights": [
        *_rows(ALL, HALF, True, None, (128, 16, (16, 64, 4, 3)), (128, 64, (64, 64, 4, 2)),
               (128, ANY, (128, 64, 8, 2)), (256, ANY, (64, 32, 8, 2))),
        *_rows(ALL, HALF, False, None, (128, 16, (16, 64, 4, 1)), (256, ANY, (64, 32, 8, 1))),
        *_rows(ALL, FLOAT32, None, None, (128, ANY, (16, 32, 8, 1)), (256, ANY, (16, 16, 8, 1))),
    ],
    # one tile of keys walks the rows that reach it and keeps what each score adds
    "mass": [
        *_rows(ALL, HALF, True, None, (64, ANY, (64, 128, 8, 2))),
        *_rows(HOPPER, HALF, True, None, (128, ANY, (64, 64, 4, 2))),
        *_rows(BLACKWELL, HALF, True, None, (128, ANY, (64, 64, 8, 2, *BOUND))),
        *_rows(MMA, HALF, True, None, (128, ANY, (64, 64, 4, 2, *BOUND))),
        *_rows(ALL, HALF, True, None, (256, ANY, (32, 64, 4, 2, *BOUND))),
        *_rows(ALL, HALF, False, None, (128, ANY, (32, 64, 4, 1)), (256, ANY, (32, 32, 8, 1))),
        *_rows(ALL, FLOAT32, None, None, (128, ANY, (16, 32, 8, 1)), (256, ANY, (16, 16, 8, 1))),
    ],
    # one tile of the bias walks what is summed into it
    "dbias": [
        *_rows(ALL, HALF, None, None, (128, ANY, (64, 32, 8, 1)), (256, ANY, (32, 16, 8, 1))),
        *_rows(ALL, FLOAT32, None, None, (64, ANY, (32, 32, 4, 1)), (128, ANY, (32, 16, 8, 1)),
               (256, ANY, (32, 16, 16, 1))),
    ],
}  # fmt: skip


def column_chunks(width: int, itemsize: int, widest: int = 0) -> tuple[int, ...]:
    """Powers of two from 16 up that sum to `width`, rounded up to a multiple of 16.

    16-bit widths above 96 other than 160, and any beside a `widest` above 160, are rounded up to
    one power of two: a third chunk, or a mask of columns beside two wide ones, takes registers that
    are not there. Wider float32 chunks than 64 make products that ptxas cannot allocate: they are
    plain multiply-adds, unrolled over the chunk.
    """
    if itemsize == HALF and (96 < width != 160 or max(width, widest) > 160):
        width = 1 << max(4, (width - 1).bit_length())
    width = -(-width // 16) * 16
    most = 256 if itemsize == HALF else 64
    rest = width % most
    return (most,) * (width // most) + tuple(1 << bit for bit in range(8, 3, -1) if rest >> bit & 1)


def tf32_fits(arch: int, D: int, Dv: int) -> bool:
    """Whether TF32 kernels of these widths fit registers and shared memory without a spill."""
    return max(D, Dv) <= 128 or FAMILIES.get(arch, "small") not in SMALL


def lookup(*call, **flags) -> Config | None:
    """The configuration of a kernel for the arguments of `find_row`; None where it should not be
    used (`fused`)."""
    return find_row(*call, **flags).config


@cache
def find_row(
    kernel: str,
    arch: int,
    D: int,
    Dv: int,
    itemsize: int,
    plain: bool,
    rows: int,
    bits: bool = False,
) -> Row:
    """The first row of TABLE[kernel] that fits a call.

    arch: compute capability times ten; D, Dv: head widths, at most 256; itemsize: bytes of an
    element of q; plain: no flag, see `Row`; rows: query rows that
    share a key head, Nq * Hq / Hkv; bits: the mask is bits.
    """
    family = FAMILIES.get(arch, "small")
    chunked = any(len(column_chunks(width, HALF, max(D, Dv))) > 1 for width in (D, Dv))
    exact = D % 16 == Dv % 16 == 0
    for row in TABLE[kernel]:
        if (
            family in row.families
            and itemsize == row.itemsize
            and row.plain in (plain, None)
            and row.chunked in (chunked, None)
            and (exact or not row.exact)
            and (bits or not row.bits)
            and max(D, Dv) <= row.width
            and rows <= row.rows
        ):
            return row
    raise ValueError(f"no configuration of {kernel} for head widths {D} and {Dv}")


# tiles of keys whose scores a row tile may keep; few different numbers, as each is a kernel
KEPT_TILES = (1, 2, 3, 4, 6, 8)


def most_kept(D: int, itemsize: int) -> int:
    """Keys whose scores a row tile may keep: in 64 registers of a thread. More would take fewer
    warps through the arithmetic of a row, which each of them repeats, but ptxas then takes minutes
    for what spills in the end."""
    if itemsize == HALF:
        return 1024 if D <= 96 else 512 if D <= 128 else 256
    return 64 if D <= 64 else 0


def selection(D: int, itemsize: int, rows: int, Nk: int) -> tuple[Config, int]:
    """(configuration, tiles of keys whose scores are kept) of the search for the top keys; 0 tiles
    where a row is too long to keep it."""
    half = itemsize == HALF
    block_k = (128 if D <= 128 else 64) if half else 32
    most = most_kept(D, itemsize)
    kept = next((n * block_k for n in KEPT_TILES if Nk <= n * block_k <= most), 0)
    if kept:
        block_q = 32 if half and rows > 16 and D <= 96 and kept <= 512 else 16
        num_warps = 8 if block_q * kept > 8192 or D > 96 else 4
        return Config(block_q, block_k, num_warps, 1, register_bound(num_warps)), kept // block_k
    if not half:
        return Config(16, 32, 8, 1, register_bound(8)), 0
    block_q = 16 if rows <= 16 else 64 if D <= 128 else 32
    num_warps = 8 if block_q > 16 else 4
    block_k = 64 if D <= 128 else 32
    return Config(block_q, block_k, num_warps, 2, register_bound(num_warps)), 0


# Several programs may search the keys of one row; what they found must fit one search in registers.
MOST_CANDIDATES = 2048


def parts_to_search(n_splits: int, D: int, itemsize: int, Nk: int, top_k: int) -> int:
    """The number of parts into which a row's keys are cut, where n_splits programs would fill the
    device. The parts leave at most MOST_CANDIDATES and at most a quarter of the keys; if possible
    there are so many that each program keeps its scores."""
    if n_splits > 1 and (kept := most_kept(D, itemsize)):
        n_splits = max(n_splits, -(-Nk // kept))
    return max(1, min(n_splits, min(MOST_CANDIDATES, Nk // 4) // top_k))


def candidates(n: int, itemsize: int) -> Config:
    """The configuration of the search among n candidates of one row. It reads `block_q` columns at
    a time: 16 bytes, which make whole sectors together with those of the row's neighbours."""
    block_k = 1 << max(6, (n - 1).bit_length())
    num_warps = 8 if block_k > 512 else 4
    return Config(16 // itemsize, block_k, num_warps, 1, register_bound(num_warps))


# Keys for each chosen one, beyond which gathering the chosen costs less than every product on the
# tensor cores: forward 4 D Nk operations of 0.65 * 790 Tflop/s against 4 D k elements of 5.5 TB/s.
# The same count gives 75 backward, but there a tile of 16 keys by 32 pairs computes 16 products of
# which one counts, which is about as many instructions as all keys take at 75, and the pairs are
# sorted first. Arithmetic for an H200; the head width cancels, and nothing was measured.
GATHERED_BEYOND = {"forward": 93, "backward": 128}


def gathers(direction: str, Nk: int, top_k: int) -> bool:
    """Whether top-k attention gathers its keys in this direction."""
    return Nk > GATHERED_BEYOND[direction] * top_k


def gathered(kernel: str, D: int, Dv: int, itemsize: int) -> Config:
    """The configuration of a kernel of `topk_gather.py`. Rows alone take `block_k` of their keys at
    a time; a tile of `block_k` keys takes `block_q` of the pairs that chose one of them."""
    width = max(D, Dv)
    if kernel == "dkdv":
        block = 32 if width <= 64 and itemsize == HALF else 16
        return Config(block, 16, 4, 1, register_bound(4))
    return Config(1, 64 if width <= 64 else 32 if width <= 128 else 16, 4, 1, register_bound(4))
