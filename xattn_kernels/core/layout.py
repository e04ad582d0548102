"""What launchers of any kernels allocate, and how tensors lie in memory: no Triton here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import QUERIES_PER_CHOICE


class AttentionResults(NamedTuple):
    """The results of a launcher of attention, or their gradients; None for what is not wanted.

    out [B, Hq, Nq, Dv]; lse, entropy and max_probability float32 [B, Hq, Nq]; lse_low, in log2
    units, is what float32 cannot hold of lse.
    """

    out: Tensor
    lse: Tensor | None
    lse_low: Tensor | None
    entropy: Tensor | None
    max_probability: Tensor | None


class TopKResults(NamedTuple):
    """`AttentionResults` and the choice: bits int32 [B, Hq, Nq, ceil(Nk / 32)], one for each key,
    and indices int32 [B, Hq, Nq, top_k]."""

    out: Tensor
    lse: Tensor | None
    lse_low: Tensor | None
    entropy: Tensor | None
    max_probability: Tensor | None
    bits: Tensor | None
    indices: Tensor | None


class WeightsResults(NamedTuple):
    """weights [B, 1 or Hq, Nq, Nk]."""

    weights: Tensor


class MassResults(NamedTuple):
    """mass float32 [B, Hkv, Nk]."""

    mass: Tensor


class ImportanceResults(NamedTuple):
    """importance float32 [B, Hkv, T, N] of N blocks of keys for T tiles of queries."""

    importance: Tensor


class GatedResults(NamedTuple):
    """y and its norm, or their gradients, [..., dim]; normed is None without a norm."""

    y: Tensor | None
    normed: Tensor | None


def empty_results(call: Any) -> AttentionResults:
    """The results of a call of attention, uninitialised."""
    out = empty_rows(call.q, call.Dv)
    lse = call.q.new_empty(call.q.shape[:3], dtype=sum_dtype(call.q))
    statistics = call.return_statistics
    wanted = (call.bias is not None, statistics, statistics)
    return AttentionResults(out, lse, *(torch.empty_like(lse) if w else None for w in wanted))


def empty_weights(call: Any) -> WeightsResults:
    """The weights of a call, uninitialised."""
    n_heads = 1 if call.average_heads else call.Hq
    return WeightsResults(call.q.new_empty((call.B, n_heads, call.Nq, call.Nk)))


def empty_mass(call: Any) -> MassResults:
    """The masses of a call, uninitialised."""
    return MassResults(call.k.new_empty(call.k.shape[:3], dtype=torch.float32))


def empty_gated(call: Any) -> GatedResults:
    """The results of a call of the gated residual, uninitialised."""
    return GatedResults(empty_like(call.x), None if call.norm is None else empty_like(call.x))


def gated_gradients(
    write: Callable[..., None], upstream: GatedResults, call: Any, results: GatedResults,
    needs: Collection[str],
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients that `needs` names, of x, h, gate, weight and bias, which `write(grads,
    upstream, call, results)` fills. That of x is asked for with a gradient of the norm alone,
    without which it is dy; y is among the results then."""
    inputs = {"h": call.h, "gate": call.gate, "weight": call.weight, "bias": call.bias}
    grads = {n: empty_like(t) for n, t in ({"x": results.y} | inputs).items() if n in needs}
    if call.h.numel() == 0:
        return {name: t.zero_() for name, t in grads.items()}
    if grads:
        write(grads, upstream, call, results)
    return grads


def sum_dtype(t: Tensor) -> torch.dtype:
    """The dtype of sums of t: float32 at least."""
    return torch.promote_types(t.dtype, torch.float32)


def row_gradient(dout: Tensor | None, out: Tensor) -> Tensor:
    """The gradient of out with neighbouring columns next to each other; zeros for None."""
    if dout is None:
        return torch.zeros_like(out)
    return dout if dout.stride(3) == 1 else dout.contiguous()


def scale_gradient(dscale: Tensor, scale_tensor: Tensor) -> Tensor:
    """The gradient of a scale from that of each row of each split, [n_splits, B, Hq, Nq]."""
    summed = (0, 1, 3) if scale_tensor.numel() > 1 else (0, 1, 2, 3)
    return dscale.sum(summed).to(scale_tensor.dtype).view_as(scale_tensor)


def empty_like(t: Tensor) -> Tensor:
    """Uninitialised, in the memory order of `t`, neighbouring columns next to each other; a `t`
    whose rows overlap has no such order."""
    like = torch.empty_like(t)
    unit = t.dim() == 0 or t.shape[-1] <= 1 or like.stride(-1) == 1
    return like if unit else t.new_empty(t.shape)


def rows_like(t: Tensor) -> Tensor:
    """`empty_rows` of the width of t, as kernels write its gradient."""
    return empty_rows(t, t.shape[3])


def dense_like(t: Tensor) -> Tensor:
    """Uninitialised and contiguous, of the shape of t."""
    return t.new_empty(t.shape)


# what makes an empty gradient of a field of a call of attention
ATTENTION_GRADIENTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "q": rows_like,
    "k": rows_like,
    "v": rows_like,
    "bias": dense_like,
    "scale_tensor": dense_like,
    "lse": dense_like,
    "row_weight": dense_like,
}


def gradients_of(*names: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Those of ATTENTION_GRADIENTS with these names."""
    return {name: ATTENTION_GRADIENTS[name] for name in names}


def zero_gradients(call: Any, needs: Collection[str]) -> dict[str, Tensor]:
    """Zeros for each field that `needs` names, laid out as the kernels would write them."""
    return {name: ATTENTION_GRADIENTS[name](getattr(call, name)).zero_() for name in needs}


def merged_rows(tensors: list[Tensor | None]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """(sizes, strides of each tensor) of the leading dimensions that all tensors share: those of 1
    left out, neighbours merged where one stride walks both in every tensor; None gets zeros."""
    existing = [t for t in tensors if t is not None]
    sizes, strides = [], []
    for d, n in enumerate(existing[0].shape):
        inner = tuple(t.stride(d) for t in existing)
        if n == 1:
            continue
        if sizes and all(outer == n * s for outer, s in zip(strides[-1], inner, strict=True)):
            sizes[-1], strides[-1] = sizes[-1] * n, inner
        else:
            sizes.append(n)
            strides.append(inner)
    if not sizes:
        sizes, strides = [1], [(0,) * len(existing)]
    by_tensor = zip(*strides, strict=True)
    none = (0,) * len(sizes)
    return tuple(sizes), [none if t is None else next(by_tensor) for t in tensors]


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


def empty_topk(call: Any, backend: str) -> TopKResults:
    """The results of a call of top-k attention by keys, uninitialised."""
    rows, Nk, top_k = call.q.shape[:3], call.Nk, call.top_k
    indexed = backend == "torch" or saves_indices(Nk, top_k)
    bits = indices = None
    if not indexed:
        bits = call.q.new_empty((*rows, -(-Nk // 32)), dtype=torch.int32)
    if indexed or call.return_indices:
        indices = call.q.new_empty((*rows, top_k), dtype=torch.int32)
    return TopKResults(*empty_results(call), bits, indices)


def empty_importance(call: Any) -> ImportanceResults:
    """The importance of blocks, uninitialised."""
    tiles, blocks = -(-call.Nq // QUERIES_PER_CHOICE), -(-call.Nk // call.topk_blocks[0])
    shape = (call.B, call.Hkv, tiles, blocks)
    return ImportanceResults(call.q.new_empty(shape, dtype=torch.float32))


def saves_indices(Nk: int, top_k: int) -> bool:
    """Whether the indices of a row's chosen keys are fewer bytes than its bits."""
    return 4 * top_k < Nk // 8
