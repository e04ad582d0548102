"""Top-k attention by blocks of keys: what a choice is made by; attention of the chosen ones.

The walks are those of `cross_attention.py` and `cross_attention_backward.py`, which look up where
their next tile of keys, or of rows, lies. So masks, groups and splits are theirs, and keys that are
not chosen are not read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.layout import row_alignment, zero_gradients
from . import cross_attention, cross_attention_backward
from .configs import column_chunks, register_bound
from .launch import (
    Blocks,
    Call,
    compiler_options,
    device_guard,
)
from .rows import lse_in_score_units
from .scores import (
    forbid_outside,
    key_ranges,
    row_offsets,
    row_scale,
    run_offsets,
    tile_scores,
)
from .tiles import (
    dot_nt,
    load_row,
    load_tile,
    packed_rows,
    program,
    store_tile,
)
from .topk_gather import pairs_by_key


@triton.jit
def pool_kernel(
    pooled,  # [B, Hkv, N, D]
    k, stride_k, seen, stride_seen,  # seen: uint8 [B or 1, Nk]
    Hkv, Nk, N, SIZE: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """The mean of a block's seen keys, 0 where none is."""
    pid = tl.program_id(0)
    n, head = pid % N, pid // N
    b, hkv = (head // Hkv).to(tl.int64), head % Hkv
    total = ()
    for c in tl.static_range(len(CHUNKS)):
        total = total + (tl.full([CHUNKS[c]], 0.0, tl.float32),)
    count = tl.full([], 0.0, tl.float32)
    for k0 in range(n * SIZE, tl.minimum((n + 1) * SIZE, Nk), BLOCK):
        # [BLOCK], [BLOCK, D]
        j = k0 + tl.arange(0, BLOCK)
        there = tl.load(seen + b * stride_seen[0] + j * stride_seen[1], j < Nk, 0) != 0
        tile = load_tile(k, run_offsets(stride_k, b, hkv, k0, BLOCK), there, D, CHUNKS, ALIGN)
        total = add_columns(total, tile, CHUNKS)
        count += tl.sum(there.to(tl.float32))
    rows = tl.full([1], 0, tl.int64) + pid.to(tl.int64) * D
    mean = ()
    for c in tl.static_range(len(CHUNKS)):
        mean = mean + ((total[c] / tl.maximum(count, 1.0))[None, :],)
    store_tile(pooled, rows, rows >= 0, mean, D, CHUNKS, 1)


@triton.jit
def add_columns(total, tile, CHUNKS: tl.constexpr):
    out = ()
    for c in tl.static_range(len(CHUNKS)):
        out = out + (total[c] + tl.sum(tile[c].to(tl.float32), 0),)
    return out


@triton.jit
def importance_kernel(
    weights,  # float32 [B, Hkv, T, Nk]
    lse,  # float32 [B, Hq, Nq], in the scores' unit
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask, start, stride_start, stop, stride_stop,
    scale, scale_tensor, stride_scale, softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, n_tiles,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """The weights of a tile of pooled keys, summed over the rows of one tile of queries; -inf where
    no row sees the key."""
    tile, hkv, b, own = program(n_tiles, Hkv, B)
    k0 = own.to(tl.int32) * BLOCK_K
    # [BLOCK_K]
    j = k0 + tl.arange(0, BLOCK_K)
    there = j < Nk
    k_tile = load_tile(k, run_offsets(stride_k, b, hkv, k0, BLOCK_K), there, D, CHUNKS, ALIGN)
    total = tl.full([BLOCK_K], 0.0, tl.float32)
    allowed = tl.full([BLOCK_K], 0, tl.int32)
    PER_TILE: tl.constexpr = QUERIES * GROUP // BLOCK_Q
    for t in range(tile * PER_TILE, (tile + 1) * PER_TILE):
        # [BLOCK_Q]
        i, h, row_mask = packed_rows(t, hkv, Nq, BLOCK_Q, GROUP)
        first, last, _, _, _, _ = key_ranges(
            start, stop, stride_start, stride_stop, b, i, row_mask, Nk
        )
        rs = row_scale(scale, scale_tensor, stride_scale, h)
        if scale_tensor is not None:
            rs = rs[:, None]
        # [BLOCK_Q, D], [BLOCK_Q, BLOCK_K]
        q_tile = load_tile(q, row_offsets(stride_q, b, h, i), row_mask, D, CHUNKS, ALIGN)
        s, _ = tile_scores(
            dot_nt(q_tile, k_tile, CHUNKS, PRECISION), rs, softcap, bias, None, stride_bias,
            mask, row_offsets(stride_mask, b, h, i)[:, None], stride_mask,
            row_mask[:, None], j[None, :], Nk,
        )  # fmt: skip
        s = forbid_outside(s, first, last, j[None, :])
        s = tl.where(row_mask[:, None], s, float("-inf"))
        rows = (b * Hkv * GROUP + h) * Nq + i
        total += tl.sum(tl.exp2(s - load_row(lse, rows, row_mask, float("inf"), 1)), 0)
        allowed = tl.maximum(allowed, tl.max((s != float("-inf")).to(tl.int32), 0))
    at = ((b * Hkv + hkv) * n_tiles + tile) * Nk + j
    tl.store(weights + at, tl.where(allowed != 0, total, float("-inf")), there)


POOLED_ROWS = 32  # keys that a program adds up at a time
MAX_REGISTERS = register_bound(num_warps=4)


def pool(k: Tensor, seen: Tensor, size: int) -> Tensor:
    """[B, Hkv, N, D] in the dtype of k, see `pool_kernel`."""
    B, Hkv, Nk, D = k.shape
    N = triton.cdiv(Nk, size)
    pooled = k.new_empty((B, Hkv, N, D))
    strides = [s if n > 1 else 0 for s, n in zip(seen.stride(), seen.shape, strict=True)]
    if pooled.numel():
        with device_guard(k.device):
            pool_kernel[(B * Hkv * N,)](
                pooled, k, k.stride(), seen.view(torch.uint8), tuple(strides), Hkv, Nk, N,
                SIZE=size, D=D, CHUNKS=column_chunks(D, k.element_size()),
                BLOCK=min(size, POOLED_ROWS), ALIGN=row_alignment(k),
                **compiler_options(MAX_REGISTERS),
            )  # fmt: skip
    return pooled


def importance(
    q, k, seen, scale_tensor, start, stop, mask, scale, size, queries, allow_tf32
) -> Tensor:
    """float32 [B, Hkv, T, N] by `importance` of `reference.py`.

    seen bool [B or 1, Nk]: the keys that some query of a batch element may see; start, stop and
    mask in blocks; queries: of a tile; the rest as `cross_attention.forward` takes it.
    """
    pooled = pool(k, seen, size)
    narrow = pooled[..., : min(k.shape[3], 16)]
    lse = cross_attention.forward(
        q, pooled, narrow, None, scale_tensor, start, stop, mask, None, scale, 0.0, 0.0, False,
        allow_tf32,
    )[1]  # fmt: skip
    call = Call(
        q, pooled, narrow, None, scale_tensor, start, stop, mask, None, scale, 0.0, 0.0, allow_tf32
    )
    T = triton.cdiv(call.Nq, queries)
    weights = lse.new_empty((call.B, call.Hkv, T, call.Nk))
    if weights.numel():
        config = call.within(call.config("weights"), queries)
        programs = T * call.key_tiles(config) * call.B * call.Hkv
        results = (weights, lse_in_score_units(call, lse))
        call.launch(importance_kernel, config, programs, results, T, QUERIES=queries)
    return weights


def forward(
    q, k, v, scale_tensor, start, stop, mask, chosen, scale, size, queries, statistics, allow_tf32
) -> tuple[Tensor, ...]:
    """(out, lse, entropy, max_probability); without `statistics` the last two have no elements.

    chosen int32 [B, Hkv, T, n]: the blocks of `size` keys of each tile of `queries` queries, in
    ascending order, then -1; the rest as `cross_attention.forward` takes it.
    """
    blocks = Blocks(size, queries, chosen, counts(chosen))
    out, lse, _, entropy, max_probability = cross_attention.forward(
        q, k, v, None, scale_tensor, start, stop, mask, None, scale, 0.0, 0.0, statistics,
        allow_tf32, blocks=blocks,
    )  # fmt: skip
    return out, lse, entropy, max_probability


def backward(
    dout, dlse, dentropy, q, k, v, scale_tensor, start, stop, mask, chosen, out, lse, entropy,
    scale, size, queries, allow_tf32, needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dscale); those that are not in the four `needs` have no elements.

    Arguments as in `forward` and `cross_attention_backward.backward`.
    """
    if out.numel() == 0 or chosen.numel() == 0:
        return zero_gradients((q, k, v, scale_tensor), needs, 3)
    pairs, _, ends = pairs_by_key(chosen, k.shape[0] * k.shape[1], triton.cdiv(k.shape[2], size))
    tiles = (pairs // chosen.shape[3] % chosen.shape[2]).to(torch.int32)
    blocks = Blocks(size, queries, chosen, counts(chosen), tiles, ends)
    dq, dk, dv, _, dscale = cross_attention_backward.backward(
        dout, dlse, dentropy, q, k, v, None, scale_tensor, start, stop, mask, None, out, lse,
        lse.new_empty(0), entropy, scale, 0.0, 0.0, allow_tf32, [*needs[:3], False, needs[3]],
        blocks=blocks,
    )  # fmt: skip
    return dq, dk, dv, dscale


def counts(chosen: Tensor) -> Tensor:
    """int32 [B, Hkv, T]."""
    return (chosen >= 0).sum(3, dtype=torch.int32)
