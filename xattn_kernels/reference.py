"""The equations in eager PyTorch: the oracle of every kernel, and the backend named `eager`.

    s   = softcap(scale * q k^T) + bias                 over the keys that the mask allows
    p   = softmax(s)      out = dropout(p) v            lse = log(sum(exp(s)))
    entropy = lse - sum_j p_j s_j                       max_probability = exp(max_j s_j - lse)

    ds  = p * (dp - delta + dlse - dentropy * (s - lse + entropy))                     (eq. ds)
    dp  = dropout(dout v^T)       delta = sum_d dout * out
    dq  = scale * ds k     dk = scale * ds^T q     dv = dropout(p)^T dout     dbias = ds
    dscale_h = sum_i <q_i, dq_i> / scale_h             (with a softcap c: ds * (1 - (s / c)^2))

    y = x + tanh(gate) * h                   dx = dy     dh = tanh(gate) * dy        (eq. gate)
    dgate = (1 - tanh(gate)^2) * sum dy * h
    normed = weight * n + bias      n = (y - mean) / sqrt(mean((y - mean)^2) + eps)  (eq. norm)
    dn = weight * dnormed           dy += (dn - mean(dn) - n * mean(n * dn)) / sqrt(...)
    dweight = sum n * dnormed       dbias = sum dnormed       (rms: mean(y) and mean(dn) are 0)

The code runs in every dtype up to float64, on every device, and is differentiable any number of
times. Its cost is the [B, Hq, Nq, Nk] tensors that the kernels avoid.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .core.call import (
    CrossAttentionInputs,
    CrossAttentionResult,
    TopKAttentionInputs,
    TopKAttentionResult,
)
from .masks import KeyInterval

NEG_INF = float("-inf")


def reasons(x: CrossAttentionInputs) -> list[str]:
    """No reasons: the reference can run every call."""
    return []


def philox_keep(
    seed: Tensor, dropout_p: float, B: int, Hq: int, Nq: int, Nk: int, first_head: int = 0
) -> Tensor:
    """The probabilities that dropout keeps, bool [B, Hq, Nq, Nk]: the same bits as in the kernels.

    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with
    key = the two halves of `seed` and counter = (j, i, h, b) keeps where word 0 >= round(p * 2^32).
    h counts from `first_head`, so that the bits of one head can be computed alone.
    """
    low32 = 0xFFFFFFFF

    def mul(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        product = a * b  # the product wraps modulo 2^64, which keeps both halves right
        return (product >> 32) & low32, product & low32

    def axis(n: int, dim: int) -> Tensor:
        return torch.arange(n, dtype=torch.int64, device=seed.device).view(
            [-1 if d == dim else 1 for d in range(4)]
        )

    c0, c1, c2, c3 = axis(Nk, 3), axis(Nq, 2), first_head + axis(Hq, 1), axis(B, 0)
    seed = seed.reshape(())
    key0, key1 = seed & low32, (seed >> 32) & low32
    for _ in range(10):
        high0, low0 = mul(0xD2511F53, c0)
        high1, low1 = mul(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & low32, (key1 + 0xBB67AE85) & low32
    return (c0 >= round(dropout_p * 2**32)).expand(B, Hq, Nq, Nk)


def allowed_keys(x: CrossAttentionInputs) -> Tensor | None:
    """The allowed keys, bool, broadcastable to [B, Hq, Nq, Nk]; None if every key is allowed."""
    if x.interval is None:
        return x.mask
    start, stop = x.bounds()
    j = torch.arange(x.Nk, device=x.q.device)
    dense = (j >= start[:, None, :, None]) & (j < stop[:, None, :, None])
    return dense if x.mask is None else dense & x.mask


def used_keys(t: Tensor, x: CrossAttentionInputs) -> Tensor:
    """`t` [B, Hkv, Nk, *] with zeros in the padding of each batch element.

    The padding is before the first and after the last interval, and may hold NaN.
    """
    if x.interval is None or x.Nq == 0:
        return t
    start, stop = x.bounds()
    empty = start >= stop
    first = start.masked_fill(empty, x.Nk).amin(1, keepdim=True)
    last = stop.masked_fill(empty, 0).amax(1, keepdim=True)
    j = torch.arange(x.Nk, device=t.device)
    return t.masked_fill(((j < first) | (j >= last))[:, None, :, None], 0.0)


def scores(x: CrossAttentionInputs) -> Tensor:
    """The scores s [B, Hq, Nq, Nk] in float32 at least, -inf where the mask forbids a key."""
    k = used_keys(x.k, x).repeat_interleave(x.Hq // x.Hkv, dim=1)
    s = x.q @ k.transpose(-1, -2)
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    s = s * (x.scale.to(s.dtype).view(1, -1, 1, 1) if isinstance(x.scale, Tensor) else x.scale)
    if x.softcap is not None:
        s = x.softcap * torch.tanh(s / x.softcap)
    if x.bias is not None:
        s = s + x.bias
    allowed = allowed_keys(x)
    return s if allowed is None else s.masked_fill(~allowed, NEG_INF)


def softmax(s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The softmax over the last dimension: (p, lse, entropy, max_probability).

    A row of -inf has p = 0, lse = -inf, entropy = max_probability = 0 and gradients of 0. The code
    never forms `inf - inf` or `log 0`, so it has no NaN to remove.
    """
    if s.shape[-1] == 0:
        row = s.sum(-1)
        return s, row + NEG_INF, row, row.detach()
    m = s.detach().amax(-1, keepdim=True)
    m = m.masked_fill(m == NEG_INF, 0.0)
    t = s - m
    e = t.exp()
    l = e.sum(-1, keepdim=True)
    empty = l == 0
    l = l.masked_fill(empty, 1.0)
    p = e / l
    lse = (m + l.log()).masked_fill(empty, NEG_INF)
    entropy = l.log() - (p * t.masked_fill(t == NEG_INF, 0.0)).sum(-1, keepdim=True)
    max_probability = (1.0 / l).detach().masked_fill(empty, 0.0)
    return p, *(row.squeeze(-1) for row in (lse, entropy, max_probability))


def drop(p: Tensor, x: CrossAttentionInputs) -> Tensor:
    """p after dropout: 0, or p / (1 - dropout_p)."""
    if x.dropout_p == 0.0:
        return p
    keep = philox_keep(x.seed, x.dropout_p, x.B, x.Hq, x.Nq, x.Nk)
    return (p / (1.0 - x.dropout_p)).masked_fill(~keep, 0.0)


def cross_attention(x: CrossAttentionInputs) -> CrossAttentionResult:
    """The results out, lse, entropy and max_probability by the equations at the top."""
    p, lse, entropy, max_probability = softmax(scores(x))
    v = used_keys(x.v, x).repeat_interleave(x.Hq // x.Hkv, dim=1)
    out = drop(p, x).to(v.dtype) @ v
    statistics = (entropy, max_probability) if x.return_statistics else (None, None)
    return CrossAttentionResult(out, lse if x.return_lse else None, *statistics)


def attention_weights(x: CrossAttentionInputs, lse: Tensor | None, average_heads: bool) -> Tensor:
    """The weights p after dropout: [B, Nq, Nk] (the mean over heads) or [B, Hq, Nq, Nk].

    With `lse` [B, Hq, Nq] the probabilities are exp(s - lse) and lse receives a gradient.
    """
    s = scores(x)
    if lse is None:
        p = softmax(s)[0]
    else:
        # an empty row has lse = -inf: with +inf in its place p is 0 without an inf - inf
        p = (s - lse.masked_fill(lse == NEG_INF, float("inf"))[..., None]).exp()
    p = drop(p, x)
    return p.mean(1) if average_heads else p


def top_indices(s: Tensor, top_k: int) -> Tensor:
    """The keys of the top_k highest scores in ascending order, int64 [..., top_k].

    Indices of -1 follow where fewer than top_k scores are above -inf. Lower keys win among equal
    scores, and NaN is above all numbers. top_k is at most the number of scores.
    """
    s = s.detach() + 0.0  # -0 becomes 0, since a sort by bits would order the two
    Nk = s.shape[-1]
    order = s.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    order = order.masked_fill(s.gather(-1, order) == NEG_INF, Nk).sort(-1).values
    return order.masked_fill(order == Nk, -1)


def scores_to_choose_by(x: TopKAttentionInputs) -> Tensor:
    """The scores of float32 products at least, since 16 bits would make many of them equal."""
    q, k = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (x.q, x.k))
    return scores(replace(x, q=q, k=k))


def choose(x: TopKAttentionInputs) -> Tensor:
    """The chosen keys, int64 [B, Hq, Nq, min(top_k, Nk)]: `top_indices` of the scores."""
    return top_indices(scores_to_choose_by(x), min(x.top_k, x.Nk))


def topk_attention(x: TopKAttentionInputs) -> TopKAttentionResult:
    """The `cross_attention` over the chosen keys, or over the keys of the chosen blocks."""
    if x.topk_blocks is None:
        indices, wanted = choose(x), x.top_k
        chosen = named(indices, x.Nk)
    else:
        indices, wanted = choose_blocks(x), x.topk_blocks[1]
        chosen = keys_of_blocks(named(indices, n_blocks(x)), x)
    p, lse, entropy, max_probability = softmax(scores(x).masked_fill(~chosen, NEG_INF))
    v = used_keys(x.v, x).repeat_interleave(x.Hq // x.Hkv, dim=1)
    return TopKAttentionResult(
        p.to(v.dtype) @ v,
        lse if x.return_lse else None,
        with_missing(indices, wanted) if x.return_indices else None,
        *((entropy, max_probability) if x.return_statistics else (None, None)),
    )


def named(indices: Tensor, n: int) -> Tensor:
    """A bool tensor [..., n], True at the `indices` [..., top_k]; an index of -1 names nothing."""
    chosen = torch.zeros((*indices.shape[:-1], n + 1), dtype=torch.bool, device=indices.device)
    return chosen.scatter_(-1, indices.long().masked_fill(indices < 0, n), True)[..., :n]


def with_missing(indices: Tensor, top_k: int) -> Tensor:
    """The indices as int32, filled with -1 to [..., top_k]."""
    return F.pad(indices, (0, top_k - indices.shape[-1]), value=-1).to(torch.int32)


QUERIES_PER_CHOICE = 64  # the neighbouring queries, in all heads of a group, that share blocks


def n_blocks(x: TopKAttentionInputs) -> int:
    """The number of blocks of keys; the last block may be shorter."""
    return -(-x.Nk // x.topk_blocks[0])


def seen_keys(x: CrossAttentionInputs) -> Tensor:
    """The keys that some query of the batch element may see, bool [B or 1, Nk]."""
    seen = torch.ones((1, x.Nk), dtype=torch.bool, device=x.q.device)
    if x.interval is not None:
        start, stop = x.bounds()
        empty = start >= stop
        # a key is seen if more intervals have begun than ended; empty ones begin and end at Nk
        bounds = (t.masked_fill(empty, x.Nk).sort(-1).values for t in (start, stop))
        j = torch.arange(x.Nk, dtype=start.dtype, device=start.device).expand(x.B, -1).contiguous()
        begun, ended = (torch.searchsorted(t, j, right=True) for t in bounds)
        seen = begun > ended
    return seen if x.mask is None else seen & x.mask.any((1, 2))


def blocked(x: TopKAttentionInputs) -> tuple[KeyInterval | None, Tensor | None]:
    """The (interval, mask) over blocks: a block is allowed where any of its keys is."""
    size, N = x.topk_blocks[0], n_blocks(x)
    interval = mask = None
    if x.interval is not None:
        start, stop = x.bounds()
        stop = stop.masked_fill(start >= stop, 0)
        interval = KeyInterval(start // size, (stop + size - 1) // size)
    if x.mask is not None:
        mask = F.pad(x.mask.expand(-1, -1, -1, x.Nk), (0, N * size - x.Nk))
        mask = mask.unflatten(3, (N, size)).any(4)
    return interval, mask


def pooled(x: TopKAttentionInputs) -> Tensor:
    """The mean of the seen keys of each block, [B, Hkv, N, D] in the dtype of k; 0 without any."""
    size, N = x.topk_blocks[0], n_blocks(x)
    seen, missing = seen_keys(x), N * size - x.Nk
    k = x.k.masked_fill(~seen[:, None, :, None], 0.0)
    k = F.pad(k.to(torch.promote_types(k.dtype, torch.float32)), (0, 0, 0, missing))
    count = F.pad(seen, (0, missing)).unflatten(1, (N, size)).sum(2).clamp(min=1)
    return (k.unflatten(2, (N, size)).sum(3) / count[:, None, :, None]).to(x.k.dtype)


def pooled_call(x: TopKAttentionInputs) -> TopKAttentionInputs:
    """The call of the same queries with one key for each block."""
    interval, mask = blocked(x)
    return replace(x, k=pooled(x), interval=interval, mask=mask)


def importance(y: TopKAttentionInputs) -> Tensor:
    """The importance of each block for each tile of QUERIES_PER_CHOICE queries, [B, Hkv, T, N].

    It is the attention weight of the block's key in the `pooled_call` y, summed over the queries of
    the tile and the heads of the group, and -inf where none of these may see the block.
    """
    q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (y.q, y.k))
    s = scores(replace(y, q=q, k=k))
    tiles = (-(-y.Nq // QUERIES_PER_CHOICE), QUERIES_PER_CHOICE)

    def by_tile(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, 0, tiles[0] * tiles[1] - y.Nq))
        return t.unflatten(1, (y.Hkv, y.Hq // y.Hkv)).unflatten(3, tiles)

    allowed = by_tile(s != NEG_INF).any(4).any(2)
    return by_tile(softmax(s)[0]).sum((2, 4)).masked_fill(~allowed, NEG_INF)


def choose_blocks(x: TopKAttentionInputs) -> Tensor:
    """The most important blocks, int64 [B, Hkv, T, min(n_blocks, N)]; see `top_indices`."""
    with torch.no_grad():
        return top_indices(importance(pooled_call(x)), min(x.topk_blocks[1], n_blocks(x)))


def keys_of_blocks(chosen: Tensor, x: TopKAttentionInputs) -> Tensor:
    """The keys of the chosen blocks [B, Hkv, T, N], bool [B, Hq, Nq, Nk]."""
    rows = chosen.repeat_interleave(QUERIES_PER_CHOICE, 2)[:, :, : x.Nq]
    keys = rows.repeat_interleave(x.topk_blocks[0], 3)[..., : x.Nk]
    return keys.repeat_interleave(x.Hq // x.Hkv, 1)


def gated_residual(x: Tensor, h: Tensor, gate: Tensor, row_mask: Tensor | None = None) -> Tensor:
    """The residual y by eq. gate, in the dtype of x."""
    t = torch.tanh(gate.to(torch.promote_types(gate.dtype, torch.float32))).to(x.dtype)
    if row_mask is None:
        return x + t * h
    row_mask = row_mask[..., None]
    return torch.where(row_mask, x + t * h.masked_fill(~row_mask, 0.0), x)


def norm(y: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of y by eq. norm, computed in float32 at least, in the dtype of y."""
    n = y.to(torch.promote_types(y.dtype, torch.float32))
    weight, bias = (None if t is None else t.to(n.dtype) for t in (weight, bias))
    if kind == "layer":
        return F.layer_norm(n, n.shape[-1:], weight, bias, eps).to(y.dtype)
    n = F.rms_norm(n, n.shape[-1:], weight, eps)
    return (n if bias is None else n + bias).to(y.dtype)
