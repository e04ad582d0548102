"""The launchers of the CUDA kernels of the gated residual, alone or fused with the next norm.

Their arguments and results are those of the launchers in `triton_kernels/gated_residual.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.call import GatedResidualCall
from ..core.kernel_op import Gradients
from ..core.layout import GatedResults, empty_gated, gated_gradients, merged_rows, unit_stride
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


def shape_of(rows: Rows, x: Tensor, call: GatedResidualCall, norm: str | None) -> Any:
    """The struct of the sizes and dtypes of a call; x is a tensor like the call's."""
    _cuda = extension()
    dim = x.shape[-1]
    return _cuda.GatedResidualShape(
        rows=_cuda.RowSizes(rows=x.numel() // dim, sizes=rows.last_first(rows.sizes, 1)),
        dim=dim,
        x_dtype=getattr(_cuda.DType, DTYPES[x.dtype]),
        h_dtype=getattr(_cuda.DType, DTYPES[call.h.dtype]),
        norm=getattr(_cuda.Norm, norm or "none"),
        eps=call.eps,
        gate_is_vector=call.gate.numel() > 1,
    )


def forward(call: GatedResidualCall) -> GatedResults:
    """y, and its norm with one, both like x."""
    gate, weight, bias = (unit_stride(t) for t in (call.gate, call.weight, call.bias))
    results = empty_gated(call)
    if results.y.numel():
        walked = dict(y=results.y, normed=results.normed, x=call.x, h=call.h)
        rows = Rows(walked, call.row_mask)
        params = extension().GatedResidualForwardParams(
            **rows.by_name,
            gate=numbers(gate),
            weight=numbers(weight),
            bias=numbers(bias),
            shape=shape_of(rows, call.x, call, call.norm),
        )
        launch.submit("gated_residual_forward", params, call.device)
    return results


def write_gradients(
    grads: Gradients, upstream: GatedResults, call: GatedResidualCall, results: GatedResults
) -> None:
    """Fills the gradients of x, h, gate, weight and bias that are in `grads`."""
    _cuda = extension()
    norm, y = (None, None) if upstream.normed is None else (call.norm, results.y)
    dy, dnormed, gate, weight = (unit_stride(t) for t in (*upstream, call.gate, call.weight))
    dnormed = None if norm is None else dnormed
    walked = {f"d{name}": grads.get(name) for name in ("x", "h")}
    walked |= dict(dy=dy, dnormed=dnormed, h=call.h if "gate" in grads else None, y=y)
    mask = None if call.row_mask is None else call.row_mask[..., None]
    if dimensions(*walked.values(), mask) > _cuda.MAX_ROW_DIMS:
        # `reasons` has seen the strides of all tensors except these gradients.
        dy, dnormed = (None if t is None else t.contiguous() for t in (dy, dnormed))
    if norm and y.shape[-1] > widest_row(y.dtype, False):
        # x and h are aligned, or `reasons` would have refused the row as too wide.
        dy, dnormed = (t if t is None or aligned(t, y.dtype) else fresh(t) for t in (dy, dnormed))
    rows = Rows(walked | dict(dy=dy, dnormed=dnormed), call.row_mask)
    shape = shape_of(rows, dy if dnormed is None else dnormed, call, norm)
    names = ("gate", "weight", "bias")
    sums = {f"d{name}": numbers(grads.get(name)) for name in names}

    def params(parts: dict[str, Tensor]):
        pointers = {f"{name}_parts": launch.pointer(parts.get(name)) for name in names}
        return _cuda.GatedResidualBackwardParams(
            **rows.by_name, **sums, **pointers, gate=numbers(gate), weight=numbers(weight),
            shape=shape,
        )  # fmt: skip

    n = _cuda.gated_residual_parts(params({}))
    parts = {name: call.h.new_empty(n, dtype=torch.float32) for name in names if name in grads}
    launch.submit("gated_residual_backward", params(parts), call.h.device)


backward = partial(gated_gradients, write_gradients)
