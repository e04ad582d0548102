"""Scores of one tile and their gradient, the same lines for every kernel in either orientation.

Row quantities (query i, head h, interval bounds, offsets) and key quantities (key j) arrive with
shapes that broadcast, [BLOCK_Q, 1] with [1, BLOCK_K], or transposed; the tile follows.
"""

import triton
import triton.language as tl

from .tiles import LN2, LOG2E, dropout_keep, tanh


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
def split_offsets(stride, split, b, h, i):
    """The same with a leading dimension of splits."""
    rows = split * stride[0] + b * stride[1] + h.to(tl.int64) * stride[2]
    return rows + i.to(tl.int64) * stride[3]


@triton.jit
def tile_scores(
    qk, scale, softcap, bias, bias_rows, stride_bias, mask, mask_rows, stride_mask, row_mask, j, Nk
):
    """(s, tanh): scores in log2 units, -inf where the bool mask forbids, and the softcap's tanh.

    `scale` is a number or a row quantity; tanh is 0 without a softcap.
    """
    if softcap is not None:
        th = tanh(qk * (scale / softcap))
        s = th * (softcap * LOG2E)
    else:
        th = 0.0
        s = qk * (scale * LOG2E)
    if bias is not None:
        b = tl.load(bias + (bias_rows + j.to(tl.int64) * stride_bias[3]), row_mask & (j < Nk), 0.0)
        s += b.to(tl.float32) * LOG2E
    if mask is not None:
        at = mask_rows + j.to(tl.int64) * stride_mask[3]
        allowed = tl.load(mask + at, row_mask & (j < Nk), 0)
        s = tl.where(allowed != 0, s, float("-inf"))
    return s, th


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
def plus_weight_gradient(dp, dweights, rows, stride, row_mask, j, Nk):
    """dp, to which the gradient of the weights is added where they were returned as well."""
    if dweights is not None:
        at = rows + j.to(tl.int64) * stride[3]
        return dp + tl.load(dweights + at, row_mask & (j < Nk), 0.0).to(tl.float32)
    else:
        return dp


@triton.jit
def score_gradient(p, s, lse, dp, delta, dentropy, th, softcap):
    """(ds, ds before the softcap), eq. ds; delta already holds -dlse + dentropy * entropy."""
    ds = dp - delta
    if dentropy is not None:
        # p = 0 has s = -inf, and its term is 0
        ds -= dentropy * tl.where(p > 0, (s - lse) * LN2, 0.0)
    ds = p * ds
    if softcap is not None:
        return ds, ds * (1.0 - th * th)
    else:
        return ds, ds
