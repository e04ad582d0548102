"""`attention_weights`: the attention probabilities, averaged over the heads as they are written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import reference
from .dispatch import Backend, choose
from .inputs import (
    CrossAttentionInputs,
    check_bias,
    check_dropout,
    check_mask,
    check_scale,
    check_softcap,
    check_tensors,
)

NEG_INF = float("-inf")


@dataclass(frozen=True)
class AttentionWeightsInputs(CrossAttentionInputs):
    """One checked call. `v` is `k`: the weights need no values, the shared code has the field."""

    lse: Tensor | None
    average_heads: bool


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    lse: Tensor | None = None,
    mask=None,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    average_heads: bool = True,
    backend: str | None = None,
) -> Tensor:
    """The weights with which `cross_attention` sums the values, by default their mean over heads.

        w = dropout(exp(s - lse))        s as in `cross_attention`; rows without a key are 0

    The mean never exists as [B, Hq, Nq, Nk], neither in the forward nor in the backward. With the
    same seed the dropped weights are those that `cross_attention` drops.

    Args:
        q, k, mask, bias, scale, softcap, dropout_p, seed: as in `cross_attention`.
        lse: [B, Hq, Nq] float32 (float64 for float64 inputs), what `cross_attention` returned for
            the same arguments; it saves computing it again and receives a gradient. The weights
            of a row then sum to 1 only if it is that row's lse.
        average_heads: False returns the weights of every head.
        backend: "triton", "sdpa" (PyTorch's own kernels, one head at a time, recomputed in the
            backward) or "eager"; None takes the first of triton and sdpa that can run.

    Returns:
        [B, Nq, Nk], or [B, Hq, Nq, Nk] without averaging, in the dtype of q; summed in float32
        and rounded once. Differentiable in q, k, bias, scale and lse.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype, device or range.
        RuntimeError: the named backend has reasons against this call.
    """
    x = check(
        q,
        k,
        lse=lse,
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
        seed=seed,
        average_heads=average_heads,
    )
    return choose("attention_weights", BACKENDS, x, backend).run(x)


def check(
    q, k, *, lse=None, mask=None, bias=None, scale=None, softcap=None, dropout_p=0.0, seed=None,
    average_heads=True,
) -> AttentionWeightsInputs:  # fmt: skip
    """The checked inputs of one call; raises TypeError or ValueError naming the argument."""
    check_tensors(q, k, None)
    interval, mask = check_mask(mask, q, k, validate=False)
    dropout_p, seed = check_dropout(dropout_p, seed, q)
    return AttentionWeightsInputs(
        q=q,
        k=k,
        v=k,
        interval=interval,
        mask=mask,
        bias=check_bias(bias, q, k),
        scale=check_scale(scale, q),
        softcap=check_softcap(softcap),
        dropout_p=dropout_p,
        seed=seed,
        return_lse=False,
        return_statistics=False,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        lse=check_lse(lse, q),
        average_heads=average_heads,
    )


def check_lse(lse, q: Tensor) -> Tensor | None:
    if lse is None:
        return None
    if not isinstance(lse, Tensor):
        raise TypeError(f"lse must be a tensor or None, got {type(lse).__name__}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    if lse.dtype != dtype:
        raise TypeError(f"lse must be {dtype} for q of {q.dtype}, got {lse.dtype}")
    if lse.shape != q.shape[:3] or lse.device != q.device:
        raise ValueError(
            f"lse must be [B, Hq, Nq] = {list(q.shape[:3])} on {q.device}, got "
            f"{list(lse.shape)} on {lse.device}"
        )
    return lse


def run_sdpa(x: AttentionWeightsInputs) -> Tensor:
    """One head's [B, Nq, Nk] at a time; checkpoints keep autograd from saving any of them."""
    allowed = reference.allowed_keys(x)
    heads = zip(
        *(
            _per_head(t, x.Hq)
            for t in (x.q, x.k, None if allowed is None else ~allowed, x.bias, x.lse)
        ),
        _per_head(x.scale[None] if isinstance(x.scale, Tensor) else None, x.Hq),
        range(x.Hq),
        strict=True,
    )
    weights = (
        checkpoint(_one_head, x, *head, use_reentrant=False, preserve_rng_state=False)
        for head in heads
    )
    if not x.average_heads:
        return torch.stack([w.to(x.q.dtype) for w in weights], dim=1)
    total = next(weights).clone()
    for w in weights:
        total += w
    return (total / x.Hq).to(x.q.dtype)


def _per_head(t: Tensor | None, Hq: int) -> list[Tensor | None]:
    """`t` cut along dimension 1 (1, Hkv or Hq long), once per query head.

    unbind and not t[:, h]: its backward stacks the gradients, that of h slices adds h full tensors.
    """
    if t is None:
        return [None] * Hq
    parts = t.unbind(1)
    return [parts[h * len(parts) // Hq] for h in range(Hq)]


def _one_head(x: AttentionWeightsInputs, q, k, forbidden, bias, lse, scale, head: int) -> Tensor:
    """`reference.attention_weights` of one head: q [B, Nq, D], k [B, Nk, D] -> [B, Nq, Nk]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = x.scale if scale is None else scale.to(dtype)
    # [B, Nq, Nk]
    s = torch.bmm(q.to(dtype) * scale, k.to(dtype).transpose(1, 2))
    if x.softcap is not None:
        s = x.softcap * torch.tanh(s / x.softcap)
    if bias is not None:
        s = s + bias
    if forbidden is not None:
        s = s.masked_fill(forbidden, NEG_INF)
    if lse is not None:
        # an empty row has lse = -inf; s - inf = -inf gives the same zero without inf - inf
        p = (s - lse.masked_fill(lse == NEG_INF, float("inf"))[..., None]).exp()
    elif bias is None and forbidden is None:
        p = s.softmax(-1)
    else:
        empty = (s == NEG_INF).all(-1, keepdim=True)
        p = s.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    if x.dropout_p == 0.0:
        return p
    keep = reference.philox_keep(x.seed, x.dropout_p, x.B, 1, x.Nq, x.Nk, first_head=head)
    return (p / (1.0 - x.dropout_p)).masked_fill(~keep[:, 0], 0.0)


def run_eager(x: AttentionWeightsInputs) -> Tensor:
    return reference.attention_weights(x, x.lse, x.average_heads).to(x.q.dtype)


BACKENDS = (
    Backend("sdpa", reference.reasons, run_sdpa),
    Backend("eager", reference.reasons, run_eager, by_name=True),
)
attention_weights.backends = BACKENDS
attention_weights.check = check
