"""Steps: one call of a provider in one mode, as a closure for checks and clocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .provider import Provider

Step = Callable[[], tuple[Tensor, ...]]


def step(provider: Provider, case: Any, mode: str) -> Step:
    """A call of the prepared provider that returns its results, then the inputs' gradients.

    "forward" runs without autograd, "backward" differentiates one retained graph again and again,
    and "both" runs forward and backward, with the gradients of all inputs.
    """
    call = provider.prepare(case)
    if mode == "forward":
        return lambda: forward(call, case)
    inputs = case.inputs(True)
    if mode == "both":
        return lambda: backward(results(call(*inputs)), inputs, case)
    outputs = results(call(*inputs))
    return lambda: backward(outputs, inputs, case, retain_graph=True)


def results(returned: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a call returned, as a tuple."""
    return (returned,) if isinstance(returned, Tensor) else tuple(returned)


@torch.no_grad()
def forward(call: Callable, case: Any) -> tuple[Tensor, ...]:
    return results(call(*case.inputs(False)))


def backward(
    outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], case: Any, **options
) -> tuple[Tensor, ...]:
    """The outputs, detached, and the gradients of the inputs."""
    grads = torch.autograd.grad(outputs, inputs, case.upstream, **options)
    return *(t.detach() for t in outputs), *grads
