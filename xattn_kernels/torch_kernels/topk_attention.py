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
from ..core.call import TopKAttentionCall
from ..core.kernel_op import Gradients, Needs
from ..core.layout import TopKResults, empty_topk, rows_like, sum_dtype

CHUNK = 2**22  # scores, or elements of gathered keys and values
GATHERED_BEYOND = 32  # keys for each that is chosen: about where either way takes as long on a CPU
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NEG_INF = float("-inf")
NOTE = "keys chosen in PyTorch for a few queries at a time, in bounded memory"


def reasons(call: TopKAttentionCall) -> list[str]:
    """Everything of the usual dtypes runs, apart from tensors without values."""
    reasons = ["on the meta device there are no scores to choose by"] if call.q.is_meta else []
    if call.q.dtype not in DTYPES:
        reasons.append(f"{call.q.dtype} has no sums in PyTorch")
    if call.Dv == 0:
        reasons.append("Dv is 0")
    return reasons


def chunks(N: int, per_row: int) -> Iterator[slice]:
    """Rows that together have at most CHUNK numbers, or one row."""
    rows = max(1, CHUNK // max(per_row, 1))
    for first in range(0, N, rows):
        yield slice(first, min(first + rows, N))


def allowed_at(call: TopKAttentionCall, b: int, rows: slice) -> Tensor | None:
    """bool, broadcastable to [Hq, rows, Nk]; None where every key is allowed."""
    allowed, mask = None, call.mask
    if call.start is not None:
        j = torch.arange(call.Nk, device=call.device)
        allowed = (j >= call.start[b, rows, None]) & (j < call.stop[b, rows, None])
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
        chosen = torch.arange(Nk, device=s.device).expand(s.shape)
        if torch.compiler.is_compiling() or missing.any():
            chosen = chosen.masked_fill(missing, Nk).sort(-1).values
            chosen = chosen.masked_fill(chosen == Nk, -1)
    elif torch.compiler.is_compiling():  # a trace cannot look for ties
        chosen = reference.top_indices(s, top_k)
    else:
        # one key too many, whose place is then that of the lowest score
        values, order = s.topk(top_k + 1, sorted=False)
        lowest = values.topk(2, largest=False)
        order = order.masked_fill(values == NEG_INF, Nk)
        order = order.scatter_(-1, lowest.indices[..., :1], Nk).sort(-1).values[..., :-1]
        chosen = order.masked_fill(order == Nk, -1)
        next_one, last = lowest.values.unbind(-1)
        tied = ((last == next_one) & (last > NEG_INF)) | last.isnan()
        if tied.any():
            chosen[tied] = reference.top_indices(s[tied], top_k)
    return chosen, s.gather(-1, chosen.clamp_min(0)).masked_fill(chosen < 0, NEG_INF)


class GatheredPart:
    """Some rows of a batch element, beside the keys that each chose: [Hq, rows, top_k, width]."""

    def __init__(self, indices: Tensor, Hkv: int, Nk: int):
        Hq = indices.shape[0]
        first = (torch.arange(Hq, device=indices.device) // (Hq // Hkv) * Nk)[:, None, None]
        self.exists, self.places = indices >= 0, indices.clamp_min(0) + first

    @staticmethod
    def numbers_per_row(Hq: int, Nk: int, top_k: int, width: int) -> int:
        return Hq * top_k * width

    def chosen(self, t: Tensor) -> Tensor:
        """The chosen of the keys or values t [Hkv, Nk, width]."""
        return gathered_rows(t, self.places).masked_fill(~self.exists[..., None], 0.0)

    def products(self, row: Tensor, keys: Tensor) -> Tensor:
        """[Hq, rows, top_k] of row [Hq, rows, width] and `chosen` keys or values."""
        return (keys @ row[..., None]).squeeze(-1)

    def weighted(self, p: Tensor, values: Tensor) -> Tensor:
        """sum_j p_ij values_j -> [Hq, rows, width]."""
        return (p[..., None, :] @ values).squeeze(-2)

    def add_outer(self, total: Tensor, p: Tensor, row: Tensor) -> None:
        """total [Hkv, Nk, width]: its j-th row grows by sum_i p_ij row_i."""
        outer = (p[..., None] * row[..., None, :]).flatten(0, 2)
        total.flatten(0, 1).index_add_(0, self.places.reshape(-1), outer)


def gathered_rows(t: Tensor, places: Tensor) -> Tensor:
    """[*places.shape, width]: of t [Hkv, Nk, width] the rows `places`, counted over all heads."""
    return t.flatten(0, 1).index_select(0, places.reshape(-1)).view(*places.shape, t.shape[2])


class WholePart:
    """Some rows of a batch element, beside all keys and one of zeros: [Hkv, Nk + 1, width]."""

    def __init__(self, indices: Tensor, Hkv: int, Nk: int):
        self.Hkv, self.Nk, self.exists = Hkv, Nk, indices >= 0
        self.j = indices.masked_fill(indices < 0, Nk)
        used = torch.zeros((Hkv, Nk + 1), dtype=torch.bool, device=indices.device)
        used.scatter_(1, by_key_head(self.j, Hkv).flatten(1), True)
        self.unused = ~used[:, :Nk, None]

    @staticmethod
    def numbers_per_row(Hq: int, Nk: int, top_k: int, width: int) -> int:
        return Hq * (Nk + 1)

    def chosen(self, t: Tensor) -> Tensor:
        """The keys or values t, zeros where none of these rows chose one: they meet a p of 0."""
        return F.pad(t.masked_fill(self.unused, 0.0), (0, 0, 0, 1))

    def products(self, row: Tensor, keys: Tensor) -> Tensor:
        """[Hq, rows, top_k] of row [Hq, rows, width] and `chosen` keys or values."""
        products = by_key_head(row, self.Hkv) @ keys.mT
        return products.view(*row.shape[:2], self.Nk + 1).gather(2, self.j)

    def dense(self, p: Tensor) -> Tensor:
        """[Hkv, group * rows, Nk + 1] of [Hq, rows, top_k], 0 beside the chosen keys."""
        dense = p.new_zeros((*p.shape[:2], self.Nk + 1)).scatter_(2, self.j, p)
        return by_key_head(dense, self.Hkv)

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
    """The faster of the two ways."""
    return GatheredPart if Nk > GATHERED_BEYOND * top_k else WholePart


def summable(t: Tensor, b: int) -> Tensor:
    """Keys or values [Hkv, Nk, width] of one batch element, as sums are."""
    return t[b].to(sum_dtype(t)).contiguous()


def forward(call: TopKAttentionCall) -> TopKResults:
    """The results of a call by keys; the choice is always kept as indices."""
    q, dtype = call.q, sum_dtype(call.q)
    results = empty_topk(call, "torch")
    top_k, scale = min(call.top_k, call.Nk), scale_of(call, dtype)
    way, width = way_of(call.Nk, top_k), call.D + call.Dv
    per_row = max(call.Hq * call.Nk, way.numbers_per_row(call.Hq, call.Nk, top_k, width))
    for b in range(call.B):
        keys, values = summable(call.k, b), summable(call.v, b)
        for queries in chunks(call.Nq, per_row):
            here = b, slice(None), queries
            s = scores(q[here].to(dtype), keys, scale)
            allowed = allowed_at(call, b, queries)
            s = s if allowed is None else s.masked_fill(~allowed, NEG_INF)
            chosen, s = top_scores(s, top_k)
            p, *statistics = reference.softmax(s)
            part = way(chosen, call.Hkv, call.Nk)
            results.out[here] = part.weighted(p, part.chosen(values)).to(q.dtype)
            results.indices[here] = reference.with_missing(chosen, call.top_k)
            of_rows = (results.lse, results.entropy, results.max_probability)
            for t, row in zip(of_rows, statistics, strict=True):
                if t is not None:
                    t[here] = row
    return results


def scale_of(call: TopKAttentionCall, dtype: torch.dtype) -> float | Tensor:
    """The scale as it multiplies scores [Hq, rows, Nk]."""
    return call.scale if call.scale_tensor is None else call.scale_tensor.to(dtype).view(-1, 1, 1)


def scores(q: Tensor, keys: Tensor, scale: float | Tensor) -> Tensor:
    """[Hq, rows, Nk] of q [Hq, rows, D] and all keys [Hkv, Nk, D]."""
    products = (by_key_head(q, len(keys)) @ keys.mT).view(*q.shape[:2], keys.shape[1])
    return products * scale


def backward(
    upstream: TopKResults, call: TopKAttentionCall, results: TopKResults, needs: Needs
) -> Gradients:
    """The gradients that `needs` names, of q, k, v and scale_tensor, by eq. ds."""
    q, k, v, dtype = call.q, call.k, call.v, sum_dtype(call.q)
    top_k, scale = min(call.top_k, call.Nk), scale_of(call, dtype)
    dq, dscale = rows_like(q), q.new_zeros((call.Hq,), dtype=dtype)
    dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
    way, width = way_of(call.Nk, top_k), call.D + call.Dv
    for b in range(call.B):
        keys, values = summable(k, b), summable(v, b)
        for queries in chunks(call.Nq, way.numbers_per_row(call.Hq, call.Nk, top_k, width)):
            here = b, slice(None), queries
            part = way(results.indices[here][..., :top_k].long(), call.Hkv, call.Nk)
            row_lse = results.lse[here][..., None]
            empty = row_lse == NEG_INF
            row_q, row_keys = q[here].to(dtype).masked_fill(empty, 0.0), part.chosen(keys)
            products = part.products(row_q, row_keys)
            s = (products * scale).masked_fill(~part.exists, NEG_INF)
            p = (s - row_lse.masked_fill(empty, float("inf"))).exp()
            dp = torch.zeros_like(p)
            if upstream.out is not None:
                row_dout = upstream.out[here].to(dtype).masked_fill(empty, 0.0)
                delta = (row_dout * results.out[here].to(dtype)).sum(-1, keepdim=True)
                dp = part.products(row_dout, part.chosen(values)) - delta
                part.add_outer(dv[b], p, row_dout)
            if upstream.lse is not None:
                dp = dp + upstream.lse[here][..., None]
            if upstream.entropy is not None:
                log_p = (s - row_lse).masked_fill(p == 0, 0.0)
                row_entropy = results.entropy[here][..., None]
                dp = dp - upstream.entropy[here][..., None] * (log_p + row_entropy)
            ds = (p * dp).masked_fill(empty | ~part.exists, 0.0)
            dscale += (ds * products).sum((1, 2))
            ds = ds * scale
            dq[here] = part.weighted(ds, row_keys).to(q.dtype)
            part.add_outer(dk[b], ds, row_q)
    grads = {"q": dq, "k": gradient_like(dk, k), "v": gradient_like(dv, v)}
    if call.scale_tensor is not None:
        grads["scale_tensor"] = scale_gradient(dscale, call.scale_tensor)
    return grads


def gradient_like(gradient: Tensor, t: Tensor) -> Tensor:
    """A gradient of t, summed in another dtype, in the layout of gradients of t."""
    return rows_like(t).copy_(gradient)


def scale_gradient(dscale: Tensor, scale_tensor: Tensor) -> Tensor:
    """The gradient of a scale from that of each head."""
    dscale = dscale if scale_tensor.numel() > 1 else dscale.sum()
    return dscale.to(scale_tensor.dtype).view_as(scale_tensor)
