"""The providers of the gated residual, ours and those of others; see `harness/provider.py`.

`prepare(case)` returns a function of the case's leaves that returns y, or (y, normed).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import xattn_kernels

from ..harness.provider import Provider, needs_half_on_cuda, needs_package, no_reasons, our_backend
from ..harness.steps import results
from ..harness.truth import Truth, allow
from .workloads import GatedCase

EPS = 1e-5
NORMS = ("layer", "rms")


# eager code, as a model file contains it


def prepare_eager(case: GatedCase) -> Callable:
    return {"plain": add, "projection": project, "layer": add_layer, "rms": add_rms}[
        case.workload.form
    ]


def add(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    return x + torch.tanh(gate) * h


def project(x: Tensor, a: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return add(x, F.linear(a, weight), gate)


def add_layer(x: Tensor, h: Tensor, gate: Tensor, weight: Tensor, bias: Tensor):
    y = add(x, h, gate)
    return y, F.layer_norm(y, weight.shape, weight, bias, EPS)


def add_rms(x: Tensor, h: Tensor, gate: Tensor, weight: Tensor):
    y = add(x, h, gate)
    return y, F.rms_norm(y, weight.shape, weight, EPS)


def prepare_compiled(case: GatedCase) -> Callable:
    torch._dynamo.reset()  # a limit on recompilations would otherwise fall back to eager code
    return torch.compile(prepare_eager(case), dynamic=False, fullgraph=True)


# a projection whose weight is scaled by the gate and whose product accumulates onto x


def only(forms: tuple[str, ...], case: GatedCase, mode: str) -> list[str]:
    form = case.workload.form
    return [] if form in forms else [f"has no counterpart of the form {form!r}"]


def prepare_addmm(case: GatedCase) -> Callable:
    def call(x: Tensor, a: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(x, a, (weight * torch.tanh(gate)[:, None]).mT)

    return call


# the nearest fused ops elsewhere: the sum of x and a product computed before, and its norm


def others_reasons(package: str, forms: tuple[str, ...], case: GatedCase, mode: str) -> list[str]:
    return only(forms, case, mode) or needs_package(package) + needs_half_on_cuda(case)


def prepare_liger(case: GatedCase) -> Callable:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    def call(x: Tensor, h: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed, y = liger_fused_add_rms_norm(torch.tanh(gate) * h, x, weight, EPS, in_place=False)
        return y, normed

    return call


def prepare_flash_attn(case: GatedCase) -> Callable:
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    norm = partial(layer_norm_fn, eps=EPS, prenorm=True, is_rms_norm=case.workload.form == "rms")

    def call(x: Tensor, h: Tensor, gate: Tensor, weight: Tensor, bias: Tensor | None = None):
        normed, y = norm(torch.tanh(gate) * h, weight, bias, residual=x)
        return y, normed

    return call


# ours, per backend


def ours_call(backend: str, case: GatedCase) -> tuple[Callable, dict]:
    """The op of a form, with the options of its call."""
    form = case.workload.form
    if form == "plain":
        return xattn_kernels.gated_residual, {}
    if form == "projection":
        return xattn_kernels.gated_projection, {}
    return xattn_kernels.gated_residual_norm, dict(norm=form, eps=EPS)


def ours_reasons(backend: str, case: GatedCase, mode: str) -> list[str]:
    op, options = ours_call(backend, case)
    inputs = op.check(*case.inputs(mode != "forward"), **options)
    return next(b for b in op.backends if b.name == backend).reasons(inputs)


def prepare_ours(backend: str, case: GatedCase) -> Callable:
    op, options = ours_call(backend, case)
    return partial(op, backend=backend, **options)


ours = partial(our_backend, ours_reasons, prepare_ours)
# Providers run in this order; where time is short, the last are left out.
PROVIDERS = (
    ours("triton"),
    ours("cuda"),
    Provider("eager", no_reasons, prepare_eager),
    Provider("addmm", partial(only, ("projection",)), prepare_addmm),
    Provider("liger", partial(others_reasons, "liger_kernel", ("rms",)), prepare_liger),
    Provider("flash-attn", partial(others_reasons, "flash_attn", NORMS), prepare_flash_attn),
    Provider("compiled", no_reasons, prepare_compiled, compiles=True),
    ours("eager"),
)
BY_NAME = {p.name: p for p in PROVIDERS}


def truth_of(case: GatedCase, gradients: bool) -> Truth:
    """The truth of the results, and with `gradients` of the gradient of every leaf."""
    names = ("y", "normed")[: len(case.upstream)]
    names += tuple(f"d{n}" for n in case.leaves) if gradients else ()
    eager, truth = (compute(case, dtype, gradients) for dtype in (case.dtype, torch.float64))
    size = 0.0
    if gradients:  # the terms of the gate's gradient, one for each element of h, may cancel
        leaves = {n: t.double() for n, t in case.leaves.items()}
        projects = case.workload.form == "projection"
        h = F.linear(leaves["a"], leaves["weight"]) if projects else leaves["h"]
        size = (truth[names.index("dx")] * h).norm().item()
    return allow(names, eager, truth, case.dtype, dgate=size)


def compute(case: GatedCase, dtype: torch.dtype, gradients: bool) -> list[Tensor]:
    """The results, and with `gradients` those of every leaf, by eager code in `dtype`."""
    inputs = [t.detach().to(dtype).requires_grad_(gradients) for t in case.inputs(False)]
    outputs = results(prepare_eager(case)(*inputs))
    upstream = [t.to(dtype) for t in case.upstream]
    grads = torch.autograd.grad(outputs, inputs, upstream) if gradients else ()
    return [t.detach() for t in (*outputs, *grads)]
