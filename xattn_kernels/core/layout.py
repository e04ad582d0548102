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


def empty_rows(t: Tensor, width: int) -> Tensor:
    """Uninitialised [B, H, N, width] with heads and rows in the memory order of `t`."""
    B, H, N, _ = t.shape
    if t.stride(1) < t.stride(2):
        return t.new_empty((B, N, H, width)).transpose(1, 2)
    return t.new_empty((B, H, N, width))


def split_buffer(t: Tensor | None, n_splits: int) -> Tensor | None:
    """What n_splits programs write instead of `t`: [n_splits, *t.shape], float32 when several,
    in the memory order of `t`."""
    if t is None or n_splits == 1:
        return None if t is None else t[None]
    if t.dim() == 4 and t.stride(1) < t.stride(2):
        B, H, N, width = t.shape
        return t.new_empty((n_splits, B, N, H, width), dtype=torch.float32).transpose(2, 3)
    return t.new_empty((n_splits, *t.shape), dtype=torch.float32)


def sum_splits(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over splits, in a fixed order and in the memory order of the parts."""
    if parts.shape[0] == 1:
        return parts[0]
    return torch.sum(parts, 0, out=torch.empty_like(parts[0])).to(dtype)


def zero_gradients(inputs: tuple, needs: list[bool], n_rows: int) -> tuple[Tensor, ...]:
    """Zeros where a gradient is needed, laid out as the kernels would write them; the first
    n_rows inputs are [B, H, N, width]. A custom op may not return one tensor twice."""
    return tuple(
        (empty_rows(t, t.shape[3]) if n < n_rows else t.new_empty(t.shape)).zero_()
        if needed
        else inputs[0].new_empty(0)
        for n, (t, needed) in enumerate(zip(inputs, needs, strict=True))
    )


def broadcast_strides(t: Tensor | None) -> tuple[int, ...]:
    """Strides with 0 where a dimension is broadcast."""
    if t is None:
        return (0, 0, 0, 0)
    return tuple(s if n > 1 else 0 for s, n in zip(t.stride(), t.shape, strict=True))


def row_alignment(*tensors: Tensor) -> int:
    """Elements by which every row offset can be divided: 16 bytes' worth, or less."""
    align = max(16 // t.element_size() for t in tensors)
    strides = [s for t in tensors for s, n in zip(t.stride()[:-1], t.shape, strict=False) if n > 1]
    while any(s % align for s in strides):
        align //= 2
    return align


def saves_indices(Nk: int, top_k: int) -> bool:
    """Whether the indices of a row's chosen keys are fewer bytes than its bits."""
    return 4 * top_k < Nk // 8
