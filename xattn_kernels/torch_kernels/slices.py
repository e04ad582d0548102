"""Slices of a tensor that share one gradient, and tensors put together from slices.

The gradient of a plain slice is zero-filled and as large as the whole tensor, once per slice. Here
the gradients of all slices are copied into one tensor, or added up in it where slices overlap.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ALL = slice(None)


def slices(t: Tensor | None, regions: list[tuple], apart: bool = True) -> Iterator[Tensor | None]:
    """t at each region: views that share one gradient, see `Cut` and `Peeled`.

    A chain of `Peeled` grows as it is asked for: so the backward comes to each link between two
    calls, and does not hold the gradients of all slices at once.
    """
    if t is None:
        yield from (None for _ in regions)
    elif len(regions) == 1 or not wants_grad(t):
        yield from (t[region] for region in regions)
    elif apart:
        yield from Cut.apply(t, regions)
    else:
        for region in regions:
            t, part = Peeled.apply(t, region)
            yield part


class Cut(torch.autograd.Function):
    """Regions without overlap; each gradient is copied to its place in that of t."""

    @staticmethod
    def forward(ctx, t, regions):
        ctx.set_materialize_grads(False)
        ctx.regions, ctx.layout = regions, layout(t)
        return tuple(t[region] for region in regions)

    @staticmethod
    def backward(ctx, *dparts):
        parts = zip(ctx.regions, dparts, strict=True)
        given = [(region, dpart) for region, dpart in parts if dpart is not None]
        if not given:
            return None, None
        dt = given[0][1].new_empty_strided(*ctx.layout)
        if sum(dpart.numel() for _, dpart in given) < dt.numel():
            dt.zero_()
        for region, dpart in given:
            dt[region] = dpart
        return dt, None


class Peeled(torch.autograd.Function):
    """(t, t[region]); the gradient of the region is added to that of t in place.

    Which is safe: the gradient of the returned t comes from the next link of the chain alone.
    """

    @staticmethod
    def forward(ctx, t, region):
        ctx.set_materialize_grads(False)
        ctx.region, ctx.layout = region, layout(t)
        return t.view_as(t), t[region]

    @staticmethod
    def backward(ctx, dt, dpart):
        if dpart is not None:
            dt = dpart.new_empty_strided(*ctx.layout).zero_() if dt is None else dt
            dt[ctx.region] += dpart
        return dt, None


class Pasted(torch.autograd.Function):
    """The opposite of `Cut`: [B, H, Nq, Dv] of its regions, in the order torch's kernels store."""

    @staticmethod
    def forward(ctx, size, regions, *parts):
        ctx.regions = regions
        out = parts[0].new_empty(*size, parts[0].shape[1], parts[0].shape[3]).transpose(1, 2)
        for region, part in zip(regions, parts, strict=True):
            out[region] = part
        return out

    @staticmethod
    def backward(ctx, dout):
        return None, None, *(dout[region] for region in ctx.regions)


def layout(t: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    """Shape and strides of a gradient of t: dense, the dimensions in t's order in memory."""
    return t.shape, torch.empty_like(t, device="meta").stride()


def wants_grad(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad and torch.is_grad_enabled()
