"""dbias of cross-attention, summed over the dimensions in which the bias is broadcast.

One program owns a tile of the bias and walks everything that it was added to, but for tiles outside
the intervals, so the sum needs no atomics, is deterministic, and only the bias is ever written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Call
from .scores import (
    forbid_outside,
    key_ranges,
    log2_probability,
    plus_rows,
    probability_gradient,
    row_offsets,
    row_scale,
    score_gradient,
    tile_scores,
)
from .tiles import dot_nt, load_rows, load_tile


@triton.jit
def dbias_kernel(
    dbias,  # float32 [n_splits, *bias.shape], contiguous
    bias_B, bias_H, bias_Nq, bias_Nk,  # each 1 or full
    dout, stride_dout, lse, lse_low, minus_delta, dentropy, dweights, stride_dweights,
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask,
    start, stride_start, stop, stride_stop,
    scale, scale_tensor, stride_scale, softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, n_splits,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q_tiles, k_tiles = tl.cdiv(Nq, BLOCK_Q), tl.cdiv(Nk, BLOCK_K)
    own_q, own_k = tl.cdiv(bias_Nq, BLOCK_Q), tl.cdiv(bias_Nk, BLOCK_K)
    pid = tl.program_id(0).to(tl.int64)
    own_j, pid = pid % own_k, pid // own_k
    own_i, pid = pid % own_q, pid // own_q
    own_h, pid = pid % bias_H, pid // bias_H
    own_b, split = pid % bias_B, pid // bias_B
    # how many batches, heads and tiles are summed into this one
    n_b, n_h = B // bias_B, Hkv * GROUP // bias_H
    n_i = tl.where(bias_Nq == Nq, 1, q_tiles)
    n_j = tl.where(bias_Nk == Nk, 1, k_tiles)
    n_terms = n_b * n_h * n_i * n_j
    per_split = tl.cdiv(n_terms, n_splits)
    # [BLOCK_Q, BLOCK_K]
    acc = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    for term in range(split * per_split, tl.minimum(n_terms, (split + 1) * per_split)):
        j = ((own_j + term % n_j) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
        i = ((own_i + term // n_j % n_i) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int32)
        h = own_h + term // (n_j * n_i) % n_h
        b = own_b + term // (n_j * n_i * n_h)
        row_mask, there = i < Nq, j < Nk
        first, last, key_begin, key_end, _, _ = key_ranges(
            start, stop, stride_start, stride_stop, b, i, row_mask, Nk
        )
        if (tl.min(j) < key_end) & (tl.max(j) >= key_begin):
            h_rows = (tl.full([BLOCK_Q], 0, tl.int64) + h).to(tl.int32)
            # [BLOCK_Q, D], [BLOCK_K, D], [BLOCK_Q, DV], [BLOCK_K, DV]
            q_tile = load_tile(q, row_offsets(stride_q, b, h, i), row_mask, D, CHUNKS, ALIGN)
            k_tile = load_tile(k, row_offsets(stride_k, b, h // GROUP, j), there, D, CHUNKS, ALIGN)
            dout_tile = load_tile(
                dout, row_offsets(stride_dout, b, h, i), row_mask, DV, CHUNKS_V, ALIGN
            )
            v_tile = load_tile(
                v, row_offsets(stride_v, b, h // GROUP, j), there, DV, CHUNKS_V, ALIGN
            )
            rs = row_scale(scale, scale_tensor, stride_scale, h)
            s = tile_scores(
                dot_nt(q_tile, k_tile, CHUNKS, PRECISION), rs, softcap,
                bias, row_offsets(stride_bias, b, h_rows, i)[:, None], stride_bias,
                mask, row_offsets(stride_mask, b, h_rows, i)[:, None], stride_mask,
                row_mask[:, None], j[None, :], Nk,
            )[0]  # fmt: skip
            s = forbid_outside(s, first, last, j[None, :])
            rows = (b * Hkv * GROUP + h) * Nq + i
            row_lse, row_low, row_minus_delta, row_dentropy = load_rows(
                lse, lse_low, minus_delta, dentropy, rows, row_mask, 1
            )
            log2_p = log2_probability(s, row_lse, row_low, bias)
            p = tl.exp2(log2_p)
            dp = probability_gradient(
                dot_nt(dout_tile, v_tile, CHUNKS_V, PRECISION), dweights,
                row_offsets(stride_dweights, b, h_rows, i)[:, None], stride_dweights,
                p_factor, seed, threshold,
                b, h_rows[:, None], i[:, None], row_mask[:, None], j[None, :], Nk,
            )  # fmt: skip
            t = plus_rows(dp, row_minus_delta, True)
            ds = score_gradient(p, log2_p, t, row_lse, dentropy, row_dentropy, True)
            # padding may hold NaN, and 0 * NaN would reach the bias beside it
            acc += forbid_outside(ds, first, last, j[None, :], 0.0)

    if bias_Nq != Nq:
        acc = tl.where(tl.arange(0, BLOCK_Q)[:, None] == 0, tl.sum(acc, 0)[None, :], 0.0)
    if bias_Nk != Nk:
        acc = tl.where(tl.arange(0, BLOCK_K)[None, :] == 0, tl.sum(acc, 1)[:, None], 0.0)
    i = own_i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = own_j * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = (((split * bias_B + own_b) * bias_H + own_h) * bias_Nq + i) * bias_Nk
    there = (i < bias_Nq)[:, None] & (j < bias_Nk)[None, :]
    tl.store(dbias + rows[:, None] + j[None, :], acc, there)


def backward_dbias(call: Call, rows: tuple) -> Tensor:
    config, bias = call.config("dbias"), call.bias
    blocks = (config.block_q, config.block_k)
    tiles = [triton.cdiv(n, b) for n, b in zip(bias.shape[2:], blocks, strict=True)]
    programs = bias.shape[0] * bias.shape[1] * tiles[0] * tiles[1]
    all_tiles = triton.cdiv(call.Nq, config.block_q) * call.key_tiles(config) * call.B * call.Hq
    n_splits = call.splits(programs, all_tiles // programs)
    dbias = bias.new_empty((n_splits, *bias.shape), dtype=torch.float32)
    call.launch(dbias_kernel, config, programs * n_splits, (dbias, *bias.shape, *rows), n_splits)
    return dbias.sum(0).to(bias.dtype)
