"""One call of a provider in one mode, as a closure that checks and clocks alike can run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .provider import Provider

Step = Callable[[], tuple[Tensor, ...]]


def step(provider: Provider, case: Any, mode: str) -> Step:
    """Prepares the provider and returns a call that gives its results, then the inputs' gradients.

    "forward" runs without autograd; "backward" differentiates one retained graph again and again;
    "both" runs forward and backward, gradients of all inputs included.
    """
    call = provider.prepare(case)
    if mode == "forward":
        return lambda: forward(call, case)
    inputs = case.inputs(True)
    if mode == "both":
        return lambda: backward(results(call(*inputs)), inputs, case)
    found = results(call(*inputs))
    return lambda: backward(found, inputs, case, retain_graph=True)


def results(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


@torch.no_grad()
def forward(call: Callable, case: Any) -> tuple[Tensor, ...]:
    return results(call(*case.inputs(False)))


def backward(
    found: tuple[Tensor, ...], inputs: tuple[Tensor, ...], case: Any, **options
) -> tuple[Tensor, ...]:
    grads = torch.autograd.grad(found, inputs, case.upstream, **options)
    return *(t.detach() for t in found), *grads
