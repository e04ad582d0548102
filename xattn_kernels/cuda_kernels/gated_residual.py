"""The gated residual, alone and with the next norm: allocates, and launches the CUDA kernels.

The launchers take and give what those of `triton_kernels/gated_residual.py` do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.layout import (
    empty_like,
    merged_rows,
    new_gradients,
    unit_stride,
)
from . import launch
from .launch import DTYPES, extension, numbers


class Rows:
    """The rows of tensors [..., dim] of one shape, some of which may be None, and of a row mask."""

    def __init__(self, tensors: list[Tensor | None], row_mask: Tensor | None):
        mask = None if row_mask is None else row_mask.view(torch.uint8)
        rows = [None if t is None else t[..., 0] for t in tensors]
        self.sizes, strides = merged_rows([*rows, mask])
        self.tensors = [
            self.tensor(t, stride) for t, stride in zip([*tensors, mask], strides, strict=True)
        ]

    def tensor(self, t: Tensor | None, strides: tuple[int, ...]) -> Any:
        return extension().RowTensor(launch.pointer(t), self.last_first(strides, 0))

    def last_first(self, numbers: tuple[int, ...], missing: int) -> list[int]:
        return [*reversed(numbers), *[missing] * (extension().MAX_ROW_DIMS - len(numbers))]


def dimensions(*tensors: Tensor | None) -> int:
    """How many leading dimensions of the tensors cannot be walked as one."""
    return len(merged_rows([None if t is None else t[..., 0] for t in tensors])[0])


def widest_norm(x: Tensor, *others: Tensor) -> int:
    """The widest row that a block can hold."""
    return widest_row(x.dtype, all(aligned(t, x.dtype) for t in (x, *others)))


@torch.compiler.assume_constant_result  # it is a function of the build
def widest_row(x_dtype: torch.dtype, is_aligned: bool) -> int:
    """The widest row that a block can hold, see `csrc/gated_residual.h`."""
    return extension().widest_normed_row(getattr(extension().DType, DTYPES[x_dtype]), is_aligned)


def aligned(t: Tensor, x_dtype: torch.dtype) -> bool:
    """Whether each row begins and ends at a multiple of what 16 bytes of x hold; a trace knows no
    offset, and what it takes for aligned and is not a launch refuses."""
    offset = 0 if torch.compiler.is_compiling() else t.storage_offset()
    starts = (*t.stride()[:-1], offset, t.shape[-1])
    return all(n * x_dtype.itemsize % 16 == 0 for n in starts)


def fresh(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def shape_of(rows: Rows, x: Tensor, h: Tensor, gate: Tensor, norm: str, eps: float) -> Any:
    _cuda = extension()
    dim = x.shape[-1]
    return _cuda.GatedResidualShape(
        x.numel() // dim, rows.last_first(rows.sizes, 1), dim,
        getattr(_cuda.DType, DTYPES[x.dtype]), getattr(_cuda.DType, DTYPES[h.dtype]),
        getattr(_cuda.Norm, norm or "none"), eps, gate.numel() > 1,
    )  # fmt: skip


def forward(x, h, gate, weight, bias, row_mask, norm, eps) -> tuple[Tensor, Tensor]:
    """(y, normed), both like x; normed has no elements when `norm` is empty."""
    gate, weight, bias = (unit_stride(t) for t in (gate, weight, bias))
    y = empty_like(x)
    normed = empty_like(x) if norm else None
    if y.numel():
        rows = Rows([y, normed, x, h], row_mask)
        params = extension().GatedResidualForwardParams(
            *rows.tensors, numbers(gate), numbers(weight), numbers(bias),
            shape_of(rows, x, h, gate, norm, eps),
        )  # fmt: skip
        launch.submit("gated_residual_forward", params, x.device)
    return y, x.new_empty(0) if normed is None else normed


def backward(
    dy, dnormed, h, gate, weight, bias, row_mask, y, norm, eps, needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dh, dgate, dweight, dbias); those not in `needs`, and dx without a norm, where it is dy,
    have no elements."""
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
    _cuda = extension()
    walked = [dx, dh, dy, dnormed, None if sums[0] is None else h, y]
    if dimensions(*walked, None if row_mask is None else row_mask[..., None]) > _cuda.MAX_ROW_DIMS:
        # of what backward may be given, only gradients have strides that `reasons` cannot know
        dy, dnormed = (None if t is None else t.contiguous() for t in (dy, dnormed))
    if norm and y.shape[-1] > widest_row(y.dtype, False):
        # as x and h are, or `reasons` would have said that the row is too wide
        dy, dnormed = (t if t is None or aligned(t, y.dtype) else fresh(t) for t in (dy, dnormed))
    walked[2:4] = dy, dnormed
    rows = Rows(walked, row_mask)
    x = dy if dnormed is None else dnormed
    shape = shape_of(rows, x, h, gate, norm, eps)

    def params(parts: list[Tensor | None]):
        dx, dh, *rest = rows.tensors
        return _cuda.GatedResidualBackwardParams(
            dx, dh, *map(numbers, sums), *map(launch.pointer, parts), *rest, numbers(gate),
            numbers(weight), shape,
        )  # fmt: skip

    n = _cuda.gated_residual_parts(params([None] * 3))
    parts = [None if t is None else h.new_empty(n, dtype=torch.float32) for t in sums]
    launch.submit("gated_residual_backward", params(parts), h.device)
