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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .core.call import (
        AttentionCall,
        AttentionWeightsCall,
        CrossAttentionCall,
        TopKAttentionCall,
    )

NEG_INF = float("-inf")


class CrossAttentionResult(NamedTuple):
    """The output of `cross_attention` when more than `out` is asked for; None for what was not.

    out [B, Hq, Nq, Dv] in the dtype of q; lse, entropy, max_probability float32 [B, Hq, Nq]
    (float64 for float64 inputs), natural logarithms.
    """

    out: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    max_probability: Tensor | None = None


class TopKAttentionResult(NamedTuple):
    """The output of `topk_attention` when more than `out` is asked for; None for what was not.

    out [B, Hq, Nq, Dv] in the dtype of q; lse, entropy, max_probability float32 [B, Hq, Nq]
    (float64 for float64 inputs), natural logarithms, of the chosen keys alone; indices int32
    [B, Hq, Nq, top_k], the chosen keys in ascending order and -1 where there are fewer; of a call
    by blocks [B, Hkv, ceil(Nq / 64), n_blocks], the chosen blocks likewise.
    """

    out: Tensor
    lse: Tensor | None = None
    indices: Tensor | None = None
    entropy: Tensor | None = None
    max_probability: Tensor | None = None


def reasons(call: Any) -> list[str]:
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


def allowed_keys(call: AttentionCall) -> Tensor | None:
    """The allowed keys, bool, broadcastable to [B, Hq, Nq, Nk]; None if every key is allowed."""
    if call.start is None:
        return call.mask
    j = torch.arange(call.Nk, device=call.device)
    dense = (j >= call.start[:, None, :, None]) & (j < call.stop[:, None, :, None])
    return dense if call.mask is None else dense & call.mask


def used_keys(t: Tensor, call: AttentionCall) -> Tensor:
    """`t` [B, Hkv, Nk, *] with zeros in the padding of each batch element.

    The padding is before the first and after the last interval, and may hold NaN.
    """
    if call.start is None or call.Nq == 0:
        return t
    empty = call.start >= call.stop
    first = call.start.masked_fill(empty, call.Nk).amin(1, keepdim=True)
    last = call.stop.masked_fill(empty, 0).amax(1, keepdim=True)
    j = torch.arange(call.Nk, device=t.device)
    return t.masked_fill(((j < first) | (j >= last))[:, None, :, None], 0.0)


def scores(call: AttentionCall) -> Tensor:
    """The scores s [B, Hq, Nq, Nk] in float32 at least, -inf where the mask forbids a key."""
    k = used_keys(call.k, call).repeat_interleave(call.group, dim=1)
    s = call.q @ k.transpose(-1, -2)
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    s = s * call.scale_of_heads(s.dtype)
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.bias is not None:
        s = s + call.bias
    allowed = allowed_keys(call)
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


def drop(p: Tensor, call: AttentionCall) -> Tensor:
    """p after dropout: 0, or p / (1 - dropout_p)."""
    if call.dropout_p == 0.0:
        return p
    keep = philox_keep(call.seed, call.dropout_p, call.B, call.Hq, call.Nq, call.Nk)
    return (p / (1.0 - call.dropout_p)).masked_fill(~keep, 0.0)


def cross_attention(call: CrossAttentionCall) -> CrossAttentionResult:
    """The results out, lse, entropy and max_probability by the equations at the top."""
    p, lse, entropy, max_probability = softmax(scores(call))
    v = used_keys(call.v, call).repeat_interleave(call.group, dim=1)
    out = drop(p, call).to(v.dtype) @ v
    statistics = (entropy, max_probability) if call.return_statistics else (None, None)
    return CrossAttentionResult(out, lse if call.return_lse else None, *statistics)


def probabilities(call: AttentionCall) -> Tensor:
    """The probabilities p [B, Hq, Nq, Nk], before dropout."""
    return softmax(scores(call))[0]


def attention_weights(call: AttentionWeightsCall) -> Tensor:
    """The weights p after dropout: [B, Nq, Nk] (the mean over heads) or [B, Hq, Nq, Nk].

    With an lse [B, Hq, Nq] the probabilities are exp(s - lse), and lse receives a gradient, unless
    it is the scores' own: then the probabilities are their softmax.
    """
    s, lse = scores(call), None if call.lse_is_own else call.lse
    if lse is None:
        p = softmax(s)[0]
    else:
        # an empty row has lse = -inf: with +inf in its place p is 0 without an inf - inf
        p = (s - lse.masked_fill(lse == NEG_INF, float("inf"))[..., None]).exp()
    p = drop(p, call)
    return p.mean(1) if call.average_heads else p


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


def scores_to_choose_by(call: TopKAttentionCall) -> Tensor:
    """The scores of float32 products at least, since 16 bits would make many of them equal."""
    q, k = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (call.q, call.k))
    return scores(replace(call, q=q, k=k))


def choose(call: TopKAttentionCall) -> Tensor:
    """The chosen keys, int64 [B, Hq, Nq, min(top_k, Nk)]: `top_indices` of the scores."""
    return top_indices(scores_to_choose_by(call), min(call.top_k, call.Nk))


def topk_attention(call: TopKAttentionCall) -> TopKAttentionResult:
    """The `cross_attention` over the chosen keys, or over the keys of the chosen blocks."""
    if call.topk_blocks is None:
        indices, wanted = choose(call), call.top_k
        chosen = named(indices, call.Nk)
    else:
        indices, wanted = choose_blocks(call), call.topk_blocks[1]
        chosen = keys_of_blocks(named(indices, n_blocks(call)), call)
    p, lse, entropy, max_probability = softmax(scores(call).masked_fill(~chosen, NEG_INF))
    v = used_keys(call.v, call).repeat_interleave(call.group, dim=1)
    return TopKAttentionResult(
        p.to(v.dtype) @ v,
        lse if call.return_lse else None,
        with_missing(indices, wanted) if call.return_indices else None,
        *((entropy, max_probability) if call.return_statistics else (None, None)),
    )


def named(indices: Tensor, n: int) -> Tensor:
    """A bool tensor [..., n], True at the `indices` [..., top_k]; an index of -1 names nothing."""
    chosen = torch.zeros((*indices.shape[:-1], n + 1), dtype=torch.bool, device=indices.device)
    return chosen.scatter_(-1, indices.long().masked_fill(indices < 0, n), True)[..., :n]


def with_missing(indices: Tensor, top_k: int) -> Tensor:
    """The indices as int32, filled with -1 to [..., top_k]."""
    return F.pad(indices, (0, top_k - indices.shape[-1]), value=-1).to(torch.int32)


QUERIES_PER_CHOICE = 64  # the neighbouring queries, in all heads of a group, that share blocks


def n_blocks(call: TopKAttentionCall) -> int:
    """The number of blocks of keys; the last block may be shorter."""
    return -(-call.Nk // call.topk_blocks[0])


def seen_keys(call: AttentionCall) -> Tensor:
    """The keys that some query of the batch element may see, bool [B or 1, Nk]."""
    seen = torch.ones((1, call.Nk), dtype=torch.bool, device=call.device)
    if call.start is not None:
        start, stop = call.start, call.stop
        empty = start >= stop
        # a key is seen if more intervals have begun than ended; empty ones begin and end at Nk
        bounds = (t.masked_fill(empty, call.Nk).sort(-1).values for t in (start, stop))
        j = torch.arange(call.Nk, dtype=start.dtype, device=start.device)
        j = j.expand(call.B, -1).contiguous()
        begun, ended = (torch.searchsorted(t, j, right=True) for t in bounds)
        seen = begun > ended
    return seen if call.mask is None else seen & call.mask.any((1, 2))


def blocked(call: TopKAttentionCall) -> TopKAttentionCall:
    """The call with the intervals and mask of blocks: one is allowed where any of its keys is."""
    size, N = call.topk_blocks[0], n_blocks(call)
    start, stop, mask = call.start, call.stop, call.mask
    if start is not None:
        stop = stop.masked_fill(start >= stop, 0)
        start, stop = start // size, (stop + size - 1) // size
    if mask is not None:
        mask = F.pad(mask.expand(-1, -1, -1, call.Nk), (0, N * size - call.Nk))
        mask = mask.unflatten(3, (N, size)).any(4)
    return replace(call, start=start, stop=stop, mask=mask)


def pooled_keys(call: TopKAttentionCall) -> Tensor:
    """The mean of the seen keys of each block, [B, Hkv, N, D] in the dtype of k; 0 without any."""
    size, N = call.topk_blocks[0], n_blocks(call)
    seen, missing = seen_keys(call), N * size - call.Nk
    k = call.k.masked_fill(~seen[:, None, :, None], 0.0)
    k = F.pad(k.to(torch.promote_types(k.dtype, torch.float32)), (0, 0, 0, missing))
    count = F.pad(seen, (0, missing)).unflatten(1, (N, size)).sum(2).clamp(min=1)
    return (k.unflatten(2, (N, size)).sum(3) / count[:, None, :, None]).to(call.k.dtype)


def pooled_call(call: TopKAttentionCall) -> TopKAttentionCall:
    """The call of the same queries with one key for each block."""
    return replace(blocked(call), k=pooled_keys(call))


def importance(pooled: TopKAttentionCall) -> Tensor:
    """The importance of each block for each tile of QUERIES_PER_CHOICE queries, [B, Hkv, T, N].

    It is the attention weight of the block's key in the `pooled_call` y, summed over the queries of
    the tile and the heads of the group, and -inf where none of these may see the block.
    """
    q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (pooled.q, pooled.k))
    s = scores(replace(pooled, q=q, k=k))
    tiles = (-(-pooled.Nq // QUERIES_PER_CHOICE), QUERIES_PER_CHOICE)

    def by_tile(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, 0, tiles[0] * tiles[1] - pooled.Nq))
        return t.unflatten(1, (pooled.Hkv, pooled.group)).unflatten(3, tiles)

    allowed = by_tile(s != NEG_INF).any(4).any(2)
    return by_tile(softmax(s)[0]).sum((2, 4)).masked_fill(~allowed, NEG_INF)


def choose_blocks(call: TopKAttentionCall) -> Tensor:
    """The most important blocks, int64 [B, Hkv, T, min(n_blocks, N)]; see `top_indices`."""
    with torch.no_grad():
        return top_indices(importance(pooled_call(call)), min(call.topk_blocks[1], n_blocks(call)))


def keys_of_blocks(chosen: Tensor, call: TopKAttentionCall) -> Tensor:
    """The keys of the chosen blocks [B, Hkv, T, N], bool [B, Hq, Nq, Nk]."""
    rows = chosen.repeat_interleave(QUERIES_PER_CHOICE, 2)[:, :, : call.Nq]
    keys = rows.repeat_interleave(call.topk_blocks[0], 3)[..., : call.Nk]
    return keys.repeat_interleave(call.group, 1)


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
