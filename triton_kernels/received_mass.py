"""Received mass: how much attention each key gets, the sum over queries of its weights.

    R_j = sum_i w_i sum_{h of group} exp(s_hij - lse_hi)

The kernel holds a tile of keys and walks the rows that reach it; what its scores add to the sums
stays in registers until the last row, so that nothing crosses lanes in the loop. The gradient needs
no kernel: it is that of attention to values of one column, see `ops/received_mass.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Call
from .rows import lse_in_score_units, tile_bounds
from .scores import (
    forbid_outside,
    log2_probability,
    row_offsets,
    row_scale,
    run_offsets,
    tile_scores,
)
from .tiles import (
    ALL,
    CUT,
    WHOLE,
    dot_nt,
    load_rows,
    load_tile,
    next_run,
    packed_rows,
    program,
    row_bounds,
    split_range,
    times,
)


@triton.jit
def mass_kernel(
    mass,  # float32 [n_splits, B, Hkv, Nk]
    row_weight, stride_weight,  # float32 [B, Nq], or None for ones
    bounds,  # int32 [B, n_tiles, 4], see `bounds_kernel`, or None
    lse, lse_low,  # float32 [B, Hq, Nq], in the scores' unit
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask,
    start, stride_start, stop, stride_stop,
    scale, scale_tensor, stride_scale, softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, n_splits,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, hkv, b, split = program(tl.cdiv(Nk, BLOCK_K), Hkv, B)
    n_tiles = tl.cdiv(Nq * GROUP, BLOCK_Q)
    k0 = tile * BLOCK_K
    # [BLOCK_K]
    j = k0 + tl.arange(0, BLOCK_K)
    there = j < Nk
    begin, end = split_range(0, n_tiles, split, n_splits, 1)
    if start is not None:
        bounds += b * n_tiles * 4
    # [BLOCK_K, D]
    k_tile = load_tile(k, run_offsets(stride_k, b, hkv, k0, BLOCK_K), there, D, CHUNKS, ALIGN)
    # [BLOCK_K, BLOCK_Q]
    acc = tl.full([BLOCK_K, BLOCK_Q], 0.0, tl.float32)
    # of intervals first the row tiles that see every key of this tile, without looking at bounds
    for PART in tl.static_range(ALL if start is None else WHOLE, ALL + 1 if start is None else ALL):
        run_begin, run_end = begin, begin
        while run_end < end:
            if PART == ALL:
                run_begin, run_end = run_end, end
            else:
                run_begin, run_end = next_run(
                    bounds, run_end, end, n_tiles, k0, k0 + BLOCK_K, PART
                )  # fmt: skip
            for t in range(run_begin, run_end):
                # [BLOCK_Q]
                i, h, row_mask = packed_rows(t, hkv, Nq, BLOCK_Q, GROUP)
                q_tile = load_tile(q, row_offsets(stride_q, b, h, i), row_mask, D, CHUNKS, ALIGN)
                rows = (b * Hkv * GROUP + h) * Nq + i
                row_lse, row_low, _, _ = load_rows(lse, lse_low, None, None, rows, row_mask, 0)
                rs = row_scale(scale, scale_tensor, stride_scale, h)
                if scale_tensor is not None:
                    rs = rs[None, :]
                # [BLOCK_K, BLOCK_Q]
                s, _ = tile_scores(
                    dot_nt(k_tile, q_tile, CHUNKS, PRECISION), rs, softcap,
                    bias, row_offsets(stride_bias, b, h, i)[None, :], stride_bias,
                    mask, row_offsets(stride_mask, b, h, i)[None, :], stride_mask,
                    row_mask[None, :], j[:, None], Nk,
                )  # fmt: skip
                if PART == CUT:
                    first, last = row_bounds(
                        start, stop, stride_start, stride_stop, b, i, row_mask, Nk
                    )  # fmt: skip
                    s = forbid_outside(s, first[None, :], last[None, :], j[:, None])
                # 0 where there is no row, and of no account where there is no key
                p = tl.exp2(log2_probability(s, row_lse, row_low, bias))
                if row_weight is not None:
                    at = b * stride_weight[0] + i.to(tl.int64) * stride_weight[1]
                    p *= tl.load(row_weight + at, row_mask, 0.0)[None, :]
                acc += p
    total = times(tl.sum(acc, 1), p_factor)
    at = ((split * B + b) * Hkv + hkv) * Nk + j
    tl.store(mass + at, total, there)


def forward(
    q, k, bias, scale_tensor, lse, lse_low, start, stop, mask, row_weight, scale, softcap,
    allow_tf32,
) -> Tensor:  # fmt: skip
    """float32 [B, Hkv, Nk], the mean over each key head's query heads.

    lse float32 [B, Hq, Nq]; row_weight float32 [B, Nq] of any strides, or None; the rest as in
    `cross_attention.forward`.
    """
    call = Call(
        q, k, k, bias, scale_tensor, start, stop, mask, None, scale, softcap, 0.0, allow_tf32,
        k.shape[1] / max(q.shape[1], 1),
    )  # fmt: skip
    if 0 in (call.B, call.Hkv, call.Nk, call.Nq):
        return k.new_zeros((call.B, call.Hkv, call.Nk), dtype=torch.float32)
    config = call.config("mass")
    bounds = None if start is None else tile_bounds(call, config)
    programs = call.key_tiles(config) * call.B * call.Hkv
    n_splits = call.splits(programs, call.row_steps(config))
    mass = q.new_empty((n_splits, call.B, call.Hkv, call.Nk), dtype=torch.float32)
    strides = (0, 0) if row_weight is None else row_weight.stride()
    results = (mass, row_weight, strides, bounds, lse_in_score_units(call, lse), lse_low)
    call.launch(mass_kernel, config, programs * n_splits, results, n_splits)
    return mass.sum(0)
