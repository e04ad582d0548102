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
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .autograd import refuse_double_backward
from .inputs import TopKAttentionInputs, TopKAttentionResult
from .masks import KeyInterval

CHUNK = 2**22  # scores, or elements of gathered keys and values
GATHERED_BEYOND = 32  # keys for each that is chosen: about where either way takes as long on a CPU
NEG_INF = float("-inf")
NOTE = "keys chosen in PyTorch for a few queries at a time, in bounded memory"


def reasons(x: TopKAttentionInputs) -> list[str]:
    """Everything runs, apart from intervals without values."""
    if x.q.is_meta and x.interval is not None:
        return ["on the meta device a KeyInterval has no values"]
    return []


def topk_attention(x: TopKAttentionInputs) -> TopKAttentionResult:
    indices, s = choose(x)
    scale = (
        x.scale if isinstance(x.scale, Tensor) else x.q.new_tensor(x.scale, dtype=sum_dtype(x.q))
    )
    out, lse, entropy, max_probability = GatheredAttention.apply(x.q, x.k, x.v, scale, indices, s)
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


@torch.no_grad()
def choose(x: TopKAttentionInputs) -> tuple[Tensor, Tensor]:
    """(int32, scores) [B, Hq, Nq, min(top_k, Nk)] both: the chosen keys in ascending order, then
    -1 with a score of -inf."""
    shape = (x.B, x.Hq, x.Nq, min(x.top_k, x.Nk))
    indices, found = (
        x.q.new_empty(shape, dtype=torch.int32),
        x.q.new_empty(shape, dtype=sum_dtype(x.q)),
    )
    for b, rows in chunks(x.B, x.Nq, x.Hq * x.Nk):
        s = reference.scores_to_choose_by(rows_of(x, b, rows))[0]
        at = b, slice(None), rows
        indices[at], found[at] = top_scores(s, shape[3])
    return indices, found


def top_indices(s: Tensor, top_k: int) -> Tensor:
    """`reference.top_indices`, faster."""
    return top_scores(s, top_k)[0]


def top_scores(s: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(`reference.top_indices`, their scores) by a partial sort; a whole one, which is stable, only
    of rows whose last chosen score is that of a key left out too."""
    Nk = s.shape[-1]
    if top_k in (0, Nk):
        found = reference.top_indices(s, top_k)
    else:
        # one key too many, whose place is then that of the lowest score
        values, order = s.topk(top_k + 1, sorted=False)
        lowest = values.topk(2, largest=False)
        order = order.masked_fill(values == NEG_INF, Nk)
        order = order.scatter_(-1, lowest.indices[..., :1], Nk).sort(-1).values[..., :-1]
        found = order.masked_fill(order == Nk, -1)
        next_one, last = lowest.values.unbind(-1)
        tied = ((last == next_one) & (last > NEG_INF)) | last.isnan()
        if tied.any():
            found[tied] = reference.top_indices(s[tied], top_k)
    return found, s.gather(-1, found.clamp_min(0)).masked_fill(found < 0, NEG_INF)


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
        self.k, self.v, self.b, self.rows = k, v, b, rows
        self.there, self.at = j >= 0, j.clamp_min(0) + first

    @staticmethod
    def numbers_per_row(k: Tensor, v: Tensor, indices: Tensor) -> int:
        return indices.shape[1] * indices.shape[3] * (k.shape[3] + v.shape[3])

    def of(self, t: Tensor) -> Tensor:
        """The chosen of the keys or values t."""
        return Gathered(t).rows(self.b, self.at).masked_fill(~self.there[..., None], 0.0)

    def products(self, row: Tensor, keys: Tensor) -> Tensor:
        """[Hq, rows, top_k] of row [Hq, rows, width] and `of` keys or values."""
        return (keys @ row[..., None]).squeeze(-1)

    def weighted(self, p: Tensor, values: Tensor) -> Tensor:
        """sum_j p_ij values_j -> [Hq, rows, width]."""
        return (p[..., None, :] @ values).squeeze(-2)

    def add_outer(self, total: Tensor, p: Tensor, row: Tensor) -> None:
        """total [B, Hkv, Nk, width]: its j-th row grows by sum_i p_ij row_i."""
        outer = (p[..., None] * row[..., None, :]).flatten(0, 2)
        total[self.b].flatten(0, 1).index_add_(0, self.at.reshape(-1), outer)


class WholePart:
    """Some rows of a batch element, beside all keys and one of zeros: [Hkv, Nk + 1, width]."""

    def __init__(self, k: Tensor, v: Tensor, b: int, rows: slice, indices: Tensor):
        self.Hkv, self.Nk = k.shape[1:3]
        j = indices[b, :, rows].long()
        self.k, self.v, self.b, self.rows, self.there = k, v, b, rows, j >= 0
        self.j = j.masked_fill(j < 0, self.Nk)
        used = torch.zeros((self.Hkv, self.Nk), dtype=torch.bool, device=k.device)
        used = F.pad(used, (0, 1)).scatter_(1, self.by_key_head(self.j).flatten(1), True)
        self.unused = ~used[:, : self.Nk, None]

    @staticmethod
    def numbers_per_row(k: Tensor, v: Tensor, indices: Tensor) -> int:
        return indices.shape[1] * (k.shape[2] + 1)

    def by_key_head(self, t: Tensor) -> Tensor:
        """[Hkv, group * rows, width] of [Hq, rows, width]."""
        return t.reshape(self.Hkv, t.shape[0] // self.Hkv * t.shape[1], t.shape[2])

    def of(self, t: Tensor) -> Tensor:
        """The keys or values t, zeros where none of these rows chose one: they meet a p of 0."""
        return F.pad(t[self.b].to(sum_dtype(t)).masked_fill(self.unused, 0.0), (0, 0, 0, 1))

    def products(self, row: Tensor, keys: Tensor) -> Tensor:
        """[Hq, rows, top_k] of row [Hq, rows, width] and `of` keys or values."""
        found = self.by_key_head(row) @ keys.mT
        return found.view(*row.shape[:2], self.Nk + 1).gather(2, self.j)

    def dense(self, p: Tensor) -> Tensor:
        """[Hkv, group * rows, Nk + 1] of [Hq, rows, top_k], 0 beside the chosen keys."""
        return self.by_key_head(p.new_zeros((*p.shape[:2], self.Nk + 1)).scatter_(2, self.j, p))

    def weighted(self, p: Tensor, values: Tensor) -> Tensor:
        """sum_j p_ij values_j -> [Hq, rows, width]."""
        return (self.dense(p) @ values).view(*p.shape[:2], values.shape[2])

    def add_outer(self, total: Tensor, p: Tensor, row: Tensor) -> None:
        """total [B, Hkv, Nk, width]: its j-th row grows by sum_i p_ij row_i."""
        total[self.b] += (self.dense(p).mT @ self.by_key_head(row))[:, : self.Nk]


def parts(k: Tensor, v: Tensor, indices: Tensor) -> Iterator[GatheredPart | WholePart]:
    """All rows, some at a time."""
    B, _, Nq, top_k = indices.shape
    way = GatheredPart if k.shape[2] > GATHERED_BEYOND * top_k else WholePart
    for b, rows in chunks(B, Nq, way.numbers_per_row(k, v, indices)):
        yield way(k, v, b, rows, indices)


class GatheredAttention(torch.autograd.Function):
    """(out, lse, entropy, max_probability) of the keys `indices`, -1 for none, and their scores."""

    @staticmethod
    def forward(ctx, q, k, v, scale, indices, s):
        ctx.set_materialize_grads(False)
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        p, lse, entropy, max_probability = reference.softmax(s)
        for part in parts(k, v, indices):
            at = part.b, slice(None), part.rows
            out[at] = part.weighted(p[at], part.of(v)).to(out.dtype)
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
        return *grads, None, None


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
        row_q, keys = q[at].to(dtype).masked_fill(empty, 0.0), part.of(k)
        products = part.products(row_q, keys)
        s = (products * scale.to(dtype).view(-1, 1, 1)).masked_fill(~part.there, NEG_INF)
        p = (s - row_lse.masked_fill(empty, float("inf"))).exp()
        dp = torch.zeros_like(p)
        if dout is not None:
            row_dout = dout[at].to(dtype).masked_fill(empty, 0.0)
            delta = (row_dout * out[at].to(dtype)).sum(-1, keepdim=True)
            dp = part.products(row_dout, part.of(v)) - delta
            part.add_outer(dv, p, row_dout)
        if dlse is not None:
            dp = dp + dlse[at][..., None]
        if dentropy is not None:
            log_p = (s - row_lse).masked_fill(p == 0, 0.0)
            dp = dp - dentropy[at][..., None] * (log_p + entropy[at][..., None])
        ds = (p * dp).masked_fill(empty | ~part.there, 0.0)
        dscale += (ds * products).sum((1, 2))
        ds = ds * scale.to(dtype).view(-1, 1, 1)
        dq[at] = part.weighted(ds, keys).to(q.dtype)
        part.add_outer(dk, ds, row_q)
    dscale = dscale if scale.numel() > 1 else dscale.sum().view(scale.shape)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dscale.to(scale.dtype)
