"""Top-k attention in plain PyTorch: keys are chosen and attended to for a few queries at a time.

The scores of a chunk of queries exist, those of all never: what a call keeps is the chosen indices,
from which both directions compute their chunks again. Few keys of many are gathered; of fewer keys
a product with all of them is faster, and the others get a probability of 0. A chunk holds at most
CHUNK numbers.
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
GATHERED_BEYOND = 16  # keys for each that is chosen: about where either way takes as long on a CPU
NEG_INF = float("-inf")
NOTE = "keys chosen in PyTorch for a few queries at a time, in bounded memory"


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
        s = reference.scores_to_choose_by(rows_of(x, b, rows))
        indices[b, :, rows] = top_indices(s, top_k)[0]
    return indices


def top_indices(s: Tensor, top_k: int) -> Tensor:
    """`reference.top_indices` by a partial sort, and by a whole one that is stable only of rows
    whose last chosen score is that of a key left out too."""
    Nk = s.shape[-1]
    if top_k in (0, Nk):
        return reference.top_indices(s, top_k)
    values, order = s.topk(top_k + 1)
    last, next_one = values[..., -2], values[..., -1]
    found = order[..., :-1].masked_fill(values[..., :-1] == NEG_INF, Nk).sort(-1).values
    found = found.masked_fill(found == Nk, -1)
    tied = ((last == next_one) & (last > NEG_INF)) | last.isnan()
    if tied.any():
        found[tied] = reference.top_indices(s[tied], top_k)
    return found


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


class GatheredPart:
    """Some rows of a batch element, beside the keys that each chose: [Hq, rows, top_k, width]."""

    def __init__(self, k: Tensor, v: Tensor, b: int, rows: slice, indices: Tensor):
        Hq, (Hkv, Nk) = indices.shape[1], k.shape[1:3]
        first = (torch.arange(Hq, device=k.device) // (Hq // Hkv) * Nk)[:, None, None]
        j = indices[b, :, rows].long()
        self.b, self.rows, self.there, self.at = b, rows, j >= 0, j.clamp_min(0) + first
        self.keys, self.values = (
            Gathered(t).rows(b, self.at).masked_fill(~self.there[..., None], 0.0) for t in (k, v)
        )

    @staticmethod
    def numbers_per_row(k: Tensor, v: Tensor, indices: Tensor) -> int:
        return indices.shape[1] * indices.shape[3] * (k.shape[3] + v.shape[3])

    @staticmethod
    def products(row: Tensor, keys: Tensor) -> Tensor:
        """[Hq, rows, top_k] of row [Hq, rows, width] and keys, or values."""
        return (keys @ row[..., None]).squeeze(-1)

    @staticmethod
    def weighted(p: Tensor, values: Tensor) -> Tensor:
        """sum_j p_ij values_j -> [Hq, rows, width]."""
        return (p[..., None, :] @ values).squeeze(-2)

    def add_outer(self, total: Tensor, p: Tensor, row: Tensor) -> None:
        """total [B, Hkv, Nk, width]: its j-th row grows by sum_i p_ij row_i."""
        outer = (p[..., None] * row[..., None, :]).flatten(0, 2)
        total[self.b].flatten(0, 1).index_add_(0, self.at.reshape(-1), outer)


class WholePart:
    """Some rows of a batch element, beside all keys: [Hkv, Nk, width]."""

    def __init__(self, k: Tensor, v: Tensor, b: int, rows: slice, indices: Tensor):
        self.b, self.rows = b, rows
        self.there = reference.named(indices[b, :, rows], k.shape[2])
        # no key that is not chosen meets a p of 0, whatever it holds
        used = self.by_key_head(self.there, k.shape[1]).any(1)[..., None]
        self.keys, self.values = (t[b].to(sum_dtype(t)).masked_fill(~used, 0.0) for t in (k, v))

    @staticmethod
    def numbers_per_row(k: Tensor, v: Tensor, indices: Tensor) -> int:
        return indices.shape[1] * k.shape[2]

    @staticmethod
    def by_key_head(t: Tensor, Hkv: int) -> Tensor:
        """[Hkv, group * rows, width] of [Hq, rows, width]."""
        return t.reshape(Hkv, t.shape[0] // Hkv * t.shape[1], t.shape[2])

    def products(self, row: Tensor, keys: Tensor) -> Tensor:
        """[Hq, rows, Nk] of row [Hq, rows, width] and keys, or values."""
        found = self.by_key_head(row, keys.shape[0]) @ keys.mT
        return found.view(*row.shape[:2], keys.shape[1])

    def weighted(self, p: Tensor, values: Tensor) -> Tensor:
        """sum_j p_ij values_j -> [Hq, rows, width]."""
        return (self.by_key_head(p, values.shape[0]) @ values).view(*p.shape[:2], values.shape[2])

    def add_outer(self, total: Tensor, p: Tensor, row: Tensor) -> None:
        """total [B, Hkv, Nk, width]: its j-th row grows by sum_i p_ij row_i."""
        p, row = (self.by_key_head(t, total.shape[1]) for t in (p, row))
        total[self.b] += p.mT @ row


def parts(k: Tensor, v: Tensor, indices: Tensor) -> Iterator[GatheredPart | WholePart]:
    """All rows, some at a time."""
    B, _, Nq, top_k = indices.shape
    way = GatheredPart if k.shape[2] > GATHERED_BEYOND * top_k else WholePart
    for b, rows in chunks(B, Nq, way.numbers_per_row(k, v, indices)):
        yield way(k, v, b, rows, indices)


def scores(part: GatheredPart | WholePart, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(s, q k^T) of the part's rows; s is -inf where no key was chosen."""
    products = part.products(q, part.keys).masked_fill(~part.there, 0.0)
    s = products * scale.to(q.dtype).view(-1, 1, 1)
    return s.masked_fill(~part.there, NEG_INF), products


class GatheredAttention(torch.autograd.Function):
    """(out, lse, entropy, max_probability) of the keys `indices`, -1 for none."""

    @staticmethod
    def forward(ctx, q, k, v, scale, indices):
        ctx.set_materialize_grads(False)
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        lse, entropy, max_probability = (
            q.new_empty(q.shape[:3], dtype=sum_dtype(q)) for _ in range(3)
        )
        for part in parts(k, v, indices):
            at = part.b, slice(None), part.rows
            s, _ = scores(part, q[at].to(sum_dtype(q)), scale)
            p, *found = reference.softmax(s)
            out[at] = part.weighted(p, part.values).to(out.dtype)
            for t, row in zip((lse, entropy, max_probability), found, strict=True):
                t[at] = row
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


def gradients(
    dout, dlse, dentropy, q, k, v, scale, indices, out, lse, entropy
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dscale) by eq. ds of `reference.py`."""
    dtype = sum_dtype(q)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
    dscale = scale.new_zeros((q.shape[1],), dtype=dtype)
    for part in parts(k, v, indices):
        at = part.b, slice(None), part.rows
        row_lse = lse[at][..., None]
        empty = row_lse == NEG_INF
        row_q = q[at].to(dtype).masked_fill(empty, 0.0)
        s, products = scores(part, row_q, scale)
        p = (s - row_lse.masked_fill(empty, float("inf"))).exp()
        dp = torch.zeros_like(p)
        if dout is not None:
            row_dout = dout[at].to(dtype).masked_fill(empty, 0.0)
            delta = (row_dout * out[at].to(dtype)).sum(-1, keepdim=True)
            dp = part.products(row_dout, part.values) - delta
            part.add_outer(dv, p, row_dout)
        if dlse is not None:
            dp = dp + dlse[at][..., None]
        if dentropy is not None:
            log_p = (s - row_lse).masked_fill(p == 0, 0.0)
            dp = dp - dentropy[at][..., None] * (log_p + entropy[at][..., None])
        ds = (p * dp).masked_fill(empty | ~part.there, 0.0)
        dscale += (ds * products).sum((1, 2))
        ds = ds * scale.to(dtype).view(-1, 1, 1)
        dq[at] = part.weighted(ds, part.keys).to(q.dtype)
        part.add_outer(dk, ds, row_q)
    dscale = dscale if scale.numel() > 1 else dscale.sum().view(scale.shape)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dscale.to(scale.dtype)
