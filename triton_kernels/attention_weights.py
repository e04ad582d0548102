"""Attention weights, averaged over the heads as they are written: forward kernel, launchers.

    w_ij = 1 / H * sum_h dropout(exp(s_hij - lse_hi))

The forward kernel holds one tile of the result and walks the heads. The backward is that of
`cross_attention_backward.py` with the gradient of the weights in place of <dout_i, v_j>. An lse
from outside gets a gradient, minus the row sums of ds; where lse is that of these scores the row
sums are subtracted instead (delta in eq. ds), which costs one more pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.layout import broadcast_strides, zero_gradients
from .bias_gradient import backward_dbias
from .cross_attention_backward import backward_dkdv, backward_dq
from .launch import Call
from .rows import lse_in_score_units
from .scores import (
    forbid_outside,
    kept,
    log2_probability,
    row_offsets,
    row_scale,
    tile_scores,
)
from .tiles import (
    dot_nt,
    load_rows,
    load_tile,
    row_bounds,
    times,
)


@triton.jit
def weights_kernel(
    weights, stride_weights,  # [B, 1 or Hq, Nq, Nk]
    lse, lse_low,  # float32 [B, Hq, Nq], in the scores' unit; see `forward`
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask,  # 4-d with broadcast strides, or None
    start, stride_start, stop, stride_stop,  # int32 [B, Nq], or None
    scale, scale_tensor, stride_scale, softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, n_heads,  # of `weights`
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    q_tiles, k_tiles = tl.cdiv(Nq, BLOCK_Q), tl.cdiv(Nk, BLOCK_K)
    own_j, pid = pid % k_tiles, pid // k_tiles
    own_i, pid = pid % q_tiles, pid // q_tiles
    own_h, b = pid % n_heads, pid // n_heads
    # [BLOCK_Q], [BLOCK_K]
    i = (own_i * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int32)
    j = (own_j * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
    row_mask, there = i < Nq, j < Nk
    heads = Hkv * GROUP // n_heads
    head_end = own_h * heads + heads
    if start is not None:
        first, last = row_bounds(start, stop, stride_start, stride_stop, b, i, row_mask, Nk)
        reaches = (tl.min(first) < (own_j + 1) * BLOCK_K) & (tl.max(last) > own_j * BLOCK_K)
        head_end = tl.where(reaches, head_end, own_h * heads)
    # [BLOCK_Q, BLOCK_K]
    acc = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    for head in range(own_h * heads, head_end):
        h = (tl.full([BLOCK_Q], 0, tl.int64) + head).to(tl.int32)
        # [BLOCK_Q, D], [BLOCK_K, D]
        q_tile = load_tile(q, row_offsets(stride_q, b, h, i), row_mask, D, CHUNKS, ALIGN)
        keys = b * stride_k[0] + head // GROUP * stride_k[1] + j.to(tl.int64) * stride_k[2]
        k_tile = load_tile(k, keys, there, D, CHUNKS, ALIGN)
        s, _ = tile_scores(
            dot_nt(q_tile, k_tile, CHUNKS, PRECISION),
            row_scale(scale, scale_tensor, stride_scale, head), softcap,
            bias, row_offsets(stride_bias, b, h, i)[:, None], stride_bias,
            mask, row_offsets(stride_mask, b, h, i)[:, None], stride_mask,
            row_mask[:, None], j[None, :], Nk,
        )  # fmt: skip
        if start is not None:
            s = forbid_outside(s, first[:, None], last[:, None], j[None, :])
        rows = (b * Hkv * GROUP + head) * Nq + i
        row_lse, row_low, _, _ = load_rows(lse, lse_low, None, None, rows, row_mask, 1)
        p = tl.exp2(log2_probability(s, row_lse, row_low, bias))
        acc += kept(p, seed, b, h[:, None], i[:, None], j[None, :], threshold)

    rows = row_offsets(stride_weights, b, own_h, i)[:, None] + j.to(tl.int64)[None, :]
    acc = times(acc, p_factor).to(weights.dtype.element_ty)
    tl.store(weights + rows, acc, row_mask[:, None] & there[None, :])


def forward(
    q, k, bias, scale_tensor, lse, lse_low, start, stop, mask, seed, scale, softcap, dropout_p,
    average_heads, allow_tf32,
) -> Tensor:  # fmt: skip
    """[B, 1, Nq, Nk] averaged over the heads, or [B, Hq, Nq, Nk], in the dtype of q.

    lse float32 [B, Hq, Nq]; lse_low and the rest as in `cross_attention.forward`.
    """
    call = Call(
        q, k, k, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p,
        allow_tf32, 1.0 / q.shape[1] if average_heads else 1.0,
    )  # fmt: skip
    n_heads = 1 if average_heads else call.Hq
    weights = q.new_empty((call.B, n_heads, call.Nq, call.Nk))
    if weights.numel():
        config = call.config("weights")
        tiles = triton.cdiv(call.Nq, config.block_q) * call.key_tiles(config)
        results = (weights.flatten(0, 1), weights.stride(), lse_in_score_units(call, lse), lse_low)
        call.launch(weights_kernel, config, call.B * n_heads * tiles, results, n_heads)
    return weights


def backward(
    dweights, q, k, bias, scale_tensor, lse, lse_low, start, stop, mask, seed, scale, softcap,
    dropout_p, average_heads, own_lse, allow_tf32, needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dbias, dscale, dlse); those that are not in the five `needs` have no elements.

    dweights like the weights, of any strides; the rest as `forward` took it. With own_lse, which
    says that lse is that of these very scores, the gradients include what flows through it.
    """
    # values and their gradient of zeros, one row for all: <dout, v> adds nothing to dweights
    v, dout = (q.new_zeros(16).expand(*t.shape[:3], 16) for t in (k, q))
    call = Call(
        q, k, v, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p,
        allow_tf32, 1.0 / q.shape[1] if average_heads else 1.0,
    )  # fmt: skip
    if dweights.numel() == 0:
        return zero_gradients((q, k, bias, scale_tensor, lse), needs, 2)
    dweights = dweights.contiguous()
    config, strides = call.config("dq", True), broadcast_strides(dweights)
    lse = lse_in_score_units(call, lse)
    dq, dk, dbias, dscale, dlse = (None,) * 5

    def rows(minus_delta: Tensor) -> tuple:
        terms = (lse, lse_low, minus_delta, None)
        return (dout, dout.stride(), *terms, dweights.flatten(0, 1), strides)

    terms = rows(torch.zeros_like(lse))
    if own_lse:
        *_, dlse = backward_dq(call, config, terms, None, False, True)
        terms = rows(dlse)
    if needs[0] or needs[3] or needs[4]:
        dq, dscale, _, _, dlse = backward_dq(call, config, terms, None, False, needs[4])
    if needs[1]:
        dk, _ = backward_dkdv(call, call.config("dkdv", True), terms, None)
    if needs[2]:
        dbias = backward_dbias(call, terms)
    grads = (dq, dk, dbias, dscale, dlse)
    return tuple(t if needed else q.new_empty(0) for t, needed in zip(grads, needs, strict=True))
