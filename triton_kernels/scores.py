"""Scores of one tile and their gradient, the same lines for every kernel in either orientation.

Row quantities (query i, head h, interval bounds, offsets) and key quantities (key j) arrive with
shapes that broadcast, [BLOCK_Q, 1] with [1, BLOCK_K], or transposed; the tile follows.
"""

import triton
import triton.language as tl

from .tiles import (
    ALL,
    CUT,
    LN2,
    LOG2E,
    dropout_keep,
    row_bounds,
    tanh,
    times,
)

# Of float32, above no score but -inf: a maximum that starts here is finite, also in a row without
# keys, where exp(-inf - maximum) is 0 and never that of -inf - -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def row_scale(scale, scale_tensor, stride_scale, h):
    """The number `scale`, or the tensor's value for each row's head, [BLOCK_Q]."""
    if scale_tensor is not None:
        return tl.load(scale_tensor + h * stride_scale[0]).to(tl.float32)
    else:
        return scale


@triton.jit
def row_offsets(stride, b, h, i):
    """Element offsets (int64) of rows (b, h, i) in a [B, H, N, *] tensor of these strides."""
    return b * stride[0] + h.to(tl.int64) * stride[1] + i.to(tl.int64) * stride[2]


@triton.jit
def run_offsets(stride, b, h, first, ROWS: tl.constexpr):
    """The same of ROWS rows from `first` on: a number, which is all that a loop moves, plus a
    tensor that stays."""
    zero = tl.full([], 0, tl.int64)
    base = b * stride[0] + (zero + h) * stride[1] + (zero + first) * stride[2]
    return base + tl.arange(0, ROWS).to(tl.int64) * stride[2]


@triton.jit
def tile_offsets(
    stride, b, hkv, tile, i, h, BLOCK_Q: tl.constexpr, GROUP: tl.constexpr, APART: tl.constexpr
):
    """(number, tensor), which add up to `row_offsets` of the packed rows (i, h) of a query tile.

    Rows without a group follow each other; all that a loop moves is then the number, if it is kept
    APART from the tensor, which stays in registers.
    """
    zero = tl.full([], 0, tl.int64)
    if APART and GROUP == 1:
        at = b * stride[0] + (zero + hkv) * stride[1] + (zero + tile) * BLOCK_Q * stride[2]
        return at, tl.arange(0, BLOCK_Q).to(tl.int64) * stride[2]
    else:
        return zero, row_offsets(stride, b, h, i)


@triton.jit
def split_offsets(stride, split, b, h, i):
    """The same with a leading dimension of splits."""
    rows = split * stride[0] + b * stride[1] + h.to(tl.int64) * stride[2]
    return rows + i.to(tl.int64) * stride[3]


@triton.jit
def tile_scores(
    qk, scale, softcap, bias, bias_rows, stride_bias, mask, mask_rows, stride_mask, row_mask, j, Nk
):
    """(s, tanh): scores, -inf where the bool mask forbids, and the softcap's tanh.

    Scores are in log2 units, natural where a bias is added: a dtype's lowest number, with which
    masks are written, would overflow in log2 units. `scale` is a number or a row quantity, or None
    to leave the product as it is; tanh is 0 without a softcap.
    """
    unit = LOG2E if bias is None else 1.0
    th = 0.0
    if softcap is not None:
        # an infinite row beside the zeros of no key is NaN, and so is its tanh, which ds = 0 keeps
        qk = tl.where(row_mask & (j < Nk), qk, 0.0)
        th = tanh(qk * (scale / softcap))
        s = th * (softcap * unit)
    elif scale is not None:
        s = qk * (scale * unit)
    else:
        s = qk
    if bias is not None:
        b = tl.load(bias + (bias_rows + j.to(tl.int64) * stride_bias[3]), row_mask & (j < Nk), 0.0)
        s += b.to(tl.float32)
    if mask is not None:
        at = mask_rows + j.to(tl.int64) * stride_mask[3]
        allowed = tl.load(mask + at, row_mask & (j < Nk), 0)
        s = tl.where(allowed != 0, s, float("-inf"))
    return s, th


@triton.jit
def tile_bits(bits, rows, row_mask, first, n_columns, BLOCK: tl.constexpr):
    """bool [ROWS, BLOCK]: BLOCK bits from `first` on of rows of n_columns bits in int32 words, at
    offsets `rows` [ROWS]; `first` is a multiple of 16, or of 32 from a BLOCK of 32 on.

    Words are row quantities, which every thread of a row has to itself: a load or a shuffle per
    score would cost more than the product.
    """
    at = bits + rows + first // 32
    # [ROWS, 1], [1, BLOCK]
    word = tl.load(at, row_mask & (first < n_columns), 0)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    for n in tl.static_range(1, BLOCK // 32):
        there = row_mask & (first + 32 * n < n_columns)
        word = tl.where(column < 32 * n, word, tl.load(at + n, there, 0)[:, None])
    if BLOCK < 32:
        column += first % 32
    return ((word >> (column % 32)) & 1) != 0


@triton.jit
def clear_gradients(chosen, log2_p, t, th, softcap):
    """`cut_gradients` where a key is not chosen."""
    log2_p = tl.where(chosen, log2_p, float("-inf"))
    t = tl.where(chosen, t, 0.0)
    if softcap is not None:
        th = tl.where(chosen, th, 0.0)
    return log2_p, t, th


@triton.jit
def exp_difference(s, m, factor, bias):
    """exp(s - m) of scores, whatever their unit; what s still lacks of m's is `factor`, or None."""
    if factor is not None:
        return tl.exp2(s * factor - m)
    elif bias is not None:
        return tl.exp2((s - m) * LOG2E)
    else:
        return tl.exp2(s - m)


@triton.jit
def natural(t, bias):
    """A score as a natural logarithm, whatever its unit."""
    if bias is not None:
        return t
    else:
        return t * LN2


@triton.jit
def log2_probability(s, lse, lse_low, bias):
    """log2 p = s - lse; `lse_low`, in log2 units, is what float32 cannot hold of lse, or 0."""
    if bias is not None:
        return (s - lse) * LOG2E - lse_low
    else:
        return s - lse


@triton.jit
def key_ranges(start, stop, stride_start, stride_stop, b, i, row_mask, Nk):
    """(first, last, begin, end, full_begin, full_end): each row's interval [BLOCK_Q, 1], the keys
    [begin, end) of any row, and the keys [full_begin, full_end) of every row."""
    if start is not None:
        first, last = row_bounds(start, stop, stride_start, stride_stop, b, i, row_mask, Nk)
        full_begin = tl.max(tl.where(row_mask, first, 0))
        full_end = tl.min(tl.where(row_mask, last, Nk))
        return first[:, None], last[:, None], tl.min(first), tl.max(last), full_begin, full_end
    else:
        return 0, Nk, 0, Nk, 0, Nk


@triton.jit
def cut_scores(s, cut, first, last, j, PART: tl.constexpr):
    """s, -inf where key j is outside its row's interval; `cut`: whether any is, asked in ALL."""
    if PART == CUT:
        s = forbid_outside(s, first, last, j)
    elif PART == ALL:
        if cut:
            s = forbid_outside(s, first, last, j)
    return s


@triton.jit
def cut_gradients(log2_p, t, th, softcap, first, last, j):
    """(log2 p, t, tanh) without what is outside the intervals; padding may hold NaN."""
    log2_p = forbid_outside(log2_p, first, last, j)
    t = forbid_outside(t, first, last, j, 0.0)
    if softcap is not None:
        th = forbid_outside(th, first, last, j, 0.0)
    return log2_p, t, th


@triton.jit
def cut_columns(
    log2_p, t, th, softcap, start, stride_start, stop, stride_stop, b, i, row_mask, j, Nk
):
    """`cut_gradients` of a transposed tile, [BLOCK_K, BLOCK_Q]. The bounds of its rows are not
    clamped: of keys beyond the last one nothing is stored."""
    if start is not None:
        i = i.to(tl.int64)
        first = tl.load(start + b * stride_start[0] + i * stride_start[1], row_mask, 0)
        last = tl.load(stop + b * stride_stop[0] + i * stride_stop[1], row_mask, 0)
    else:
        first, last = 0 * i, tl.where(row_mask, Nk, 0)
    return cut_gradients(log2_p, t, th, softcap, first[None, :], last[None, :], j[:, None])


@triton.jit
def forbid_outside(s, first, last, j, other=float("-inf")):
    """s, `other` where key j lies outside the row's interval [first, last)."""
    return tl.where((j >= first) & (j < last), s, other)


@triton.jit
def kept(p, seed, b, h, i, j, threshold):
    """p where dropout keeps it, else 0; the 1 / (1 - dropout_p) is applied to sums."""
    if seed is not None:
        return tl.where(dropout_keep(tl.load(seed), b, h, i, j, threshold), p, 0.0)
    else:
        return p


@triton.jit
def probability_gradient(
    dp, dweights, weight_rows, stride_dweights, p_factor, seed, threshold, b, h, i, row_mask, j, Nk
):
    """dp of eq. ds from <dout, v>, to which the gradient of the weights is added where they were
    returned as well."""
    if dweights is not None:
        at = weight_rows + j.to(tl.int64) * stride_dweights[3]
        dp += tl.load(dweights + at, row_mask & (j < Nk), 0.0).to(tl.float32)
    return kept(times(dp, p_factor), seed, b, h, i, j, threshold)


@triton.jit
def plus_rows(dp, row, IN_PRODUCT: tl.constexpr):
    """dp + row, a row quantity. Of a plain sum with a product the compiler makes what the product
    itself starts from: free in an mma, but it takes registers early. A multiply-add stays apart.
    """
    if IN_PRODUCT:
        return dp + row
    else:
        return tl.fma(tl.broadcast_to(row, dp.shape), tl.full(dp.shape, 1.0, tl.float32), dp)


@triton.jit
def score_gradient(p, log2_p, t, lse, dentropy, row_dentropy, GUARD: tl.constexpr):
    """ds of the capped scores, eq. ds; t = dp - delta, see `delta_kernel`.

    GUARD: it is summed over rows, some of which may have no key: dp may be infinite or NaN there,
    which p = 0 does not clear.
    """
    if dentropy is not None:
        # p = 0 has log2 p = -inf, and its term is 0
        t -= tl.where(p > 0, row_dentropy * (log2_p * LN2), 0.0)
    ds = p * t
    if GUARD:
        ds = tl.where(lse == float("inf"), 0.0, ds)
    return ds


@triton.jit
def through_softcap(ds, th, softcap):
    """ds of the scores below the softcap, whose tanh is `th`."""
    if softcap is not None:
        return ds * (1.0 - th * th)
    else:
        return ds
