"""`gated_projection`: the gated residual of a linear layer's output, which nothing keeps.

Its product is PyTorch's, the rest `gated_residual`; the gradients are matrix products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..core.call import GatedProjectionCall, GatedResidualCall
from ..core.dispatch import Backend, run, without_autocast
from ..core.kernel_op import Gradients, Needs, kernel_op, launchers_of
from ..core.layout import GatedResults, dense_like, empty_like
from . import gated_residual as gated
from .gated_residual import check_float


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
        y, in the shape and dtype of x. The errors are those of `gated_residual`.

    Source: Alayrac et al., "Flamingo: a visual language model for few-shot learning" (2022).
    """
    call = check(x, a, gate, weight, bias, row_mask=row_mask)
    return run("gated_projection", BACKENDS, call, backend)


def check(x, a, gate, weight, bias=None, *, row_mask=None) -> GatedProjectionCall:
    """The call with these arguments; raises TypeError or ValueError naming the argument."""
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
    gated.check(x, unwritten_branch(x, a), gate, row_mask=row_mask)
    return GatedProjectionCall(x=x, a=a, gate=gate, weight=weight, bias=bias, row_mask=row_mask)


def unwritten_branch(x: Tensor, a: Tensor) -> Tensor:
    """The shape and dtype of the product; it takes no memory."""
    return a.new_empty(()).expand(x.shape)


def branch_call(call: GatedProjectionCall, h: Tensor) -> GatedResidualCall:
    """The gated residual of the product h."""
    return GatedResidualCall(x=call.x, h=h, gate=call.gate, row_mask=call.row_mask)


def kernel_reasons(of_gates: Callable, call: GatedProjectionCall) -> list[str]:
    """Why a kernel of the gated residual, whose reasons are `of_gates`, cannot run this call."""
    product = torch.empty_like(call.x, dtype=call.a.dtype, device="meta")
    return of_gates(branch_call(call, product))


@cache
def launchers(backend: str) -> SimpleNamespace:
    """`forward` and `backward` of a backend."""
    return SimpleNamespace(forward=partial(forward, backend), backward=backward)


def forward(backend: str, call: GatedProjectionCall) -> GatedResults:
    """y, by PyTorch's product and a backend's kernel of the gated residual."""
    h = F.linear(call.a, call.weight, call.bias)
    return launchers_of(backend, "gated_residual").forward(branch_call(call, h))


def backward(
    upstream: GatedResults, call: GatedProjectionCall, results: GatedResults, needs: Needs
) -> Gradients:
    """The gradients that `needs` names, of a, gate, weight and bias."""
    with without_autocast(call.device):
        return gradients(upstream.y, call, needs)


def gradients(dy: Tensor, call: GatedProjectionCall, needs: Needs) -> Gradients:
    """`backward` outside of autocast."""
    a, gate, weight, bias, row_mask = call.a, call.gate, call.weight, call.bias, call.row_mask
    dim, width = weight.shape
    t = torch.tanh(gate.float() if gate.dtype != torch.float64 else gate)
    rows = dy
    if row_mask is not None:  # also of a, where 0 * NaN would reach the weight
        rows, a = (t.masked_fill(~row_mask[..., None], 0.0) for t in (dy, a))
    rows = rows.reshape(-1, dim).to(a.dtype)
    a_rows = a.reshape(len(rows), width)
    column = t.expand(dim)[:, None]
    grads = {}
    if "a" in needs:
        grads["a"] = (rows @ (weight * column).to(a.dtype)).view(a.shape)
    if "gate" in needs or "weight" in needs:
        dweight = product(rows.mT, a_rows)
    if bias is not None and ("gate" in needs or "bias" in needs):
        dbias = rows.sum(0, dtype=t.dtype)
    if "gate" in needs:
        sums = (weight * dweight).sum(1, dtype=t.dtype)
        sums = sums if bias is None else sums + bias * dbias
        sums = (sums if gate.numel() == dim else sums.sum()).view(gate.shape)
        grads["gate"] = ((1 - t * t) * sums).to(gate.dtype)
    if "weight" in needs:
        grads["weight"] = (dweight * column).to(weight.dtype)
    if "bias" in needs:
        grads["bias"] = (dbias * column[:, 0]).to(bias.dtype)
    return grads


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; of float16 in float32, as a closed gate makes 0 of what float16 would not hold."""
    if a.dtype != torch.float16:
        return a @ b
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


projection_op = kernel_op(
    "gated_projection",
    GatedProjectionCall,
    GatedResults,
    lambda call, backend: GatedResults(empty_like(call.x), None),
    gradients=dict.fromkeys(("x", "a", "gate", "weight", "bias"), dense_like),
    without_launch=lambda upstream, call: {"x": upstream.y},
    keep=lambda call, results, _: (replace(call, x=None), results),
    launchers=launchers,
)


def run_kernels(call: GatedProjectionCall, backend: str) -> Tensor:
    return projection_op(call, backend).y


def run_eager(call: GatedProjectionCall) -> Tensor:
    a = call.a
    if call.row_mask is not None:
        a = a.masked_fill(~call.row_mask[..., None], 0.0)
    h = F.linear(a, call.weight, call.bias)
    return reference.gated_residual(call.x, h, call.gate, call.row_mask)


BACKENDS = (
    Backend(
        "triton",
        partial(kernel_reasons, gated.triton_reasons),
        partial(run_kernels, backend="triton"),
    ),
    Backend(
        "cuda", partial(kernel_reasons, gated.cuda_reasons), partial(run_kernels, backend="cuda")
    ),
    Backend("eager", reference.reasons, run_eager),
)
gated_projection.backends, gated_projection.check = BACKENDS, check
