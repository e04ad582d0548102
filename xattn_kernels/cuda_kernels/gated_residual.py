"""The launchers of the CUDA kernels of the gated residual, alone or fused with the next norm.

Their arguments and results are those of the launchers in `triton_kernels/gated_residual.py`.
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
    """The structs of tensors [..., dim] of one shape, or of None, and of a row mask."""

    def __init__(self, tensors: dict[str, Tensor | None], row_mask: Tensor | None):
        mask = None if row_mask is None else row_mask.view(torch.uint8)
        rows = [None if t is None else t[..., 0] for t in tensors.values()]
        self.sizes, strides = merged_rows([*rows, mask])
        named = (tensors | {"row_mask": mask}).items()
        self.by_name = {
            name: self.tensor(t, stride) for (name, t), stride in zip(named, strides, strict=True)
        }

    def tensor(self, t: Tensor | None, strides: tuple[int, ...]) -> Any:
        return extension().RowTensor(data=launch.pointer(t), strides=self.last_first(strides, 0))

    def last_first(self, numbers: tuple[int, ...], missing: int) -> list[int]:
        return [*reversed(numbers), *[missing] * (extension().MAX_ROW_DIMS - len(numbers))]


def dimensions(*tensors: Tensor | None) -> int:
    """The number of leading dimensions that remain after those are merged that the strides of all
    tensors allow to merge."""
    return len(merged_rows([None if t is None else t[..., 0] for t in tensors])[0])


def widest_norm(x: Tensor, *others: Tensor) -> int:
    """The widest row that a block can hold, for the alignment of these tensors."""
    return widest_row(x.dtype, all(aligned(t, x.dtype) for t in (x, *others)))


@torch.compiler.assume_constant_result  # The result depends on the build only.
def widest_row(x_dtype: torch.dtype, is_aligned: bool) -> int:
    """The widest row that a block can hold; `csrc/gated_residual.h` explains the arguments."""
    return extension().widest_normed_row(getattr(extension().DType, DTYPES[x_dtype]), is_aligned)


def aligned(t: Tensor, x_dtype: torch.dtype) -> bool:
    """Whether the offset and the length of each row are multiples of 16 bytes of x.

    A trace does not know the storage offset and takes it for 0; the launch refuses a row that is
    too wide for its true offset.
    """
    offset = 0 if torch.compiler.is_compiling() else t.storage_offset()
    starts = (*t.stride()[:-1], offset, t.shape[-1])
    return all(n * x_dtype.itemsize % 16 == 0 for n in starts)


def fresh(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def shape_of(rows: Rows, x: Tensor, h: Tensor, gate: Tensor, norm: str, eps: float) -> Any:
    _cuda = extension()
    dim = x.shape[-1]
    return _cuda.GatedResidualShape(
        rows=_cuda.RowSizes(rows=x.numel() // dim, sizes=rows.last_first(rows.sizes, 1)),
        dim=dim,
        x_dtype=getattr(_cuda.DType, DTYPES[x.dtype]),
        h_dtype=getattr(_cuda.DType, DTYPES[h.dtype]),
        norm=getattr(_cuda.Norm, norm or "none"),
        eps=eps,
        gate_is_vector=gate.numel() > 1,
    )


def forward(x, h, gate, weight, bias, row_mask, norm, eps) -> tuple[Tensor, Tensor]:
    """(y, normed), both like x. normed has no elements if `norm` is empty."""
    gate, weight, bias = (unit_stride(t) for t in (gate, weight, bias))
    y = empty_like(x)
    normed = empty_like(x) if norm else None
    if y.numel():
        rows = Rows(dict(y=y, normed=normed, x=x, h=h), row_mask)
        params = extension().GatedResidualForwardParams(
            **rows.by_name,
            gate=numbers(gate),
            weight=numbers(weight),
            bias=numbers(bias),
            shape=shape_of(rows, x, h, gate, norm, eps),
        )
        launch.submit("gated_residual_forward", params, x.device)
    return y, x.new_empty(0) if normed is None else normed


def backward(
    dy, dnormed, h, gate, weight, bias, row_mask, y, norm, eps, needs
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dh, dgate, dweight, dbias). Those that `needs` excludes have no elements, nor has dx
    without a norm, where it equals dy."""
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
    walked = dict(dx=dx, dh=dh, dy=dy, dnormed=dnormed, h=None if sums[0] is None else h, y=y)
    row_dims = dimensions(*walked.values(), None if row_mask is None else row_mask[..., None])
    if row_dims > _cuda.MAX_ROW_DIMS:
        # `reasons` has seen the strides of all tensors except these gradients.
        dy, dnormed = (None if t is None else t.contiguous() for t in (dy, dnormed))
    if norm and y.shape[-1] > widest_row(y.dtype, False):
        # x and h are aligned, or `reasons` would have refused the row as too wide.
        dy, dnormed = (t if t is None or aligned(t, y.dtype) else fresh(t) for t in (dy, dnormed))
    rows = Rows(walked | dict(dy=dy, dnormed=dnormed), row_mask)
    x = dy if dnormed is None else dnormed
    shape = shape_of(rows, x, h, gate, norm, eps)

    def params(parts: list[Tensor | None]):
        gate_parts, weight_parts, bias_parts = map(launch.pointer, parts)
        return _cuda.GatedResidualBackwardParams(
            **rows.by_name,
            dgate=numbers(sums[0]),
            dweight=numbers(sums[1]),
            dbias=numbers(sums[2]),
            gate_parts=gate_parts,
            weight_parts=weight_parts,
            bias_parts=bias_parts,
            gate=numbers(gate),
            weight=numbers(weight),
            shape=shape,
        )

    n = _cuda.gated_residual_parts(params([None] * 3))
    parts = [None if t is None else h.new_empty(n, dtype=torch.float32) for t in sums]
    launch.submit("gated_residual_backward", params(parts), h.device)
