"""Fused masked cross-attention, backward: kernels and launchers of dq, dk and dv.

The equations are those of `xattn_kernels/reference.py`. The dq kernel holds a tile of query rows
and walks its keys; the dk, dv kernel holds a tile of keys and walks the rows that reach it. When
all rows of a key head fit one tile the dq kernel writes dk and dv as well, and each of S, P, dP and
dS is then computed once. Nothing is summed by atomics, so every result is deterministic.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.call import CrossAttentionCall
from ..core.kernel_op import Gradients, Needs
from ..core.layout import (
    AttentionResults,
    empty_rows,
    row_gradient,
    scale_gradient,
    split_buffer,
    sum_splits,
    zero_gradients,
)
from .bias_gradient import backward_dbias
from .configs import Config
from .launch import NOTHING, Blocks, Launch, strided
from .rows import bits_by_key, row_terms, tile_bounds
from .scores import (
    clear_gradients,
    cut_columns,
    cut_gradients,
    kept,
    key_ranges,
    log2_probability,
    pair_rows,
    plus_rows,
    probability_gradient,
    row_offsets,
    row_scale,
    run_offsets,
    score_gradient,
    split_offsets,
    through_softcap,
    tile_bits,
    tile_offsets,
    tile_scores,
)
from .structs import Pair, Upstream
from .tiles import (
    ALL,
    CUT,
    WHOLE,
    blocks_of_tile,
    clear_rows,
    dot_into,
    dot_nt,
    first_column,
    has_warpgroup_products,
    in_blocks,
    keys_of_part,
    load_rows,
    load_tile,
    next_run,
    over_gap,
    packed_rows,
    program,
    program_again,
    program_of,
    row_dot,
    rows_of_part,
    scale_rows,
    split_range,
    store_tile,
    times,
    zero_tile,
)


@triton.jit
def dq_kernel(
    dq,  # Strided [n_splits, B, Hq, Nq, D]
    dscale,  # float32 [n_splits, B, Hq, Nq], <q, dq> / scale of each row, or None
    dlse,  # float32 [n_splits, B, Hq, Nq], minus the row sums of ds, or None
    dk,  # Strided [B, Hkv, Nk, D] and
    dv,  # [B, Hkv, Nk, DV], when one tile holds all rows; else of None
    up,  # Upstream
    x,  # Operands
    s,  # Scores
    dropout,  # Dropout
    n,  # Sizes
    n_splits,
    lists,  # BlockLists
    T: tl.constexpr,  # Tiling
    W: tl.constexpr,  # Walk
):
    PRECISION: tl.constexpr = T.PRECISION
    CHUNKS: tl.constexpr = T.CHUNKS
    CHUNKS_V: tl.constexpr = T.CHUNKS_V
    BLOCK_Q: tl.constexpr = T.BLOCK_Q
    NATURAL: tl.constexpr = s.bias.ptr is not None
    tile, hkv, b, split = program(tl.cdiv(n.Nq * T.GROUP, BLOCK_Q), n.Hkv, n.B)
    # [BLOCK_Q]
    i, h, row_mask = packed_rows(tile, hkv, n.Nq, BLOCK_Q, T.GROUP)
    keys = key_ranges(s, b, i, row_mask, n.Nk)
    key_begin, key_end = keys.begin, keys.end
    if s.bits.ptr is not None:  # words begin at multiples of 32
        key_begin = key_begin // 32 * 32
    ids = None
    if lists.ids is not None:
        ids, n_ids = blocks_of_tile(lists, b * n.Hkv + hkv, tile, n.Nq, T, W)
        key_begin, key_end = 0, n_ids * W.BLOCK_SIZE
    key_begin, key_end = split_range(key_begin, key_end, split, n_splits, T.BLOCK_K)

    rs = row_scale(s.scale, h)
    if s.scale.ptr is not None:
        rs = rs[:, None]
    bias_rows, mask_rows = pair_rows(s.bias, b, h, i, 1), pair_rows(s.mask, b, h, i, 1)
    words = None
    if s.bits.ptr is not None:
        words = row_offsets(s.bits.stride, b, h, i)
    weight_rows = pair_rows(up.dweights, b, h, i, 1)
    rows = (b * n.Hkv * T.GROUP + h) * n.Nq + i
    row = load_rows(up.rows, rows, row_mask, 1)
    # [BLOCK_Q, D], [BLOCK_Q, DV]
    q_rows = row_offsets(x.q.stride, b, h, i)
    q_tile = load_tile(x.q.ptr, q_rows, row_mask, T.D, CHUNKS, T.ALIGN)
    dout_rows = row_offsets(up.dout.stride, b, h, i)
    dout_tile = load_tile(up.dout.ptr, dout_rows, row_mask, T.DV, CHUNKS_V, T.ALIGN)
    acc = zero_tile(BLOCK_Q, CHUNKS)
    row_ds = tl.full([BLOCK_Q], 0.0, tl.float32)
    MASKED: tl.constexpr = s.mask.ptr is not None or s.bits.ptr is not None
    MAY_BE_EMPTY: tl.constexpr = s.start.ptr is not None or MASKED or NATURAL
    GUARD: tl.constexpr = dk.ptr is not None and MAY_BE_EMPTY
    for PART in tl.static_range(WHOLE if W.TWO_LOOPS else ALL, ALL if W.TWO_LOOPS else ALL + 1):
        begin, end, gap, length = keys_of_part(
            key_begin, key_end, keys.full_begin, keys.full_end, T.BLOCK_K, PART
        )
        for k0 in range(begin, end, T.BLOCK_K):
            k0 = over_gap(k0, gap, length, PART)
            if ids is not None:
                k0 = in_blocks(ids, k0, W.BLOCK_SIZE)
            j = k0 + tl.arange(0, T.BLOCK_K)
            pair = Pair(b, h[:, None], i[:, None], j[None, :])
            exists = None if PART == WHOLE else j < (keys.end if ids is not None else key_end)
            if s.bits.ptr is not None or ids is not None:
                exists = exists & (j >= keys.begin)
            # [BLOCK_K, D], [BLOCK_K, DV]
            run = run_offsets(x.k.stride, b, hkv, k0, T.BLOCK_K)
            k_tile = load_tile(x.k.ptr, run, exists, T.D, CHUNKS, T.ALIGN)
            run = run_offsets(x.v.stride, b, hkv, k0, T.BLOCK_K)
            v_tile = load_tile(x.v.ptr, run, exists, T.DV, CHUNKS_V, T.ALIGN)
            # [BLOCK_Q, BLOCK_K]
            score, th = tile_scores(
                dot_nt(q_tile, k_tile, CHUNKS, PRECISION), rs, s, bias_rows, mask_rows,
                row_mask[:, None], j[None, :], n.Nk,
            )  # fmt: skip
            log2_p = log2_probability(score, row, NATURAL)
            dp = dot_nt(dout_tile, v_tile, CHUNKS_V, PRECISION)
            dp = probability_gradient(
                dp, up.dweights, weight_rows, dropout, pair, row_mask[:, None], n.Nk
            )
            t = plus_rows(dp, row.minus_delta, True)
            if s.bits.ptr is not None:
                chosen = tile_bits(s.bits.ptr, words, row_mask, k0, n.Nk, T.BLOCK_K)
                log2_p, t, th = clear_gradients(chosen, log2_p, t, th, s.softcap)
            elif PART == CUT:
                log2_p, t, th = cut_gradients(
                    log2_p, t, th, s.softcap, keys.first, keys.last, j[None, :]
                )
            elif PART == ALL:
                # one branch for all: of two the compiler makes selects in every tile
                if (k0 < keys.full_begin) | (k0 + T.BLOCK_K > keys.full_end):
                    log2_p, t, th = cut_gradients(
                        log2_p, t, th, s.softcap, keys.first, keys.last, j[None, :]
                    )
            p = tl.exp2(log2_p)
            ds = score_gradient(p, log2_p, t, row, up.rows, GUARD)
            if dlse is not None:
                row_ds += tl.sum(ds, 1)
            ds = through_softcap(ds, th, s.softcap)
            acc = dot_into(acc, ds.to(k_tile[0].dtype), k_tile, CHUNKS, PRECISION)
            if dk.ptr is not None:
                p = kept(times(p, dropout.factor), dropout, pair)
                # [BLOCK_K, D], [BLOCK_K, DV]
                dk_tile = zero_tile(T.BLOCK_K, CHUNKS)
                dv_tile = zero_tile(T.BLOCK_K, CHUNKS_V)
                ds_t = tl.trans((ds * rs).to(q_tile[0].dtype))
                p_t = tl.trans(p.to(dout_tile[0].dtype))
                dk_tile = dot_into(dk_tile, ds_t, q_tile, CHUNKS, PRECISION)
                dv_tile = dot_into(dv_tile, p_t, dout_tile, CHUNKS_V, PRECISION)
                run = run_offsets(dk.stride, b, hkv, k0, T.BLOCK_K)
                store_tile(dk.ptr, run, exists, dk_tile, T.D, CHUNKS, T.ALIGN)
                run = run_offsets(dv.stride, b, hkv, k0, T.BLOCK_K)
                store_tile(dv.ptr, run, exists, dv_tile, T.DV, CHUNKS_V, T.ALIGN)

    if MAY_BE_EMPTY:  # rows without keys, whatever reached them
        empty = tl.reshape(row.lse, [BLOCK_Q]) == float("inf")
        acc = clear_rows(acc, empty, CHUNKS)
        row_ds = tl.where(empty, 0.0, row_ds)
    if dlse is not None:
        tl.store(dlse + split * n.B * n.Hkv * T.GROUP * n.Nq + rows, -row_ds, row_mask)
    if dscale is not None:
        split_rows = dscale + split * n.B * n.Hkv * T.GROUP * n.Nq + rows
        tl.store(split_rows, row_dot(q_tile, acc, CHUNKS), row_mask)
    rows = split_offsets(dq.stride, split, b, h, i)
    rs = row_scale(s.scale, h) + tl.full([BLOCK_Q], 0.0, tl.float32)
    acc = scale_rows(acc, rs, CHUNKS)
    store_tile(dq.ptr, rows, row_mask, acc, T.D, CHUNKS, T.ALIGN)


@triton.jit
def dkdv_kernel(
    dk,  # Strided [n_splits, B, Hkv, Nk, D]
    dv,  # Strided [n_splits, B, Hkv, Nk, DV]
    bounds,  # int32 [B, n_tiles, 4]: smallest and largest start and stop of each row tile, or None
    up,  # Upstream
    x,  # Operands
    s,  # Scores, of bits by key
    dropout,  # Dropout
    n,  # Sizes
    n_splits,
    lists,  # BlockLists, by key
    T: tl.constexpr,  # Tiling
    W: tl.constexpr,  # Walk
):
    PRECISION: tl.constexpr = T.PRECISION
    CHUNKS: tl.constexpr = T.CHUNKS
    CHUNKS_V: tl.constexpr = T.CHUNKS_V
    BLOCK_K: tl.constexpr = T.BLOCK_K
    NATURAL: tl.constexpr = s.bias.ptr is not None
    tile, hkv, b, split = program(tl.cdiv(n.Nk, BLOCK_K), n.Hkv, n.B)
    n_tiles = tl.cdiv(n.Nq * T.GROUP, T.BLOCK_Q)
    k0 = tile * BLOCK_K
    # [BLOCK_K]
    j = k0 + tl.arange(0, BLOCK_K)
    exists = j < n.Nk
    last_tile = n_tiles
    ids = None
    if lists.ids is not None:  # the queries that chose this block
        ends = lists.counts + (b * n.Hkv + hkv) * (tl.cdiv(n.Nk, W.BLOCK_SIZE) + 1)
        ends += k0 // W.BLOCK_SIZE
        PER_CHOICE: tl.constexpr = W.QUERIES * T.GROUP // T.BLOCK_Q
        first_choice = tl.load(ends)
        ids = lists.ids + first_choice
        last_tile = ((tl.load(ends + 1) - first_choice) * PER_CHOICE).to(tl.int32)
    tile_begin, tile_end = split_range(0, last_tile, split, n_splits, 1)
    if s.start.ptr is not None:
        bounds += b * n_tiles * 4
    # [BLOCK_K, D], [BLOCK_K, DV]
    run = run_offsets(x.k.stride, b, hkv, k0, BLOCK_K)
    k_tile = load_tile(x.k.ptr, run, exists, T.D, CHUNKS, T.ALIGN)
    run = run_offsets(x.v.stride, b, hkv, k0, BLOCK_K)
    v_tile = load_tile(x.v.ptr, run, exists, T.DV, CHUNKS_V, T.ALIGN)
    dk_tile = zero_tile(BLOCK_K, CHUNKS)
    dv_tile = zero_tile(BLOCK_K, CHUNKS_V)
    MASKED: tl.constexpr = s.mask.ptr is not None or s.bits.ptr is not None
    GUARD: tl.constexpr = MASKED or NATURAL
    # Offsets kept apart take registers, which the mask in CUT needs as well, and so do that of
    # padded columns, further chunks of q and dout, and the accumulators of warpgroup products.
    N_CHUNKS: tl.constexpr = len(CHUNKS) + len(CHUNKS_V)
    EXACT: tl.constexpr = first_column(CHUNKS + CHUNKS_V, N_CHUNKS) == T.D + T.DV
    SINGLE: tl.constexpr = EXACT and N_CHUNKS == 2 and not has_warpgroup_products()
    FREE: tl.constexpr = EXACT and T.GROUP == 1  # registers: offsets of a group's rows take many
    heads = tl.full([], T.GROUP, tl.int64) * n.Hkv
    ONE_SCALE: tl.constexpr = s.scale.ptr is None or T.GROUP == 1
    if ONE_SCALE:  # else it is a row quantity, which the loop cannot take over from a number
        rs = row_scale(s.scale, hkv)
    for PART in tl.static_range(WHOLE if W.TWO_LOOPS else ALL, ALL if W.TWO_LOOPS else ALL + 1):
        part_begin, part_end = tile_begin, tile_end
        if s.start.ptr is None:
            n_whole = n.Nq * T.GROUP // T.BLOCK_Q
            part_begin, part_end = rows_of_part(tile_begin, tile_end, n_whole, PART)
        run_begin, run_end = part_begin, part_begin
        while run_end < part_end:
            # runs of row tiles that all reach these keys, so that the inner loop has no branch
            # around its loads and can be pipelined; sorted intervals make one run
            if s.start.ptr is not None and ids is None:
                run_begin, run_end = next_run(
                    bounds, run_end, part_end, n_tiles, k0, k0 + BLOCK_K, PART
                )
            else:
                run_begin, run_end = run_end, part_end
            for t in range(run_begin, run_end):
                if ids is not None:
                    t = tl.load(ids + t // PER_CHOICE) * PER_CHOICE + t % PER_CHOICE
                # [BLOCK_Q]
                i, h, row_mask = packed_rows(t, hkv, n.Nq, T.BLOCK_Q, T.GROUP)
                pair = Pair(b, h[None, :], i[None, :], j[:, None])
                rows_exist = None if PART == WHOLE else row_mask
                # [BLOCK_Q, D], [BLOCK_Q, DV]
                APART: tl.constexpr = SINGLE and PART != CUT
                first, rows = tile_offsets(x.q.stride, b, hkv, t, i, h, T, APART)
                q_tile = load_tile(x.q.ptr, rows, rows_exist, T.D, CHUNKS, T.ALIGN, first)
                first, rows = tile_offsets(up.dout.stride, b, hkv, t, i, h, T, APART)
                dout_tile = load_tile(up.dout.ptr, rows, rows_exist, T.DV, CHUNKS_V, T.ALIGN, first)
                first, rows = 0, (b * heads + h) * n.Nq + i
                if T.GROUP == 1:
                    strides = (heads * n.Nq, n.Nq, 1)
                    first, rows = tile_offsets(
                        strides, b, hkv, t, i, h, T, PART != CUT or not EXACT
                    )
                # where there is no row q and dout are 0: a p of 1 adds nothing, so no select then
                NO_ROW: tl.constexpr = float("inf") if GUARD else 0.0
                row = load_rows(up.rows, rows, rows_exist, 0, NO_ROW, first)
                if not ONE_SCALE:
                    rs = row_scale(s.scale, h)[None, :]
                # [BLOCK_K, BLOCK_Q]
                score, th = tile_scores(
                    dot_nt(k_tile, q_tile, CHUNKS, PRECISION), rs, s,
                    pair_rows(s.bias, b, h, i, 0), pair_rows(s.mask, b, h, i, 0),
                    row_mask[None, :], j[:, None], n.Nk,
                )  # fmt: skip
                log2_p = log2_probability(score, row, NATURAL)
                dp = dot_nt(v_tile, dout_tile, CHUNKS_V, PRECISION)
                weight_rows = pair_rows(up.dweights, b, h, i, 0)
                dp = probability_gradient(
                    dp, up.dweights, weight_rows, dropout, pair, row_mask[None, :], n.Nk
                )
                t_tile = plus_rows(dp, row.minus_delta, FREE and PART == WHOLE)
                if s.bits.ptr is not None:
                    words = run_offsets(s.bits.stride, b, hkv, k0, BLOCK_K)
                    n_columns = n.Nq * T.GROUP
                    chosen = tile_bits(
                        s.bits.ptr, words, exists, t * T.BLOCK_Q, n_columns, T.BLOCK_Q
                    )
                    log2_p, t_tile, th = clear_gradients(chosen, log2_p, t_tile, th, s.softcap)
                elif PART == CUT:
                    log2_p, t_tile, th = cut_columns(
                        log2_p, t_tile, th, s, Pair(b, h, i, j), row_mask, n.Nk
                    )
                elif PART == ALL:
                    cut = k0 + BLOCK_K > n.Nk
                    if s.start.ptr is not None:
                        bound = bounds + (t if ids is None else tl.minimum(t, n_tiles - 1)) * 4
                        cut |= tl.load(bound + 1) > k0
                        cut |= tl.load(bound + 2) < k0 + BLOCK_K
                    # one branch for all: of two the compiler makes selects in every tile
                    if cut:
                        log2_p, t_tile, th = cut_columns(
                            log2_p, t_tile, th, s, Pair(b, h, i, j), row_mask, n.Nk
                        )
                p = tl.exp2(log2_p)
                keep_p = kept(p, dropout, pair).to(dout_tile[0].dtype)
                dv_tile = dot_into(dv_tile, keep_p, dout_tile, CHUNKS_V, PRECISION)
                ds = score_gradient(p, log2_p, t_tile, row, up.rows, GUARD)
                ds = through_softcap(ds, th, s.softcap)
                if not ONE_SCALE:
                    ds *= rs
                dk_tile = dot_into(dk_tile, ds.to(q_tile[0].dtype), q_tile, CHUNKS, PRECISION)

    tile, hkv, b, split = program_of(program_again(), tl.cdiv(n.Nk, BLOCK_K), n.Hkv, n.B)
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    exists = j < n.Nk
    one = tl.full([BLOCK_K], 1.0, tl.float32)
    if ONE_SCALE:
        dk_tile = scale_rows(dk_tile, one * rs, CHUNKS)
    keys = split_offsets(dk.stride, split, b, hkv, j)
    store_tile(dk.ptr, keys, exists, dk_tile, T.D, CHUNKS, T.ALIGN)
    keys = split_offsets(dv.stride, split, b, hkv, j)
    dv_tile = scale_rows(dv_tile, times(one, dropout.factor), CHUNKS_V)
    store_tile(dv.ptr, keys, exists, dv_tile, T.DV, CHUNKS_V, T.ALIGN)


class RowGradients(NamedTuple):
    """What the dq kernel writes, None for what a call does not want."""

    dq: Tensor
    dscale: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dlse: Tensor | None


def backward(
    upstream: AttentionResults, call: CrossAttentionCall, results: AttentionResults, needs: Needs,
    *, n_splits: int | None = None, blocks: Blocks | None = None,
) -> Gradients:  # fmt: skip
    """The gradients that `needs` names, of q, k, v, bias and scale_tensor.

    upstream: the gradients of the results, None for zero; n_splits and blocks as in `forward`.
    """
    if call.Nk == 0 or results.out.numel() == 0:
        return zero_gradients(call, needs)
    launch, dout = Launch(call, blocks), row_gradient(upstream.out, results.out)
    rows = row_terms(launch, upstream._replace(out=dout), results)
    up = Upstream(strided(dout), rows, NOTHING)
    grads = {}
    statistics = rows.dentropy is not None
    fused = launch.config("fused", statistics)
    of_keys = "k" in needs or "v" in needs
    if fused and of_keys and launch.row_tiles(fused) == 1:
        of_rows = backward_dq(launch, fused, up, n_splits, with_dkdv=True)
        grads |= of_rows_by_name(of_rows)
    else:
        if "q" in needs or "scale_tensor" in needs:
            config = launch.config("dq", statistics)
            grads |= of_rows_by_name(backward_dq(launch, config, up, n_splits))
        if of_keys:
            config = launch.config("dkdv", statistics)
            grads["k"], grads["v"] = backward_dkdv(launch, config, up, n_splits)
    if "bias" in needs:
        grads["bias"] = backward_dbias(launch, up)
    return grads


def of_rows_by_name(grads: RowGradients) -> dict[str, Tensor]:
    """The gradients by the names of the call's fields."""
    return {"q": grads.dq, "scale_tensor": grads.dscale, "k": grads.dk, "v": grads.dv}


def backward_dq(
    launch: Launch, config: Config, up: Upstream, n_splits: int | None, *,
    with_dkdv: bool = False, with_dlse: bool = False,
) -> RowGradients:  # fmt: skip
    """The gradients of rows; dk and dv only where one row tile holds every row, else None.

    dlse is the gradient of an lse that came in as an argument: of `attention_weights` alone.
    """
    call = launch.call
    q, k, v = call.q, call.k, call.v
    programs = launch.row_tiles(config) * call.B * call.Hkv
    n_splits = launch.splits(programs, launch.key_steps(config), n_splits)
    dq = split_buffer(empty_rows(q, call.D), n_splits)
    dk, dv = None, None
    if with_dkdv:
        dk, dv = empty_rows(k, call.D), empty_rows(v, call.Dv)
        if call.start is not None or launch.blocks:  # keys that no row reaches are not visited
            dk.zero_(), dv.zero_()
    dscale = None
    if call.scale_tensor is not None:
        dscale = q.new_empty((n_splits, *q.shape[:3]), dtype=torch.float32)
    dlse = q.new_empty((n_splits, *q.shape[:3]), dtype=torch.float32) if with_dlse else None
    two_loops = not with_dkdv and launch.two_loops(config, config.block_q, of_statistics(up))
    rows = [t for t in (dq, dk, dv, up.dout.ptr) if t is not None]
    launch.run(
        dq_kernel, programs * n_splits, config,
        strided(dq), dscale, dlse, strided(dk), strided(dv), up, launch.operands(),
        launch.scores(), launch.dropout(), launch.sizes(), n_splits, launch.block_lists(),
        T=launch.tiling(config, *rows), W=launch.walk(two_loops),
    )  # fmt: skip
    if dscale is not None:
        dscale = scale_gradient(dscale, call.scale_tensor)
    dlse = None if dlse is None else sum_splits(dlse, dlse.dtype)
    return RowGradients(sum_splits(dq, q.dtype), dscale, dk, dv, dlse)


def of_statistics(up: Upstream) -> bool:
    """Whether the entropy or returned weights have a gradient."""
    return up.rows.dentropy is not None or up.dweights.ptr is not None


def backward_dkdv(
    launch: Launch, config: Config, up: Upstream, n_splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """(dk, dv)."""
    call = launch.call
    if launch.bits:
        launch = replace(launch, call=replace(call, mask=bits_by_key(launch)))
    bounds = tile_bounds(launch, config) if call.start is not None else None
    programs = launch.key_tiles(config) * call.B * call.Hkv
    n_splits = launch.splits(programs, launch.row_steps(config), n_splits)
    dk = split_buffer(empty_rows(call.k, call.D), n_splits)
    dv = split_buffer(empty_rows(call.v, call.Dv), n_splits)
    launch.run(
        dkdv_kernel, programs * n_splits, config,
        strided(dk), strided(dv), bounds, up, launch.operands(), launch.scores(),
        launch.dropout(), launch.sizes(), n_splits, launch.block_lists(by_key=True),
        T=launch.tiling(config, dk, dv, up.dout.ptr),
        W=launch.walk(launch.two_loops(config, config.block_k, of_statistics(up))),
    )  # fmt: skip
    return sum_splits(dk, call.k.dtype), sum_splits(dv, call.v.dtype)
