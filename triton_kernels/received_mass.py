"""Received mass: how much attention each key gets, the sum over queries of its weights.

    R_j = sum_i w_i sum_{h of group} exp(s_hij - lse_hi)

The kernel holds a tile of keys and walks the rows that reach it; what its scores add to the sums
stays in registers until the last row, so that nothing crosses lanes in the loop. The gradient needs
no kernel: it is that of attention to values of one column, see `backward`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..core.call import ReceivedMassCall
from ..core.kernel_op import Gradients, Needs
from ..core.layout import MassResults
from . import cross_attention
from .attention_weights import with_values
from .launch import Launch, strided
from .rows import lse_in_score_units, tile_bounds
from .scores import (
    forbid_outside,
    log2_probability,
    pair_rows,
    row_offsets,
    row_scale,
    run_offsets,
    tile_scores,
)
from .structs import RowTerms
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

# The values of the gradient have so many columns: the narrowest that the kernels multiply.
COLUMNS = 16


@triton.jit
def mass_kernel(
    mass,  # float32 [n_splits, B, Hkv, Nk]
    weight,  # Strided float32 [B, Nq], of each row, or of None for ones
    bounds,  # int32 [B, n_tiles, 4], see `bounds_kernel`, or None
    terms,  # RowTerms of lse and lse_low, in the scores' unit
    x,  # QueriesAndKeys
    s,  # Scores
    factor,  # multiplies the sums; None for 1
    n,  # Sizes
    n_splits,
    T: tl.constexpr,  # Tiling
):
    PRECISION: tl.constexpr = T.PRECISION
    CHUNKS: tl.constexpr = T.CHUNKS
    BLOCK_Q: tl.constexpr = T.BLOCK_Q
    BLOCK_K: tl.constexpr = T.BLOCK_K
    tile, hkv, b, split = program(tl.cdiv(n.Nk, BLOCK_K), n.Hkv, n.B)
    n_tiles = tl.cdiv(n.Nq * T.GROUP, BLOCK_Q)
    k0 = tile * BLOCK_K
    # [BLOCK_K]
    j = k0 + tl.arange(0, BLOCK_K)
    exists = j < n.Nk
    begin, end = split_range(0, n_tiles, split, n_splits, 1)
    if s.start.ptr is not None:
        bounds += b * n_tiles * 4
    # [BLOCK_K, D]
    run = run_offsets(x.k.stride, b, hkv, k0, BLOCK_K)
    k_tile = load_tile(x.k.ptr, run, exists, T.D, CHUNKS, T.ALIGN)
    # [BLOCK_K, BLOCK_Q]
    acc = tl.full([BLOCK_K, BLOCK_Q], 0.0, tl.float32)
    # With intervals, the row tiles that see every key of this tile come first: they need no bounds.
    WHOLE_FIRST: tl.constexpr = s.start.ptr is not None
    for PART in tl.static_range(WHOLE if WHOLE_FIRST else ALL, ALL if WHOLE_FIRST else ALL + 1):
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
                i, h, row_mask = packed_rows(t, hkv, n.Nq, BLOCK_Q, T.GROUP)
                rows = row_offsets(x.q.stride, b, h, i)
                q_tile = load_tile(x.q.ptr, rows, row_mask, T.D, CHUNKS, T.ALIGN)
                rows = (b * n.Hkv * T.GROUP + h) * n.Nq + i
                row = load_rows(terms, rows, row_mask, 0)
                rs = row_scale(s.scale, h)
                if s.scale.ptr is not None:
                    rs = rs[None, :]
                # [BLOCK_K, BLOCK_Q]
                score, _ = tile_scores(
                    dot_nt(k_tile, q_tile, CHUNKS, PRECISION), rs, s,
                    pair_rows(s.bias, b, h, i, 0), pair_rows(s.mask, b, h, i, 0),
                    row_mask[None, :], j[:, None], n.Nk,
                )  # fmt: skip
                if PART == CUT:
                    first, last = row_bounds(s, b, i, row_mask, n.Nk)
                    score = forbid_outside(score, first[None, :], last[None, :], j[:, None])
                # 0 where there is no row, and of no account where there is no key
                p = tl.exp2(log2_probability(score, row, s.bias.ptr is not None))
                if weight.ptr is not None:
                    rows = b * weight.stride[0] + i.to(tl.int64) * weight.stride[1]
                    p *= tl.load(weight.ptr + rows, row_mask, 0.0)[None, :]
                acc += p
    total = times(tl.sum(acc, 1), factor)
    tl.store(mass + ((split * n.B + b) * n.Hkv + hkv) * n.Nk + j, total, exists)


def forward(call: ReceivedMassCall) -> MassResults:
    """float32 [B, Hkv, Nk], the mean over each key head's query heads, of a call with an lse."""
    if 0 in (call.B, call.Hkv, call.Nk, call.Nq):
        mass = call.k.new_zeros((call.B, call.Hkv, call.Nk), dtype=torch.float32)
        return MassResults(mass)
    launch = Launch(call, p_scale=call.Hkv / call.Hq)
    config = launch.config("mass")
    bounds = None if call.start is None else tile_bounds(launch, config)
    programs = launch.key_tiles(config) * call.B * call.Hkv
    n_splits = launch.splits(programs, launch.row_steps(config))
    mass = call.q.new_empty((n_splits, call.B, call.Hkv, call.Nk), dtype=torch.float32)
    terms = RowTerms(lse_in_score_units(launch, call.lse), call.lse_low, None, None)
    launch.run(
        mass_kernel, programs * n_splits, config,
        mass, strided(call.row_weight), bounds, terms, launch.queries_and_keys(),
        launch.scores(), launch.dropout().factor, launch.sizes(), n_splits,
        T=launch.tiling(config),
    )  # fmt: skip
    return MassResults(mass.sum(0))


def backward(
    upstream: MassResults, call: ReceivedMassCall, results: MassResults, needs: Needs
) -> Gradients:
    """The gradients that `needs` names, of q, k, bias, scale_tensor and row_weight.

    sum_j g_j R_j = sum_i w_i out_i, where out is attention to values v_j = g_j of one column: so w
    is the gradient of out, and out the gradient of w.
    """
    dmass, q = upstream.mass, call.q
    attention = with_values(call, values_of(dmass, q))
    attended = cross_attention.forward(attention)
    dout = attended._replace(
        out=gradients_of(call.row_weight, q), lse=None, lse_low=None, entropy=None
    )
    of_attention = [name for name in needs if name != "row_weight"]
    grads = dict(cross_attention.backward(dout, attention, attended, of_attention))
    if "row_weight" in needs:
        sums = torch.promote_types(q.dtype, torch.float32)
        grads["row_weight"] = attended.out[..., :2].to(sums).sum((1, 3))
    return grads


def two_parts(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(large, small) of a dtype that may be narrower than that of their sum, `t`."""
    large = t.to(dtype)
    small = torch.where(large.isfinite(), t - large.to(t.dtype), 0.0).to(dtype)
    return large, small


def values_of(dmass: Tensor, q: Tensor) -> Tensor:
    """[B, Hkv, Nk, COLUMNS]: g in two parts, twice, for the two parts of w, see `backward`."""
    large, small = two_parts(dmass * (dmass.shape[1] / q.shape[1]), q.dtype)
    return F.pad(torch.stack((large, small, large, small), -1), (0, COLUMNS - 4))


def gradients_of(row_weight: Tensor | None, q: Tensor) -> Tensor:
    """[B, Hq, Nq, COLUMNS]: w in two parts, each beside both of g."""
    if row_weight is None:
        one = F.pad(q.new_ones(2), (0, COLUMNS - 2))
        return one.expand(*q.shape[:3], COLUMNS)
    large, small = two_parts(row_weight, q.dtype)
    columns = F.pad(torch.stack((large, large, small, small), -1), (0, COLUMNS - 4))
    return columns[:, None].expand(*q.shape[:3], COLUMNS)
