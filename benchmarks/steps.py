"""One call of a provider in one mode, as a closure that checks and clocks alike can run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .case import Case
from .providers import Attend, Provider

Step = Callable[[], tuple[Tensor, ...]]


def step(provider: Provider, case: Case, mode: str) -> Step:
    """Prepares the provider and returns a call that gives (out,) or (out, dq, dk, dv).

    "forward" runs without autograd; "backward" differentiates one retained graph again and again;
    "both" runs forward and backward, gradients of q, k and v included.
    """
    attend = provider.prepare(case)
    if mode == "forward":
        return lambda: forward(attend, case)
    inputs = case.inputs(True)
    if mode == "both":
        return lambda: backward(attend(*inputs), inputs, case)
    out = attend(*inputs)
    return lambda: backward(out, inputs, case, retain_graph=True)


@torch.no_grad()
def forward(attend: Attend, case: Case) -> tuple[Tensor]:
    return (attend(*case.inputs(False)),)


def backward(out: Tensor, inputs: tuple[Tensor, ...], case: Case, **options) -> tuple[Tensor, ...]:
    return out.detach(), *torch.autograd.grad(out, inputs, case.dout, **options)
