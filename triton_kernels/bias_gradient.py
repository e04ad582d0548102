"""dbias of cross-attention, summed over the dimensions in which the bias is broadcast.

One program owns a tile of the bias and walks everything that it was added to, but for tiles outside
the intervals, so the sum needs no atomics, is deterministic, and only the bias is ever written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .scores import (
    forbid_outside,
    key_ranges,
    log2_probability,
    pair_rows,
    plus_rows,
    probability_gradient,
    row_offsets,
    row_scale,
    score_gradient,
    tile_scores,
)
from .structs import Pair, PairSizes, Upstream
from .tiles import dot_nt, load_rows, load_tile


@triton.jit
def dbias_kernel(
    dbias,  # float32 [n_splits, *bias.shape], contiguous
    size,  # PairSizes, of the bias
    up,  # Upstream
    x,  # Operands
    s,  # Scores
    dropout,  # Dropout
    n,  # Sizes
    n_splits,
    T: tl.constexpr,  # Tiling
):
    PRECISION: tl.constexpr = T.PRECISION
    CHUNKS: tl.constexpr = T.CHUNKS
    CHUNKS_V: tl.constexpr = T.CHUNKS_V
    BLOCK_Q: tl.constexpr = T.BLOCK_Q
    BLOCK_K: tl.constexpr = T.BLOCK_K
    q_tiles, k_tiles = tl.cdiv(n.Nq, BLOCK_Q), tl.cdiv(n.Nk, BLOCK_K)
    bias_q_tiles, bias_k_tiles = tl.cdiv(size.Nq, BLOCK_Q), tl.cdiv(size.Nk, BLOCK_K)
    pid = tl.program_id(0).to(tl.int64)
    bias_j, pid = pid % bias_k_tiles, pid // bias_k_tiles
    bias_i, pid = pid % bias_q_tiles, pid // bias_q_tiles
    bias_h, pid = pid % size.H, pid // size.H
    bias_b, split = pid % size.B, pid // size.B
    # how many batches, heads and tiles are summed into this one
    n_b, n_h = n.B // size.B, n.Hkv * T.GROUP // size.H
    n_i = tl.where(size.Nq == n.Nq, 1, q_tiles)
    n_j = tl.where(size.Nk == n.Nk, 1, k_tiles)
    n_terms = n_b * n_h * n_i * n_j
    per_split = tl.cdiv(n_terms, n_splits)
    # [BLOCK_Q, BLOCK_K]
    acc = tl.full([BLOCK_Q, BLOCK_K], 0.0, tl.float32)
    for term in range(split * per_split, tl.minimum(n_terms, (split + 1) * per_split)):
        j = ((bias_j + term % n_j) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int32)
        i = ((bias_i + term // n_j % n_i) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int32)
        h = bias_h + term // (n_j * n_i) % n_h
        b = bias_b + term // (n_j * n_i * n_h)
        row_mask, exists = i < n.Nq, j < n.Nk
        keys = key_ranges(s, b, i, row_mask, n.Nk)
        if (tl.min(j) < keys.end) & (tl.max(j) >= keys.begin):
            h_rows = (tl.full([BLOCK_Q], 0, tl.int64) + h).to(tl.int32)
            pair = Pair(b, h_rows[:, None], i[:, None], j[None, :])
            # [BLOCK_Q, D], [BLOCK_K, D], [BLOCK_Q, DV], [BLOCK_K, DV]
            rows = row_offsets(x.q.stride, b, h, i)
            q_tile = load_tile(x.q.ptr, rows, row_mask, T.D, CHUNKS, T.ALIGN)
            rows = row_offsets(x.k.stride, b, h // T.GROUP, j)
            k_tile = load_tile(x.k.ptr, rows, exists, T.D, CHUNKS, T.ALIGN)
            rows = row_offsets(up.dout.stride, b, h, i)
            dout_tile = load_tile(up.dout.ptr, rows, row_mask, T.DV, CHUNKS_V, T.ALIGN)
            rows = row_offsets(x.v.stride, b, h // T.GROUP, j)
            v_tile = load_tile(x.v.ptr, rows, exists, T.DV, CHUNKS_V, T.ALIGN)
            rs = row_scale(s.scale, h)
            score, _ = tile_scores(
                dot_nt(q_tile, k_tile, CHUNKS, PRECISION), rs, s,
                pair_rows(s.bias, b, h_rows, i, 1), pair_rows(s.mask, b, h_rows, i, 1),
                row_mask[:, None], j[None, :], n.Nk,
            )  # fmt: skip
            score = forbid_outside(score, keys.first, keys.last, j[None, :])
            rows = (b * n.Hkv * T.GROUP + h) * n.Nq + i
            row = load_rows(up.rows, rows, row_mask, 1)
            log2_p = log2_probability(score, row, True)
            p = tl.exp2(log2_p)
            dp = dot_nt(dout_tile, v_tile, CHUNKS_V, PRECISION)
            weight_rows = pair_rows(up.dweights, b, h_rows, i, 1)
            dp = probability_gradient(
                dp, up.dweights, weight_rows, dropout, pair, row_mask[:, None], n.Nk
            )
            t = plus_rows(dp, row.minus_delta, True)
            ds = score_gradient(p, log2_p, t, row, up.rows, True)
            # padding may hold NaN, and 0 * NaN would reach the bias beside it
            acc += forbid_outside(ds, keys.first, keys.last, j[None, :], 0.0)

    if size.Nq != n.Nq:
        acc = tl.where(tl.arange(0, BLOCK_Q)[:, None] == 0, tl.sum(acc, 0)[None, :], 0.0)
    if size.Nk != n.Nk:
        acc = tl.where(tl.arange(0, BLOCK_K)[None, :] == 0, tl.sum(acc, 1)[:, None], 0.0)
    i = bias_i * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = bias_j * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = (((split * size.B + bias_b) * size.H + bias_h) * size.Nq + i) * size.Nk
    exists = (i < size.Nq)[:, None] & (j < size.Nk)[None, :]
    tl.store(dbias + rows[:, None] + j[None, :], acc, exists)


def backward_dbias(launch: Launch, up: Upstream) -> Tensor:
    """dbias, like the bias."""
    call, config, bias = launch.call, launch.config("dbias"), launch.call.bias
    blocks = (config.block_q, config.block_k)
    tiles = [triton.cdiv(n, b) for n, b in zip(bias.shape[2:], blocks, strict=True)]
    programs = bias.shape[0] * bias.shape[1] * tiles[0] * tiles[1]
    q_tiles = triton.cdiv(call.Nq, config.block_q)
    all_tiles = q_tiles * launch.key_tiles(config) * call.B * call.Hq
    n_splits = launch.splits(programs, all_tiles // programs)
    dbias = bias.new_empty((n_splits, *bias.shape), dtype=torch.float32)
    launch.run(
        dbias_kernel, programs * n_splits, config,
        dbias, PairSizes(*bias.shape), up, launch.operands(), launch.scores(), launch.dropout(),
        launch.sizes(), n_splits, T=launch.tiling(config, up.dout.ptr),
    )  # fmt: skip
    return dbias.sum(0).to(bias.dtype)
