"""One call of an op as one value: made by the op's check, and handed whole to everything behind it.

Reasons, backends, the autograd Function, the custom ops and the launchers all take a call and read
its fields by name. What is not there is None.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..reference import QUERIES_PER_CHOICE, CrossAttentionResult, TopKAttentionResult

__all__ = [
    "QUERIES_PER_CHOICE",
    "AttentionCall",
    "AttentionWeightsCall",
    "CrossAttentionCall",
    "CrossAttentionResult",
    "GatedProjectionCall",
    "GatedResidualCall",
    "ReceivedMassCall",
    "TopKAttentionCall",
    "TopKAttentionResult",
    "TopKBlocksCall",
]
AnyCall = TypeVar("AnyCall")


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What the probabilities of attention are made of.

    q [B, Hq, Nq, D], k [B, Hkv, Nk, D]; start, stop int32 [B, Nq], the bounds of each query's key
    interval, or both None; mask bool and bias are 4-d views whose dimensions are 1 or full;
    exactly one of scale and scale_tensor (1 or Hq values) is there; seed is an int64 tensor of one
    value, there exactly when dropout_p > 0; allow_tf32 is about products of float32.
    """

    q: Tensor
    k: Tensor
    bias: Tensor | None
    scale_tensor: Tensor | None
    start: Tensor | None
    stop: Tensor | None
    mask: Tensor | None
    seed: Tensor | None
    scale: float | None
    softcap: float | None
    dropout_p: float
    allow_tf32: bool

    B = property(lambda self: self.q.shape[0])
    Hq = property(lambda self: self.q.shape[1])
    Hkv = property(lambda self: self.k.shape[1])
    Nq = property(lambda self: self.q.shape[2])
    Nk = property(lambda self: self.k.shape[2])
    D = property(lambda self: self.q.shape[3])
    Dv = property(lambda self: self.q.shape[3])  # where there are no values
    group = property(lambda self: self.q.shape[1] // self.k.shape[1])
    device = property(lambda self: self.q.device)

    def scale_of_heads(self, dtype: torch.dtype) -> float | Tensor:
        """The scale as it multiplies scores [B, Hq, Nq, Nk]: a number, or a tensor of `dtype`."""
        if self.scale_tensor is None:
            return self.scale
        return self.scale_tensor.to(dtype).view(1, -1, 1, 1)

    def part(self: AnyCall, batch: slice, rows: slice) -> AnyCall:
        """The call of these batch elements and queries alone."""

        def cut(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            t = t[batch] if t.shape[0] > 1 else t
            return t[:, :, rows] if t.shape[2] > 1 else t

        start, stop = (None if t is None else t[batch, rows] for t in (self.start, self.stop))
        keys = dict(k=self.k[batch], mask=cut(self.mask), bias=cut(self.bias))
        return replace(self, q=self.q[batch, :, rows], start=start, stop=stop, **keys)


@dataclass(frozen=True, kw_only=True)
class CrossAttentionCall(AttentionCall):
    """A call of `cross_attention`; v [B, Hkv, Nk, Dv]."""

    v: Tensor
    return_lse: bool
    return_statistics: bool
    deterministic: bool

    Dv = property(lambda self: self.v.shape[3])

    def part(self, batch: slice, rows: slice) -> CrossAttentionCall:
        return super(CrossAttentionCall, replace(self, v=self.v[batch])).part(batch, rows)


@dataclass(frozen=True, kw_only=True)
class AttentionWeightsCall(AttentionCall):
    """A call of `attention_weights`: p = exp(s - lse), lse [B, Hq, Nq] or None.

    lse is a variable like any other, with a gradient. `lse_is_own` says that it is known to be that
    of these very scores: p = softmax(s), and the gradient includes what flows through it, with the
    precision that the two parts of it would cancel away. lse_low is what its float32 cannot hold.
    """

    lse: Tensor | None
    lse_low: Tensor | None
    lse_is_own: bool
    average_heads: bool


@dataclass(frozen=True, kw_only=True)
class ReceivedMassCall(AttentionCall):
    """A call of `received_mass`; row_weight is [B, Nq] in the dtype of the sums; lse [B, Hq, Nq]
    has no gradient, and lse_low is what its float32 cannot hold."""

    lse: Tensor | None
    lse_low: Tensor | None
    row_weight: Tensor | None
    average_heads: bool

    def part(self, batch: slice, rows: slice) -> ReceivedMassCall:
        weight = None if self.row_weight is None else self.row_weight[batch, rows]
        cut = replace(self, lse=None, lse_low=None, row_weight=weight)
        return super(ReceivedMassCall, cut).part(batch, rows)


@dataclass(frozen=True, kw_only=True)
class TopKAttentionCall(CrossAttentionCall):
    """A call of `topk_attention`, by keys (`top_k`) or by blocks of keys (`topk_blocks`: keys of a
    block, number of blocks); the other is None. There is no bias, softcap or dropout."""

    top_k: int | None
    topk_blocks: tuple[int, int] | None
    return_indices: bool


@dataclass(frozen=True, kw_only=True)
class TopKBlocksCall(TopKAttentionCall):
    """A call by blocks with the choice made: chosen int32 [B, Hkv, T, n], the blocks of each of the
    T tiles of queries in ascending order, then -1."""

    chosen: Tensor


@dataclass(frozen=True, kw_only=True)
class TopKImportanceCall(TopKAttentionCall):
    """What the blocks of a call are chosen by; its start, stop and mask are of blocks. seen bool
    [B or 1, Nk]: the keys that some query of a batch element may see."""

    seen: Tensor


@dataclass(frozen=True, kw_only=True)
class GatedResidualCall:
    """A call of `gated_residual`, or of `gated_residual_norm` with a norm ("layer" or "rms").

    x, h [..., dim]; gate a scalar, [1] or [dim]; weight, bias [dim], of the norm; row_mask bool,
    the shape of x without its last dimension. In a backward that does not need x or h they are
    None.
    """

    x: Tensor | None
    h: Tensor | None
    gate: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    row_mask: Tensor | None = None
    norm: str | None = None
    eps: float = 0.0

    device = property(lambda self: self.x.device)


@dataclass(frozen=True, kw_only=True)
class GatedProjectionCall:
    """A call of `gated_projection`: x [..., dim], a [..., width], gate as in `GatedResidualCall`,
    weight [dim, width] and bias [dim] of the product."""

    x: Tensor | None
    a: Tensor
    gate: Tensor
    weight: Tensor
    bias: Tensor | None = None
    row_mask: Tensor | None = None

    device = property(lambda self: self.a.device)


def field_names(Call: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(Call))


# a trace of torch.compile cannot ask a dataclass
FIELDS = {Call.__name__: field_names(Call) for Call in (AttentionCall, CrossAttentionCall)}
FIELDS |= {"TopKAttentionCall": field_names(TopKAttentionCall)}


def shared_fields(call: AttentionCall, name: str) -> dict[str, Any]:
    """The fields of a call that one of the class of that name has too."""
    return {field: getattr(call, field) for field in FIELDS[name]}
