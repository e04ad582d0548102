"""Top-k attention of indices: what is computed is what is attended, so nothing grows with Nk.

A row gathers its keys and values. dk and dv take the pairs sorted by key: a tile of keys walks the
rows that chose one of them, as in `cross_attention_backward.py`, with rows gathered from anywhere
and all of a tile's products but one per row masked. Nothing is summed by atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.call import TopKAttentionCall
from ..core.kernel_op import Gradients, Needs
from ..core.layout import AttentionResults, empty_results, empty_rows, scale_gradient
from .configs import gathered
from .launch import Launch, strided
from .rows import row_terms
from .scores import LOWEST, natural, row_scale, run_offsets, score_gradient
from .structs import RowResults, RowTerms
from .tiles import (
    LOG2E,
    dot_into,
    dot_nt,
    load_rows,
    load_tile,
    row_dot,
    scale_rows,
    store_tile,
    zero_tile,
)


@triton.jit
def one_row(n, Nq, Hq, GROUP: tl.constexpr):
    """(b, h, key head, i) of row n of [B, Hq, Nq]."""
    n = n.to(tl.int64)
    h = n // Nq % Hq
    return n // Nq // Hq, h, h // GROUP, n % Nq


@triton.jit
def one_row_offset(stride, b, h, i):
    """The offset of one row, [1]."""
    one = tl.arange(0, 1).to(tl.int64)
    return b * stride[0] + h * stride[1] + i * stride[2] + one


@triton.jit
def gathered_scores(q_tile, k, rows, exists, rs, T: tl.constexpr):
    """(keys, scores [BLOCK_K] in log2 units, -inf where there is no key)."""
    CHUNKS: tl.constexpr = T.CHUNKS
    k_tile = load_tile(k, rows, exists, T.D, CHUNKS, T.ALIGN)
    score = row_dot(k_tile, q_tile, CHUNKS) * (rs * LOG2E)
    return k_tile, tl.where(exists, score, float("-inf"))


@triton.jit
def weighted_sum(acc, p, tile, CHUNKS: tl.constexpr):
    """acc [1, width] plus the rows of the tile, each times its p [BLOCK_K]."""
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        out = out + (acc[i] + tl.sum(p[:, None] * tile[i].to(tl.float32), 0)[None, :],)
    return out


@triton.jit
def gather_forward_kernel(
    out,  # Strided [B, Hq, Nq, DV]
    results,  # RowResults
    indices,  # int32 [B, Hq, Nq, top_k], -1 for none
    x,  # Operands
    scale,  # Scale
    n,  # Sizes
    top_k,
    T: tl.constexpr,  # Tiling
):
    """Each program has one row."""
    CHUNKS: tl.constexpr = T.CHUNKS
    CHUNKS_V: tl.constexpr = T.CHUNKS_V
    r = tl.program_id(0)
    b, h, hkv, i = one_row(r, n.Nq, n.Hkv * T.GROUP, T.GROUP)
    rs = row_scale(scale, h)
    one = tl.arange(0, 1).to(tl.int64)
    # [1, D], [1, DV]
    rows = one_row_offset(x.q.stride, b, h, i)
    q_tile = load_tile(x.q.ptr, rows, None, T.D, CHUNKS, T.ALIGN)
    acc = zero_tile(1, CHUNKS_V)
    m = tl.full([], LOWEST, tl.float32)
    l = tl.full([], 0.0, tl.float32)
    a = tl.full([], 0.0, tl.float32)
    indices += r.to(tl.int64) * top_k
    k = x.k.ptr + (b * x.k.stride[0] + hkv * x.k.stride[1])
    v = x.v.ptr + (b * x.v.stride[0] + hkv * x.v.stride[1])
    for first in range(0, top_k, T.BLOCK_K):
        # [BLOCK_K]
        place = first + tl.arange(0, T.BLOCK_K)
        j = tl.load(indices + place, place < top_k, -1).to(tl.int64)
        exists = j >= 0
        _, s = gathered_scores(q_tile, k, j * x.k.stride[2], exists, rs, T)
        m_new = tl.maximum(m, tl.max(s, 0))
        e, alpha = tl.exp2(s - m_new), tl.exp2(m - m_new)
        if results.entropy is not None:
            a = tl.where(alpha == 0, 0.0, alpha * (a + l * (m - m_new)))
            a += tl.sum(e * tl.where(e > 0, s - m_new, 0.0), 0)
        l = l * alpha + tl.sum(e, 0)
        m = m_new
        v_tile = load_tile(v, j * x.v.stride[2], exists, T.DV, CHUNKS_V, T.ALIGN)
        acc = scale_rows(acc, alpha + 0.0 * one, CHUNKS_V)
        acc = weighted_sum(acc, e, v_tile, CHUNKS_V)

    empty = l == 0
    l = tl.where(empty, 1.0, l)
    log_l = tl.log(l)
    tl.store(results.lse + r, tl.where(empty, float("-inf"), natural(m, False) + log_l))
    if results.entropy is not None:
        tl.store(results.entropy + r, log_l - natural(a, False) / l)
        tl.store(results.max_probability + r, tl.where(empty, 0.0, 1.0 / l))
    rows = one_row_offset(out.stride, b, h, i)
    acc = scale_rows(acc, 1.0 / l + 0.0 * one, CHUNKS_V)
    store_tile(out.ptr, rows, one == 0, acc, T.DV, CHUNKS_V, T.ALIGN)


@triton.jit
def gather_dq_kernel(
    dq,  # Strided [B, Hq, Nq, D]
    dscale,  # float32 [B, Hq, Nq], <q, dq> / scale of each row, or None
    indices,  # int32 [B, Hq, Nq, top_k], -1 for none
    dout,  # Strided [B, Hq, Nq, DV]
    terms,  # RowTerms
    x,  # Operands
    scale,  # Scale
    n,  # Sizes
    top_k,
    T: tl.constexpr,  # Tiling
):
    """Each program has one row."""
    CHUNKS: tl.constexpr = T.CHUNKS
    CHUNKS_V: tl.constexpr = T.CHUNKS_V
    r = tl.program_id(0)
    b, h, hkv, i = one_row(r, n.Nq, n.Hkv * T.GROUP, T.GROUP)
    rs = row_scale(scale, h)
    one = tl.arange(0, 1).to(tl.int64)
    # [1, D], [1, DV]
    rows = one_row_offset(x.q.stride, b, h, i)
    q_tile = load_tile(x.q.ptr, rows, None, T.D, CHUNKS, T.ALIGN)
    rows = one_row_offset(dout.stride, b, h, i)
    dout_tile = load_tile(dout.ptr, rows, None, T.DV, CHUNKS_V, T.ALIGN)
    acc = zero_tile(1, CHUNKS)
    row_lse, row_minus_delta = tl.load(terms.lse + r), tl.load(terms.minus_delta + r)
    row_dentropy = 0.0
    if terms.dentropy is not None:
        row_dentropy = tl.load(terms.dentropy + r)
    row = RowTerms(row_lse, 0.0, row_minus_delta, row_dentropy)
    indices += r.to(tl.int64) * top_k
    k = x.k.ptr + (b * x.k.stride[0] + hkv * x.k.stride[1])
    v = x.v.ptr + (b * x.v.stride[0] + hkv * x.v.stride[1])
    for first in range(0, top_k, T.BLOCK_K):
        # [BLOCK_K]
        place = first + tl.arange(0, T.BLOCK_K)
        j = tl.load(indices + place, place < top_k, -1).to(tl.int64)
        exists = j >= 0
        k_tile, s = gathered_scores(q_tile, k, j * x.k.stride[2], exists, rs, T)
        v_tile = load_tile(v, j * x.v.stride[2], exists, T.DV, CHUNKS_V, T.ALIGN)
        log2_p = s - row.lse
        t = row_dot(v_tile, dout_tile, CHUNKS_V) + row.minus_delta
        p = tl.exp2(log2_p)
        ds = score_gradient(p, log2_p, t, row, terms, False)
        acc = weighted_sum(acc, tl.where(exists, ds, 0.0), k_tile, CHUNKS)

    rows = one_row_offset(dq.stride, b, h, i)
    if dscale is not None:
        tl.store(dscale + r + one, row_dot(q_tile, acc, CHUNKS))
    acc = scale_rows(acc, rs + 0.0 * one, CHUNKS)
    store_tile(dq.ptr, rows, one == 0, acc, T.D, CHUNKS, T.ALIGN)


@triton.jit
def gather_dkdv_kernel(
    dk,  # Strided [B, Hkv, Nk, D]
    dv,  # Strided [B, Hkv, Nk, DV]
    pairs,  # int64 [B * Hq * Nq * top_k], places in `indices`, sorted by key
    keys,  # int64, the key of each of them, counted through all key heads
    ends,  # int64 [B, Hkv, tiles + 1]: where the pairs of each tile of keys begin
    dout,  # Strided [B, Hq, Nq, DV]
    terms,  # RowTerms
    x,  # Operands
    scale,  # Scale
    n,  # Sizes
    top_k,
    T: tl.constexpr,  # Tiling; BLOCK_Q are pairs
):
    PRECISION: tl.constexpr = T.PRECISION
    CHUNKS: tl.constexpr = T.CHUNKS
    CHUNKS_V: tl.constexpr = T.CHUNKS_V
    pid, n_tiles = tl.program_id(0), tl.cdiv(n.Nk, T.BLOCK_K)
    tile, head = pid % n_tiles, pid // n_tiles
    b, hkv = (head // n.Hkv).to(tl.int64), head % n.Hkv
    k0 = tile * T.BLOCK_K
    # [BLOCK_K]
    j = k0 + tl.arange(0, T.BLOCK_K)
    exists = j < n.Nk
    # [BLOCK_K, D], [BLOCK_K, DV]
    run = run_offsets(x.k.stride, b, hkv, k0, T.BLOCK_K)
    k_tile = load_tile(x.k.ptr, run, exists, T.D, CHUNKS, T.ALIGN)
    run = run_offsets(x.v.stride, b, hkv, k0, T.BLOCK_K)
    v_tile = load_tile(x.v.ptr, run, exists, T.DV, CHUNKS_V, T.ALIGN)
    dk_tile, dv_tile = zero_tile(T.BLOCK_K, CHUNKS), zero_tile(T.BLOCK_K, CHUNKS_V)
    ends += head.to(tl.int64) * (n_tiles + 1) + tile
    begin, end = tl.load(ends), tl.load(ends + 1)
    for e0 in range(begin, end, T.BLOCK_Q):
        # [BLOCK_Q]: pairs, and the rows that they are of
        e = e0 + tl.arange(0, T.BLOCK_Q)
        is_pair = e < end
        r = tl.load(pairs + e, is_pair, 0) // top_k
        key = tl.load(keys + e, is_pair, -1) - head.to(tl.int64) * n.Nk
        _, h, _, i = one_row(r, n.Nq, n.Hkv * T.GROUP, T.GROUP)
        rs = row_scale(scale, h)
        if scale.ptr is not None:
            rs = rs[None, :]
        # [BLOCK_Q, D], [BLOCK_Q, DV]
        rows = b * x.q.stride[0] + h * x.q.stride[1] + i * x.q.stride[2]
        q_tile = load_tile(x.q.ptr, rows, is_pair, T.D, CHUNKS, T.ALIGN)
        rows = b * dout.stride[0] + h * dout.stride[1] + i * dout.stride[2]
        dout_tile = load_tile(dout.ptr, rows, is_pair, T.DV, CHUNKS_V, T.ALIGN)
        row = load_rows(terms, r, is_pair, 0)
        # [BLOCK_K, BLOCK_Q]
        chosen = j.to(tl.int64)[:, None] == key[None, :]
        s = dot_nt(k_tile, q_tile, CHUNKS, PRECISION) * (rs * LOG2E)
        log2_p = tl.where(chosen, s - row.lse, float("-inf"))
        t = dot_nt(v_tile, dout_tile, CHUNKS_V, PRECISION) + row.minus_delta
        t = tl.where(chosen, t, 0.0)
        p = tl.exp2(log2_p)
        p_tile = p.to(dout_tile[0].dtype)
        dv_tile = dot_into(dv_tile, p_tile, dout_tile, CHUNKS_V, PRECISION)
        ds = score_gradient(p, log2_p, t, row, terms, True) * rs
        dk_tile = dot_into(dk_tile, ds.to(q_tile[0].dtype), q_tile, CHUNKS, PRECISION)

    run = run_offsets(dk.stride, b, hkv, k0, T.BLOCK_K)
    store_tile(dk.ptr, run, exists, dk_tile, T.D, CHUNKS, T.ALIGN)
    run = run_offsets(dv.stride, b, hkv, k0, T.BLOCK_K)
    store_tile(dv.ptr, run, exists, dv_tile, T.DV, CHUNKS_V, T.ALIGN)


def forward(call: TopKAttentionCall, indices: Tensor) -> AttentionResults:
    """The results of attention to the keys of `indices`, see `gather_forward_kernel`."""
    results = empty_results(call)
    if results.lse.numel():
        launch = Launch(call)
        config = gathered("forward", call.D, call.Dv, launch.itemsize)
        launch.run(
            gather_forward_kernel, results.lse.numel(), config,
            strided(results.out), RowResults(*results[1:]), indices, launch.operands(),
            launch.scale(), launch.sizes(), indices.shape[3],
            T=launch.tiling(config, results.out),
        )  # fmt: skip
    return results


def backward(
    upstream: AttentionResults, call: TopKAttentionCall, results: AttentionResults,
    indices: Tensor, needs: Needs,
) -> Gradients:  # fmt: skip
    """The gradients that `needs` names, of q, k, v and scale_tensor; upstream has one of out."""
    q, dout, launch = call.q, upstream.out, Launch(call)
    terms = row_terms(launch, upstream, results)
    grads = {}
    if "q" in needs or "scale_tensor" in needs:
        dq, dscale = empty_rows(q, call.D), None
        if call.scale_tensor is not None:
            dscale = torch.empty_like(results.lse)
        config = gathered("dq", call.D, call.Dv, launch.itemsize)
        launch.run(
            gather_dq_kernel, results.lse.numel(), config,
            strided(dq), dscale, indices, strided(dout), terms, launch.operands(),
            launch.scale(), launch.sizes(), indices.shape[3],
            T=launch.tiling(config, dq, dout),
        )  # fmt: skip
        grads["q"] = dq
        if dscale is not None:
            grads["scale_tensor"] = scale_gradient(dscale[None], call.scale_tensor)
    if "k" in needs or "v" in needs:
        dk, dv = empty_rows(call.k, call.D), empty_rows(call.v, call.Dv)
        config = gathered("dkdv", call.D, call.Dv, launch.itemsize)
        pairs, keys, ends = pairs_by_key(indices, call.B * call.Hkv, call.Nk, config.block_k)
        launch.run(
            gather_dkdv_kernel, launch.key_tiles(config) * call.B * call.Hkv, config,
            strided(dk), strided(dv), pairs, keys, ends, strided(dout), terms,
            launch.operands(), launch.scale(), launch.sizes(), indices.shape[3],
            T=launch.tiling(config, dk, dv, dout),
        )  # fmt: skip
        grads["k"], grads["v"] = dk, dv
    return grads


def pairs_by_key(
    indices: Tensor, heads: int, Nk: int, block_k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(pairs, keys, ends), see `gather_dkdv_kernel`, of indices [B, H, N, n], -1 for none, of which
    H * B / heads neighbours have one key head: a stable sort, so pairs of a key come in the order
    of their rows."""
    device, all_heads = indices.device, indices.shape[0] * indices.shape[1]
    head = torch.arange(all_heads, device=device) // (all_heads // heads)
    # pairs of no key come last
    keys = indices.reshape(all_heads, -1) + head[:, None] * Nk
    keys = keys.masked_fill_(indices.reshape(all_heads, -1) < 0, heads * Nk)
    keys, pairs = torch.sort(keys.view(-1), stable=True)
    tiles = torch.arange(triton.cdiv(Nk, block_k) + 1, device=device) * block_k
    borders = tiles.clamp_(max=Nk) + torch.arange(heads, device=device)[:, None] * Nk
    return pairs, keys, torch.searchsorted(keys, borders)
