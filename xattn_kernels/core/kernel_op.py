"""What the autograd Functions of several ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def apart(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, each an object of its own: torch.compile refuses a Function that gets one
    twice."""
    found: list[Tensor | None] = []
    for t in tensors:
        again = t is not None and any(t is other for other in found)
        found.append(t.view(t.shape) if again else t)
    return found


def refuse_double_backward(
    op: str, grads: tuple, sources: tuple, instead: str = "use backend='eager'"
) -> tuple:
    """The gradients; differentiating them again, by way of `sources`, is an error that says so."""
    if not torch.is_grad_enabled():
        return grads
    return RefuseDoubleBackward.apply(op, instead, len(grads), *grads, *sources)


class RefuseDoubleBackward(torch.autograd.Function):
    """Identity on the first n of the tensors, without a derivative."""

    @staticmethod
    def forward(ctx, op, instead, n, *tensors):
        ctx.op, ctx.instead = op, instead
        return tuple(None if g is None else g.view_as(g) for g in tensors[:n])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op}: the kernels have no double backward; {ctx.instead} for second derivatives"
        )
