"""`gated_residual`, also with the next layer's norm: public ops and backends.

The equations are in `reference.py`, the kernels in `triton_kernels/gated_residual.py` and
`csrc/gated_residual.cuh`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..core.arguments import check_number
from ..core.call import GatedResidualCall
from ..core.dispatch import TRITON_DTYPES, Backend, run, triton_device_reasons
from ..core.kernel_op import Needs, kernel_op
from ..core.layout import GatedResults, empty_gated, empty_like
from ..cuda_kernels import gated_residual as cuda_kernels
from ..cuda_kernels import launch as cuda

NORMS = ("layer", "rms")
# For each dtype of x, the dtypes that h may have: the same, or one whose numbers x's dtype holds.
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


def constant(call: GatedResidualCall, needs: Needs) -> tuple[str, ...]:
    """The results without a derivative: of the norm's weight and bias y knows nothing."""
    return () if {"x", "h", "gate"} & set(needs) else ("y",)


def without_launch(upstream: GatedResults, call: GatedResidualCall) -> dict[str, Tensor | None]:
    """The gradients that take no kernel: without one of the norm, dx is dy."""
    if upstream.normed is not None:
        return {}
    return {"x": upstream.y, "weight": None, "bias": None}


def keep(call: GatedResidualCall, results: GatedResults, needs: Needs) -> tuple:
    """What the backward is given: h is for the gate's gradient, else its shape is enough, and the
    statistics of a norm are computed again from y, which also lies in memory as dx does."""
    h = call.h if "gate" in needs else call.h.new_empty(()).expand(call.h.shape)
    y = None if call.norm is None else results.y
    return replace(call, x=y, h=h), GatedResults(y, None)


gated_op = kernel_op(
    "gated_residual",
    GatedResidualCall,
    GatedResults,
    lambda call, backend: empty_gated(call),
    gradients=dict.fromkeys(("x", "h", "gate", "weight", "bias"), empty_like),
    saved=("y",),
    constant=constant,
    without_launch=without_launch,
    keep=keep,
)


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
    call = check(x, h, gate, row_mask=row_mask)
    return run("gated_residual", BACKENDS, call, backend).y


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
    call = check_norm(x, h, gate, weight, bias, norm=norm, eps=eps, row_mask=row_mask)
    return run("gated_residual_norm", BACKENDS, call, backend)


def check(x, h, gate, *, row_mask=None) -> GatedResidualCall:
    """The call with these arguments; raises TypeError or ValueError naming the argument."""
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
    return GatedResidualCall(x=x, h=h, gate=gate, row_mask=check_row_mask(row_mask, x))


def check_norm(
    x, h, gate, weight=None, bias=None, *, norm="layer", eps=1e-5, row_mask=None
) -> GatedResidualCall:
    """The call of the form with a norm."""
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
    return replace(plain, norm=norm, weight=weight, bias=bias, eps=eps)


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
    """row_mask, which is bool with a value for each row of x."""
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


def widest_norm(call: GatedResidualCall) -> int:
    """The widest row of which the backward keeps all it sums in the registers of one block."""
    if call.x.shape[-1] % 16:
        return 2048
    return 4096 if call.x.dtype == torch.float32 or call.gate.numel() > 1 else 8192


def kernel_reasons(call: GatedResidualCall) -> list[str]:
    """Why no kernel can run this call."""
    reasons = []
    for name in ("x", "h", "gate", "weight", "bias"):
        t = getattr(call, name)
        if t is not None and t.dtype not in TRITON_DTYPES:
            reasons.append(f"the dtype of {name}, {t.dtype}, is not float32, float16 or bfloat16")
    if not torch.compiler.is_compiling():  # or a trace would be held to fewer rows
        reasons += row_reasons(call.x)
    for name, t in {"x": call.x, "h": call.h}.items():
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            reasons.append(f"the last dimension of {name} is not contiguous")
    return reasons


def row_reasons(x: Tensor) -> list[str]:
    """Why there are too many rows."""
    return [f"x has more than {MOST_ROWS} rows"] if x[..., 0].numel() > MOST_ROWS else []


def width_reasons(call: GatedResidualCall, widest: int) -> list[str]:
    """Why the rows are too wide for a norm."""
    if call.norm is None or call.x.shape[-1] <= widest:
        return []
    return [f"dim {call.x.shape[-1]} > {widest}, a row and its sums do not fit registers"]


def triton_reasons(call: GatedResidualCall) -> list[str]:
    """Why the Triton kernels cannot run this call."""
    reasons = triton_device_reasons(call.device) + kernel_reasons(call)
    return reasons + width_reasons(call, widest_norm(call))


def cuda_reasons(call: GatedResidualCall) -> list[str]:
    """Why the CUDA kernels cannot run this call."""
    if reasons := cuda.device_reasons(call.device) + kernel_reasons(call):
        return reasons
    mask = None if call.row_mask is None else call.row_mask[..., None]
    most, walks = cuda.extension().MAX_ROW_DIMS, cuda_kernels.dimensions(call.x, call.h, mask)
    if walks > most:
        return [
            f"the leading dimensions of x, h and row_mask are {walks} walks, at most {most} fit"
        ]
    return width_reasons(call, cuda_kernels.widest_norm(call.x, call.h))


def run_kernels(call: GatedResidualCall, backend: str) -> GatedResidualNormResult:
    return GatedResidualNormResult(*gated_op(call, backend))


def run_eager(call: GatedResidualCall) -> GatedResidualNormResult:
    y = reference.gated_residual(call.x, call.h, call.gate, call.row_mask)
    if call.norm is None:
        return GatedResidualNormResult(y, y)
    norm = reference.norm(y, call.norm, call.weight, call.bias, call.eps)
    return GatedResidualNormResult(y, norm)


BACKENDS = (
    Backend("triton", triton_reasons, partial(run_kernels, backend="triton")),
    Backend("cuda", cuda_reasons, partial(run_kernels, backend="cuda")),
    Backend("eager", reference.reasons, run_eager),
)
gated_residual.backends, gated_residual.check = BACKENDS, check
gated_residual_norm.backends, gated_residual_norm.check = BACKENDS, check_norm
