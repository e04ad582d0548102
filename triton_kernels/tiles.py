"""What every kernel shares: rows of a grouped tile, loads in column chunks, dots, walks, dropout.

A query tile packs the GROUP query heads that share a key head: row r is query r // GROUP of head
r % GROUP, so K and V are read once for the whole group and neighbouring rows keep neighbouring
intervals. A head width is covered by chunks whose widths are powers of two, such as (64, 32) for
96; a `tile` of keys, values or queries is the tuple of its chunks.
"""

import triton
import triton.language as tl
from triton.language.target_info import current_target, is_cuda

from .structs import RowTerms

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# parts of a walk over tiles, see `keys_of_part`
WHOLE, CUT, ALL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def first_column(CHUNKS, i):
    return sum(int(c) for c in CHUNKS[:i])


@triton.constexpr_function
def has_warpgroup_products():
    """Whether products are those of wgmma or tcgen05: on 9.x and 10.x; 12.x has mma alone."""
    target = current_target()
    return target is not None and target.backend == "cuda" and 90 <= target.arch < 120


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. The interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_nt(a, b, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T of two tiles [M, width], [N, width] -> [M, N]."""
    M: tl.constexpr = a[0].shape[0]
    N: tl.constexpr = b[0].shape[0]
    acc = tl.full([M, N], 0.0, tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        acc = dot(a[i], tl.trans(b[i]), acc, PRECISION)
    return acc


@triton.jit
def dot_into(acc, p, tile, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """The tile acc [M, width] plus p [M, N] times the tile [N, width]."""
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        out = out + (dot(p, tile[i], acc[i], PRECISION),)
    return out


@triton.jit
def zero_tile(ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    tile = ()
    for i in tl.static_range(len(CHUNKS)):
        tile = tile + (tl.full([ROWS, CHUNKS[i]], 0.0, tl.float32),)
    return tile


@triton.jit
def clear_rows(tile, rows, CHUNKS: tl.constexpr):
    """The tile with zeros in the rows where `rows` [ROWS] is true, whatever was there."""
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        out = out + (tl.where(rows[:, None], 0.0, tile[i]),)
    return out


@triton.jit
def scale_rows(tile, factor, CHUNKS: tl.constexpr):
    """The tile with each row times factor [ROWS]."""
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        out = out + (tile[i] * factor[:, None],)
    return out


@triton.jit
def row_dot(a, b, CHUNKS: tl.constexpr):
    """sum_d a[r, d] * b[r, d] in float32 -> [ROWS]."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(CHUNKS)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def load_tile(
    base, rows, row_mask, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ALIGN: tl.constexpr, first=None
):
    """Rows at element offsets `rows` (int64 [ROWS], multiples of ALIGN), zero where masked; with
    None for row_mask all of them are there. `first`: a number to add to the offsets."""
    if first is not None:
        base += tl.multiple_of(first, [ALIGN])
    tile = ()
    for i in tl.static_range(len(CHUNKS)):
        cols = first_column(CHUNKS, i) + tl.arange(0, CHUNKS[i])
        # a hint on `rows` itself would be lost, as it is an argument of this function
        elements = tl.multiple_of(rows[:, None] + cols[None, :], [1, ALIGN])
        if row_mask is None and first_column(CHUNKS, i + 1) <= WIDTH:
            tile = tile + (tl.load(base + elements),)
        else:
            keep = tile_mask(row_mask, cols < WIDTH, first_column(CHUNKS, i + 1) > WIDTH)
            tile = tile + (tl.load(base + elements, mask=keep, other=0.0),)
    return tile


@triton.jit
def tile_mask(row_mask, col_mask, PADDED: tl.constexpr):
    """[ROWS, columns] or what broadcasts to it: the mask of both; row_mask may be None."""
    if row_mask is None:
        return col_mask[None, :]
    elif PADDED:
        return row_mask[:, None] & col_mask[None, :]
    else:
        return row_mask[:, None]


@triton.jit
def store_tile(
    base, rows, row_mask, tile, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ALIGN: tl.constexpr
):
    for i in tl.static_range(len(CHUNKS)):
        cols = first_column(CHUNKS, i) + tl.arange(0, CHUNKS[i])
        elements = tl.multiple_of(rows[:, None] + cols[None, :], [1, ALIGN])
        keep = row_mask[:, None]
        if first_column(CHUNKS, i + 1) > WIDTH:
            keep = keep & (cols < WIDTH)[None, :]
        tl.store(base + elements, tile[i].to(base.dtype.element_ty), mask=keep)


@triton.jit
def packed_rows(tile, hkv, Nq, BLOCK_Q: tl.constexpr, GROUP: tl.constexpr):
    """(query index, query head, row mask) of the rows of a query tile, each [BLOCK_Q]."""
    r = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i = r // GROUP
    return i, hkv * GROUP + r % GROUP, i < Nq


@triton.jit
def row_bounds(s, b, i, row_mask, Nk):
    """The key interval of each row by the bounds in s, clamped to [0, Nk]; (Nk, 0) if empty."""
    i = i.to(tl.int64)
    starts = s.start.ptr + b * s.start.stride[0] + i * s.start.stride[1]
    first = tl.load(starts, mask=row_mask, other=0)
    stops = s.stop.ptr + b * s.stop.stride[0] + i * s.stop.stride[1]
    last = tl.load(stops, mask=row_mask, other=0)
    first, last = tl.maximum(first, 0), tl.minimum(last, Nk)
    empty = first >= last
    return tl.where(empty, Nk, first), tl.where(empty, 0, last)


@triton.jit
def tanh(x):
    """tanh to float32 accuracy; the hardware's approximation keeps 11 bits only."""
    z = tl.minimum(tl.abs(x), 10.0)
    y = z * z
    # odd polynomial below 0.6, where 1 - 2 / (1 + e^2x) would cancel
    small = 1.3331924e-1 + y * (-5.378383e-2 + y * (2.079598e-2 + y * -5.89516e-3))
    small = z + z * y * (-3.3333298e-1 + y * small)
    large = 1.0 - 2.0 / (1.0 + tl.exp2(2.0 * LOG2E * z))
    t = tl.where(z < 0.6, small, large)
    t = tl.where(x == x, t, x)
    return tl.where(x < 0, -t, t)


@triton.jit
def dropout_keep(seed, pair, threshold):
    """Whether dropout keeps each `Pair`: Philox4x32-10, one counter each; see reference.py."""
    b = tl.full([1, 1], 0, tl.int32) + pair.b.to(tl.int32)
    j, i, h = pair.j.to(tl.int32), pair.i.to(tl.int32), pair.h.to(tl.int32)
    return tl.philox(seed, j, i, h, b)[0] >= threshold


@triton.jit
def program(n_tiles, Hkv, B):
    """(tile, key head, batch, split) of this program; a 1-d grid has no 65,535 limit."""
    return program_of(tl.program_id(0), n_tiles, Hkv, B)


@triton.jit
def program_of(pid, n_tiles, Hkv, B):
    tile, pid = pid % n_tiles, pid // n_tiles
    hkv, pid = pid % Hkv, pid // Hkv
    return tile, hkv, (pid % B).to(tl.int64), (pid // B).to(tl.int64)


@triton.jit
def program_again():
    """`tl.program_id(0)`, read anew: what is computed from it need not stay in registers."""
    if INTERPRETING or not is_cuda():
        return tl.program_id(0)
    else:
        return tl.inline_asm_elementwise(
            "mov.u32 $0, %ctaid.x;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def split_range(begin, end, split, n_splits, BLOCK: tl.constexpr):
    """The part of [begin, end) that is this split's, in whole blocks."""
    per_split = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK), n_splits) * BLOCK
    begin += split.to(tl.int32) * per_split
    return begin, tl.minimum(end, begin + per_split)


@triton.jit
def blocks_of_tile(lists, head, tile, Nq, T: tl.constexpr, W: tl.constexpr):
    """(pointer to the blocks that this row tile of a key head attends to, their number), by the
    `BlockLists` of a walk over keys."""
    choice = head * tl.cdiv(Nq, W.QUERIES) + tile * T.BLOCK_Q // (W.QUERIES * T.GROUP)
    return lists.ids + choice * lists.n_blocks, tl.load(lists.counts + choice)


@triton.jit
def in_blocks(blocks, k0, SIZE: tl.constexpr):
    """The first key of the tile at `k0` of the chosen blocks, counted end to end."""
    return tl.load(blocks + k0 // SIZE) * SIZE + k0 % SIZE


@triton.jit
def keys_of_part(begin, end, full_begin, full_end, BLOCK: tl.constexpr, PART: tl.constexpr):
    """(begin, end, gap, length): the loop over the tiles of this part of a row tile's keys; from
    `gap` on it goes on `length` keys further.

    WHOLE: the tiles that every row sees whole; CUT: those before and after; ALL: both, as they
    come. A loop of its own needs no branch around the mask, which hides from the compiler that one
    product feeds the next, so that both may keep one layout.
    """
    if PART == ALL:
        return begin, end, 0, 0
    else:
        head = tl.minimum(tl.cdiv(tl.maximum(full_begin - begin, 0), BLOCK) * BLOCK, end - begin)
        gap = begin + tl.maximum(head, 0)
        length = tl.maximum((tl.minimum(full_end, end) - gap) // BLOCK, 0) * BLOCK
        if PART == WHOLE:
            return gap, gap + length, 0, 0
        else:
            return begin, end - length, gap, length


@triton.jit
def over_gap(k0, gap, length, PART: tl.constexpr):
    """The first key of the tile that a loop of `keys_of_part` is at."""
    if PART == CUT:
        return tl.where(k0 < gap, k0, k0 + length)
    else:
        return k0


@triton.jit
def next_run(bounds, begin, end, n_tiles, key_begin, key_end, PART: tl.constexpr):
    """The next run [first, last) of row tiles from `begin` on that all meet the keys and are of
    this part, see `tiles_meet`; it ends at `end` at the latest, and is empty there when no tile is
    left. One pass finds each border."""
    first, last = end, end
    for t0 in range(0, n_tiles, 256):
        t, meets = tiles_meet(bounds, t0, n_tiles, key_begin, key_end, PART)
        first = tl.minimum(first, tl.min(tl.where(meets & (t >= begin), t, end)))
    for t0 in range(0, n_tiles, 256):
        t, meets = tiles_meet(bounds, t0, n_tiles, key_begin, key_end, PART)
        last = tl.minimum(last, tl.min(tl.where((t > first) & ~meets, t, end)))
    return first, last


@triton.jit
def tiles_meet(bounds, t0, n_tiles, key_begin, key_end, PART: tl.constexpr):
    """(t, whether row tile t belongs to the part) of 256 tiles from t0 on: to WHOLE when all its
    rows see all keys in [key_begin, key_end), to CUT when some rows see some, to ALL in both cases.
    """
    # [256]
    t = t0 + tl.arange(0, 256)
    begin = tl.load(bounds + t * 4, t < n_tiles, 0)
    end = tl.load(bounds + t * 4 + 3, t < n_tiles, 0)
    meets = (begin < key_end) & (end > key_begin)
    if PART != ALL:
        begin = tl.load(bounds + t * 4 + 1, t < n_tiles, 0)
        end = tl.load(bounds + t * 4 + 2, t < n_tiles, 0)
        whole = (begin <= key_begin) & (end >= key_end)
        meets = meets & (whole if PART == WHOLE else ~whole)
    return t, meets


@triton.jit
def rows_of_part(begin, end, n_whole, PART: tl.constexpr):
    """The row tiles of a part of [begin, end) without intervals: n_whole have all their rows."""
    if PART == WHOLE:
        return begin, tl.minimum(end, n_whole)
    elif PART == CUT:
        return tl.maximum(begin, n_whole), end
    else:
        return begin, end


@triton.jit
def load_rows(terms, rows, row_mask, AXIS: tl.constexpr, no_row=float("inf"), first=0):
    """The `RowTerms` of the rows at first + `rows`, with a dimension of one at AXIS; 0 for a tensor
    that is not there.

    lse is +inf for a row without keys, so that p = 0, and `no_row` where there is no row.
    """
    lse = load_row(terms.lse + first, rows, row_mask, no_row, AXIS)
    lse_low, minus_delta, dentropy = 0.0, 0.0, 0.0
    if terms.lse_low is not None:
        lse_low = load_row(terms.lse_low + first, rows, row_mask, 0.0, AXIS)
    if terms.minus_delta is not None:
        minus_delta = load_row(terms.minus_delta + first, rows, row_mask, 0.0, AXIS)
    if terms.dentropy is not None:
        dentropy = load_row(terms.dentropy + first, rows, row_mask, 0.0, AXIS)
    return RowTerms(lse, lse_low, minus_delta, dentropy)


@triton.jit
def load_row(base, rows, row_mask, other, AXIS: tl.constexpr):
    """A number of each row, with a dimension of one at AXIS."""
    if row_mask is None:
        return tl.expand_dims(tl.load(base + rows), AXIS)
    else:
        return tl.expand_dims(tl.load(base + rows, row_mask, other), AXIS)


@triton.jit
def times(x, factor):
    """x * factor; None is a factor of one that costs nothing."""
    if factor is not None:
        return x * factor
    else:
        return x
