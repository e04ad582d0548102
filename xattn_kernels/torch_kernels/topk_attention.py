"""Top-k attention in plain PyTorch: keys are chosen and attended to for a few queries at a time.

The scores of a chunk of queries exist, those of all never: what a call keeps is the chosen indices,
from which both directions compute their chunks again. Few keys of many are gathered; of fewer keys
a product with all of them is faster, and the others get a probability of 0. A chunk holds at most
CHUNK numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..core.call import TopKAttentionInputs, TopKAttentionResult
from ..core.kernel_op import refuse_double_backward

CHUNK = 2**22  # scores, or elements of gathered keys and values
GATHERED_BEYOND = 32  # keys for each that is chosen: about where either way takes as long on a CPU
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NEG_INF = float("-inf")
NOTE = "keys chosen in PyTorch for a few queries at a time, in bounded memory"


def reasons(x: TopKAttentionInputs) -> list[str]:
    """Everything of the usual dtypes runs, apart from tensors without values."""
    found = ["on the meta device there are no scores to choose by"] if x.q.is_meta else []
    if x.q.dtype not in DTYPES:
        found.append(f"{x.q.dtype} has no sums in PyTorch")
    if x.Dv == 0:
        found.append("Dv is 0")
    return found


def topk_attention(x: TopKAttentionInputs) -> TopKAttentionResult:
    scale = (
        x.scale if isinstance(x.scale, Tensor) else x.q.new_tensor(x.scale, dtype=sum_dtype(x.q))
    )
    out, lse, entropy, max_probability, indices = GatheredAttention.apply(
        x.q, x.k, x.v, scale, *x.bounds(), x.mask, min(x.top_k, x.Nk)
    )
    return TopKAttentionResult(
        out,
        lse if x.return_lse else None,
        reference.with_missing(indices, x.top_k) if x.return_indices else None,
        *((entropy, max_probability) if x.return_statistics else (None, None)),
    )


def sum_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def chunks(N: int, per_row: int) -> Iterator[slice]:
    """Rows that together have at most CHUNK numbers, or one row."""
    rows = max(1, CHUNK // max(per_row, 1))
    for first in range(0, N, rows):
        yield slice(first, min(first + rows, N))


def allowed_at(
    start: Tensor | None, stop: Tensor | None, mask: Tensor | None, b: int, rows: slice, Nk: int
) -> Tensor | None:
    """bool, broadcastable to [Hq, rows, Nk]; None where every key is allowed."""
    allowed = None
    if start is not None:
        j = torch.arange(Nk, device=start.device)
        allowed = (j >= start[b, rows, None]) & (j < stop[b, rows, None])
    if mask is not None:
        mask = mask[b if mask.shape[0] > 1 else 0]
        mask = mask[:, rows if mask.shape[1] > 1 else slice(None)]
        allowed = mask if allowed is None else mask & allowed
    return allowed


def top_indices(s: Tensor, top_k: int) -> Tensor:
    """`reference.top_indices`, faster."""
    return top_scores(s, top_k)[0]


def top_scores(s: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(`reference.top_indices`, their scores) by a partial sort; a whole one, which is stable, only
    of rows whose last chosen score is that of a key left out too."""
    Nk = s.shape[-1]
    if top_k == Nk:
        missing = s == NEG_INF
        found = torch.arange(Nk, device=s.device).expand(s.shape)
        if torch.compiler.is_compiling() or missing.any():
            found = found.masked_fill(missing, Nk).sort(-1).values
            found = found.masked_fill(found == Nk, -1)
    elif torch.compiler.is_compiling():  # a trace cannot look for ties
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


class GatheredPart:
    """Some rows of a batch element, beside the keys that each chose: [Hq, rows, top_k, width]."""

    def __init__(self, indices: Tensor, Hkv: int, Nk: int):
        Hq = indices.shape[0]
        first = (torch.arange(Hq, device=indices.device) // (Hq // Hkv) * Nk)[:, None, None]
        self.there, self.at = indices >= 0, indices.clamp_min(0) + first

    @staticmethod
    def numbers_per_row(Hq: int, Nk: int, top_k: int, width: int) -> int:
        return Hq * top_k * width

    def of(self, t: Tensor) -> Tensor:
        """The chosen of the keys or values t [Hkv, Nk, width]."""
        return gathered_rows(t, self.at).masked_fill(~self.there[..., None], 0.0)

    def products(self, row: Tensor, keys: Tensor) -> Tensor:
        """[Hq, rows, top_k] of row [Hq, rows, width] and `of` keys or values."""
        return (keys @ row[..., None]).squeeze(-1)

    def weighted(self, p: Tensor, values: Tensor) -> Tensor:
        """sum_j p_ij values_j -> [Hq, rows, width]."""
        return (p[..., None, :] @ values).squeeze(-2)

    def add_outer(self, total: Tensor, p: Tensor, row: Tensor) -> None:
        """total [Hkv, Nk, width]: its j-th row grows by sum_i p_ij row_i."""
        outer = (p[..., None] * row[..., None, :]).flatten(0, 2)
        total.flatten(0, 1).index_add_(0, self.at.reshape(-1), outer)


def gathered_rows(t: Tensor, at: Tensor) -> Tensor:
    """[*at.shape, width]: of t [Hkv, Nk, width] the rows `at`, counted over all heads."""
    return t.flatten(0, 1).index_select(0, at.reshape(-1)).view(*at.shape, t.shape[2])


class WholePart:
    """Some rows of a batch element, beside all keys and one of zeros: [Hkv, Nk + 1, width]."""

    def __init__(self, indices: Tensor, Hkv: int, Nk: int):
        self.Hkv, self.Nk, self.there = Hkv, Nk, indices >= 0
        self.j = indices.masked_fill(indices < 0, Nk)
        used = torch.zeros((Hkv, Nk + 1), dtype=torch.bool, device=indices.device)
        used.scatter_(1, by_key_head(self.j, Hkv).flatten(1), True)
        self.unused = ~used[:, :Nk, None]

    @staticmethod
    def numbers_per_row(Hq: int, Nk: int, top_k: int, width: int) -> int:
        return Hq * (Nk + 1)

    def of(self, t: Tensor) -> Tensor:
        """The keys or values t, zeros where none of these rows chose one: they meet a p of 0."""
        return F.pad(t.masked_fill(self.unused, 0.0), (0, 0, 0, 1))

    def products(self, row: Tensor, keys: Tensor) -> Tensor:
        """[Hq, rows, top_k] of row [Hq, rows, width] and `of` keys or values."""
        found = by_key_head(row, self.Hkv) @ keys.mT
        return found.view(*row.shape[:2], self.Nk + 1).gather(2, self.j)

    def dense(self, p: Tensor) -> Tensor:
        """[Hkv, group * rows, Nk + 1] of [Hq, rows, top_k], 0 beside the chosen keys."""
        found = p.new_zeros((*p.shape[:2], self.Nk + 1)).scatter_(2, self.j, p)
        return by_key_head(found, self.Hkv)

    def weighted(self, p: Tensor, values: Tensor) -> Tensor:
        """sum_j p_ij values_j -> [Hq, rows, width]."""
        return (self.dense(p) @ values).view(*p.shape[:2], values.shape[2])

    def add_outer(self, total: Tensor, p: Tensor, row: Tensor) -> None:
        """total [Hkv, Nk, width]: its j-th row grows by sum_i p_ij row_i."""
        total += (self.dense(p).mT @ by_key_head(row, self.Hkv))[:, : self.Nk]


def by_key_head(t: Tensor, Hkv: int) -> Tensor:
    """[Hkv, group * rows, width] of [Hq, rows, width]."""
    return t.reshape(Hkv, t.shape[0] // Hkv * t.shape[1], t.shape[2])


def way_of(Nk: int, top_k: int) -> type[GatheredPart] | type[WholePart]:
    return GatheredPart if Nk > GATHERED_BEYOND * top_k else WholePart


def of_batch(t: Tensor, b: int) -> Tensor:
    """Keys or values [Hkv, Nk, width] of one batch element, as sums are."""
    return t[b].to(sum_dtype(t)).contiguous()


class GatheredAttention(torch.autograd.Function):
    """(out, lse, entropy, max_probability, indices of the chosen keys in ascending order, then
    -1)."""

    @staticmethod
    def forward(ctx, q, k, v, scale, start, stop, mask, top_k):
        ctx.set_materialize_grads(False)
        (B, Hq, Nq, _), Nk, dtype = q.shape, k.shape[2], sum_dtype(q)
        indices = q.new_empty((B, Hq, Nq, top_k), dtype=torch.int32)
        out = q.new_empty((B, Hq, Nq, v.shape[3]))
        rows = [q.new_empty((B, Hq, Nq), dtype=dtype) for _ in range(3)]
        way, width = way_of(Nk, top_k), k.shape[3] + v.shape[3]
        per_row = max(Hq * Nk, way.numbers_per_row(Hq, Nk, top_k, width))
        for b in range(B):
            keys, values = of_batch(k, b), of_batch(v, b)
            for queries in chunks(Nq, per_row):
                at = b, slice(None), queries
                s = scores(q[at].to(dtype), keys, scale)
                allowed = allowed_at(start, stop, mask, b, queries, Nk)
                s = s if allowed is None else s.masked_fill(~allowed, NEG_INF)
                chosen, s = top_scores(s, top_k)
                p, *found = reference.softmax(s)
                part = way(chosen, len(keys), Nk)
                out[at] = part.weighted(p, part.of(values)).to(out.dtype)
                indices[at] = chosen
                for t, row in zip(rows, found, strict=True):
                    t[at] = row
        lse, entropy, max_probability = rows
        ctx.save_for_backward(q, k, v, scale, indices, out, lse, entropy)
        ctx.mark_non_differentiable(max_probability, indices)
        return out, lse, entropy, max_probability, indices

    @staticmethod
    def backward(ctx, dout, dlse, dentropy, *_):
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        with torch.no_grad():
            grads = gradients(dout, dlse, dentropy, *saved)
        grads = tuple(
            g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[:4], strict=True)
        )
        grads = refuse_double_backward("topk_attention", grads, (dout, *saved[:4]))
        return *grads, *[None] * 4


def scores(q: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """[Hq, rows, Nk] of q [Hq, rows, D] and all keys [Hkv, Nk, D]."""
    found = (by_key_head(q, len(keys)) @ keys.mT).view(*q.shape[:2], keys.shape[1])
    return found * scale.detach().to(q.dtype).view(-1, 1, 1)


def gradients(
    dout, dlse, dentropy, q, k, v, scale, indices, out, lse, entropy
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dscale) by eq. ds of `reference.py`."""
    (B, Hq, Nq, _), Nk, top_k, dtype = q.shape, k.shape[2], indices.shape[3], sum_dtype(q)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
    dscale = scale.new_zeros((Hq,), dtype=dtype)
    way, width = way_of(Nk, top_k), k.shape[3] + v.shape[3]
    for b in range(B):
        keys, values = of_batch(k, b), of_batch(v, b)
        for queries in chunks(Nq, way.numbers_per_row(Hq, Nk, top_k, width)):
            at = b, slice(None), queries
            part = way(indices[at].long(), len(keys), Nk)
            row_lse = lse[at][..., None]
            empty = row_lse == NEG_INF
            row_q, row_keys = q[at].to(dtype).masked_fill(empty, 0.0), part.of(keys)
            products = part.products(row_q, row_keys)
            s = (products * scale.to(dtype).view(-1, 1, 1)).masked_fill(~part.there, NEG_INF)
            p = (s - row_lse.masked_fill(empty, float("inf"))).exp()
            dp = torch.zeros_like(p)
            if dout is not None:
                row_dout = dout[at].to(dtype).masked_fill(empty, 0.0)
                delta = (row_dout * out[at].to(dtype)).sum(-1, keepdim=True)
                dp = part.products(row_dout, part.of(values)) - delta
                part.add_outer(dv[b], p, row_dout)
            if dlse is not None:
                dp = dp + dlse[at][..., None]
            if dentropy is not None:
                log_p = (s - row_lse).masked_fill(p == 0, 0.0)
                dp = dp - dentropy[at][..., None] * (log_p + entropy[at][..., None])
            ds = (p * dp).masked_fill(empty | ~part.there, 0.0)
            dscale += (ds * products).sum((1, 2))
            ds = ds * scale.to(dtype).view(-1, 1, 1)
            dq[at] = part.weighted(ds, row_keys).to(q.dtype)
            part.add_outer(dk[b], ds, row_q)
    dscale = dscale if scale.numel() > 1 else dscale.sum().view(scale.shape)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dscale.to(scale.dtype)
