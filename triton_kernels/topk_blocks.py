"""Top-k attention by blocks of keys: what a choice is made by; attention of the chosen ones.

The walks are those of `cross_attention.py` and `cross_attention_backward.py`, which look up where
their next tile of keys, or of rows, lies. So masks, groups and splits are theirs, and keys that are
not chosen are not read.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.call import QUERIES_PER_CHOICE, TopKBlocksCall, TopKImportanceCall
from ..core.kernel_op import Gradients, Needs
from ..core.layout import (
    AttentionResults,
    ImportanceResults,
    broadcast_strides,
    row_alignment,
    zero_gradients,
)
from . import cross_attention
from .configs import column_chunks, register_bound
from .launch import Blocks, Launch, compiler_options, device_guard, strided
from .rows import lse_in_score_units
from .scores import (
    forbid_outside,
    key_ranges,
    pair_rows,
    row_offsets,
    row_scale,
    run_offsets,
    tile_scores,
)
from .structs import Strided
from .tiles import dot_nt, load_row, load_tile, packed_rows, program, store_tile
from .topk_gather import pairs_by_key


@triton.jit
def pool_kernel(
    pooled,  # [B, Hkv, N, D]
    k,  # Strided [B, Hkv, Nk, D]
    seen,  # Strided uint8 [B or 1, Nk], by broadcast strides
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
        seen_keys = seen.ptr + b * seen.stride[0] + j * seen.stride[1]
        is_seen = tl.load(seen_keys, j < Nk, 0) != 0
        run = run_offsets(k.stride, b, hkv, k0, BLOCK)
        tile = load_tile(k.ptr, run, is_seen, D, CHUNKS, ALIGN)
        total = add_columns(total, tile, CHUNKS)
        count += tl.sum(is_seen.to(tl.float32))
    rows = tl.full([1], 0, tl.int64) + pid.to(tl.int64) * D
    mean = ()
    for c in tl.static_range(len(CHUNKS)):
        mean = mean + ((total[c] / tl.maximum(count, 1.0))[None, :],)
    store_tile(pooled, rows, rows >= 0, mean, D, CHUNKS, 1)


@triton.jit
def add_columns(total, tile, CHUNKS: tl.constexpr):
    """The sums of columns with those of the tile."""
    out = ()
    for c in tl.static_range(len(CHUNKS)):
        out = out + (total[c] + tl.sum(tile[c].to(tl.float32), 0),)
    return out


@triton.jit
def importance_kernel(
    weights,  # float32 [B, Hkv, T, Nk]
    lse,  # float32 [B, Hq, Nq], in the scores' unit
    x,  # QueriesAndKeys
    s,  # Scores
    n,  # Sizes
    n_tiles,
    T: tl.constexpr,  # Tiling
    QUERIES: tl.constexpr,
):
    """The weights of a tile of pooled keys, summed over the rows of one tile of queries; -inf where
    no row sees the key."""
    PRECISION: tl.constexpr = T.PRECISION
    CHUNKS: tl.constexpr = T.CHUNKS
    BLOCK_K: tl.constexpr = T.BLOCK_K
    tile, hkv, b, k_tile_index = program(n_tiles, n.Hkv, n.B)
    k0 = k_tile_index.to(tl.int32) * BLOCK_K
    # [BLOCK_K]
    j = k0 + tl.arange(0, BLOCK_K)
    exists = j < n.Nk
    run = run_offsets(x.k.stride, b, hkv, k0, BLOCK_K)
    k_tile = load_tile(x.k.ptr, run, exists, T.D, CHUNKS, T.ALIGN)
    total = tl.full([BLOCK_K], 0.0, tl.float32)
    allowed = tl.full([BLOCK_K], 0, tl.int32)
    PER_TILE: tl.constexpr = QUERIES * T.GROUP // T.BLOCK_Q
    for t in range(tile * PER_TILE, (tile + 1) * PER_TILE):
        # [BLOCK_Q]
        i, h, row_mask = packed_rows(t, hkv, n.Nq, T.BLOCK_Q, T.GROUP)
        keys = key_ranges(s, b, i, row_mask, n.Nk)
        rs = row_scale(s.scale, h)
        if s.scale.ptr is not None:
            rs = rs[:, None]
        # [BLOCK_Q, D], [BLOCK_Q, BLOCK_K]
        rows = row_offsets(x.q.stride, b, h, i)
        q_tile = load_tile(x.q.ptr, rows, row_mask, T.D, CHUNKS, T.ALIGN)
        score, _ = tile_scores(
            dot_nt(q_tile, k_tile, CHUNKS, PRECISION), rs, s, None,
            pair_rows(s.mask, b, h, i, 1), row_mask[:, None], j[None, :], n.Nk,
        )  # fmt: skip
        score = forbid_outside(score, keys.first, keys.last, j[None, :])
        score = tl.where(row_mask[:, None], score, float("-inf"))
        rows = (b * n.Hkv * T.GROUP + h) * n.Nq + i
        row_lse = load_row(lse, rows, row_mask, float("inf"), 1)
        total += tl.sum(tl.exp2(score - row_lse), 0)
        allowed = tl.maximum(allowed, tl.max((score != float("-inf")).to(tl.int32), 0))
    keys = ((b * n.Hkv + hkv) * n_tiles + tile) * n.Nk + j
    tl.store(weights + keys, tl.where(allowed != 0, total, float("-inf")), exists)


POOLED_ROWS = 32  # keys that a program adds up at a time
MAX_REGISTERS = register_bound(num_warps=4)


def pool(k: Tensor, seen: Tensor, size: int) -> Tensor:
    """[B, Hkv, N, D] in the dtype of k, see `pool_kernel`."""
    B, Hkv, Nk, D = k.shape
    N = triton.cdiv(Nk, size)
    pooled = k.new_empty((B, Hkv, N, D))
    if pooled.numel():
        with device_guard(k.device):
            pool_kernel[(B * Hkv * N,)](
                pooled, strided(k), Strided(seen.view(torch.uint8), broadcast_strides(seen)),
                Hkv, Nk, N, SIZE=size, D=D, CHUNKS=column_chunks(D, k.element_size()),
                BLOCK=min(size, POOLED_ROWS), ALIGN=row_alignment(k),
                **compiler_options(MAX_REGISTERS),
            )  # fmt: skip
    return pooled


def importance(call: TopKImportanceCall) -> ImportanceResults:
    """float32 [B, Hkv, T, N] by `importance` of `reference.py`."""
    pooled = pool(call.k, call.seen, call.topk_blocks[0])
    narrow = pooled[..., : min(call.D, 16)]
    call = replace(call, k=pooled, v=narrow, return_statistics=False)
    lse = cross_attention.forward(call).lse
    launch, T = Launch(call), triton.cdiv(call.Nq, QUERIES_PER_CHOICE)
    weights = lse.new_empty((call.B, call.Hkv, T, call.Nk))
    if weights.numel():
        config = launch.within(launch.config("weights"), QUERIES_PER_CHOICE)
        programs = T * launch.key_tiles(config) * call.B * call.Hkv
        launch.run(
            importance_kernel, programs, config,
            weights, lse_in_score_units(launch, lse), launch.queries_and_keys(),
            launch.scores(), launch.sizes(), T, T=launch.tiling(config),
            QUERIES=QUERIES_PER_CHOICE,
        )  # fmt: skip
    return ImportanceResults(weights)


def forward(call: TopKBlocksCall) -> AttentionResults:
    """The results of attention to the chosen blocks."""
    blocks = Blocks(call.topk_blocks[0], QUERIES_PER_CHOICE, call.chosen, counts(call.chosen))
    return cross_attention.forward(call, blocks=blocks)


def backward(
    upstream: AttentionResults, call: TopKBlocksCall, results: AttentionResults, needs: Needs
) -> Gradients:
    """The gradients that `needs` names, of q, k, v and scale_tensor."""
    chosen, size = call.chosen, call.topk_blocks[0]
    if results.out.numel() == 0 or chosen.numel() == 0:
        return zero_gradients(call, needs)
    pairs, _, ends = pairs_by_key(chosen, call.B * call.Hkv, triton.cdiv(call.Nk, size))
    tiles = (pairs // chosen.shape[3] % chosen.shape[2]).to(torch.int32)
    blocks = Blocks(size, QUERIES_PER_CHOICE, chosen, counts(chosen), tiles, ends)
    return cross_attention.backward(upstream, call, results, needs, blocks=blocks)


def counts(chosen: Tensor) -> Tensor:
    """int32 [B, Hkv, T], how many blocks each tile of queries chose."""
    return (chosen >= 0).sum(3, dtype=torch.int32)
