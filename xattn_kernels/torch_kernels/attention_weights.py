"""Attention in plain PyTorch, one head at a time: output and weights together, any option.

Where PyTorch's fused kernels cannot help, since they give no weights and drop other weights than
ours, this costs the tensors of one head, [B, Nq, Nk], in place of [B, Hq, Nq, Nk]. Autograd keeps
none of them: each head is a checkpoint, computed again in the backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import reference
from ..core.call import AttentionCall

NEG_INF = float("-inf")


def attend(
    call: AttentionCall, *, lse: Tensor | None = None, out: bool, average_heads: bool | None
) -> tuple[Tensor | None, Tensor | None]:
    """(out, weights) by the equations of `reference.py`, None for what is not asked for.

    The weights, after dropout, are [B, Nq, Nk] (average_heads True), [B, Hq, Nq, Nk] (False) or
    None (None). With `lse` [B, Hq, Nq] the probabilities are exp(s - lse). Dropout without a seed
    takes torch's generator.
    """
    allowed, bias = reference.allowed_keys(call), call.bias
    if bias is None and allowed is not None:  # once for all heads
        bias, allowed = torch.where(allowed, 0.0, NEG_INF).to(_sum_dtype(call)), None
    scale = None if call.scale_tensor is None else call.scale_tensor[None]
    k, v = reference.used_keys(call.k, call), reference.used_keys(call.v, call) if out else None
    tensors = Head(call.q, k, v, allowed, bias, lse, scale)
    outs, weights = [], []
    mean = (
        call.q.new_zeros((call.B, call.Nq, call.Nk), dtype=_sum_dtype(call))
        if average_heads
        else None
    )
    for h, head in enumerate(zip(*(_per_head(t, call.Hq) for t in tensors), strict=True)):
        p, head_out = checkpoint(
            _one_head, call, Head(*head), h, use_reentrant=False,
            preserve_rng_state=call.dropout_p > 0.0 and call.seed is None,
        )  # fmt: skip
        outs.append(head_out)
        if average_heads:
            mean.add_(p, alpha=1.0 / call.Hq)
        elif average_heads is not None:
            weights.append(p.to(call.q.dtype))
    if average_heads is not None:
        weights = mean.to(call.q.dtype) if average_heads else torch.stack(weights, dim=1)
    return torch.stack(outs, dim=1) if out else None, None if average_heads is None else weights


def _sum_dtype(call: AttentionCall) -> torch.dtype:
    return torch.promote_types(call.q.dtype, torch.float32)


def _per_head(t: Tensor | None, Hq: int) -> list[Tensor | None]:
    """`t` cut along dimension 1 (1, Hkv or Hq long), once per query head.

    unbind and not t[:, h]: its backward stacks the gradients, that of h slices adds h full tensors.
    """
    if t is None:
        return [None] * Hq
    parts = t.unbind(1)
    return [parts[h * len(parts) // Hq] for h in range(Hq)]


class Head(NamedTuple):
    """The tensors of one head, or of all with a dimension of heads before that of rows.

    q [B, Nq, D], k [B, Nk, D], v [B, Nk, Dv]; allowed and bias broadcast to [B, Nq, Nk]; lse
    [B, Nq] and scale, a number in a tensor. All but q and k may be None.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    allowed: Tensor | None
    bias: Tensor | None
    lse: Tensor | None
    scale: Tensor | None


def _one_head(call: AttentionCall, head: Head, h: int) -> tuple[Tensor, Tensor | None]:
    """(p [B, Nq, Nk] after dropout, out [B, Nq, Dv] or None) of the h-th head."""
    q, k, v, allowed, bias, lse, scale = head
    q, k = q.to(_sum_dtype(call)), k.to(_sum_dtype(call))
    if allowed is not None:
        bias = torch.where(allowed, bias, NEG_INF)
    empty = None
    if lse is None and bias is not None:
        # a row without a key gets finite scores here and p = 0 below: inf - inf is never formed
        empty = (bias == NEG_INF).all(-1, keepdim=True)
        bias = bias.masked_fill(empty, 0.0)
    # [B, Nq, Nk]
    s = _scores(q, k, bias, call.scale if scale is None else scale.to(q.dtype), call.softcap)
    if lse is None:
        p = s.softmax(-1)
    else:
        # an empty row has lse = -inf; s - inf = -inf is the same zero without inf - inf
        p = (s - lse.masked_fill(lse == NEG_INF, float("inf"))[..., None]).exp()
    if empty is not None:
        p = p.masked_fill(empty, 0.0)  # in the backward too, whatever gradient arrives
    if call.dropout_p > 0.0 and call.seed is None:
        p = F.dropout(p, call.dropout_p)
    elif call.dropout_p > 0.0:
        keep = reference.philox_keep(
            call.seed, call.dropout_p, call.B, 1, call.Nq, call.Nk, first_head=h
        )
        p = p * (keep[:, 0].to(p.dtype) / (1.0 - call.dropout_p))
    return p, None if v is None else torch.bmm(p, v.to(p.dtype)).to(v.dtype)


def _scores(q, k, bias, scale: float | Tensor, softcap: float | None) -> Tensor:
    """softcap(scale * q k^T) + bias, in one pass where nothing has to happen in between."""
    k = k.transpose(1, 2)
    if isinstance(scale, float) and softcap is None:
        addend = q.new_zeros(()) if bias is None else bias.to(q.dtype)
        return torch.baddbmm(addend, q, k, beta=0 if bias is None else 1, alpha=scale)
    s = torch.bmm(q, k) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    return s if bias is None else s + bias
