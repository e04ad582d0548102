"""The gated residual, alone and with the next norm: forward and backward kernels, launchers.

    y = x + tanh(gate) * h                     normed = norm(y) * weight + bias

A tile is some rows of the result by some of its columns; with a norm it has whole rows. The
backward computes the statistics of a row again from y, and sums what belongs to a column over the
rows of one group of tiles; a last kernel adds up the groups, in the same order in every run.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.layout import (
    empty_like,
    merged_rows,
    new_gradients,
    row_alignment,
    unit_stride,
)
from .configs import register_bound
from .launch import compiler_options, device_guard
from .tiles import tanh

# Fixed, not by the device's size: the order of a sum, hence its bits, are the same on each device.
GROUPS = 128
TILE = 2048  # elements, where a row has not more
WIDEST_PART = 512  # columns of a tile that needs no whole rows
PER_WARP = 512
SUMMED = 128  # columns of the groups' sums in one program
PARTS = 1024  # parts of one gate's gradient that are added at a time


@triton.jit
def row_starts(r, sizes, stride):
    """Element offsets (int64) of rows r of a tensor whose leading dimensions have these sizes and
    strides; the first size is not needed."""
    at = tl.full(r.shape, 0, tl.int64)
    for d in tl.static_range(len(sizes)):
        n = sizes[len(sizes) - 1 - d]
        at += (r % n).to(tl.int64) * stride[len(sizes) - d]
        r = r // n
    return at + r.to(tl.int64) * stride[0]


@triton.jit
def columns_there(columns, dim, EXACT: tl.constexpr):
    """Which columns there are; all of them, known when compiling, where tiles divide dim."""
    if EXACT:
        return tl.full(columns.shape, True, tl.int1)
    else:
        return columns < dim


@triton.jit
def load_elements(base, starts, columns, keep, ALIGN: tl.constexpr):
    """[ROWS, COLUMNS] in float32, zero where not kept."""
    at = tl.multiple_of(starts[:, None] + columns[None, :], [1, ALIGN])
    return tl.load(base + at, keep, 0.0).to(tl.float32)


@triton.jit
def store_elements(base, starts, columns, keep, t, ALIGN: tl.constexpr):
    at = tl.multiple_of(starts[:, None] + columns[None, :], [1, ALIGN])
    tl.store(base + at, t.to(base.dtype.element_ty), keep)


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
def normalise(y, there, column_mask, dim, eps, NORM: tl.constexpr):
    """(n, 1 / sqrt(...)) of whole rows by eq. norm, y being 0 beyond dim; both 0 in rows that are
    not there, whose 0 / 0 would reach the sums."""
    if NORM == "layer":
        mean = tl.sum(y, 1, keep_dims=True) / dim
        y = tl.where(column_mask[None, :], y - mean, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(y * y, 1, keep_dims=True) / dim + eps)
    factor = tl.where(there[:, None], factor, 0.0)
    return y * factor, factor


@triton.jit
def gated_forward_kernel(
    y, stride_y, normed, stride_normed, x, stride_x, h, stride_h,  # [..., dim]
    row_mask, stride_mask,  # [...], or None
    gate, weight, bias, eps,  # [1] or [dim]; [dim] or None
    sizes, rows, dim,  # leading sizes without the first one; their product
    NORM: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    pid, column_tiles = tl.program_id(0), tl.cdiv(dim, COLUMNS)
    # [ROWS], [COLUMNS]
    r = pid // column_tiles * ROWS + tl.arange(0, ROWS)
    columns = pid % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    there = r < rows
    column_mask = columns_there(columns, dim, EXACT)
    keep = there[:, None] & column_mask[None, :]
    gated = keep
    if row_mask is not None:
        gated = (
            gated & (tl.load(row_mask + row_starts(r, sizes, stride_mask), there, 0) != 0)[:, None]
        )
    # [ROWS, COLUMNS]
    x_tile = load_elements(x, row_starts(r, sizes, stride_x), columns, keep, ALIGN)
    h_tile = load_elements(h, row_starts(r, sizes, stride_h), columns, gated, ALIGN)
    t = load_gate(gate, columns, column_mask, VECTOR)
    y_tile = x_tile + t * h_tile
    if row_mask is not None:  # a gate of NaN reaches no other row
        y_tile = tl.where(gated, y_tile, x_tile)
    y_tile = y_tile.to(y.dtype.element_ty)
    store_elements(y, row_starts(r, sizes, stride_y), columns, keep, y_tile, ALIGN)
    if NORM != "":
        n, _ = normalise(y_tile.to(tl.float32), there, column_mask, dim, eps, NORM)
        n = n * load_column(weight, columns, column_mask, 1.0)
        n += load_column(bias, columns, column_mask, 0.0)
        store_elements(normed, row_starts(r, sizes, stride_normed), columns, keep, n, ALIGN)


@triton.jit
def gated_backward_kernel(
    dgate, dweight, dbias,  # float32 [n_groups, dim], of one gate [n_groups, column tiles]; or None
    dx, stride_dx, dh, stride_dh, dy, stride_dy, dnormed, stride_dnormed,  # [..., dim] or None
    h, stride_h, y, stride_y, row_mask, stride_mask,
    gate, weight, eps,
    sizes, rows, dim, n_groups,
    NORM: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EXACT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    pid, column_tiles = tl.program_id(0), tl.cdiv(dim, COLUMNS)
    group, column_tile = pid // column_tiles, pid % column_tiles
    # [COLUMNS]
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = columns_there(columns, dim, EXACT)
    # [ROWS, COLUMNS]
    gate_sum = tl.full([ROWS, COLUMNS if VECTOR else 1], 0.0, tl.float32)
    weight_sum = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    bias_sum = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for tile in range(group, tl.cdiv(rows, ROWS), n_groups):
        # [ROWS]
        r = tile * ROWS + tl.arange(0, ROWS)
        there = r < rows
        keep = there[:, None] & column_mask[None, :]
        gated = keep
        if row_mask is not None:
            at = row_starts(r, sizes, stride_mask)
            gated = gated & (tl.load(row_mask + at, there, 0) != 0)[:, None]
        # [ROWS, COLUMNS]
        dy_tile = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
        if NORM != "":
            at = row_starts(r, sizes, stride_dnormed)
            dn = load_elements(dnormed, at, columns, keep, ALIGN)
            y_tile = load_elements(y, row_starts(r, sizes, stride_y), columns, keep, ALIGN)
            n, factor = normalise(y_tile, there, column_mask, dim, eps, NORM)
            if dweight is not None:
                weight_sum += dn * n
            if dbias is not None:
                bias_sum += dn
            dn = dn * load_column(weight, columns, column_mask, 1.0)
            away = n * (tl.sum(dn * n, 1, keep_dims=True) / dim)
            if NORM == "layer":
                away += tl.sum(dn, 1, keep_dims=True) / dim
            dy_tile = factor * (dn - away)
        if dy is not None:  # not before: of a wide row there are registers for one of the two
            dy_tile += load_elements(dy, row_starts(r, sizes, stride_dy), columns, keep, ALIGN)
        if dx is not None:
            at = row_starts(r, sizes, stride_dx)
            store_elements(dx, at, columns, keep, dy_tile, ALIGN)
        if dgate is not None:
            h_tile = load_elements(h, row_starts(r, sizes, stride_h), columns, gated, ALIGN)
            gate_term = dy_tile * h_tile
            if row_mask is not None:  # dy may be NaN where h does not count
                gate_term = tl.where(gated, gate_term, 0.0)
            gate_sum += gate_term if VECTOR else tl.sum(gate_term, 1, keep_dims=True)
        if dh is not None:
            dh_tile = load_gate(gate, columns, column_mask, VECTOR) * dy_tile
            if row_mask is not None:
                dh_tile = tl.where(gated, dh_tile, 0.0)
            store_elements(dh, row_starts(r, sizes, stride_dh), columns, keep, dh_tile, ALIGN)

    at = group.to(tl.int64) * dim + columns
    if dgate is not None:
        if VECTOR:
            tl.store(dgate + at, tl.sum(gate_sum, 0), column_mask)
        else:
            tl.store(dgate + pid, tl.sum(tl.sum(gate_sum, 1), 0))
    if dweight is not None:
        tl.store(dweight + at, tl.sum(weight_sum, 0), column_mask)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(bias_sum, 0), column_mask)


@triton.jit
def gated_sums_kernel(
    dgate, dweight, dbias,  # [1] or [dim], or None
    gate_parts, weight_parts, bias_parts, gate,  # float32 [n_groups, dim]; of one gate [n_parts]
    dim, n_groups, n_parts,
    VECTOR: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # [COLUMNS]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = columns < dim
    if dweight is not None:
        store_sum(dweight, weight_parts, None, columns, column_mask, dim, n_groups, COLUMNS)
    if dbias is not None:
        store_sum(dbias, bias_parts, None, columns, column_mask, dim, n_groups, COLUMNS)
    if dgate is not None:
        if VECTOR:
            store_sum(dgate, gate_parts, gate, columns, column_mask, dim, n_groups, COLUMNS)
        elif tl.program_id(0) == 0:
            # [PARTS]
            sums = tl.full([PARTS], 0.0, tl.float32)
            for first in range(0, n_parts, PARTS):
                parts = first + tl.arange(0, PARTS)
                sums += tl.load(gate_parts + parts, parts < n_parts, 0.0)
            t = tanh(tl.load(gate).to(tl.float32))
            tl.store(dgate, (tl.sum(sums, 0) * (1.0 - t * t)).to(dgate.dtype.element_ty))


@triton.jit
def store_sum(
    out, parts, gate, columns, column_mask, dim, n_groups, COLUMNS: tl.constexpr
):  # fmt: skip
    """The sum over the groups, one after the other, times the derivative of a gate's tanh."""
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
class Walk:
    """How a kernel walks tensors [..., dim] of one shape, some of which may be None."""

    tensors: list[Tensor | None]
    row_mask: Tensor | None
    whole: bool  # a tile has all columns of its rows

    dim = property(lambda self: self.there[0].shape[-1])
    rows = property(lambda self: self.there[0].numel() // self.dim)
    there = property(lambda self: [t for t in self.tensors if t is not None])

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns)"""
        columns = triton.next_power_of_2(self.dim)
        columns = columns if self.whole else min(columns, WIDEST_PART)
        return min(max(1, TILE // columns), triton.next_power_of_2(self.rows)), columns

    @property
    def column_tiles(self) -> int:
        return triton.cdiv(self.dim, self.tile[1])

    @property
    def row_tiles(self) -> int:
        return triton.cdiv(self.rows, self.tile[0])

    def launch(
        self, kernel, programs: int, results: tuple, operands: tuple, sizes: tuple, **constants
    ):
        """Launches `kernel` on results, tensors with their strides, operands and sizes."""
        mask = None if self.row_mask is None else self.row_mask.view(torch.uint8)
        rows = [None if t is None else t[..., 0] for t in self.tensors]
        lengths, strides = merged_rows([*rows, mask])
        walked = [item for pair in zip(self.tensors, strides, strict=False) for item in pair]
        ROWS, COLUMNS = self.tile
        elements = PER_WARP if self.dim % 16 == 0 else PER_WARP // 2  # masks take registers
        num_warps = min(32, max(4, ROWS * COLUMNS // elements))
        with device_guard(self.there[0].device):
            kernel[(programs,)](
                *results, *walked, mask, strides[-1], *operands, lengths[1:], self.rows, self.dim,
                *sizes, ROWS=ROWS, COLUMNS=COLUMNS, EXACT=self.dim % COLUMNS == 0,
                ALIGN=row_alignment(*self.there),
                num_warps=num_warps, **constants, **compiler_options(register_bound(num_warps)),
            )  # fmt: skip


def forward(x, h, gate, weight, bias, row_mask, norm, eps) -> tuple[Tensor, Tensor]:
    """(y, normed), both like x; normed has no elements when `norm` is empty.

    x, h [..., dim] with a contiguous last dimension; gate [1] or [dim]; weight, bias [dim] or None;
    row_mask bool, the shape of the rows, or None; norm "layer", "rms" or "".
    """
    gate, weight, bias = (unit_stride(t) for t in (gate, weight, bias))
    y = empty_like(x)
    normed = empty_like(x) if norm else None
    if y.numel():
        walk = Walk([y, normed, x, h], row_mask, bool(norm))
        walk.launch(
            gated_forward_kernel, walk.row_tiles * walk.column_tiles, (),
            (gate, weight, bias, eps), (), NORM=norm, VECTOR=gate.numel() > 1,
        )  # fmt: skip
    return y, x.new_empty(0) if normed is None else normed


def backward(
    dy, dnormed, h, gate, weight, bias, row_mask, y, norm, eps, needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dh, dgate, dweight, dbias); those not in `needs`, and dx without a norm, where it is dy,
    have no elements. dy or dnormed may be None; the rest as `forward` took and gave it."""
    dy, dnormed, gate, weight = (unit_stride(t) for t in (dy, dnormed, gate, weight))
    like = (y if norm else None, h, gate, weight if norm else None, bias if norm else None)
    grads = new_gradients(like, needs, h.numel() == 0)
    if h.numel() and any(g is not None for g in grads):
        write_gradients(
            grads, dy, dnormed, h, y if norm else None, gate, weight, row_mask, norm, eps
        )
    return tuple(h.new_empty(0) if g is None else g for g in grads)


def write_gradients(grads, dy, dnormed, h, y, gate, weight, row_mask, norm, eps) -> None:
    """Fills those of (dx, dh, dgate, dweight, dbias) that are not None."""
    dx, dh, *sums = grads
    walk = Walk([dx, dh, dy, dnormed, None if sums[0] is None else h, y], row_mask, bool(norm))
    vector, n_groups = gate.numel() > 1, min(walk.row_tiles, GROUPS)
    n_parts = n_groups * walk.column_tiles
    width = (walk.dim if vector else walk.column_tiles, walk.dim, walk.dim)
    parts = [
        None if t is None else h.new_empty((n_groups, n), dtype=torch.float32)
        for t, n in zip(sums, width, strict=True)
    ]
    walk.launch(
        gated_backward_kernel, n_parts, tuple(parts), (gate, weight, eps), (n_groups,),
        NORM=norm, VECTOR=vector,
    )  # fmt: skip
    if any(t is not None for t in sums):
        by_column = vector or any(t is not None for t in sums[1:])
        with device_guard(h.device):
            gated_sums_kernel[(triton.cdiv(walk.dim, SUMMED) if by_column else 1,)](
                *sums, *parts, gate, walk.dim, n_groups, n_parts, VECTOR=vector,
                PARTS=min(triton.next_power_of_2(n_parts), PARTS), COLUMNS=SUMMED,
                num_warps=4, **compiler_options(None),
            )  # fmt: skip
