"""Small kernels over rows: merging splits, delta, and the interval bounds of row tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.layout import row_alignment
from .configs import Config, column_chunks, register_bound
from .launch import Call, compiler_options, device_guard
from .scores import LOWEST, row_offsets, tile_bits
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
    """(b, h, n, n-th row of all, whether there) of this program's rows; all but b, h [BLOCK]."""
    tiles = tl.cdiv(N, BLOCK)
    pid = tl.program_id(0)
    bh = pid // tiles
    n = (pid % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    return (bh // H).to(tl.int64), (bh % H).to(tl.int64), n, bh.to(tl.int64) * N + n, n < N


@triton.jit
def merge_kernel(
    out, stride_out,  # [B, H, N, DV]
    lse, lse_low, entropy, max_probability,  # float32 [B, H, N], or None but for lse
    out_parts, stride_parts, lse_parts, low_parts, entropy_parts, max_parts,
    # parts: float32 [n_splits, B, H, N(, DV)]
    H, N, n_rows, n_splits,  # n_rows = B * H * N
    DV: tl.constexpr, CHUNKS_V: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """out = sum_c w_c out_c with w_c = exp(lse_c - lse); entropy = sum_c w_c (H_c - ln w_c)."""
    b, h, n, r, there = rows_of(H, N, BLOCK)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    for c in range(n_splits):
        at = tl.cast(c, tl.int64) * n_rows + r
        m = tl.maximum(m, tl.load(lse_parts + at, there, float("-inf")))
    l = tl.full([BLOCK], 0.0, tl.float32)
    for c in range(n_splits):
        at = tl.cast(c, tl.int64) * n_rows + r
        l += tl.exp(part_lse(lse_parts, low_parts, at, there, m))
    empty = l == 0
    log_l = tl.log(tl.where(empty, 1.0, l))
    acc = zero_tile(BLOCK, CHUNKS_V)
    row_entropy = tl.full([BLOCK], 0.0, tl.float32)
    row_max = tl.full([BLOCK], 0.0, tl.float32)
    for c in range(n_splits):
        part = tl.cast(c, tl.int64)
        at = part * n_rows + r
        log_w = part_lse(lse_parts, low_parts, at, there, m) - log_l
        w = tl.exp(log_w)
        rows = part * stride_parts[0] + b * stride_parts[1]
        rows += h * stride_parts[2] + n * stride_parts[3]
        out_part = load_tile(out_parts, rows, there, DV, CHUNKS_V, ALIGN)
        acc = add_tiles(acc, scale_rows(out_part, w, CHUNKS_V), CHUNKS_V)
        if entropy is not None:
            log_w = tl.where(w > 0, log_w, 0.0)
            row_entropy += w * (tl.load(entropy_parts + at, there, 0.0) - log_w)
            part_max = w * tl.load(max_parts + at, there, 0.0)
            row_max = tl.maximum(row_max, part_max, propagate_nan=tl.PropagateNan.ALL)
    row_lse = m + log_l
    tl.store(lse + r, tl.where(empty, float("-inf"), row_lse), there)
    if lse_low is not None:
        tl.store(lse_low + r, tl.where(empty, 0.0, (m - row_lse + log_l) * LOG2E), there)
    if entropy is not None:
        tl.store(entropy + r, row_entropy, there)
        tl.store(max_probability + r, row_max, there)
    rows = b * stride_out[0] + h * stride_out[1] + n * stride_out[2]
    store_tile(out, rows, there, acc, DV, CHUNKS_V, ALIGN)


@triton.jit
def part_lse(lse_parts, low_parts, at, there, m):
    """lse of a part less m, with its low part where there is one."""
    t = tl.load(lse_parts + at, there, float("-inf")) - m
    if low_parts is not None:
        t += tl.load(low_parts + at, there, 0.0) * LN2
    return t


@triton.jit
def add_tiles(a, b, CHUNKS: tl.constexpr):
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def delta_kernel(
    unit_lse, minus_delta,  # float32 [B, H, N]
    lse,  # float32 [B, H, N], natural logarithm
    out, stride_out, dout, stride_dout,  # [B, H, N, DV]
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
    b, h, n, r, there = rows_of(H, N, BLOCK)
    rows = b * stride_out[0] + h * stride_out[1] + n * stride_out[2]
    out_tile = load_tile(out, rows, there, DV, CHUNKS_V, ALIGN)
    rows = b * stride_dout[0] + h * stride_dout[1] + n * stride_dout[2]
    dout_tile = load_tile(dout, rows, there, DV, CHUNKS_V, ALIGN)
    total = row_dot(out_tile, dout_tile, CHUNKS_V)
    if dlse is not None:
        total -= tl.load(dlse + r, there, 0.0)
    if dentropy is not None:
        total += tl.load(dentropy + r, there, 0.0) * tl.load(entropy + r, there, 0.0)
    row_lse = tl.load(lse + r, there, 0.0)
    empty = row_lse == float("-inf")
    # NaN that arrives at a row without keys must not reach its dq
    tl.store(minus_delta + r, tl.where(empty, 0.0, -total), there)
    if not NATURAL:
        row_lse *= LOG2E
    tl.store(unit_lse + r, tl.where(empty, float("inf"), row_lse), there)


@triton.jit
def bounds_kernel(
    bounds,  # int32 [B, n_tiles, 4]
    start, stride_start, stop, stride_stop, Nq, Nk, n_tiles,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Smallest and largest start, smallest and largest stop of each tile of packed rows; a row that
    is not there starts at Nk and stops at 0, so that no key tile counts as whole beside it."""
    tile, b = tl.program_id(0) % n_tiles, (tl.program_id(0) // n_tiles).to(tl.int64)
    i, _, row_mask = packed_rows(tile, 0, Nq, BLOCK_Q, GROUP)
    first, last = row_bounds(start, stop, stride_start, stride_stop, b, i, row_mask, Nk)
    bounds += (b * n_tiles + tile) * 4
    tl.store(bounds, tl.min(first))
    tl.store(bounds + 1, tl.max(first))
    tl.store(bounds + 2, tl.min(last))
    tl.store(bounds + 3, tl.max(last))


@triton.jit
def turn_bits_kernel(
    turned,  # int32 [B, Hkv, Nk, n_row_words]: bit r % 32 of word r // 32 is that of packed row r
    bits, stride_bits,  # [B, Hq, Nq, n_words], see `Call.bits`
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
    rows = row_offsets(stride_bits, b, h, i)
    chosen = tile_bits(bits, rows, row_mask, k0, Nk, BLOCK_K).to(tl.int32)
    # [BLOCK_K]
    j = k0 + tl.arange(0, BLOCK_K)
    at = turned + ((b * Hkv + hkv) * Nk + j.to(tl.int64)) * n_row_words + word
    tl.store(at, tl.sum(chosen << tl.arange(0, 32)[:, None], 0), j < Nk)


# Rows per program: 256 columns of float32 keep four warps busy; few queries make few programs of
# the merge, which walks its parts one after the other.
ROWS, MERGE_ROWS, TURNED_KEYS = 16, 8, 128
MAX_REGISTERS = register_bound(num_warps=4)


def merge_splits(results: tuple, parts: list[Tensor]) -> None:
    """Fills (out, lse, lse_low, entropy, max_probability) from parts [n_splits, ...] of each."""
    out, lse, *rows = results
    B, H, N, DV = out.shape
    with device_guard(out.device):
        merge_kernel[(B * H * triton.cdiv(N, MERGE_ROWS),)](
            out, out.stride(), lse, *rows, parts[0], parts[0].stride(), *parts[1:],
            H, N, lse.numel(), parts[0].shape[0],
            DV=DV, CHUNKS_V=column_chunks(DV, out.element_size()), BLOCK=MERGE_ROWS,
            ALIGN=row_alignment(out, parts[0]), **compiler_options(MAX_REGISTERS),
        )  # fmt: skip


def row_terms(
    call: Call, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None,
    dentropy: Tensor | None, entropy: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(lse in the unit of the scores, -delta) float32 [B, H, N], see `delta_kernel`."""
    B, H, N, DV = out.shape
    unit_lse, minus_delta = (torch.empty_like(lse) for _ in range(2))
    with device_guard(out.device):
        delta_kernel[(B * H * triton.cdiv(N, ROWS),)](
            unit_lse, minus_delta, lse, out, out.stride(), dout, dout.stride(),
            None if dlse is None else dlse.contiguous(), dentropy,
            None if dentropy is None else entropy, H, N, NATURAL=call.bias is not None,
            DV=DV, CHUNKS_V=column_chunks(DV, out.element_size()), BLOCK=ROWS,
            ALIGN=row_alignment(out, dout), **compiler_options(MAX_REGISTERS),
        )  # fmt: skip
    return unit_lse, minus_delta


def lse_in_score_units(call: Call, lse: Tensor) -> Tensor:
    """lse as `delta_kernel` writes it."""
    lse = lse.contiguous() * (1.0 if call.bias is not None else LOG2E.value)
    return lse.masked_fill_(lse == float("-inf"), float("inf"))


def tile_bounds(call: Call, config: Config) -> Tensor:
    """int32 [B, n_tiles, 4], see `bounds_kernel`."""
    n_tiles = call.row_tiles(config)
    bounds = call.start.new_empty((call.B, n_tiles, 4))
    with device_guard(bounds.device):
        bounds_kernel[(call.B * n_tiles,)](
            bounds, call.start, call.start.stride(), call.stop, call.stop.stride(),
            call.Nq, call.Nk, n_tiles, GROUP=call.group, BLOCK_Q=config.block_q,
            **compiler_options(MAX_REGISTERS),
        )  # fmt: skip
    return bounds


def bits_by_key(call: Call) -> Tensor:
    """int32 [B, Hkv, Nk, words]: the bits of `call` by key, see `turn_bits_kernel`."""
    n_words = triton.cdiv(call.Nq * call.group, 32)
    turned = call.mask.new_empty((call.B, call.Hkv, call.Nk, n_words))
    tiles = triton.cdiv(call.Nk, TURNED_KEYS)
    with device_guard(turned.device):
        turn_bits_kernel[(tiles * n_words * call.Hkv * call.B,)](
            turned, call.mask, call.mask.stride(), call.Hkv, call.Nq, call.Nk, n_words,
            GROUP=call.group, BLOCK_K=TURNED_KEYS, **compiler_options(MAX_REGISTERS),
        )  # fmt: skip
    return turned
