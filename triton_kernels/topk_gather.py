"""Top-k attention of indices: what is computed is what is attended, so nothing grows with Nk.

A row gathers its keys and values. dk and dv take the pairs sorted by key: a tile of keys walks the
rows that chose one of them, as in `cross_attention_backward.py`, with rows gathered from anywhere
and all of a tile's products but one per row masked. Nothing is summed by atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.layout import empty_rows
from .configs import gathered
from .launch import Call
from .rows import row_terms
from .scores import (
    LOWEST,
    natural,
    row_scale,
    run_offsets,
    score_gradient,
)
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
def gathered_scores(
    q_tile, k, rows, there, rs, D: tl.constexpr, CHUNKS: tl.constexpr, ALIGN: tl.constexpr
):
    """(keys, scores [BLOCK_K] in log2 units, -inf where there is no key)."""
    k_tile = load_tile(k, rows, there, D, CHUNKS, ALIGN)
    s = row_dot(k_tile, q_tile, CHUNKS) * (rs * LOG2E)
    return k_tile, tl.where(there, s, float("-inf"))


@triton.jit
def weighted_sum(acc, p, tile, CHUNKS: tl.constexpr):
    """acc [1, width] plus the rows of the tile, each times its p [BLOCK_K]."""
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        out = out + (acc[i] + tl.sum(p[:, None] * tile[i].to(tl.float32), 0)[None, :],)
    return out


@triton.jit
def gather_forward_kernel(
    out, stride_out,  # [B, Hq, Nq, DV]
    lse, entropy, max_probability,  # float32 [B, Hq, Nq], the last two may be None
    indices,  # int32 [B, Hq, Nq, top_k], -1 for none
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask, start, stride_start, stop, stride_stop,
    scale, scale_tensor, stride_scale, softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, top_k,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row."""
    n = tl.program_id(0)
    b, h, hkv, i = one_row(n, Nq, Hkv * GROUP, GROUP)
    rs = row_scale(scale, scale_tensor, stride_scale, h)
    one = tl.arange(0, 1).to(tl.int64)
    # [1, D], [1, DV]
    rows = b * stride_q[0] + h * stride_q[1] + i * stride_q[2] + one
    q_tile = load_tile(q, rows, None, D, CHUNKS, ALIGN)
    acc = zero_tile(1, CHUNKS_V)
    m = tl.full([], LOWEST, tl.float32)
    l = tl.full([], 0.0, tl.float32)
    a = tl.full([], 0.0, tl.float32)
    indices += n.to(tl.int64) * top_k
    k += b * stride_k[0] + hkv * stride_k[1]
    v += b * stride_v[0] + hkv * stride_v[1]
    for first in range(0, top_k, BLOCK_K):
        # [BLOCK_K]
        place = first + tl.arange(0, BLOCK_K)
        j = tl.load(indices + place, place < top_k, -1).to(tl.int64)
        there = j >= 0
        _, s = gathered_scores(q_tile, k, j * stride_k[2], there, rs, D, CHUNKS, ALIGN)
        m_new = tl.maximum(m, tl.max(s, 0))
        e, alpha = tl.exp2(s - m_new), tl.exp2(m - m_new)
        if entropy is not None:
            a = tl.where(alpha == 0, 0.0, alpha * (a + l * (m - m_new)))
            a += tl.sum(e * tl.where(e > 0, s - m_new, 0.0), 0)
        l = l * alpha + tl.sum(e, 0)
        m = m_new
        v_tile = load_tile(v, j * stride_v[2], there, DV, CHUNKS_V, ALIGN)
        acc = weighted_sum(scale_rows(acc, alpha + 0.0 * one, CHUNKS_V), e, v_tile, CHUNKS_V)

    empty = l == 0
    l = tl.where(empty, 1.0, l)
    log_l = tl.log(l)
    tl.store(lse + n, tl.where(empty, float("-inf"), natural(m, None) + log_l))
    if entropy is not None:
        tl.store(entropy + n, log_l - natural(a, None) / l)
        tl.store(max_probability + n, tl.where(empty, 0.0, 1.0 / l))
    rows = b * stride_out[0] + h * stride_out[1] + i * stride_out[2] + one
    store_tile(
        out, rows, one == 0, scale_rows(acc, 1.0 / l + 0.0 * one, CHUNKS_V), DV, CHUNKS_V, ALIGN
    )


@triton.jit
def gather_dq_kernel(
    dq, stride_dq,  # [B, Hq, Nq, D]
    dscale,  # float32 [B, Hq, Nq], <q, dq> / scale of each row, or None
    indices,  # int32 [B, Hq, Nq, top_k], -1 for none
    dout, stride_dout, lse, minus_delta, dentropy,  # as in `dq_kernel`
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask, start, stride_start, stop, stride_stop,
    scale, scale_tensor, stride_scale, softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, top_k,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row."""
    n = tl.program_id(0)
    b, h, hkv, i = one_row(n, Nq, Hkv * GROUP, GROUP)
    rs = row_scale(scale, scale_tensor, stride_scale, h)
    one = tl.arange(0, 1).to(tl.int64)
    # [1, D], [1, DV]
    rows = b * stride_q[0] + h * stride_q[1] + i * stride_q[2] + one
    q_tile = load_tile(q, rows, None, D, CHUNKS, ALIGN)
    rows = b * stride_dout[0] + h * stride_dout[1] + i * stride_dout[2] + one
    dout_tile = load_tile(dout, rows, None, DV, CHUNKS_V, ALIGN)
    acc = zero_tile(1, CHUNKS)
    row_lse, row_minus_delta = tl.load(lse + n), tl.load(minus_delta + n)
    row_dentropy = 0.0
    if dentropy is not None:
        row_dentropy = tl.load(dentropy + n)
    indices += n.to(tl.int64) * top_k
    k += b * stride_k[0] + hkv * stride_k[1]
    v += b * stride_v[0] + hkv * stride_v[1]
    for first in range(0, top_k, BLOCK_K):
        # [BLOCK_K]
        place = first + tl.arange(0, BLOCK_K)
        j = tl.load(indices + place, place < top_k, -1).to(tl.int64)
        there = j >= 0
        k_tile, s = gathered_scores(q_tile, k, j * stride_k[2], there, rs, D, CHUNKS, ALIGN)
        v_tile = load_tile(v, j * stride_v[2], there, DV, CHUNKS_V, ALIGN)
        log2_p = s - row_lse
        t = row_dot(v_tile, dout_tile, CHUNKS_V) + row_minus_delta
        p = tl.exp2(log2_p)
        ds = score_gradient(p, log2_p, t, row_lse, dentropy, row_dentropy, False)
        acc = weighted_sum(acc, tl.where(there, ds, 0.0), k_tile, CHUNKS)

    rows = b * stride_dq[0] + h * stride_dq[1] + i * stride_dq[2] + one
    if dscale is not None:
        tl.store(dscale + n + one, row_dot(q_tile, acc, CHUNKS))
    store_tile(dq, rows, one == 0, scale_rows(acc, rs + 0.0 * one, CHUNKS), D, CHUNKS, ALIGN)


@triton.jit
def gather_dkdv_kernel(
    dk, stride_dk, dv, stride_dv,  # [B, Hkv, Nk, *]
    pairs,  # int64 [B * Hq * Nq * top_k], places in `indices`, sorted by key
    keys,  # int64, the key of each of them, counted through all key heads
    ends,  # int64 [B, Hkv, tiles + 1]: where the pairs of each tile of keys begin
    dout, stride_dout, lse, minus_delta, dentropy,  # as in `dkdv_kernel`
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask, start, stride_start, stop, stride_stop,
    scale, scale_tensor, stride_scale, softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, top_k,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid, n_tiles = tl.program_id(0), tl.cdiv(Nk, BLOCK_K)
    tile, head = pid % n_tiles, pid // n_tiles
    b, hkv = (head // Hkv).to(tl.int64), head % Hkv
    k0 = tile * BLOCK_K
    # [BLOCK_K]
    j = k0 + tl.arange(0, BLOCK_K)
    here = j < Nk
    # [BLOCK_K, D], [BLOCK_K, DV]
    k_tile = load_tile(k, run_offsets(stride_k, b, hkv, k0, BLOCK_K), here, D, CHUNKS, ALIGN)
    v_tile = load_tile(v, run_offsets(stride_v, b, hkv, k0, BLOCK_K), here, DV, CHUNKS_V, ALIGN)
    dk_tile, dv_tile = zero_tile(BLOCK_K, CHUNKS), zero_tile(BLOCK_K, CHUNKS_V)
    ends += head.to(tl.int64) * (n_tiles + 1) + tile
    begin, end = tl.load(ends), tl.load(ends + 1)
    for e0 in range(begin, end, BLOCK_Q):
        # [BLOCK_Q]: pairs, and the rows that they are of
        e = e0 + tl.arange(0, BLOCK_Q)
        there = e < end
        n = tl.load(pairs + e, there, 0) // top_k
        own = tl.load(keys + e, there, -1) - head.to(tl.int64) * Nk
        _, h, _, i = one_row(n, Nq, Hkv * GROUP, GROUP)
        rs = row_scale(scale, scale_tensor, stride_scale, h)
        if scale_tensor is not None:
            rs = rs[None, :]
        # [BLOCK_Q, D], [BLOCK_Q, DV]
        rows = b * stride_q[0] + h * stride_q[1] + i * stride_q[2]
        q_tile = load_tile(q, rows, there, D, CHUNKS, ALIGN)
        rows = b * stride_dout[0] + h * stride_dout[1] + i * stride_dout[2]
        dout_tile = load_tile(dout, rows, there, DV, CHUNKS_V, ALIGN)
        row_lse, _, row_minus_delta, row_dentropy = load_rows(
            lse, None, minus_delta, dentropy, n, there, 0
        )
        # [BLOCK_K, BLOCK_Q]
        chosen = j.to(tl.int64)[:, None] == own[None, :]
        s = dot_nt(k_tile, q_tile, CHUNKS, PRECISION) * (rs * LOG2E)
        log2_p = tl.where(chosen, s - row_lse, float("-inf"))
        t = dot_nt(v_tile, dout_tile, CHUNKS_V, PRECISION) + row_minus_delta
        t = tl.where(chosen, t, 0.0)
        p = tl.exp2(log2_p)
        dv_tile = dot_into(dv_tile, p.to(dout_tile[0].dtype), dout_tile, CHUNKS_V, PRECISION)
        ds = score_gradient(p, log2_p, t, row_lse, dentropy, row_dentropy, True) * rs
        dk_tile = dot_into(dk_tile, ds.to(q_tile[0].dtype), q_tile, CHUNKS, PRECISION)

    store_tile(dk, run_offsets(stride_dk, b, hkv, k0, BLOCK_K), here, dk_tile, D, CHUNKS, ALIGN)
    store_tile(dv, run_offsets(stride_dv, b, hkv, k0, BLOCK_K), here, dv_tile, DV, CHUNKS_V, ALIGN)


def forward(call: Call, indices: Tensor, statistics: bool) -> tuple[Tensor, ...]:
    """(out, lse, entropy, max_probability); without `statistics` the last two have no elements."""
    q, top_k = call.q, indices.shape[3]
    out = empty_rows(q, call.DV)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    entropy, max_probability = (torch.empty_like(lse) if statistics else None for _ in range(2))
    if lse.numel():
        config = gathered("forward", call.D, call.DV, q.element_size())
        results = (out, out.stride(), lse, entropy, max_probability, indices)
        call.launch(gather_forward_kernel, config, lse.numel(), results, top_k)
    empty = lse.new_empty(0)
    return out, lse, *(empty if t is None else t for t in (entropy, max_probability))


def backward(
    call: Call, dout: Tensor, dlse, dentropy, indices: Tensor, out: Tensor, lse: Tensor,
    entropy: Tensor, needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(dq, dk, dv, dscale), None for what is not needed; dlse and dentropy may be None."""
    q, top_k = call.q, indices.shape[3]
    lse, minus_delta = row_terms(call, out, lse, dout, dlse, dentropy, entropy)
    rows = (dout, dout.stride(), lse, minus_delta, dentropy)
    dq, dk, dv, dscale = (None,) * 4
    if needs[0] or needs[3]:
        dq = empty_rows(q, call.D)
        if call.scale_tensor is not None:
            dscale = torch.empty_like(lse)
        config = gathered("dq", call.D, call.DV, q.element_size())
        results = (dq, dq.stride(), dscale, indices, *rows)
        call.launch(gather_dq_kernel, config, lse.numel(), results, top_k)
        if dscale is not None:
            over = (0, 2) if call.scale_tensor.numel() > 1 else (0, 1, 2)
            dscale = dscale.sum(over).to(call.scale_tensor.dtype).view_as(call.scale_tensor)
    if needs[1] or needs[2]:
        dk, dv = empty_rows(call.k, call.D), empty_rows(call.v, call.DV)
        config = gathered("dkdv", call.D, call.DV, q.element_size())
        pairs, keys, ends = pairs_by_key(indices, call.B * call.Hkv, call.Nk, config.block_k)
        results = (dk, dk.stride(), dv, dv.stride(), pairs, keys, ends, *rows)
        programs = call.key_tiles(config) * call.B * call.Hkv
        call.launch(gather_dkdv_kernel, config, programs, results, top_k)
    return dq, dk, dv, dscale


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
