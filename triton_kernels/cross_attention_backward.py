"""Fused masked cross-attention, backward: kernels and launchers of dq, dk and dv.

The equations are those of `xattn_kernels/reference.py`. The dq kernel holds a tile of query rows
and walks its keys; the dk, dv kernel holds a tile of keys and walks the rows that reach it. When
all rows of a key head fit one tile the dq kernel writes dk and dv as well, and each of S, P, dP and
dS is then computed once. Nothing is summed by atomics, so every result is deterministic.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..core.layout import (
    empty_rows,
    split_buffer,
    sum_splits,
    zero_gradients,
)
from .bias_gradient import backward_dbias
from .configs import Config
from .launch import Call
from .rows import bits_by_key, row_terms, tile_bounds
from .scores import (
    clear_gradients,
    cut_columns,
    cut_gradients,
    kept,
    key_ranges,
    log2_probability,
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
    dq, stride_dq,  # [n_splits, B, Hq, Nq, D]
    dscale,  # float32 [n_splits, B, Hq, Nq], <q, dq> / scale of each row, or None
    dlse,  # float32 [n_splits, B, Hq, Nq], minus the row sums of ds, or None
    dk, stride_dk, dv, stride_dv,  # [B, Hkv, Nk, *], when one tile holds all rows; else None
    dout, stride_dout,
    lse, lse_low, minus_delta, dentropy,  # float32 [B, Hq, Nq], see `delta_kernel`; two may be None
    dweights, stride_dweights,  # gradient of the weights, 4-d with broadcast strides, or None
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask,
    start, stride_start, stop, stride_stop,
    scale, scale_tensor, stride_scale, softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, n_splits,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, TWO_LOOPS: tl.constexpr, BITS: tl.constexpr,
    blocks, n_chosen, n_blocks, BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    tile, hkv, b, split = program(tl.cdiv(Nq * GROUP, BLOCK_Q), Hkv, B)
    # [BLOCK_Q]
    i, h, row_mask = packed_rows(tile, hkv, Nq, BLOCK_Q, GROUP)
    first, last, key_begin, key_end, full_begin, full_end = key_ranges(
        start, stop, stride_start, stride_stop, b, i, row_mask, Nk
    )
    first_key, last_key, bool_mask = key_begin, key_end, mask
    if BITS:  # words begin at multiples of 32
        key_begin, bool_mask = key_begin // 32 * 32, None
    if blocks is not None:
        blocks, n = blocks_of_tile(
            blocks, n_chosen, n_blocks, b, hkv, Hkv, tile, Nq, QUERIES, BLOCK_Q, GROUP
        )
        key_begin, key_end = 0, n * BLOCK_SIZE
    key_begin, key_end = split_range(key_begin, key_end, split, n_splits, BLOCK_K)

    rs = row_scale(scale, scale_tensor, stride_scale, h)
    if scale_tensor is not None:
        rs = rs[:, None]
    bias_rows = row_offsets(stride_bias, b, h, i)[:, None]
    mask_rows = row_offsets(stride_mask, b, h, i)
    weight_rows = row_offsets(stride_dweights, b, h, i)[:, None]
    rows = (b * Hkv * GROUP + h) * Nq + i
    row_lse, row_low, row_minus_delta, row_dentropy = load_rows(
        lse, lse_low, minus_delta, dentropy, rows, row_mask, 1
    )
    # [BLOCK_Q, D], [BLOCK_Q, DV]
    q_tile = load_tile(q, row_offsets(stride_q, b, h, i), row_mask, D, CHUNKS, ALIGN)
    dout_tile = load_tile(dout, row_offsets(stride_dout, b, h, i), row_mask, DV, CHUNKS_V, ALIGN)
    acc = zero_tile(BLOCK_Q, CHUNKS)
    row_ds = tl.full([BLOCK_Q], 0.0, tl.float32)
    MAY_BE_EMPTY: tl.constexpr = start is not None or mask is not None or bias is not None
    for PART in tl.static_range(WHOLE if TWO_LOOPS else ALL, ALL if TWO_LOOPS else ALL + 1):
        begin, end, gap, length = keys_of_part(
            key_begin, key_end, full_begin, full_end, BLOCK_K, PART
        )
        for k0 in range(begin, end, BLOCK_K):
            k0 = over_gap(k0, gap, length, PART)
            if blocks is not None:
                k0 = in_blocks(blocks, k0, BLOCK_SIZE)
            j = k0 + tl.arange(0, BLOCK_K)
            there = None if PART == WHOLE else j < (last_key if blocks is not None else key_end)
            if BITS or blocks is not None:
                there = there & (j >= first_key)
            # [BLOCK_K, D], [BLOCK_K, DV]
            k_tile = load_tile(
                k, run_offsets(stride_k, b, hkv, k0, BLOCK_K), there, D, CHUNKS, ALIGN
            )
            keys = run_offsets(stride_v, b, hkv, k0, BLOCK_K)
            v_tile = load_tile(v, keys, there, DV, CHUNKS_V, ALIGN)
            # [BLOCK_Q, BLOCK_K]
            s, th = tile_scores(
                dot_nt(q_tile, k_tile, CHUNKS, PRECISION), rs, softcap, bias, bias_rows,
                stride_bias, bool_mask, mask_rows[:, None], stride_mask, row_mask[:, None],
                j[None, :], Nk,
            )  # fmt: skip
            log2_p = log2_probability(s, row_lse, row_low, bias)
            dp = probability_gradient(
                dot_nt(dout_tile, v_tile, CHUNKS_V, PRECISION), dweights, weight_rows,
                stride_dweights, p_factor, seed, threshold,
                b, h[:, None], i[:, None], row_mask[:, None], j[None, :], Nk,
            )  # fmt: skip
            t = plus_rows(dp, row_minus_delta, True)
            if BITS:
                chosen = tile_bits(mask, mask_rows, row_mask, k0, Nk, BLOCK_K)
                log2_p, t, th = clear_gradients(chosen, log2_p, t, th, softcap)
            elif PART == CUT:
                log2_p, t, th = cut_gradients(log2_p, t, th, softcap, first, last, j[None, :])
            elif PART == ALL:
                # one branch for all: of two the compiler makes selects in every tile
                if (k0 < full_begin) | (k0 + BLOCK_K > full_end):
                    log2_p, t, th = cut_gradients(log2_p, t, th, softcap, first, last, j[None, :])
            p = tl.exp2(log2_p)
            ds = score_gradient(
                p, log2_p, t, row_lse, dentropy, row_dentropy, dk is not None and MAY_BE_EMPTY
            )
            if dlse is not None:
                row_ds += tl.sum(ds, 1)
            ds = through_softcap(ds, th, softcap)
            acc = dot_into(acc, ds.to(k_tile[0].dtype), k_tile, CHUNKS, PRECISION)
            if dk is not None:
                p = kept(times(p, p_factor), seed, b, h[:, None], i[:, None], j[None, :], threshold)
                # [BLOCK_K, D], [BLOCK_K, DV]
                dk_tile = zero_tile(BLOCK_K, CHUNKS)
                dv_tile = zero_tile(BLOCK_K, CHUNKS_V)
                ds_t = tl.trans((ds * rs).to(q_tile[0].dtype))
                p_t = tl.trans(p.to(dout_tile[0].dtype))
                dk_tile = dot_into(dk_tile, ds_t, q_tile, CHUNKS, PRECISION)
                dv_tile = dot_into(dv_tile, p_t, dout_tile, CHUNKS_V, PRECISION)
                keys = run_offsets(stride_dk, b, hkv, k0, BLOCK_K)
                store_tile(dk, keys, there, dk_tile, D, CHUNKS, ALIGN)
                keys = run_offsets(stride_dv, b, hkv, k0, BLOCK_K)
                store_tile(dv, keys, there, dv_tile, DV, CHUNKS_V, ALIGN)

    if MAY_BE_EMPTY:  # rows without keys, whatever reached them
        empty = tl.reshape(row_lse, [BLOCK_Q]) == float("inf")
        acc = clear_rows(acc, empty, CHUNKS)
        row_ds = tl.where(empty, 0.0, row_ds)
    if dlse is not None:
        tl.store(dlse + split * B * Hkv * GROUP * Nq + rows, -row_ds, row_mask)
    if dscale is not None:
        tl.store(
            dscale + split * B * Hkv * GROUP * Nq + rows, row_dot(q_tile, acc, CHUNKS), row_mask
        )
    rows = split_offsets(stride_dq, split, b, h, i)
    rs = row_scale(scale, scale_tensor, stride_scale, h) + tl.full([BLOCK_Q], 0.0, tl.float32)
    store_tile(dq, rows, row_mask, scale_rows(acc, rs, CHUNKS), D, CHUNKS, ALIGN)


@triton.jit
def dkdv_kernel(
    dk, stride_dk, dv, stride_dv,  # [n_splits, B, Hkv, Nk, *]
    bounds,  # int32 [B, n_tiles, 4]: smallest and largest start and stop of each row tile, or None
    dout, stride_dout, lse, lse_low, minus_delta, dentropy, dweights, stride_dweights,
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask,
    start, stride_start, stop, stride_stop,
    scale, scale_tensor, stride_scale, softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, n_splits,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, TWO_LOOPS: tl.constexpr, BITS: tl.constexpr,
    blocks, n_chosen, n_blocks, BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    tile, hkv, b, split = program(tl.cdiv(Nk, BLOCK_K), Hkv, B)
    n_tiles = tl.cdiv(Nq * GROUP, BLOCK_Q)
    k0 = tile * BLOCK_K
    # [BLOCK_K]
    j = k0 + tl.arange(0, BLOCK_K)
    there = j < Nk
    last_tile = n_tiles
    if blocks is not None:  # the queries that chose this block
        n_chosen += (b * Hkv + hkv) * (tl.cdiv(Nk, BLOCK_SIZE) + 1) + k0 // BLOCK_SIZE
        PER_CHOICE: tl.constexpr = QUERIES * GROUP // BLOCK_Q
        first_choice = tl.load(n_chosen)
        blocks += first_choice
        last_tile = ((tl.load(n_chosen + 1) - first_choice) * PER_CHOICE).to(tl.int32)
    tile_begin, tile_end = split_range(0, last_tile, split, n_splits, 1)
    if start is not None:
        bounds += b * n_tiles * 4
    # [BLOCK_K, D], [BLOCK_K, DV]
    k_tile = load_tile(k, run_offsets(stride_k, b, hkv, k0, BLOCK_K), there, D, CHUNKS, ALIGN)
    keys = run_offsets(stride_v, b, hkv, k0, BLOCK_K)
    v_tile = load_tile(v, keys, there, DV, CHUNKS_V, ALIGN)
    dk_tile = zero_tile(BLOCK_K, CHUNKS)
    dv_tile = zero_tile(BLOCK_K, CHUNKS_V)
    GUARD: tl.constexpr = mask is not None or bias is not None
    bool_mask = None if BITS else mask
    # Offsets kept apart take registers, which the mask in CUT needs as well, and so do that of
    # padded columns, further chunks of q and dout, and the accumulators of warpgroup products.
    EXACT: tl.constexpr = first_column(CHUNKS + CHUNKS_V, len(CHUNKS + CHUNKS_V)) == D + DV
    SINGLE: tl.constexpr = EXACT and len(CHUNKS + CHUNKS_V) == 2 and not has_warpgroup_products()
    FREE: tl.constexpr = EXACT and GROUP == 1  # registers: offsets of a group's rows take many
    heads = tl.full([], GROUP, tl.int64) * Hkv
    ONE_SCALE: tl.constexpr = scale_tensor is None or GROUP == 1
    if ONE_SCALE:  # else it is a row quantity, which the loop cannot take over from a number
        rs = row_scale(scale, scale_tensor, stride_scale, hkv)
    for PART in tl.static_range(WHOLE if TWO_LOOPS else ALL, ALL if TWO_LOOPS else ALL + 1):
        part_begin, part_end = tile_begin, tile_end
        if start is None:
            part_begin, part_end = rows_of_part(tile_begin, tile_end, Nq * GROUP // BLOCK_Q, PART)
        run_begin, run_end = part_begin, part_begin
        while run_end < part_end:
            # runs of row tiles that all reach these keys, so that the inner loop has no branch
            # around its loads and can be pipelined; sorted intervals make one run
            if start is not None and blocks is None:
                run_begin, run_end = next_run(
                    bounds, run_end, part_end, n_tiles, k0, k0 + BLOCK_K, PART
                )
            else:
                run_begin, run_end = run_end, part_end
            for t in range(run_begin, run_end):
                if blocks is not None:
                    t = tl.load(blocks + t // PER_CHOICE) * PER_CHOICE + t % PER_CHOICE
                # [BLOCK_Q]
                i, h, row_mask = packed_rows(t, hkv, Nq, BLOCK_Q, GROUP)
                rows_there = None if PART == WHOLE else row_mask
                # [BLOCK_Q, D], [BLOCK_Q, DV]
                at, rows = tile_offsets(
                    stride_q, b, hkv, t, i, h, BLOCK_Q, GROUP, SINGLE and PART != CUT
                )
                q_tile = load_tile(q, rows, rows_there, D, CHUNKS, ALIGN, at)
                at, rows = tile_offsets(
                    stride_dout, b, hkv, t, i, h, BLOCK_Q, GROUP, SINGLE and PART != CUT
                )
                dout_tile = load_tile(dout, rows, rows_there, DV, CHUNKS_V, ALIGN, at)
                at, rows = 0, (b * heads + h) * Nq + i
                if GROUP == 1:
                    at, rows = tile_offsets(
                        (heads * Nq, Nq, 1), b, hkv, t, i, h, BLOCK_Q, GROUP,
                        PART != CUT or not EXACT,
                    )  # fmt: skip
                # where there is no row q and dout are 0: a p of 1 adds nothing, so no select then
                row_lse, row_low, row_minus_delta, row_dentropy = load_rows(
                    lse, lse_low, minus_delta, dentropy, rows, rows_there, 0,
                    float("inf") if GUARD else 0.0, at,
                )  # fmt: skip
                if not ONE_SCALE:
                    rs = row_scale(scale, scale_tensor, stride_scale, h)[None, :]
                # [BLOCK_K, BLOCK_Q]
                s, th = tile_scores(
                    dot_nt(k_tile, q_tile, CHUNKS, PRECISION), rs, softcap,
                    bias, row_offsets(stride_bias, b, h, i)[None, :], stride_bias,
                    bool_mask, row_offsets(stride_mask, b, h, i)[None, :], stride_mask,
                    row_mask[None, :], j[:, None], Nk,
                )  # fmt: skip
                log2_p = log2_probability(s, row_lse, row_low, bias)
                dp = probability_gradient(
                    dot_nt(v_tile, dout_tile, CHUNKS_V, PRECISION), dweights,
                    row_offsets(stride_dweights, b, h, i)[None, :], stride_dweights,
                    p_factor, seed, threshold,
                    b, h[None, :], i[None, :], row_mask[None, :], j[:, None], Nk,
                )  # fmt: skip
                t_tile = plus_rows(dp, row_minus_delta, FREE and PART == WHOLE)
                if BITS:
                    chosen = tile_bits(
                        mask, run_offsets(stride_mask, b, hkv, k0, BLOCK_K), there, t * BLOCK_Q,
                        Nq * GROUP, BLOCK_Q,
                    )  # fmt: skip
                    log2_p, t_tile, th = clear_gradients(chosen, log2_p, t_tile, th, softcap)
                elif PART == CUT:
                    log2_p, t_tile, th = cut_columns(
                        log2_p, t_tile, th, softcap, start, stride_start, stop, stride_stop,
                        b, i, row_mask, j, Nk,
                    )  # fmt: skip
                elif PART == ALL:
                    cut = k0 + BLOCK_K > Nk
                    if start is not None:
                        own = bounds + (t if blocks is None else tl.minimum(t, n_tiles - 1)) * 4
                        cut |= tl.load(own + 1) > k0
                        cut |= tl.load(own + 2) < k0 + BLOCK_K
                    # one branch for all: of two the compiler makes selects in every tile
                    if cut:
                        log2_p, t_tile, th = cut_columns(
                            log2_p, t_tile, th, softcap, start, stride_start, stop, stride_stop,
                            b, i, row_mask, j, Nk,
                        )  # fmt: skip
                p = tl.exp2(log2_p)
                keep_p = kept(p, seed, b, h[None, :], i[None, :], j[:, None], threshold)
                dv_tile = dot_into(
                    dv_tile, keep_p.to(dout_tile[0].dtype), dout_tile, CHUNKS_V, PRECISION
                )
                ds = score_gradient(p, log2_p, t_tile, row_lse, dentropy, row_dentropy, GUARD)
                ds = through_softcap(ds, th, softcap)
                if not ONE_SCALE:
                    ds *= rs
                dk_tile = dot_into(dk_tile, ds.to(q_tile[0].dtype), q_tile, CHUNKS, PRECISION)

    tile, hkv, b, split = program_of(program_again(), tl.cdiv(Nk, BLOCK_K), Hkv, B)
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    there = j < Nk
    one = tl.full([BLOCK_K], 1.0, tl.float32)
    if ONE_SCALE:
        dk_tile = scale_rows(dk_tile, one * rs, CHUNKS)
    keys = split_offsets(stride_dk, split, b, hkv, j)
    store_tile(dk, keys, there, dk_tile, D, CHUNKS, ALIGN)
    keys = split_offsets(stride_dv, split, b, hkv, j)
    dv_tile = scale_rows(dv_tile, times(one, p_factor), CHUNKS_V)
    store_tile(dv, keys, there, dv_tile, DV, CHUNKS_V, ALIGN)


def backward(
    dout, dlse, dentropy, q, k, v, bias, scale_tensor, start, stop, mask, seed, out, lse, lse_low,
    entropy, scale, softcap, dropout_p, allow_tf32, needs, n_splits=None, blocks=None,
):  # fmt: skip
    """(dq, dk, dv, dbias, dscale); those that are not in the five `needs` have no elements.

    dout like out, dlse and dentropy like lse, each None for zero; `needs` five bools for q, k, v,
    bias and scale_tensor; the rest as `forward` took and returned it.
    """
    call = Call(
        q, k, v, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p, allow_tf32,
        blocks=blocks,
    )  # fmt: skip
    if call.Nk == 0 or out.numel() == 0:
        return zero_gradients((q, k, v, bias, scale_tensor), needs, 3)
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(3) != 1:
        dout = dout.contiguous()
    dentropy = None if dentropy is None else dentropy.contiguous()
    lse, minus_delta = row_terms(call, out, lse, dout, dlse, dentropy, entropy)
    lse_low = None if bias is None else lse_low
    rows = (dout, dout.stride(), lse, lse_low, minus_delta, dentropy, None, (0,) * 4)
    dq, dk, dv, dbias, dscale = (None,) * 5
    statistics = dentropy is not None
    fused = call.config("fused", statistics)
    if fused and (needs[1] or needs[2]) and call.row_tiles(fused) == 1:
        dq, dscale, dk, dv, _ = backward_dq(call, fused, rows, n_splits, True)
    else:
        if needs[0] or needs[4]:
            dq, dscale, *_ = backward_dq(call, call.config("dq", statistics), rows, n_splits, False)
        if needs[1] or needs[2]:
            dk, dv = backward_dkdv(call, call.config("dkdv", statistics), rows, n_splits)
    if needs[3]:
        dbias = backward_dbias(call, rows)
    grads = (dq, dk, dv, dbias, dscale)
    return tuple(t if needed else q.new_empty(0) for t, needed in zip(grads, needs, strict=True))


def backward_dq(
    call: Call, config: Config, rows: tuple, n_splits: int | None, with_dkdv: bool,
    with_dlse: bool = False,
):  # fmt: skip
    """(dq, dscale, dk, dv, dlse); dk and dv only where one row tile holds every row, else None.

    dlse is the gradient of an lse that came in as an argument: of `attention_weights` alone.
    """
    q, k, v = call.q, call.k, call.v
    programs = call.row_tiles(config) * call.B * call.Hkv
    n_splits = call.splits(programs, call.key_steps(config), n_splits)
    dq = split_buffer(empty_rows(q, call.D), n_splits)
    dk, dv = None, None
    if with_dkdv:
        dk, dv = empty_rows(k, call.D), empty_rows(v, call.DV)
        if call.start is not None or call.blocks:  # keys that no row reaches are not visited
            dk.zero_(), dv.zero_()
    dscale = None
    if call.scale_tensor is not None:
        dscale = q.new_empty((n_splits, *q.shape[:3]), dtype=torch.float32)
    dlse = q.new_empty((n_splits, *q.shape[:3]), dtype=torch.float32) if with_dlse else None
    strides = [(0,) * 4 if t is None else t.stride() for t in (dk, dv)]
    call.launch(
        dq_kernel, config, programs * n_splits,
        (dq, dq.stride(), dscale, dlse, dk, strides[0], dv, strides[1], *rows), n_splits,
        TWO_LOOPS=not with_dkdv and call.two_loops(config, config.block_q, of_statistics(rows)),
        BITS=call.bits, **call.block_arguments(),
    )  # fmt: skip
    if dscale is not None:
        over = (0, 1, 3) if call.scale_tensor.numel() > 1 else (0, 1, 2, 3)
        dscale = dscale.sum(over).to(call.scale_tensor.dtype).view_as(call.scale_tensor)
    dlse = None if dlse is None else sum_splits(dlse, dlse.dtype)
    return sum_splits(dq, q.dtype), dscale, dk, dv, dlse


def of_statistics(rows: tuple) -> bool:
    """Whether entropy or weights have a gradient: dentropy, dweights."""
    return rows[5] is not None or rows[6] is not None


def backward_dkdv(call: Call, config: Config, rows: tuple, n_splits: int | None):
    """(dk, dv)."""
    if call.bits:
        call = replace(call, mask=bits_by_key(call))
    bounds = None
    if call.start is not None:
        bounds = tile_bounds(call, config)
    programs = call.key_tiles(config) * call.B * call.Hkv
    n_splits = call.splits(programs, call.row_steps(config), n_splits)
    dk = split_buffer(empty_rows(call.k, call.D), n_splits)
    dv = split_buffer(empty_rows(call.v, call.DV), n_splits)
    call.launch(
        dkdv_kernel, config, programs * n_splits,
        (dk, dk.stride(), dv, dv.stride(), bounds, *rows), n_splits,
        TWO_LOOPS=call.two_loops(config, config.block_k, of_statistics(rows)), BITS=call.bits,
        **call.block_arguments(by_key=True),
    )  # fmt: skip
    return sum_splits(dk, call.k.dtype), sum_splits(dv, call.v.dtype)
