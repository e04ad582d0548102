"""How tensors lie in memory, for launchers of any kernels: no Triton here."""

import torch
from torch import Tensor


def empty_like(t: Tensor) -> Tensor:
    """Uninitialised, in the memory order of `t`, neighbouring columns next to each other; a `t`
    whose rows overlap has no such order."""
    found = torch.empty_like(t)
    unit = t.dim() == 0 or t.shape[-1] <= 1 or found.stride(-1) == 1
    return found if unit else t.new_empty(t.shape)


def new_gradients(
    like: tuple[Tensor | None, ...], needs: list[bool], zero: bool
) -> list[Tensor | None]:
    """`empty_like` of those that are needed and there, zeroed where nothing will write them."""
    found = [
        empty_like(t) if n and t is not None else None for t, n in zip(like, needs, strict=True)
    ]
    return [t.zero_() if zero and t is not None else t for t in found]


def merged_rows(tensors: list[Tensor | None]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """(sizes, strides of each tensor) of the leading dimensions that all tensors share: those of 1
    left out, neighbours merged where one stride walks both in every tensor; None gets zeros."""
    there = [t for t in tensors if t is not None]
    sizes, strides = [], []
    for d, n in enumerate(there[0].shape):
        own = tuple(t.stride(d) for t in there)
        if n == 1:
            continue
        if sizes and all(outer == n * s for outer, s in zip(strides[-1], own, strict=True)):
            sizes[-1], strides[-1] = sizes[-1] * n, own
        else:
            sizes.append(n)
            strides.append(own)
    if not sizes:
        sizes, strides = [1], [(0,) * len(there)]
    found = zip(*strides, strict=True)
    none = (0,) * len(sizes)
    return tuple(sizes), [none if t is None else next(found) for t in tensors]


def unit_stride(t: Tensor | None) -> Tensor | None:
    """Neighbouring columns next to each other, as the kernels read them. The gradient of a sum is
    one number, expanded; a gate or weight may be a column of a matrix, too small to walk."""
    return t if t is None or t.numel() <= 1 or t.stride(-1) == 1 else t.contiguous()
