"""Top-k attention in plain PyTorch: keys are chosen and gathered for a few queries at a time.

The scores of a chunk of queries exist, those of all never: what a call keeps is the chosen indices,
and both directions gather keys and values again. A chunk holds at most CHUNK numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from . import reference
from .autograd import refuse_double_backward
from .inputs import TopKAttentionInputs, TopKAttentionResult
from .masks import KeyInterval

CHUNK = 2**22  # scores, or elements of gathered keys and values
NEG_INF = float("-inf")
NOTE = "keys gathered in PyTorch for a few queries at a time, in bounded memory"


def reasons(x: TopKAttentionInputs) -> list[str]:
    """Everything runs, apart from intervals without values."""
    if x.q.is_meta and x.interval is not None:
        return ["on the meta device a KeyInterval has no values"]
    return []


def topk_attention(x: TopKAttentionInputs) -> TopKAttentionResult:
    indices = choose(x)
    scale = (
        x.scale if isinstance(x.scale, Tensor) else x.q.new_tensor(x.scale, dtype=sum_dtype(x.q))
    )
    out, lse, entropy, max_probability = GatheredAttention.apply(x.q, x.k, x.v, scale, indices)
    statistics = (entropy, max_probability) if x.return_statistics else (None, None)
    if x.return_indices:
        missing = indices.new_full((*indices.shape[:3], x.top_k - indices.shape[3]), -1)
        indices = torch.cat((indices, missing), -1)
    return TopKAttentionResult(
        out, lse if x.return_lse else None, indices if x.return_indices else None, *statistics
    )


def sum_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def chunks(B: int, N: int, per_row: int) -> Iterator[tuple[int, slice]]:
    """(batch element, rows) of which each has at most CHUNK numbers, or one row."""
    rows = max(1, CHUNK // max(per_row, 1))
    for b in range(B):
        for first in range(0, N, rows):
            yield b, slice(first, min(first + rows, N))


def choose(x: TopKAttentionInputs) -> Tensor:
    """int32 [B, Hq, Nq, min(top_k, Nk)]: the chosen keys in ascending order, then -1."""
    top_k = min(x.top_k, x.Nk)
    indices = x.q.new_empty((x.B, x.Hq, x.Nq, top_k), dtype=torch.int32)
    for b, rows in chunks(x.B, x.Nq, x.Hq * x.Nk):
        indices[b, :, rows] = reference.choose(rows_of(x, b, rows))[0]
    return indices


def rows_of(x: TopKAttentionInputs, b: int, rows: slice) -> TopKAttentionInputs:
    """The call of some rows of one batch element."""
    start, stop = x.bounds()
    one = slice(b, b + 1)
    interval = None if start is None else KeyInterval(start[one, rows], stop[one, rows])
    mask = x.mask
    if mask is not None:
        at_b = one if mask.shape[0] > 1 else slice(None)
        mask = mask[at_b, :, rows if mask.shape[2] > 1 else slice(None)]
    return replace(x, q=x.q[one, :, rows], k=x.k[one], v=x.v[one], interval=interval, mask=mask)


class Gathered:
    """Keys or values [B, Hkv, Nk, width] by rows of all heads of one batch element."""

    def __init__(self, t: Tensor):
        self.t = t

    def rows(self, b: int, at: Tensor) -> Tensor:
        """[Hq, rows, top_k, width] of the row numbers `at` [Hq, rows, top_k]."""
        flat = self.t[b].reshape(-1, self.t.shape[3])
        found = flat.index_select(0, at.reshape(-1)).to(sum_dtype(self.t))
        return found.view(*at.shape, self.t.shape[3])


class GatheredAttention(torch.autograd.Function):
    """(out, lse, entropy, max_probability) of the keys `indices`, -1 for none."""

    @staticmethod
    def forward(ctx, q, k, v, scale, indices):
        ctx.set_materialize_grads(False)
        B, Hq, Nq, _ = q.shape
        out = q.new_empty((B, Hq, Nq, v.shape[3]))
        lse, entropy, max_probability = (
            q.new_empty((B, Hq, Nq), dtype=sum_dtype(q)) for _ in range(3)
        )
        for b, rows, keys, there in chosen(q, k, v, indices):
            s, _ = scores(q[b, :, rows], Gathered(k).rows(b, keys), scale, there)
            p, *found = reference.softmax(s)
            values = Gathered(v).rows(b, keys).masked_fill(~there[..., None], 0.0)
            out[b, :, rows] = weighted(p, values).to(out.dtype)
            for t, part in zip((lse, entropy, max_probability), found, strict=True):
                t[b, :, rows] = part
        ctx.save_for_backward(q, k, v, scale, indices, out, lse, entropy)
        ctx.mark_non_differentiable(max_probability)
        return out, lse, entropy, max_probability

    @staticmethod
    def backward(ctx, dout, dlse, dentropy, _):
        with torch.no_grad():
            grads = gradients(dout, dlse, dentropy, *ctx.saved_tensors)
        grads = tuple(
            g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:4], strict=True)
        )
        grads = refuse_double_backward("topk_attention", grads, (dout, *ctx.saved_tensors[:4]))
        return *grads, None


def chosen(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """(batch element, rows, row numbers among the keys of all heads, whether there is a key)."""
    B, Hq, Nq, top_k = indices.shape
    Hkv, Nk = k.shape[1:3]
    first = (torch.arange(Hq, device=q.device) // (Hq // Hkv) * Nk)[:, None, None]
    for b, rows in chunks(B, Nq, Hq * top_k * (k.shape[3] + v.shape[3])):
        keys = indices[b, :, rows].long()
        yield b, rows, keys.clamp_min(0) + first, keys >= 0


def scores(q: Tensor, keys: Tensor, scale: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """(s, q k^T), [Hq, rows, top_k]; s is -inf where there is no key."""
    products = (keys @ q.to(keys.dtype)[..., None]).squeeze(-1)
    s = products * scale.to(keys.dtype).view(-1, 1, 1)
    return s.masked_fill(~there, NEG_INF), products.masked_fill(~there, 0.0)


def weighted(p: Tensor, rows: Tensor) -> Tensor:
    """sum_j p[h, i, j] rows[h, i, j, :] -> [Hq, rows, width]."""
    return (p[..., None, :] @ rows).squeeze(-2)


def gradients(
    dout, dlse, dentropy, q, k, v, scale, indices, out, lse, entropy
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dscale) by eq. ds of `reference.py`."""
    dtype = sum_dtype(q)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (
        t.new_zeros((t.shape[0], t.shape[1] * t.shape[2], t.shape[3]), dtype=dtype) for t in (k, v)
    )
    dscale = scale.new_zeros((q.shape[1],), dtype=dtype)
    for b, rows, at, there in chosen(q, k, v, indices):
        keys, values = Gathered(k).rows(b, at), Gathered(v).rows(b, at)
        values = values.masked_fill(~there[..., None], 0.0)
        row_q = q[b, :, rows].to(dtype)
        s, products = scores(q[b, :, rows], keys, scale, there)
        row_lse = lse[b, :, rows, None]
        empty = row_lse == NEG_INF
        p = (s - row_lse.masked_fill(empty, float("inf"))).exp()
        dp = torch.zeros_like(p)
        if dout is not None:
            row_dout = dout[b, :, rows].to(dtype).masked_fill(empty, 0.0)
            delta = (row_dout * out[b, :, rows].to(dtype)).sum(-1, keepdim=True)
            dp = (values @ row_dout[..., None]).squeeze(-1) - delta
            dv[b].index_add_(0, at.reshape(-1), outer(p, row_dout))
        if dlse is not None:
            dp = dp + dlse[b, :, rows, None]
        if dentropy is not None:
            log_p = (s - row_lse).masked_fill(p == 0, 0.0)
            dp = dp - dentropy[b, :, rows, None] * (log_p + entropy[b, :, rows, None])
        ds = (p * dp).masked_fill(empty | ~there, 0.0)
        dscale += (ds * products).sum((1, 2))
        ds = ds * scale.to(dtype).view(-1, 1, 1)
        dq[b, :, rows] = weighted(ds, keys.masked_fill(~there[..., None], 0.0)).to(q.dtype)
        dk[b].index_add_(0, at.reshape(-1), outer(ds, row_q))
    dscale = dscale if scale.numel() > 1 else dscale.sum().view(scale.shape)
    return dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), dscale.to(scale.dtype)


def outer(p: Tensor, row: Tensor) -> Tensor:
    """[Hq * rows * top_k, width] of p [Hq, rows, top_k] and row [Hq, rows, width]."""
    return (p[..., None] * row[..., None, :]).flatten(0, 2)
