"""`gated_residual`, also with the next layer's norm: public ops, autograd Function, custom ops.

The equations are in `reference.py`, the kernels in `triton_kernels/gated_residual.py` and
`csrc/gated_residual.cuh`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..core.arguments import check_number
from ..core.dispatch import (
    TRITON_DTYPES,
    Backend,
    run,
    triton_device_reasons,
)
from ..core.kernel_op import apart, refuse_double_backward
from ..core.layout import empty_like
from ..cuda_kernels import launch as cuda

NORMS = ("layer", "rms")
# of each dtype of x those of h: the same, or one whose numbers it holds
NARROWER = {
    torch.float64: (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float32, torch.float16, torch.bfloat16),
    torch.float16: (torch.float16,),
    torch.bfloat16: (torch.bfloat16,),
}
MOST_ROWS = 2**31 - 1  # counted in int32


class GatedResidualNormResult(NamedTuple):
    """y and its norm, both like x."""

    y: Tensor
    normed: Tensor


@dataclass(frozen=True)
class GatedResidualInputs:
    """One checked call. `norm` is None for the plain form; `row_mask` has the shape of the rows."""

    x: Tensor
    h: Tensor
    gate: Tensor
    row_mask: Tensor | None
    norm: str | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0

    device = property(lambda self: self.x.device)


def gated_residual(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    *,
    row_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The residual stream plus a gated branch: y = x + tanh(gate) * h.

    One pass reads x and h and writes y; the backward reads dy and h and writes dh, dx is dy
    itself. Computed in float32 and rounded once. Inputs are not cast, under autocast neither.
    A gate of 0 gives exactly x, for any finite h.

    Args:
        x: [..., dim], the residual stream; any leading dimensions and strides, for the kernels
            with a contiguous last dimension, for those of cuda in at most four walks (dimensions
            that one stride walks count as one).
        h: like x, of the same or a narrower dtype (float32 stream, bfloat16 branch).
        gate: a scalar, [1] or [dim], floating-point; its gradient is reduced in float32 in a
            fixed order, the same bits in every run.
        row_mask: bool, the shape of x without its last dimension; where False y is x, and h,
            which may be NaN there, and the gate receive no gradient.
        backend: "triton", "cuda" or "eager"; None takes the first that can run.

    Returns:
        y, in the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        RuntimeError: the named backend has reasons against this call.

    Source: Alayrac et al., "Flamingo: a visual language model for few-shot learning" (2022).
    """
    return run("gated_residual", BACKENDS, check(x, h, gate, row_mask=row_mask), backend).y


def gated_residual_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
    row_mask: Tensor | None = None,
    backend: str | None = None,
) -> GatedResidualNormResult:
    """`gated_residual` and the norm of its result for the next sub-layer, in the same pass.

        y = x + tanh(gate) * h        normed = norm(y) * weight + bias

    y is rounded before the norm, as it is where the two are separate. The backward takes the
    gradients of both results and recomputes the statistics from y.

    Args:
        x, h, gate, row_mask, backend: as in `gated_residual`; on the triton backend dim is at most
            8192, in float32 or with a vector gate 4096, and 2048 where it is no multiple of 16; on
            cuda 8192, in float32 or where a row begins or ends at no multiple of 16 bytes 4096: a
            row and its sums are kept in registers.
        weight, bias: [dim] or None, floating-point.
        norm: "layer" (mean and variance) or "rms" (root mean square), in float32.
        eps: added to the variance or mean square.

    Returns:
        `GatedResidualNormResult(y, normed)`, both in the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype, device or range.
        RuntimeError: the named backend has reasons against this call.

    Source: Ba et al., "Layer normalization" (2016); Zhang and Sennrich, "Root mean square layer
    normalization" (2019).
    """
    x = check_norm(x, h, gate, weight, bias, norm=norm, eps=eps, row_mask=row_mask)
    return run("gated_residual_norm", BACKENDS, x, backend)


def check(x, h, gate, *, row_mask=None) -> GatedResidualInputs:
    """The checked inputs of one call; raises TypeError or ValueError naming the argument."""
    for name, t in {"x": x, "h": h, "gate": gate}.items():
        check_float(name, t, x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., dim] with dim >= 1, got shape {list(x.shape)}")
    if h.shape != x.shape:
        raise ValueError(f"h must have the shape of x, {list(x.shape)}, got {list(h.shape)}")
    if h.dtype not in NARROWER[x.dtype]:
        raise TypeError(
            f"h must have the dtype of x, {x.dtype}, or a narrower one that converts to it, got "
            f"{h.dtype}"
        )
    if tuple(gate.shape) not in ((), (1,), (x.shape[-1],)):
        raise ValueError(
            f"gate must be a scalar, [1] or [dim] = [{x.shape[-1]}], got shape {list(gate.shape)}"
        )
    return GatedResidualInputs(x, h, gate, check_row_mask(row_mask, x))


def check_norm(
    x, h, gate, weight=None, bias=None, *, norm="layer", eps=1e-5, row_mask=None
) -> GatedResidualInputs:
    """The same for the form with a norm."""
    plain = check(x, h, gate, row_mask=row_mask)
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    for name, t in {"weight": weight, "bias": bias}.items():
        if t is None:
            continue
        check_float(name, t, x)
        if t.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be [dim] = [{x.shape[-1]}], got shape {list(t.shape)}")
    allowed = "a number of at least 0"
    eps = check_number("eps", eps, allowed)
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be {allowed}, got {eps}")
    options = dict(norm=norm, weight=weight, bias=bias, eps=eps)
    return GatedResidualInputs(plain.x, plain.h, plain.gate, plain.row_mask, **options)


def check_float(name: str, t, x: Tensor) -> None:
    """Raises unless `t` is a floating-point tensor on the device of x."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in NARROWER:
        raise TypeError(
            f"{name} must be a floating-point tensor of 16, 32 or 64 bits, got {t.dtype}"
        )
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")


def check_row_mask(row_mask, x: Tensor) -> Tensor | None:
    if row_mask is None:
        return None
    if not isinstance(row_mask, Tensor):
        raise TypeError(f"row_mask must be a bool tensor or None, got {type(row_mask).__name__}")
    if row_mask.dtype != torch.bool:
        raise TypeError(f"row_mask must be bool (False = y is x), got {row_mask.dtype}")
    if row_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"row_mask must have the shape of x without its last dimension, {list(x.shape[:-1])}, "
            f"got {list(row_mask.shape)}"
        )
    if row_mask.device != x.device:
        raise ValueError(f"row_mask must be on the device of x, {x.device}, got {row_mask.device}")
    return row_mask


def widest_norm(x: GatedResidualInputs) -> int:
    """The widest row of which the backward keeps all it sums in the registers of one block."""
    if x.x.shape[-1] % 16:
        return 2048
    return 4096 if x.x.dtype == torch.float32 or x.gate.numel() > 1 else 8192


def kernel_reasons(x: GatedResidualInputs) -> list[str]:
    """Why no kernel can run this call."""
    found = []
    for name, t in {"x": x.x, "h": x.h, "gate": x.gate, "weight": x.weight, "bias": x.bias}.items():
        if t is not None and t.dtype not in TRITON_DTYPES:
            found.append(f"the dtype of {name}, {t.dtype}, is not float32, float16 or bfloat16")
    if not torch.compiler.is_compiling():  # or a trace would be held to fewer rows
        found += row_reasons(x.x)
    for name, t in {"x": x.x, "h": x.h}.items():
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            found.append(f"the last dimension of {name} is not contiguous")
    return found


def row_reasons(x: Tensor) -> list[str]:
    return [f"x has more than {MOST_ROWS} rows"] if x[..., 0].numel() > MOST_ROWS else []


def width_reasons(x: GatedResidualInputs, widest: int) -> list[str]:
    if x.norm is None or x.x.shape[-1] <= widest:
        return []
    return [f"dim {x.x.shape[-1]} > {widest}, a row and its sums do not fit registers"]


def triton_reasons(x: GatedResidualInputs) -> list[str]:
    """Why the Triton kernels cannot run this call."""
    found = triton_device_reasons(x.device) + kernel_reasons(x)
    return found + width_reasons(x, widest_norm(x))


def cuda_reasons(x: GatedResidualInputs) -> list[str]:
    """Why the CUDA kernels cannot run this call."""
    if found := cuda.device_reasons(x.device) + kernel_reasons(x):
        return found
    kernels = kernels_of("cuda")
    mask = None if x.row_mask is None else x.row_mask[..., None]
    most, found = cuda.extension().MAX_ROW_DIMS, kernels.dimensions(x.x, x.h, mask)
    if found > most:
        return [
            f"the leading dimensions of x, h and row_mask are {found} walks, at most {most} fit"
        ]
    return width_reasons(x, kernels.widest_norm(x.x, x.h))


def run_kernels(backend: str, x: GatedResidualInputs) -> GatedResidualNormResult:
    options = (x.norm or "", x.eps, backend)
    leaves = apart(x.x, x.h, x.gate, x.weight, x.bias)
    results = GatedResidualFunction.apply(*leaves, x.row_mask, options)
    return GatedResidualNormResult(*results)


def run_eager(x: GatedResidualInputs) -> GatedResidualNormResult:
    y = reference.gated_residual(x.x, x.h, x.gate, x.row_mask)
    normed = y if x.norm is None else reference.norm(y, x.norm, x.weight, x.bias, x.eps)
    return GatedResidualNormResult(y, normed)


BACKENDS = (
    Backend("triton", triton_reasons, partial(run_kernels, "triton")),
    Backend("cuda", cuda_reasons, partial(run_kernels, "cuda")),
    Backend("eager", reference.reasons, run_eager),
)
gated_residual.backends, gated_residual.check = BACKENDS, check
gated_residual_norm.backends, gated_residual_norm.check = BACKENDS, check_norm


class GatedResidualFunction(torch.autograd.Function):
    """Wires the launchers into autograd; nothing is computed here."""

    @staticmethod
    def forward(ctx, x, h, gate, weight, bias, row_mask, options):
        ctx.set_materialize_grads(False)
        launch = forward_op if torch.compiler.is_compiling() else launch_forward
        y, normed = launch(x, h, gate, weight, bias, row_mask, *options)
        if not any(ctx.needs_input_grad[:3]):  # of the norm's weight and bias y knows nothing
            ctx.mark_non_differentiable(y)
        # statistics are computed again; h is for the gate's gradient, else its shape is enough
        h = h if ctx.needs_input_grad[2] else h.new_empty(()).expand(h.shape)
        ctx.save_for_backward(h, gate, weight, bias, row_mask, y if options[0] else None)
        ctx.options = options
        return y, normed

    @staticmethod
    def backward(ctx, dy, dnormed):
        saved, (norm, eps, backend) = ctx.saved_tensors, ctx.options
        norm = norm if dnormed is not None else ""
        if dy is None and not norm:
            return (None,) * 7
        needs = [n and (i < 3 or bool(norm)) for i, n in enumerate(ctx.needs_input_grad[:5])]
        launch = backward_op if torch.compiler.is_compiling() else launch_backward
        with torch.no_grad():
            grads = launch(dy, dnormed if norm else None, *saved, norm, eps, needs, backend)
        grads = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
        if not norm and needs[0]:
            grads[0] = dy
        grads = refuse_double_backward("gated_residual", tuple(grads), (dy, dnormed, *saved[:4]))
        return *grads, None, None


def kernels_of(backend: str) -> ModuleType:
    """The launchers `forward` and `backward` of a backend."""
    if backend == "cuda":
        from ..cuda_kernels import gated_residual as kernels
    else:
        from ..triton_kernels import gated_residual as kernels
    return kernels


def launch_forward(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_mask: Tensor | None,
    norm: str,
    eps: float,
    backend: str = "triton",
) -> tuple[Tensor, Tensor]:
    """(y, normed); normed has no elements when norm is empty."""
    if found := row_reasons(x):
        raise RuntimeError(f"gated_residual: {found[0]}")
    return kernels_of(backend).forward(x, h, gate, weight, bias, row_mask, norm, eps)


def launch_backward(
    dy: Tensor | None,
    dnormed: Tensor | None,
    h: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row_mask: Tensor | None,
    y: Tensor | None,
    norm: str,
    eps: float,
    needs: list[bool],
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dh, dgate, dweight, dbias); those not in `needs`, and dx without a norm, which is dy,
    have no elements."""
    return kernels_of(backend).backward(
        dy, dnormed, h, gate, weight, bias, row_mask, y, norm, eps, needs
    )


forward_op = torch.library.custom_op(
    "xattn_kernels::gated_residual_forward", launch_forward, mutates_args=()
)
backward_op = torch.library.custom_op(
    "xattn_kernels::gated_residual_backward", launch_backward, mutates_args=()
)


@forward_op.register_fake
def fake_forward(x, h, gate, weight, bias, row_mask, norm, eps, backend="triton"):
    return empty_like(x), empty_like(x) if norm else x.new_empty(0)


@backward_op.register_fake
def fake_backward(
    dy, dnormed, h, gate, weight, bias, row_mask, y, norm, eps, needs, backend="triton"
):
    like = (y if norm else None, h, gate, weight, bias)
    return tuple(
        empty_like(t) if needed and t is not None else h.new_empty(0)
        for t, needed in zip(like, needs, strict=True)
    )
