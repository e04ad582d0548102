"""Fused masked cross-attention, forward: kernel and launcher.

The equations are those of `xattn_kernels/reference.py`. The kernel holds a tile of query rows and
walks its keys; where rows are few, several programs share the keys and a second pass merges them.
"""

import torch
import triton
import triton.language as tl

from ..core.layout import empty_rows, split_buffer
from .launch import Call
from .rows import merge_splits
from .scores import (
    LOWEST,
    cut_scores,
    exp_difference,
    kept,
    key_ranges,
    natural,
    row_offsets,
    row_scale,
    run_offsets,
    split_offsets,
    tile_bits,
    tile_scores,
)
from .tiles import (
    ALL,
    LOG2E,
    WHOLE,
    blocks_of_tile,
    dot_into,
    dot_nt,
    in_blocks,
    keys_of_part,
    load_tile,
    over_gap,
    packed_rows,
    program,
    scale_rows,
    split_range,
    store_tile,
    times,
    zero_tile,
)

SMALLEST_SCALE = 2.0**-126  # below, float32 may round a positive scale to 0


@triton.jit
def forward_kernel(
    out, stride_out,  # [n_splits, B, Hq, Nq, DV]
    lse, lse_low, entropy, max_probability,  # float32 [n_splits, B, Hq, Nq], or None but for lse
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask,  # 4-d with broadcast strides, or None
    start, stride_start, stop, stride_stop,  # int32 [B, Nq], or None
    scale, scale_tensor, stride_scale, softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, n_splits,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    TWO_LOOPS: tl.constexpr,  # see `keys_of_part`
    SCALE_LATER: tl.constexpr,  # scale > 0 and nothing else in the scores: see `factor`
    BITS: tl.constexpr,  # the mask is `Call.bits`
    blocks, n_chosen, n_blocks, BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr,  # see `Blocks`
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
    factor = None
    if scale_tensor is not None:
        rs = rs[:, None]
    elif SCALE_LATER:  # the maximum is that of the products: one multiplication less per score
        rs, factor = None, scale * LOG2E
    bias_rows = row_offsets(stride_bias, b, h, i)[:, None]
    mask_rows = row_offsets(stride_mask, b, h, i)
    # [BLOCK_Q, D]
    q_tile = load_tile(q, row_offsets(stride_q, b, h, i), row_mask, D, CHUNKS, ALIGN)
    # [BLOCK_Q], [BLOCK_Q, DV]
    m = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l = tl.full([BLOCK_Q], 0.0, tl.float32)
    a = tl.full([BLOCK_Q], 0.0, tl.float32)  # sum of e * log(e), for the entropy
    acc = zero_tile(BLOCK_Q, CHUNKS_V)
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
            # [BLOCK_K, D]
            k_tile = load_tile(
                k, run_offsets(stride_k, b, hkv, k0, BLOCK_K), there, D, CHUNKS, ALIGN
            )
            # [BLOCK_Q, BLOCK_K]
            s, _ = tile_scores(
                dot_nt(q_tile, k_tile, CHUNKS, PRECISION), rs, softcap, bias, bias_rows,
                stride_bias, bool_mask, mask_rows[:, None], stride_mask, row_mask[:, None],
                j[None, :], Nk,
            )  # fmt: skip
            if BITS:
                chosen = tile_bits(mask, mask_rows, row_mask, k0, Nk, BLOCK_K)
                s = tl.where(chosen, s, float("-inf"))
            else:
                cut = (k0 < full_begin) | (k0 + BLOCK_K > full_end)
                s = cut_scores(s, cut, first, last, j[None, :], PART)
            m_new = tl.maximum(m, times(tl.max(s, 1), factor))
            e = exp_difference(s, m_new[:, None], factor, bias)
            alpha = exp_difference(m, m_new, None, bias)
            if entropy is not None:
                t = tl.where(e > 0, s - m_new[:, None], 0.0)
                # alpha = 0 forgets what came before, though m - m_new may have overflowed
                a = tl.where(alpha == 0, 0.0, alpha * (a + l * (m - m_new))) + tl.sum(e * t, 1)
            l = l * alpha + tl.sum(e, 1)
            m = m_new
            e = kept(e, seed, b, h[:, None], i[:, None], j[None, :], threshold)
            # [BLOCK_K, DV]
            keys = run_offsets(stride_v, b, hkv, k0, BLOCK_K)
            v_tile = load_tile(v, keys, there, DV, CHUNKS_V, ALIGN)
            acc = dot_into(
                scale_rows(acc, alpha, CHUNKS_V), e.to(v_tile[0].dtype), v_tile, CHUNKS_V, PRECISION
            )

    empty = l == 0
    l = tl.where(empty, 1.0, l)
    log_l, m = tl.log(l), natural(m, bias)
    row_lse = m + log_l
    rows = ((split * B + b) * Hkv * GROUP + h) * Nq + i
    tl.store(lse + rows, tl.where(empty, float("-inf"), row_lse), row_mask)
    if lse_low is not None:
        tl.store(lse_low + rows, tl.where(empty, 0.0, (m - row_lse + log_l) * LOG2E), row_mask)
    if entropy is not None:
        tl.store(entropy + rows, log_l - natural(a, bias) / l, row_mask)
        tl.store(max_probability + rows, tl.where(empty, 0.0, 1.0 / l), row_mask)
    rows = split_offsets(stride_out, split, b, h, i)
    acc = scale_rows(acc, times(1.0 / l, p_factor), CHUNKS_V)
    store_tile(out, rows, row_mask, acc, DV, CHUNKS_V, ALIGN)


def forward(
    q, k, v, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p, statistics,
    allow_tf32, n_splits=None, blocks=None,
):  # fmt: skip
    """(out, lse, lse_low, entropy, max_probability): what was not asked for has no elements.

    lse_low, in log2 units, is what float32 cannot hold of lse; it comes with a bias, as beside one
    of -1e9 nothing of log(sum) is left. entropy and max_probability come with `statistics`.
    q [B, Hq, Nq, D], k [B, Hkv, Nk, D], v [B, Hkv, Nk, Dv]; start, stop int32 [B, Nq] or None;
    mask bool and bias 4-d with dimensions 1 or full, or None, or mask as in `Call.bits`;
    scale_tensor [1] or [Hq], or None to use the number `scale`; softcap 0 for none. `n_splits`
    overrides how many programs share the keys of a row tile; `blocks`: the keys that it walks.
    """
    call = Call(
        q, k, v, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p, allow_tf32,
        blocks=blocks,
    )  # fmt: skip
    out = empty_rows(q, call.DV)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    wanted = (bias is not None, statistics, statistics)
    results = (out, lse, *(torch.empty_like(lse) if w else None for w in wanted))
    if call.Nk == 0:
        for t, empty in zip(results, (0.0, float("-inf"), 0.0, 0.0, 0.0), strict=True):
            t is None or t.fill_(empty)
    elif out.numel():
        config = call.config("forward", statistics)
        programs = call.row_tiles(config) * call.B * call.Hkv
        n_splits = call.splits(programs, call.key_steps(config), n_splits)
        parts = [split_buffer(t, n_splits) for t in results]
        plain_scores = bias is None and scale_tensor is None and not softcap and not statistics
        call.launch(
            forward_kernel, config, programs * n_splits, (parts[0], parts[0].stride(), *parts[1:]),
            n_splits, TWO_LOOPS=call.two_loops(config, config.block_q, statistics),
            SCALE_LATER=plain_scores and scale >= SMALLEST_SCALE, BITS=call.bits,
            **call.block_arguments(),
        )  # fmt: skip
        if n_splits > 1:
            merge_splits(results, parts)
    return tuple(lse.new_empty(0) if t is None else t for t in results)
