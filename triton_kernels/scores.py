"""Scores of one tile and their gradient, the same lines for every kernel in either orientation.

Row quantities (query i, head h, interval bounds, offsets) and key quantities (key j) arrive with
shapes that broadcast, [BLOCK_Q, 1] with [1, BLOCK_K], or transposed; the tile follows.
"""

import triton
import triton.language as tl

from .structs import KeyRange
from .tiles import ALL, CUT, LN2, LOG2E, dropout_keep, row_bounds, tanh, times

# The lowest float32, above no score but -inf: a maximum that starts here is finite, also in a row
# without keys, where exp(-inf - maximum) is 0 and never that of -inf - -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def row_scale(scale, h):
    """The number of a `Scale`, or the tensor's value for each row's head, [BLOCK_Q]."""
    if scale.ptr is not None:
        return tl.load(scale.ptr + h * scale.stride[0]).to(tl.float32)
    else:
        return scale.number


@triton.jit
def row_offsets(stride, b, h, i):
    """Element offsets (int64) of rows (b, h, i) in a [B, H, N, *] tensor of these strides."""
    return b * stride[0] + h.to(tl.int64) * stride[1] + i.to(tl.int64) * stride[2]


@triton.jit
def pair_rows(t, b, h, i, AXIS: tl.constexpr):
    """`row_offsets` in a `Strided` that is indexed by pairs, with a dimension of one at AXIS; 0
    where there is no tensor."""
    if t.ptr is None:
        return 0
    else:
        return tl.expand_dims(row_offsets(t.stride, b, h, i), AXIS)


@triton.jit
def run_offsets(stride, b, hkv, first, ROWS: tl.constexpr):
    """The offsets of ROWS rows from `first` on: a number, which is all that a loop moves, plus a
    tensor that stays."""
    zero = tl.full([], 0, tl.int64)
    base = b * stride[0] + (zero + hkv) * stride[1] + (zero + first) * stride[2]
    return base + tl.arange(0, ROWS).to(tl.int64) * stride[2]


@triton.jit
def tile_offsets(stride, b, hkv, tile, i, h, T: tl.constexpr, APART: tl.constexpr):
    """(number, tensor), which add up to `row_offsets` of the packed rows (i, h) of a query tile.

    Rows without a group follow each other; all that a loop moves is then the number, if it is kept
    APART from the tensor, which stays in registers.
    """
    zero = tl.full([], 0, tl.int64)
    if APART and T.GROUP == 1:
        base = b * stride[0] + (zero + hkv) * stride[1] + (zero + tile) * T.BLOCK_Q * stride[2]
        return base, tl.arange(0, T.BLOCK_Q).to(tl.int64) * stride[2]
    else:
        return zero, row_offsets(stride, b, h, i)


@triton.jit
def split_offsets(stride, split, b, h, i):
    """`row_offsets` in a tensor with a leading dimension of splits."""
    rows = split * stride[0] + b * stride[1] + h.to(tl.int64) * stride[2]
    return rows + i.to(tl.int64) * stride[3]


@triton.jit
def tile_scores(qk, scale, s, bias_rows, mask_rows, row_mask, j, Nk):
    """(scores, tanh): scores of the products qk by the `Scores` s, -inf where the bool mask
    forbids, and the softcap's tanh.

    Scores are in log2 units, natural where a bias is added: a dtype's lowest number, with which
    masks are written, would overflow in log2 units. `scale` is a number or a row quantity, or None
    to leave the product as it is; tanh is 0 without a softcap.
    """
    unit = LOG2E if s.bias.ptr is None else 1.0
    th = 0.0
    if s.softcap is not None:
        # an infinite row beside the zeros of no key is NaN, and so is its tanh, which ds = 0 keeps
        qk = tl.where(row_mask & (j < Nk), qk, 0.0)
        th = tanh(qk * (scale / s.softcap))
        score = th * (s.softcap * unit)
    elif scale is not None:
        score = qk * (scale * unit)
    else:
        score = qk
    if s.bias.ptr is not None:
        pairs = bias_rows + j.to(tl.int64) * s.bias.stride[3]
        bias = tl.load(s.bias.ptr + pairs, row_mask & (j < Nk), 0.0)
        score += bias.to(tl.float32)
    if s.mask.ptr is not None:
        pairs = mask_rows + j.to(tl.int64) * s.mask.stride[3]
        allowed = tl.load(s.mask.ptr + pairs, row_mask & (j < Nk), 0)
        score = tl.where(allowed != 0, score, float("-inf"))
    return score, th


@triton.jit
def tile_bits(bits, rows, row_mask, first, n_columns, BLOCK: tl.constexpr):
    """bool [ROWS, BLOCK]: BLOCK bits from `first` on of rows of n_columns bits in int32 words, at
    offsets `rows` [ROWS]; `first` is a multiple of 16, or of 32 from a BLOCK of 32 on.

    Words are row quantities, which every thread of a row has to itself: a load or a shuffle per
    score would cost more than the product.
    """
    words = bits + rows + first // 32
    # [ROWS, 1], [1, BLOCK]
    word = tl.load(words, row_mask & (first < n_columns), 0)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    for n in tl.static_range(1, BLOCK // 32):
        exists = row_mask & (first + 32 * n < n_columns)
        word = tl.where(column < 32 * n, word, tl.load(words + n, exists, 0)[:, None])
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
def exp_difference(s, m, factor, NATURAL: tl.constexpr):
    """exp(s - m) of scores, whatever their unit; what s still lacks of m's is `factor`, or None."""
    if factor is not None:
        return tl.exp2(s * factor - m)
    elif NATURAL:
        return tl.exp2((s - m) * LOG2E)
    else:
        return tl.exp2(s - m)


@triton.jit
def natural(t, NATURAL: tl.constexpr):
    """A score as a natural logarithm, whatever its unit."""
    if NATURAL:
        return t
    else:
        return t * LN2


@triton.jit
def log2_probability(s, row, NATURAL: tl.constexpr):
    """log2 p = s - lse; the row's lse_low, in log2 units, is what float32 cannot hold of lse."""
    if NATURAL:
        return (s - row.lse) * LOG2E - row.lse_low
    else:
        return s - row.lse


@triton.jit
def key_ranges(s, b, i, row_mask, Nk):
    """The `KeyRange` of the rows i."""
    if s.start.ptr is not None:
        first, last = row_bounds(s, b, i, row_mask, Nk)
        full_begin = tl.max(tl.where(row_mask, first, 0))
        full_end = tl.min(tl.where(row_mask, last, Nk))
        return KeyRange(
            first[:, None], last[:, None], tl.min(first), tl.max(last), full_begin, full_end
        )
    else:
        return KeyRange(0, Nk, 0, Nk, 0, Nk)


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
def cut_columns(log2_p, t, th, s, pair, row_mask, Nk):
    """`cut_gradients` of a transposed tile, [BLOCK_K, BLOCK_Q], whose pair.i is [BLOCK_Q] and
    pair.j [BLOCK_K]. The bounds of its rows are not clamped: of keys beyond the last one nothing is
    stored."""
    if s.start.ptr is not None:
        i = pair.i.to(tl.int64)
        starts = s.start.ptr + pair.b * s.start.stride[0] + i * s.start.stride[1]
        first = tl.load(starts, row_mask, 0)
        stops = s.stop.ptr + pair.b * s.stop.stride[0] + i * s.stop.stride[1]
        last = tl.load(stops, row_mask, 0)
    else:
        first, last = 0 * pair.i, tl.where(row_mask, Nk, 0)
    j = pair.j[:, None]
    return cut_gradients(log2_p, t, th, s.softcap, first[None, :], last[None, :], j)


@triton.jit
def forbid_outside(s, first, last, j, other=float("-inf")):
    """s, `other` where key j lies outside the row's interval [first, last)."""
    return tl.where((j >= first) & (j < last), s, other)


@triton.jit
def kept(p, dropout, pair):
    """p where dropout keeps it, else 0; the 1 / (1 - dropout_p) is applied to sums."""
    if dropout.seed is not None:
        return tl.where(dropout_keep(tl.load(dropout.seed), pair, dropout.threshold), p, 0.0)
    else:
        return p


@triton.jit
def probability_gradient(dp, dweights, weight_rows, dropout, pair, row_mask, Nk):
    """dp of eq. ds from <dout, v>, to which the gradient of the weights is added where they were
    returned as well."""
    if dweights.ptr is not None:
        pairs = weight_rows + pair.j.to(tl.int64) * dweights.stride[3]
        dp += tl.load(dweights.ptr + pairs, row_mask & (pair.j < Nk), 0.0).to(tl.float32)
    return kept(times(dp, dropout.factor), dropout, pair)


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
def score_gradient(p, log2_p, t, row, terms, GUARD: tl.constexpr):
    """ds of the capped scores, eq. ds, by the row's values of the `RowTerms` terms; t = dp - delta,
    see `delta_kernel`.

    GUARD: it is summed over rows, some of which may have no key: dp may be infinite or NaN there,
    which p = 0 does not clear.
    """
    if terms.dentropy is not None:
        # p = 0 has log2 p = -inf, and its term is 0
        t -= tl.where(p > 0, row.dentropy * (log2_p * LN2), 0.0)
    ds = p * t
    if GUARD:
        ds = tl.where(row.lse == float("inf"), 0.0, ds)
    return ds


@triton.jit
def through_softcap(ds, th, softcap):
    """ds of the scores below the softcap, whose tanh is `th`."""
    if softcap is not None:
        return ds * (1.0 - th * th)
    else:
        return ds
