"""Small kernels over rows: merging splits, delta, and the interval bounds of row tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.layout import AttentionResults, row_alignment
from .configs import Config, column_chunks, register_bound
from .launch import Launch, compiler_options, device_guard, strided
from .scores import LOWEST, row_offsets, tile_bits
from .structs import Intervals, RowResults, RowTerms
from .tiles import (
    LN2,
    LOG2E,
    load_tile,
    packed_rows,
    row_bounds,
    row_dot,
    scale_rows,
    store_tile,
    zero_tile,
)


@triton.jit
def rows_of(H, N, BLOCK: tl.constexpr):
    """(b, h, n, row among all, whether it exists) of this program's rows; all but b, h [BLOCK]."""
    tiles = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    bh = pid // tiles
    n = (pid % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    return (bh // H).to(tl.int64), (bh % H).to(tl.int64), n, bh.to(tl.int64) * N + n, n < N


@triton.jit
def merge_kernel(
    out,  # Strided [B, H, N, DV]
    results,  # RowResults of one split
    out_parts,  # Strided float32 [n_splits, B, H, N, DV]
    parts,  # RowResults
    H, N, n_rows, n_splits,  # n_rows = B * H * N
    DV: tl.constexpr, CHUNKS_V: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out = sum_c w_c out_c with w_c = exp(lse_c - lse); entropy = sum_c w_c (H_c - ln w_c)."""
    b, h, n, r, exists = rows_of(H, N, BLOCK)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    for c in range(n_splits):
        rows = tl.cast(c, tl.int64) * n_rows + r
        m = tl.maximum(m, tl.load(parts.lse + rows, exists, float("-inf")))
    l = tl.full([BLOCK], 0.0, tl.float32)
    for c in range(n_splits):
        rows = tl.cast(c, tl.int64) * n_rows + r
        l += tl.exp(part_lse(parts, rows, exists, m))
    empty = l == 0
    log_l = tl.log(tl.where(empty, 1.0, l))
    acc = zero_tile(BLOCK, CHUNKS_V)
    row_entropy = tl.full([BLOCK], 0.0, tl.float32)
    row_max = tl.full([BLOCK], 0.0, tl.float32)
    for c in range(n_splits):
        part = tl.cast(c, tl.int64)
        rows = part * n_rows + r
        log_w = part_lse(parts, rows, exists, m) - log_l
        w = tl.exp(log_w)
        out_rows = part * out_parts.stride[0] + b * out_parts.stride[1]
        out_rows += h * out_parts.stride[2] + n * out_parts.stride[3]
        out_part = load_tile(out_parts.ptr, out_rows, exists, DV, CHUNKS_V, ALIGN)
        acc = add_tiles(acc, scale_rows(out_part, w, CHUNKS_V), CHUNKS_V)
        if results.entropy is not None:
            log_w = tl.where(w > 0, log_w, 0.0)
            row_entropy += w * (tl.load(parts.entropy + rows, exists, 0.0) - log_w)
            part_max = w * tl.load(parts.max_probability + rows, exists, 0.0)
            row_max = tl.maximum(row_max, part_max, propagate_nan=tl.PropagateNan.ALL)
    row_lse = m + log_l
    tl.store(results.lse + r, tl.where(empty, float("-inf"), row_lse), exists)
    if results.lse_low is not None:
        lse_low = tl.where(empty, 0.0, (m - row_lse + log_l) * LOG2E)
        tl.store(results.lse_low + r, lse_low, exists)
    if results.entropy is not None:
        tl.store(results.entropy + r, row_entropy, exists)
        tl.store(results.max_probability + r, row_max, exists)
    out_rows = b * out.stride[0] + h * out.stride[1] + n * out.stride[2]
    store_tile(out.ptr, out_rows, exists, acc, DV, CHUNKS_V, ALIGN)


@triton.jit
def part_lse(parts, rows, exists, m):
    """The lse of a split's rows less m, with its low part where there is one."""
    t = tl.load(parts.lse + rows, exists, float("-inf")) - m
    if parts.lse_low is not None:
        t += tl.load(parts.lse_low + rows, exists, 0.0) * LN2
    return t


@triton.jit
def add_tiles(a, b, CHUNKS: tl.constexpr):
    """The sum of two tiles."""
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def delta_kernel(
    unit_lse, minus_delta,  # float32 [B, H, N]
    lse,  # float32 [B, H, N], natural logarithm
    out, dout,  # Strided [B, H, N, DV]
    dlse, dentropy, entropy,  # float32 [B, H, N], or None
    H, N,
    NATURAL: tl.constexpr,  # the unit of the scores, see `tile_scores`
    DV: tl.constexpr, CHUNKS_V: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """delta = <out, dout> - dlse + dentropy * entropy: what eq. ds subtracts from dp, per row; it
    is negated as <dout, v> is summed onto it.

    unit_lse is lse in the unit of the scores, with +inf in place of -inf, so that a row without
    keys has p = 0.
    """
    b, h, n, r, exists = rows_of(H, N, BLOCK)
    rows = b * out.stride[0] + h * out.stride[1] + n * out.stride[2]
    out_tile = load_tile(out.ptr, rows, exists, DV, CHUNKS_V, ALIGN)
    rows = b * dout.stride[0] + h * dout.stride[1] + n * dout.stride[2]
    dout_tile = load_tile(dout.ptr, rows, exists, DV, CHUNKS_V, ALIGN)
    total = row_dot(out_tile, dout_tile, CHUNKS_V)
    if dlse is not None:
        total -= tl.load(dlse + r, exists, 0.0)
    if dentropy is not None:
        total += tl.load(dentropy + r, exists, 0.0) * tl.load(entropy + r, exists, 0.0)
    row_lse = tl.load(lse + r, exists, 0.0)
    empty = row_lse == float("-inf")
    # NaN that arrives at a row without keys must not reach its dq
    tl.store(minus_delta + r, tl.where(empty, 0.0, -total), exists)
    if not NATURAL:
        row_lse *= LOG2E
    tl.store(unit_lse + r, tl.where(empty, float("inf"), row_lse), exists)


@triton.jit
def bounds_kernel(
    bounds,  # int32 [B, n_tiles, 4]
    intervals,  # Intervals
    Nq, Nk, n_tiles, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Smallest and largest start, smallest and largest stop of each tile of packed rows; a row that
    does not exist starts at Nk and stops at 0, so that no key tile counts as whole beside it."""
    tile, b = tl.program_id(0) % n_tiles, (tl.program_id(0) // n_tiles).to(tl.int64)
    i, _, row_mask = packed_rows(tile, 0, Nq, BLOCK_Q, GROUP)
    first, last = row_bounds(intervals, b, i, row_mask, Nk)
    bounds += (b * n_tiles + tile) * 4
    tl.store(bounds, tl.min(first))
    tl.store(bounds + 1, tl.max(first))
    tl.store(bounds + 2, tl.min(last))
    tl.store(bounds + 3, tl.max(last))


@triton.jit
def turn_bits_kernel(
    turned,  # int32 [B, Hkv, Nk, n_row_words]: bit r % 32 of word r // 32 is that of packed row r
    bits,  # Strided [B, Hq, Nq, n_words], see `Launch.bits`
    Hkv, Nq, Nk, n_row_words, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each program writes one word of BLOCK_K keys."""
    pid, n_tiles = tl.program_id(0), tl.cdiv(Nk, BLOCK_K)
    k0, pid = pid % n_tiles * BLOCK_K, pid // n_tiles
    word, pid = pid % n_row_words, pid // n_row_words
    hkv, b = pid % Hkv, (pid // Hkv).to(tl.int64)
    # [32]
    i, h, row_mask = packed_rows(word, hkv, Nq, 32, GROUP)
    # [32, BLOCK_K]
    rows = row_offsets(bits.stride, b, h, i)
    chosen = tile_bits(bits.ptr, rows, row_mask, k0, Nk, BLOCK_K).to(tl.int32)
    # [BLOCK_K]
    j = k0 + tl.arange(0, BLOCK_K)
    words = turned + ((b * Hkv + hkv) * Nk + j.to(tl.int64)) * n_row_words + word
    tl.store(words, tl.sum(chosen << tl.arange(0, 32)[:, None], 0), j < Nk)


# Rows per program: 256 columns of float32 keep four warps busy; few queries make few programs of
# the merge, which walks its parts one after the other.
ROWS, MERGE_ROWS, TURNED_KEYS = 16, 8, 128
MAX_REGISTERS = register_bound(num_warps=4)


def merge_splits(results: AttentionResults, parts: AttentionResults) -> None:
    """Fills the results from parts [n_splits, ...] of each."""
    B, H, N, DV = results.out.shape
    with device_guard(results.out.device):
        merge_kernel[(B * H * triton.cdiv(N, MERGE_ROWS),)](
            strided(results.out), RowResults(*results[1:]), strided(parts.out),
            RowResults(*parts[1:]), H, N, results.lse.numel(), parts.out.shape[0],
            DV=DV, CHUNKS_V=column_chunks(DV, results.out.element_size()), BLOCK=MERGE_ROWS,
            ALIGN=row_alignment(results.out, parts.out), **compiler_options(MAX_REGISTERS),
        )  # fmt: skip


def row_terms(launch: Launch, upstream: AttentionResults, results: AttentionResults) -> RowTerms:
    """lse in the unit of the scores, its low part, -delta and dentropy, see `delta_kernel`; the
    upstream has a gradient of out."""
    out, dout = results.out, upstream.out
    B, H, N, DV = out.shape
    unit_lse, minus_delta = (torch.empty_like(results.lse) for _ in range(2))
    dlse, dentropy = (
        None if t is None else t.contiguous() for t in (upstream.lse, upstream.entropy)
    )
    with device_guard(out.device):
        delta_kernel[(B * H * triton.cdiv(N, ROWS),)](
            unit_lse, minus_delta, results.lse, strided(out), strided(dout), dlse, dentropy,
            None if dentropy is None else results.entropy, H, N,
            NATURAL=launch.call.bias is not None, DV=DV,
            CHUNKS_V=column_chunks(DV, out.element_size()), BLOCK=ROWS,
            ALIGN=row_alignment(out, dout), **compiler_options(MAX_REGISTERS),
        )  # fmt: skip
    return RowTerms(unit_lse, results.lse_low, minus_delta, dentropy)


def lse_in_score_units(launch: Launch, lse: Tensor) -> Tensor:
    """lse as `delta_kernel` writes it."""
    lse = lse.contiguous() * (1.0 if launch.call.bias is not None else LOG2E.value)
    return lse.masked_fill_(lse == float("-inf"), float("inf"))


def tile_bounds(launch: Launch, config: Config) -> Tensor:
    """int32 [B, n_tiles, 4], see `bounds_kernel`."""
    call, n_tiles = launch.call, launch.row_tiles(config)
    bounds = call.start.new_empty((call.B, n_tiles, 4))
    with device_guard(bounds.device):
        bounds_kernel[(call.B * n_tiles,)](
            bounds, Intervals(strided(call.start), strided(call.stop)), call.Nq, call.Nk, n_tiles,
            GROUP=call.group, BLOCK_Q=config.block_q, **compiler_options(MAX_REGISTERS),
        )  # fmt: skip
    return bounds


def bits_by_key(launch: Launch) -> Tensor:
    """int32 [B, Hkv, Nk, words]: the bits of a call by key, see `turn_bits_kernel`."""
    call = launch.call
    n_words = triton.cdiv(call.Nq * call.group, 32)
    turned = call.mask.new_empty((call.B, call.Hkv, call.Nk, n_words))
    tiles = triton.cdiv(call.Nk, TURNED_KEYS)
    with device_guard(turned.device):
        turn_bits_kernel[(tiles * n_words * call.Hkv * call.B,)](
            turned, strided(call.mask), call.Hkv, call.Nq, call.Nk, n_words,
            GROUP=call.group, BLOCK_K=TURNED_KEYS, **compiler_options(MAX_REGISTERS),
        )  # fmt: skip
    return turned
