"""The gated residual, alone and with the next norm: forward and backward kernels, launchers.

    y = x + tanh(gate) * h                     normed = norm(y) * weight + bias

A tile is some rows of the result by some of its columns; with a norm it has whole rows. The
backward computes the statistics of a row again from y, and sums what belongs to a column over the
rows of one group of tiles; a last kernel adds up the groups, in the same order in every run.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.call import GatedResidualCall
from ..core.kernel_op import Gradients
from ..core.layout import (
    GatedResults,
    empty_gated,
    gated_gradients,
    merged_rows,
    row_alignment,
    unit_stride,
)
from .configs import register_bound
from .launch import compiler_options, device_guard
from .structs import Strided
from .tiles import tanh

# Fixed, not by the device's size: the order of a sum, hence its bits, are the same on each device.
GROUPS = 128
TILE = 2048  # elements, where a row has not more
WIDEST_PART = 512  # columns of a tile that needs no whole rows
PER_WARP = 512
SUMMED = 128  # columns of the groups' sums in one program
PARTS = 1024  # parts of one gate's gradient that are added at a time


class RowSizes(NamedTuple):
    """The leading sizes that all tensors of a call share, without the first one; how many rows they
    make; and dim."""

    lengths: Any
    rows: Any
    dim: Any


class NormArguments(NamedTuple):
    """weight and bias [dim], each None where there is none, and the number eps."""

    weight: Any
    bias: Any
    eps: Any


class GatedSums(NamedTuple):
    """The gradients of gate, weight and bias, or their parts of each group; None where unwanted.

    As parts float32 [n_groups, dim], of one gate [n_groups, column tiles].
    """

    gate: Any
    weight: Any
    bias: Any


class GatedTiling(NamedTuple):
    """Constants of a kernel: "layer", "rms" or None; whether the gate is [dim]; rows and columns of
    a tile; whether tiles divide dim; elements by which every row's offset can be divided."""

    NORM: Any
    VECTOR: Any
    ROWS: Any
    COLUMNS: Any
    EXACT: Any
    ALIGN: Any


@triton.jit
def row_starts(r, sizes, stride):
    """Element offsets (int64) of rows r of a tensor whose leading dimensions have these sizes and
    strides; the first size is not needed."""
    starts = tl.full(r.shape, 0, tl.int64)
    for d in tl.static_range(len(sizes)):
        n = sizes[len(sizes) - 1 - d]
        starts += (r % n).to(tl.int64) * stride[len(sizes) - d]
        r = r // n
    return starts + r.to(tl.int64) * stride[0]


@triton.jit
def column_masks(columns, dim, EXACT: tl.constexpr):
    """Which columns exist; all of them, known when compiling, where tiles divide dim."""
    if EXACT:
        return tl.full(columns.shape, True, tl.int1)
    else:
        return columns < dim


@triton.jit
def load_elements(base, starts, columns, keep, ALIGN: tl.constexpr):
    """[ROWS, COLUMNS] in float32, zero where not kept."""
    elements = tl.multiple_of(starts[:, None] + columns[None, :], [1, ALIGN])
    return tl.load(base + elements, keep, 0.0).to(tl.float32)


@triton.jit
def store_elements(base, starts, columns, keep, t, ALIGN: tl.constexpr):
    """Stores t [ROWS, COLUMNS] where kept, rounded to the dtype of `base`."""
    elements = tl.multiple_of(starts[:, None] + columns[None, :], [1, ALIGN])
    tl.store(base + elements, t.to(base.dtype.element_ty), keep)


@triton.jit
def load_gate(gate, columns, column_mask, VECTOR: tl.constexpr):
    """tanh of the gate: [1, COLUMNS], or a number."""
    if VECTOR:
        return tanh(tl.load(gate + columns, column_mask, 0.0).to(tl.float32))[None, :]
    else:
        return tanh(tl.load(gate).to(tl.float32))


@triton.jit
def load_column(base, columns, column_mask, other):
    """[1, COLUMNS] in float32; `other` where there is no tensor."""
    if base is not None:
        return tl.load(base + columns, column_mask, other).to(tl.float32)[None, :]
    else:
        return other


@triton.jit
def normalise(y, exists, column_mask, dim, eps, NORM: tl.constexpr):
    """(n, 1 / sqrt(...)) of whole rows by eq. norm, y being 0 beyond dim; both 0 in rows that do
    not exist, whose 0 / 0 would reach the sums."""
    if NORM == "layer":
        mean = tl.sum(y, 1, keep_dims=True) / dim
        y = tl.where(column_mask[None, :], y - mean, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(y * y, 1, keep_dims=True) / dim + eps)
    factor = tl.where(exists[:, None], factor, 0.0)
    return y * factor, factor


@triton.jit
def gated_forward_kernel(
    y, normed, x, h,  # Strided [..., dim]
    row_mask,  # Strided bytes [...]
    gate,  # [1] or [dim]
    norm,  # NormArguments
    n,  # RowSizes
    T: tl.constexpr,  # GatedTiling
):  # fmt: skip
    NORM: tl.constexpr = T.NORM
    pid, column_tiles = tl.program_id(0), tl.cdiv(n.dim, T.COLUMNS)
    # [ROWS], [COLUMNS]
    r = pid // column_tiles * T.ROWS + tl.arange(0, T.ROWS)
    columns = pid % column_tiles * T.COLUMNS + tl.arange(0, T.COLUMNS)
    exists = r < n.rows
    column_mask = column_masks(columns, n.dim, T.EXACT)
    keep = exists[:, None] & column_mask[None, :]
    gated = keep
    if row_mask.ptr is not None:
        starts = row_starts(r, n.lengths, row_mask.stride)
        gated = gated & (tl.load(row_mask.ptr + starts, exists, 0) != 0)[:, None]
    # [ROWS, COLUMNS]
    starts = row_starts(r, n.lengths, x.stride)
    x_tile = load_elements(x.ptr, starts, columns, keep, T.ALIGN)
    starts = row_starts(r, n.lengths, h.stride)
    h_tile = load_elements(h.ptr, starts, columns, gated, T.ALIGN)
    t = load_gate(gate, columns, column_mask, T.VECTOR)
    y_tile = x_tile + t * h_tile
    if row_mask.ptr is not None:  # a gate of NaN reaches no other row
        y_tile = tl.where(gated, y_tile, x_tile)
    y_tile = y_tile.to(y.ptr.dtype.element_ty)
    starts = row_starts(r, n.lengths, y.stride)
    store_elements(y.ptr, starts, columns, keep, y_tile, T.ALIGN)
    if NORM is not None:
        y_tile = y_tile.to(tl.float32)
        n_tile, _ = normalise(y_tile, exists, column_mask, n.dim, norm.eps, NORM)
        n_tile = n_tile * load_column(norm.weight, columns, column_mask, 1.0)
        n_tile += load_column(norm.bias, columns, column_mask, 0.0)
        starts = row_starts(r, n.lengths, normed.stride)
        store_elements(normed.ptr, starts, columns, keep, n_tile, T.ALIGN)


@triton.jit
def gated_backward_kernel(
    parts,  # GatedSums, of each group
    dx, dh, dy, dnormed,  # Strided [..., dim], each may be of None
    h, y,  # Strided [..., dim], each may be of None
    row_mask,  # Strided bytes [...]
    gate,  # [1] or [dim]
    norm,  # NormArguments
    n,  # RowSizes
    n_groups,
    T: tl.constexpr,  # GatedTiling
):  # fmt: skip
    NORM: tl.constexpr = T.NORM
    ROWS: tl.constexpr = T.ROWS
    COLUMNS: tl.constexpr = T.COLUMNS
    VECTOR: tl.constexpr = T.VECTOR
    pid, column_tiles = tl.program_id(0), tl.cdiv(n.dim, COLUMNS)
    group, column_tile = pid // column_tiles, pid % column_tiles
    # [COLUMNS]
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column_masks(columns, n.dim, T.EXACT)
    # [ROWS, COLUMNS]
    gate_sum = tl.full([ROWS, COLUMNS if VECTOR else 1], 0.0, tl.float32)
    weight_sum = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    bias_sum = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for tile in range(group, tl.cdiv(n.rows, ROWS), n_groups):
        # [ROWS]
        r = tile * ROWS + tl.arange(0, ROWS)
        exists = r < n.rows
        keep = exists[:, None] & column_mask[None, :]
        gated = keep
        if row_mask.ptr is not None:
            starts = row_starts(r, n.lengths, row_mask.stride)
            gated = gated & (tl.load(row_mask.ptr + starts, exists, 0) != 0)[:, None]
        # [ROWS, COLUMNS]
        dy_tile = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
        if NORM is not None:
            starts = row_starts(r, n.lengths, dnormed.stride)
            dn = load_elements(dnormed.ptr, starts, columns, keep, T.ALIGN)
            starts = row_starts(r, n.lengths, y.stride)
            y_tile = load_elements(y.ptr, starts, columns, keep, T.ALIGN)
            n_tile, factor = normalise(y_tile, exists, column_mask, n.dim, norm.eps, NORM)
            if parts.weight is not None:
                weight_sum += dn * n_tile
            if parts.bias is not None:
                bias_sum += dn
            dn = dn * load_column(norm.weight, columns, column_mask, 1.0)
            away = n_tile * (tl.sum(dn * n_tile, 1, keep_dims=True) / n.dim)
            if NORM == "layer":
                away += tl.sum(dn, 1, keep_dims=True) / n.dim
            dy_tile = factor * (dn - away)
        if dy.ptr is not None:  # not before: of a wide row there are registers for one of the two
            starts = row_starts(r, n.lengths, dy.stride)
            dy_tile += load_elements(dy.ptr, starts, columns, keep, T.ALIGN)
        if dx.ptr is not None:
            starts = row_starts(r, n.lengths, dx.stride)
            store_elements(dx.ptr, starts, columns, keep, dy_tile, T.ALIGN)
        if parts.gate is not None:
            starts = row_starts(r, n.lengths, h.stride)
            h_tile = load_elements(h.ptr, starts, columns, gated, T.ALIGN)
            gate_term = dy_tile * h_tile
            if row_mask.ptr is not None:  # dy may be NaN where h does not count
                gate_term = tl.where(gated, gate_term, 0.0)
            gate_sum += gate_term if VECTOR else tl.sum(gate_term, 1, keep_dims=True)
        if dh.ptr is not None:
            dh_tile = load_gate(gate, columns, column_mask, VECTOR) * dy_tile
            if row_mask.ptr is not None:
                dh_tile = tl.where(gated, dh_tile, 0.0)
            starts = row_starts(r, n.lengths, dh.stride)
            store_elements(dh.ptr, starts, columns, keep, dh_tile, T.ALIGN)

    sums = group.to(tl.int64) * n.dim + columns
    if parts.gate is not None:
        if VECTOR:
            tl.store(parts.gate + sums, tl.sum(gate_sum, 0), column_mask)
        else:
            tl.store(parts.gate + pid, tl.sum(tl.sum(gate_sum, 1), 0))
    if parts.weight is not None:
        tl.store(parts.weight + sums, tl.sum(weight_sum, 0), column_mask)
    if parts.bias is not None:
        tl.store(parts.bias + sums, tl.sum(bias_sum, 0), column_mask)


@triton.jit
def gated_sums_kernel(
    sums,  # GatedSums [1] or [dim]
    parts,  # GatedSums, of each group
    gate,  # [1] or [dim]
    dim, n_groups, n_parts,
    VECTOR: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # [COLUMNS]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if sums.weight is not None:
        store_sum(sums.weight, parts.weight, None, columns, dim, n_groups, COLUMNS)
    if sums.bias is not None:
        store_sum(sums.bias, parts.bias, None, columns, dim, n_groups, COLUMNS)
    if sums.gate is not None:
        if VECTOR:
            store_sum(sums.gate, parts.gate, gate, columns, dim, n_groups, COLUMNS)
        elif tl.program_id(0) == 0:
            # [PARTS]
            total = tl.full([PARTS], 0.0, tl.float32)
            for first in range(0, n_parts, PARTS):
                n = first + tl.arange(0, PARTS)
                total += tl.load(parts.gate + n, n < n_parts, 0.0)
            t = tanh(tl.load(gate).to(tl.float32))
            dgate = tl.sum(total, 0) * (1.0 - t * t)
            tl.store(sums.gate, dgate.to(sums.gate.dtype.element_ty))


@triton.jit
def store_sum(out, parts, gate, columns, dim, n_groups, COLUMNS: tl.constexpr):
    """The sum over the groups, one after the other, times the derivative of a gate's tanh."""
    column_mask = columns < dim
    # [COLUMNS]
    total = tl.full([COLUMNS], 0.0, tl.float32)
    for _ in range(n_groups):
        total += tl.load(parts + columns, column_mask, 0.0)
        parts += dim
    if gate is not None:
        t = tanh(tl.load(gate + columns, column_mask, 0.0).to(tl.float32))
        total = total * (1.0 - t * t)
    tl.store(out + columns, total.to(out.dtype.element_ty), column_mask)


@dataclass(frozen=True)
class RowWalk:
    """How a kernel walks tensors [..., dim] of one shape, some of which may be None."""

    tensors: list[Tensor | None]
    row_mask: Tensor | None
    norm: str | None  # with one a tile has all columns of its rows

    existing = property(lambda self: [t for t in self.tensors if t is not None])
    dim = property(lambda self: self.existing[0].shape[-1])
    rows = property(lambda self: self.existing[0].numel() // self.dim)

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns)"""
        columns = triton.next_power_of_2(self.dim)
        columns = min(columns, WIDEST_PART) if self.norm is None else columns
        return min(max(1, TILE // columns), triton.next_power_of_2(self.rows)), columns

    @property
    def column_tiles(self) -> int:
        return triton.cdiv(self.dim, self.tile[1])

    @property
    def row_tiles(self) -> int:
        return triton.cdiv(self.rows, self.tile[0])

    def launch(self, kernel, programs: int, results: tuple, operands: tuple, *sizes: int) -> None:
        """Launches `kernel` on results, tensors with their strides, operands (the gate first) and
        sizes."""
        mask = None if self.row_mask is None else self.row_mask.view(torch.uint8)
        rows = [None if t is None else t[..., 0] for t in self.tensors]
        lengths, strides = merged_rows([*rows, mask])
        walked = map(strided_rows, [*self.tensors, mask], strides)
        ROWS, COLUMNS = self.tile
        elements = PER_WARP if self.dim % 16 == 0 else PER_WARP // 2  # masks take registers
        num_warps = min(32, max(4, ROWS * COLUMNS // elements))
        vector, exact = operands[0].numel() > 1, self.dim % COLUMNS == 0
        align = row_alignment(*self.existing)
        with device_guard(self.existing[0].device):
            kernel[(programs,)](
                *results, *walked, *operands, RowSizes(lengths[1:], self.rows, self.dim), *sizes,
                T=GatedTiling(self.norm, vector, ROWS, COLUMNS, exact, align),
                num_warps=num_warps, **compiler_options(register_bound(num_warps)),
            )  # fmt: skip


def strided_rows(t: Tensor | None, stride: tuple[int, ...]) -> Strided:
    """A tensor by the strides of its merged rows."""
    return Strided(None, None) if t is None else Strided(t, stride)


def forward(call: GatedResidualCall) -> GatedResults:
    """y, and its norm with one, both like x."""
    gate, weight, bias = (unit_stride(t) for t in (call.gate, call.weight, call.bias))
    results = empty_gated(call)
    if results.y.numel():
        walk = RowWalk([*results, call.x, call.h], call.row_mask, call.norm)
        norm = NormArguments(weight, bias, call.eps)
        walk.launch(gated_forward_kernel, walk.row_tiles * walk.column_tiles, (), (gate, norm))
    return results


def write_gradients(
    grads: Gradients, upstream: GatedResults, call: GatedResidualCall, results: GatedResults
) -> None:
    """Fills the gradients of x, h, gate, weight and bias that are in `grads`."""
    norm, y = (None, None) if upstream.normed is None else (call.norm, results.y)
    dy, dnormed, gate, weight = (unit_stride(t) for t in (*upstream, call.gate, call.weight))
    sums = GatedSums(*(grads.get(name) for name in GatedSums._fields))
    h = None if sums.gate is None else call.h
    dnormed = None if norm is None else dnormed
    walk = RowWalk([grads.get("x"), grads.get("h"), dy, dnormed, h, y], call.row_mask, norm)
    vector, n_groups = gate.numel() > 1, min(walk.row_tiles, GROUPS)
    n_parts = n_groups * walk.column_tiles
    width = (walk.dim if vector else walk.column_tiles, walk.dim, walk.dim)
    parts = GatedSums(
        *(
            None if t is None else call.h.new_empty((n_groups, n), dtype=torch.float32)
            for t, n in zip(sums, width, strict=True)
        )
    )
    operands = (gate, NormArguments(weight, None, call.eps))
    walk.launch(gated_backward_kernel, n_parts, (parts,), operands, n_groups)
    if any(t is not None for t in sums):
        by_column = vector or any(t is not None for t in sums[1:])
        with device_guard(call.h.device):
            gated_sums_kernel[(triton.cdiv(walk.dim, SUMMED) if by_column else 1,)](
                sums, parts, gate, walk.dim, n_groups, n_parts, VECTOR=vector,
                PARTS=min(triton.next_power_of_2(n_parts), PARTS), COLUMNS=SUMMED,
                num_warps=4, **compiler_options(None),
            )  # fmt: skip


backward = partial(gated_gradients, write_gradients)
