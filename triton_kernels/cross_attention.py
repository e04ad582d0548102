"""Fused masked cross-attention, forward: kernel and launcher.

The equations are those of `xattn_kernels/reference.py`. The kernel holds a tile of query rows and
walks its keys; where rows are few, several programs share the keys and a second pass merges them.
"""

import triton
import triton.language as tl

from ..core.call import CrossAttentionCall
from ..core.layout import AttentionResults, empty_results, split_buffer
from .cross_attention_backward import backward  # noqa: F401  the other launcher of this op
from .launch import Blocks, Launch, strided
from .rows import merge_splits
from .scores import (
    LOWEST,
    cut_scores,
    exp_difference,
    kept,
    key_ranges,
    natural,
    pair_rows,
    row_offsets,
    row_scale,
    run_offsets,
    split_offsets,
    tile_bits,
    tile_scores,
)
from .structs import Pair, RowResults
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
    out,  # Strided [n_splits, B, Hq, Nq, DV]
    results,  # RowResults
    x,  # Operands
    s,  # Scores
    dropout,  # Dropout
    n,  # Sizes
    n_splits,
    lists,  # BlockLists
    T: tl.constexpr,  # Tiling
    W: tl.constexpr,  # Walk
    SCALE_LATER: tl.constexpr,  # scale > 0 and nothing else in the scores: see `factor`
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
    factor = None
    if s.scale.ptr is not None:
        rs = rs[:, None]
    elif SCALE_LATER:  # the maximum is that of the products: one multiplication less per score
        rs, factor = None, s.scale.number * LOG2E
    bias_rows, mask_rows = pair_rows(s.bias, b, h, i, 1), pair_rows(s.mask, b, h, i, 1)
    words = None
    if s.bits.ptr is not None:
        words = row_offsets(s.bits.stride, b, h, i)
    # [BLOCK_Q, D]
    q_tile = load_tile(x.q.ptr, row_offsets(x.q.stride, b, h, i), row_mask, T.D, CHUNKS, T.ALIGN)
    # [BLOCK_Q], [BLOCK_Q, DV]
    m = tl.full([BLOCK_Q], LOWEST, tl.float32)
    l = tl.full([BLOCK_Q], 0.0, tl.float32)
    a = tl.full([BLOCK_Q], 0.0, tl.float32)  # sum of e * log(e), for the entropy
    acc = zero_tile(BLOCK_Q, CHUNKS_V)
    for PART in tl.static_range(WHOLE if W.TWO_LOOPS else ALL, ALL if W.TWO_LOOPS else ALL + 1):
        begin, end, gap, length = keys_of_part(
            key_begin, key_end, keys.full_begin, keys.full_end, T.BLOCK_K, PART
        )
        for k0 in range(begin, end, T.BLOCK_K):
            k0 = over_gap(k0, gap, length, PART)
            if ids is not None:
                k0 = in_blocks(ids, k0, W.BLOCK_SIZE)
            j = k0 + tl.arange(0, T.BLOCK_K)
            exists = None if PART == WHOLE else j < (keys.end if ids is not None else key_end)
            if s.bits.ptr is not None or ids is not None:
                exists = exists & (j >= keys.begin)
            # [BLOCK_K, D]
            run = run_offsets(x.k.stride, b, hkv, k0, T.BLOCK_K)
            k_tile = load_tile(x.k.ptr, run, exists, T.D, CHUNKS, T.ALIGN)
            # [BLOCK_Q, BLOCK_K]
            score, _ = tile_scores(
                dot_nt(q_tile, k_tile, CHUNKS, PRECISION), rs, s, bias_rows, mask_rows,
                row_mask[:, None], j[None, :], n.Nk,
            )  # fmt: skip
            if s.bits.ptr is not None:
                chosen = tile_bits(s.bits.ptr, words, row_mask, k0, n.Nk, T.BLOCK_K)
                score = tl.where(chosen, score, float("-inf"))
            else:
                cut = (k0 < keys.full_begin) | (k0 + T.BLOCK_K > keys.full_end)
                score = cut_scores(score, cut, keys.first, keys.last, j[None, :], PART)
            m_new = tl.maximum(m, times(tl.max(score, 1), factor))
            e = exp_difference(score, m_new[:, None], factor, NATURAL)
            alpha = exp_difference(m, m_new, None, NATURAL)
            if results.entropy is not None:
                t = tl.where(e > 0, score - m_new[:, None], 0.0)
                # alpha = 0 forgets what came before, though m - m_new may have overflowed
                a = tl.where(alpha == 0, 0.0, alpha * (a + l * (m - m_new))) + tl.sum(e * t, 1)
            l = l * alpha + tl.sum(e, 1)
            m = m_new
            e = kept(e, dropout, Pair(b, h[:, None], i[:, None], j[None, :]))
            # [BLOCK_K, DV]
            run = run_offsets(x.v.stride, b, hkv, k0, T.BLOCK_K)
            v_tile = load_tile(x.v.ptr, run, exists, T.DV, CHUNKS_V, T.ALIGN)
            acc = scale_rows(acc, alpha, CHUNKS_V)
            acc = dot_into(acc, e.to(v_tile[0].dtype), v_tile, CHUNKS_V, PRECISION)

    empty = l == 0
    l = tl.where(empty, 1.0, l)
    log_l, m = tl.log(l), natural(m, NATURAL)
    row_lse = m + log_l
    rows = ((split * n.B + b) * n.Hkv * T.GROUP + h) * n.Nq + i
    tl.store(results.lse + rows, tl.where(empty, float("-inf"), row_lse), row_mask)
    if results.lse_low is not None:
        lse_low = tl.where(empty, 0.0, (m - row_lse + log_l) * LOG2E)
        tl.store(results.lse_low + rows, lse_low, row_mask)
    if results.entropy is not None:
        tl.store(results.entropy + rows, log_l - natural(a, NATURAL) / l, row_mask)
        tl.store(results.max_probability + rows, tl.where(empty, 0.0, 1.0 / l), row_mask)
    rows = split_offsets(out.stride, split, b, h, i)
    acc = scale_rows(acc, times(1.0 / l, dropout.factor), CHUNKS_V)
    store_tile(out.ptr, rows, row_mask, acc, T.DV, CHUNKS_V, T.ALIGN)


def forward(
    call: CrossAttentionCall, *, n_splits: int | None = None, blocks: Blocks | None = None
) -> AttentionResults:
    """The results of a call; entropy and max_probability come with its statistics, lse_low with a
    bias, as beside one of -1e9 nothing of log(sum) is left.

    The call's mask may be `Launch.bits`. `n_splits` overrides how many programs share the keys of a
    row tile; `blocks` are the keys that it walks.
    """
    launch, statistics = Launch(call, blocks), call.return_statistics
    results = empty_results(call)
    if call.Nk == 0:
        results.out.zero_(), results.lse.fill_(float("-inf"))
        for t in results[2:]:
            t is None or t.zero_()
    elif results.out.numel():
        config = launch.config("forward", statistics)
        programs = launch.row_tiles(config) * call.B * call.Hkv
        n_splits = launch.splits(programs, launch.key_steps(config), n_splits)
        parts = AttentionResults(*(split_buffer(t, n_splits) for t in results))
        plain = call.bias is None and call.scale_tensor is None and call.softcap is None
        launch.run(
            forward_kernel, programs * n_splits, config,
            strided(parts.out), RowResults(*parts[1:]), launch.operands(), launch.scores(),
            launch.dropout(), launch.sizes(), n_splits, launch.block_lists(),
            T=launch.tiling(config, parts.out),
            W=launch.walk(launch.two_loops(config, config.block_q, statistics)),
            SCALE_LATER=plain and not statistics and call.scale >= SMALLEST_SCALE,
        )  # fmt: skip
        if n_splits > 1:
            merge_splits(results, parts)
    return results
