"""Flash attention as in a textbook: dense or causal, lengths divisible by the tile, no options.

Without interval, bias and bounds it shows the cost of the algorithm itself, as a floor to compare
with. q [BH, Nq, D], k and v [BH, Nk, D] are contiguous; causal needs Nq == Nk; lse is in log2
units.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


@triton.jit
def tile_at(base, first, ROWS: tl.constexpr, D: tl.constexpr):
    """Pointers of ROWS rows from row `first` on."""
    rows = first + tl.arange(0, ROWS)
    return base + rows[:, None] * D + tl.arange(0, D)[None, :]


@triton.jit
def forward_tiles(
    acc, m, l, q_tile, k, v, qk_scale, i, begin, end,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for k0 in range(begin, end, BLOCK_K):
        k_tile = tl.load(tile_at(k, k0, BLOCK_K, D))
        # [BLOCK_Q, BLOCK_K]
        s = tl.dot(q_tile, tl.trans(k_tile))
        if MASKED:
            j = k0 + tl.arange(0, BLOCK_K)
            s = tl.where(i[:, None] >= j[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * qk_scale)
        p = tl.exp2(s * qk_scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        v_tile = tl.load(tile_at(v, k0, BLOCK_K, D))
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None])
        m = m_new
    return acc, m, l


@triton.jit
def forward_kernel(
    out, lse, q, k, v, qk_scale, Nq, Nk,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i0, bh = tl.program_id(0) * BLOCK_Q, tl.program_id(1).to(tl.int64)
    q, out, lse = q + bh * Nq * D, out + bh * Nq * D, lse + bh * Nq
    k, v = k + bh * Nk * D, v + bh * Nk * D
    i = i0 + tl.arange(0, BLOCK_Q)
    q_tile = tl.load(tile_at(q, i0, BLOCK_Q, D))
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    l = tl.full([BLOCK_Q], 0.0, tl.float32)
    acc = tl.full([BLOCK_Q, D], 0.0, tl.float32)
    full = i0 // BLOCK_K * BLOCK_K if CAUSAL else Nk
    acc, m, l = forward_tiles(
        acc, m, l, q_tile, k, v, qk_scale, i, 0, full, False, D, BLOCK_K
    )  # fmt: skip
    if CAUSAL:
        acc, m, l = forward_tiles(
            acc, m, l, q_tile, k, v, qk_scale, i, full, i0 + BLOCK_Q, True, D, BLOCK_K
        )  # fmt: skip
    tl.store(lse + i, m + tl.log2(l))
    acc = acc / l[:, None]
    tl.store(tile_at(out, i0, BLOCK_Q, D), acc.to(out.dtype.element_ty))


@triton.jit
def dq_tiles(
    acc, q_tile, dout_tile, row_lse, row_delta, k, v, qk_scale, i, begin, end,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    for k0 in range(begin, end, BLOCK_K):
        k_tile, v_tile = tl.load(tile_at(k, k0, BLOCK_K, D)), tl.load(tile_at(v, k0, BLOCK_K, D))
        # [BLOCK_Q, BLOCK_K]
        p = tl.exp2(tl.dot(q_tile, tl.trans(k_tile)) * qk_scale - row_lse[:, None])
        if MASKED:
            p = tl.where(i[:, None] >= (k0 + tl.arange(0, BLOCK_K))[None, :], p, 0.0)
        ds = p * (tl.dot(dout_tile, tl.trans(v_tile)) - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc)
    return acc


@triton.jit
def dq_kernel(
    dq, dout, lse, delta, q, k, v, scale, qk_scale, Nq, Nk,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i0, bh = tl.program_id(0) * BLOCK_Q, tl.program_id(1).to(tl.int64)
    q, dq, dout = q + bh * Nq * D, dq + bh * Nq * D, dout + bh * Nq * D
    k, v = k + bh * Nk * D, v + bh * Nk * D
    i = i0 + tl.arange(0, BLOCK_Q)
    q_tile, dout_tile = tl.load(tile_at(q, i0, BLOCK_Q, D)), tl.load(tile_at(dout, i0, BLOCK_Q, D))
    row_lse, row_delta = tl.load(lse + bh * Nq + i), tl.load(delta + bh * Nq + i)
    acc = tl.full([BLOCK_Q, D], 0.0, tl.float32)
    full = i0 // BLOCK_K * BLOCK_K if CAUSAL else Nk
    acc = dq_tiles(
        acc, q_tile, dout_tile, row_lse, row_delta, k, v, qk_scale, i, 0, full, False, D, BLOCK_K
    )
    if CAUSAL:
        acc = dq_tiles(
            acc, q_tile, dout_tile, row_lse, row_delta, k, v, qk_scale, i, full, i0 + BLOCK_Q,
            True, D, BLOCK_K,
        )  # fmt: skip
    tl.store(tile_at(dq, i0, BLOCK_Q, D), (acc * scale).to(dq.dtype.element_ty))


@triton.jit
def dkdv_tiles(
    dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, qk_scale, j, begin, end,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    for i0 in range(begin, end, BLOCK_Q):
        i = i0 + tl.arange(0, BLOCK_Q)
        q_tile = tl.load(tile_at(q, i0, BLOCK_Q, D))
        dout_tile = tl.load(tile_at(dout, i0, BLOCK_Q, D))
        # [BLOCK_K, BLOCK_Q]
        s = tl.dot(k_tile, tl.trans(q_tile))
        p = tl.exp2(s * qk_scale - tl.load(lse + i)[None, :])
        if MASKED:
            p = tl.where(i[None, :] >= j[:, None], p, 0.0)
        dv_tile = tl.dot(p.to(dout_tile.dtype), dout_tile, dv_tile)
        ds = p * (tl.dot(v_tile, tl.trans(dout_tile)) - tl.load(delta + i)[None, :])
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile)
    return dk_tile, dv_tile


@triton.jit
def dkdv_kernel(
    dk, dv, dout, lse, delta, q, k, v, scale, qk_scale, Nq, Nk,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    j0, bh = tl.program_id(0) * BLOCK_K, tl.program_id(1).to(tl.int64)
    q, dout, lse, delta = q + bh * Nq * D, dout + bh * Nq * D, lse + bh * Nq, delta + bh * Nq
    k, v, dk, dv = k + bh * Nk * D, v + bh * Nk * D, dk + bh * Nk * D, dv + bh * Nk * D
    j = j0 + tl.arange(0, BLOCK_K)
    k_tile, v_tile = tl.load(tile_at(k, j0, BLOCK_K, D)), tl.load(tile_at(v, j0, BLOCK_K, D))
    dk_tile = tl.full([BLOCK_K, D], 0.0, tl.float32)
    dv_tile = tl.full([BLOCK_K, D], 0.0, tl.float32)
    begin = 0
    if CAUSAL:
        begin = tl.cdiv(j0 + BLOCK_K, BLOCK_Q) * BLOCK_Q
        dk_tile, dv_tile = dkdv_tiles(
            dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, qk_scale, j,
            j0 // BLOCK_Q * BLOCK_Q, tl.minimum(begin, Nq), True, D, BLOCK_Q,
        )  # fmt: skip
    dk_tile, dv_tile = dkdv_tiles(
        dk_tile, dv_tile, k_tile, v_tile, q, dout, lse, delta, qk_scale, j, begin, Nq, False, D,
        BLOCK_Q,
    )  # fmt: skip
    tl.store(tile_at(dk, j0, BLOCK_K, D), (dk_tile * scale).to(dk.dtype.element_ty))
    tl.store(tile_at(dv, j0, BLOCK_K, D), dv_tile.to(dv.dtype.element_ty))


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, **tile) -> tuple:
    """(out, lse in log2 units); `tile` holds BLOCK_Q, BLOCK_K and Triton's own options."""
    (BH, Nq, D), Nk = q.shape, k.shape[1]
    out, lse = torch.empty_like(q), q.new_empty((BH, Nq), dtype=torch.float32)
    forward_kernel[(Nq // tile["BLOCK_Q"], BH)](
        out, lse, q, k, v, scale * LOG2E, Nq, Nk, CAUSAL=causal, D=D, **tile
    )
    return out, lse


def dq(dout, out, lse, q, k, v, scale: float, causal: bool, **tile) -> Tensor:
    (BH, Nq, D), Nk = q.shape, k.shape[1]
    result, delta = torch.empty_like(q), (out.float() * dout.float()).sum(-1)
    dq_kernel[(Nq // tile["BLOCK_Q"], BH)](
        result, dout, lse, delta, q, k, v, scale, scale * LOG2E, Nq, Nk, CAUSAL=causal, D=D, **tile
    )
    return result


def dkdv(dout, out, lse, q, k, v, scale: float, causal: bool, **tile) -> tuple[Tensor, Tensor]:
    (BH, Nq, D), Nk = q.shape, k.shape[1]
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    delta = (out.float() * dout.float()).sum(-1)
    dkdv_kernel[(Nk // tile["BLOCK_K"], BH)](
        dk, dv, dout, lse, delta, q, k, v, scale, scale * LOG2E, Nq, Nk,
        CAUSAL=causal, D=D, **tile,
    )  # fmt: skip
    return dk, dv
