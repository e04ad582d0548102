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

from ..core.call import AttentionCall, AttentionWeightsCall, CrossAttentionCall, shared_fields
from ..core.kernel_op import Gradients, Needs
from ..core.layout import WeightsResults, empty_weights, zero_gradients
from .bias_gradient import backward_dbias
from .cross_attention_backward import backward_dkdv, backward_dq
from .launch import Launch, broadcast, strided
from .rows import lse_in_score_units
from .scores import (
    forbid_outside,
    kept,
    log2_probability,
    pair_rows,
    row_offsets,
    row_scale,
    tile_scores,
)
from .structs import Pair, RowTerms, Strided, Upstream
from .tiles import dot_nt, load_rows, load_tile, row_bounds, times


@triton.jit
def weights_kernel(
    weights,  # Strided [B, 1 or Hq, Nq, Nk]
    terms,  # RowTerms of lse and lse_low, in the scores' unit
    x,  # QueriesAndKeys
    s,  # Scores
    dropout,  # Dropout
    n,  # Sizes
    n_heads,  # of `weights`
    T: tl.constexpr,  # Tiling
):
    PRECISION: tl.constexpr = T.PRECISION
    CHUNKS: tl.constexpr = T.CHUNKS
    BLOCK_Q: tl.constexpr = T.BLOCK_Q
    BLOCK_K: tl.constexpr = T.BLOCK_K
    pid = tl.program_id(0).to(tl.int64)
    q_tiles, k_tiles = tl.cdiv(n.Nq, BLOCK_Q), tl.cdiv(n.Nk, BLOCK_K)
    k_tile_index, pid = pid % k_tiles, pid // k_tiles
    q_tile_index, pid = pid % q_tiles, pid // q_tiles
    weights_h, b = pid % n_heads, pid // n_heads
    # [BLOCK_Q], [BLOCK_K]
    i = (q_tile_index * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int32)
    j = (k_tile_index * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
    row_mask, exists = i < n.Nq, j < n.Nk
    heads = n.Hkv * T.GROUP // n_heads
    head_end = weights_h * heads + heads
    if s.start.ptr is not None:
        first, last = row_bounds(s, b, i, row_mask, n.Nk)
        reaches = (tl.min(first) < (k_tile_index + 1) * BLOCK_K) & (
            tl.max(last) > k_tile_index * BLOCK_K
        )
        head_end = tl.where(reaches, head_end, weights_h * heads)
    # [BLOCK_Q, BLOCK_K]
    acc = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    for head in range(weights_h * heads, head_end):
        h = (tl.full([BLOCK_Q], 0, tl.int64) + head).to(tl.int32)
        # [BLOCK_Q, D], [BLOCK_K, D]
        rows = row_offsets(x.q.stride, b, h, i)
        q_tile = load_tile(x.q.ptr, rows, row_mask, T.D, CHUNKS, T.ALIGN)
        keys = b * x.k.stride[0] + head // T.GROUP * x.k.stride[1]
        keys = keys + j.to(tl.int64) * x.k.stride[2]
        k_tile = load_tile(x.k.ptr, keys, exists, T.D, CHUNKS, T.ALIGN)
        score, _ = tile_scores(
            dot_nt(q_tile, k_tile, CHUNKS, PRECISION), row_scale(s.scale, head), s,
            pair_rows(s.bias, b, h, i, 1), pair_rows(s.mask, b, h, i, 1),
            row_mask[:, None], j[None, :], n.Nk,
        )  # fmt: skip
        if s.start.ptr is not None:
            score = forbid_outside(score, first[:, None], last[:, None], j[None, :])
        rows = (b * n.Hkv * T.GROUP + head) * n.Nq + i
        row = load_rows(terms, rows, row_mask, 1)
        p = tl.exp2(log2_probability(score, row, s.bias.ptr is not None))
        acc += kept(p, dropout, Pair(b, h[:, None], i[:, None], j[None, :]))

    pairs = row_offsets(weights.stride, b, weights_h, i)[:, None] + j.to(tl.int64)[None, :]
    acc = times(acc, dropout.factor).to(weights.ptr.dtype.element_ty)
    tl.store(weights.ptr + pairs, acc, row_mask[:, None] & exists[None, :])


def forward(call: AttentionWeightsCall) -> WeightsResults:
    """The weights of a call, which has an lse."""
    weights = empty_weights(call).weights
    if weights.numel():
        launch = Launch(call, p_scale=p_scale(call))
        n_heads = weights.shape[1]
        config = launch.config("weights")
        tiles = triton.cdiv(call.Nq, config.block_q) * launch.key_tiles(config)
        terms = RowTerms(lse_in_score_units(launch, call.lse), call.lse_low, None, None)
        launch.run(
            weights_kernel, call.B * n_heads * tiles, config,
            Strided(weights.flatten(0, 1), weights.stride()), terms, launch.queries_and_keys(),
            launch.scores(), launch.dropout(), launch.sizes(), n_heads, T=launch.tiling(config),
        )  # fmt: skip
    return WeightsResults(weights)


def p_scale(call: AttentionWeightsCall) -> float:
    """What multiplies each head's weights."""
    return 1.0 / call.Hq if call.average_heads else 1.0


def backward(
    upstream: WeightsResults, call: AttentionWeightsCall, results: WeightsResults, needs: Needs
) -> Gradients:
    """The gradients that `needs` names, of q, k, bias, scale_tensor and lse.

    Where the call's lse is its own, they include what flows through it.
    """
    dweights = upstream.weights
    if dweights.numel() == 0:
        return zero_gradients(call, needs)
    # values and their gradient of zeros, one row for all: <dout, v> adds nothing to dweights
    v, dout = (call.q.new_zeros(16).expand(*t.shape[:3], 16) for t in (call.k, call.q))
    launch = Launch(with_values(call, v), p_scale=p_scale(call))
    dweights = dweights.contiguous()
    weights = Strided(dweights.flatten(0, 1), broadcast(dweights).stride)
    config, lse = launch.config("dq", True), lse_in_score_units(launch, call.lse)

    def terms(minus_delta: Tensor) -> Upstream:
        return Upstream(strided(dout), RowTerms(lse, call.lse_low, minus_delta, None), weights)

    up = terms(torch.zeros_like(lse))
    if call.lse_is_own:
        up = terms(backward_dq(launch, config, up, None, with_dlse=True).dlse)
    grads = {}
    if "q" in needs or "scale_tensor" in needs or "lse" in needs:
        of_rows = backward_dq(launch, config, up, None, with_dlse="lse" in needs)
        grads = {"q": of_rows.dq, "scale_tensor": of_rows.dscale, "lse": of_rows.dlse}
    if "k" in needs:
        grads["k"], _ = backward_dkdv(launch, launch.config("dkdv", True), up)
    if "bias" in needs:
        grads["bias"] = backward_dbias(launch, up)
    return grads


def with_values(call: AttentionCall, v: Tensor) -> CrossAttentionCall:
    """The call of attention to these values, with the same probabilities."""
    shared = shared_fields(call, "AttentionCall")
    plain = dict(return_lse=False, return_statistics=False, deterministic=True)
    return CrossAttentionCall(**shared, v=v, **plain)
