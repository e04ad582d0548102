"""`gated_projection`: the gated residual of a linear layer's output, which nothing keeps.

Its product is PyTorch's, the rest `gated_residual`; the gradients are matrix products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..core.dispatch import Backend, run, without_autocast
from ..core.kernel_op import apart, refuse_double_backward
from . import gated_residual as gated
from .gated_residual import GatedResidualInputs, check_float, launch_forward


@dataclass(frozen=True)
class GatedProjectionInputs(GatedResidualInputs):
    """One checked call; `weight`, `bias` are those of the product, `h` stands for its result."""

    a: Tensor | None = None


def gated_projection(
    x: Tensor,
    a: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    row_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The residual stream plus a gated linear layer: y = x + tanh(gate) * (a @ weight.T + bias).

    The same as `gated_residual(x, F.linear(a, weight, bias), gate)` without keeping the product
    for the backward: with dw = dy^T a, which the gradient of the weight needs anyway,

        dgate = (1 - tanh(gate)^2) * (sum(weight * dw) + sum(bias * sum dy))

    so that the gradient of the gate costs no pass over rows. Scaling the weight by the gate and
    letting the product accumulate onto x would need no kernel, and is about as accurate; but
    PyTorch first copies x to where the product accumulates, which makes as many bytes, and there
    is no row mask and no x wider than the product.

    Args:
        x: [..., dim], the residual stream.
        a: [..., width], with the leading dimensions of x; it may be NaN where row_mask is False.
        gate, row_mask, backend: as in `gated_residual`.
        weight: [dim, width], in the dtype of a.
        bias: [dim] in the dtype of a, or None.

    Returns:
        y, in the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        RuntimeError: the named backend has reasons against this call.

    Source: Alayrac et al., "Flamingo: a visual language model for few-shot learning" (2022).
    """
    inputs = check(x, a, gate, weight, bias, row_mask=row_mask)
    return run("gated_projection", BACKENDS, inputs, backend)


def check(x, a, gate, weight, bias=None, *, row_mask=None) -> GatedProjectionInputs:
    """The checked inputs of one call; raises TypeError or ValueError naming the argument."""
    for name, t in {"x": x, "a": a, "weight": weight, "bias": bias}.items():
        if t is not None or name != "bias":
            check_float(name, t, x)
    if x.dim() < 1 or a.dim() < 1 or a.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"a must be [..., width] with the leading dimensions of x, {list(x.shape[:-1])}, got "
            f"{list(a.shape)}"
        )
    dim, width = x.shape[-1], a.shape[-1]
    if weight.shape != (dim, width):
        raise ValueError(f"weight must be [dim, width] = {[dim, width]}, got {list(weight.shape)}")
    if bias is not None and bias.shape != (dim,):
        raise ValueError(f"bias must be [dim] = {[dim]}, got {list(bias.shape)}")
    for name, t in {"weight": weight, "bias": bias}.items():
        if t is not None and t.dtype != a.dtype:
            raise TypeError(f"{name} must have the dtype of a, {a.dtype}, got {t.dtype}")
    h = a.new_empty(()).expand(x.shape)  # its shape and dtype, no memory
    plain = gated.check(x, h, gate, row_mask=row_mask)
    plain = {name: getattr(plain, name) for name in ("x", "h", "gate", "row_mask")}
    return GatedProjectionInputs(**plain, a=a, weight=weight, bias=bias)


def kernel_reasons(of_gates: Callable, x: GatedProjectionInputs) -> list[str]:
    """Why a kernel of the gated residual, whose reasons are `of_gates`, cannot run this call."""
    product = torch.empty_like(x.x, dtype=x.h.dtype, device="meta")
    return of_gates(replace(x, h=product))


def run_kernel(backend: str, x: GatedProjectionInputs) -> Tensor:
    leaves = apart(x.x, x.a, x.gate, x.weight, x.bias)
    return GatedProjectionFunction.apply(*leaves, x.row_mask, backend)


def run_eager(x: GatedProjectionInputs) -> Tensor:
    a = x.a if x.row_mask is None else x.a.masked_fill(~x.row_mask[..., None], 0.0)
    return reference.gated_residual(x.x, F.linear(a, x.weight, x.bias), x.gate, x.row_mask)


BACKENDS = (
    Backend("triton", partial(kernel_reasons, gated.triton_reasons), partial(run_kernel, "triton")),
    Backend("cuda", partial(kernel_reasons, gated.cuda_reasons), partial(run_kernel, "cuda")),
    Backend("eager", reference.reasons, run_eager),
)
gated_projection.backends, gated_projection.check = BACKENDS, check


class GatedProjectionFunction(torch.autograd.Function):
    """Wires the product and the launcher into autograd."""

    @staticmethod
    def forward(ctx, x, a, gate, weight, bias, row_mask, backend):
        ctx.save_for_backward(a, gate, weight, bias, row_mask)
        launch = gated.forward_op if torch.compiler.is_compiling() else launch_forward
        h = F.linear(a, weight, bias)
        y, _ = launch(x, h, gate, None, None, row_mask, "", 0.0, backend)
        return y

    @staticmethod
    def backward(ctx, dy):
        needs, saved = ctx.needs_input_grad[:5], ctx.saved_tensors
        with torch.no_grad(), without_autocast(dy.device):
            grads = (dy if needs[0] else None, *gradients(dy, *saved, needs[1:]))
        grads = refuse_double_backward("gated_projection", grads, (dy, *saved[:4]))
        return *grads, None, None


def gradients(
    dy: Tensor, a: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None,
    row_mask: Tensor | None, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(da, dgate, dweight, dbias); None for those not in `needs`."""
    dim, width = weight.shape
    t = torch.tanh(gate.float() if gate.dtype != torch.float64 else gate)
    rows = dy
    if row_mask is not None:  # also of a, where 0 * NaN would reach the weight
        rows, a = (t.masked_fill(~row_mask[..., None], 0.0) for t in (dy, a))
    rows = rows.reshape(-1, dim).to(a.dtype)
    a_rows = a.reshape(len(rows), width)
    column = t.expand(dim)[:, None]
    da = dgate = dweight = dbias = None
    if needs[0]:
        da = (rows @ (weight * column).to(a.dtype)).view(a.shape)
    if needs[1] or needs[2]:
        dweight = product(rows.mT, a_rows)
    if bias is not None and (needs[1] or needs[3]):
        dbias = rows.sum(0, dtype=t.dtype)
    if needs[1]:
        sums = (weight * dweight).sum(1, dtype=t.dtype)
        sums = sums if bias is None else sums + bias * dbias
        sums = (sums if gate.numel() == dim else sums.sum()).view(gate.shape)
        dgate = ((1 - t * t) * sums).to(gate.dtype)
    dweight = (dweight * column).to(weight.dtype) if needs[2] else None
    dbias = (dbias * column[:, 0]).to(bias.dtype) if bias is not None and needs[3] else None
    return da, dgate, dweight, dbias


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; of float16 in float32, as a closed gate makes 0 of what float16 would not hold."""
    if a.dtype != torch.float16:
        return a @ b
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
