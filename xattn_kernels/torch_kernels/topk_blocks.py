"""Top-k attention by blocks of keys in plain PyTorch: the path of a CPU.

Keys and values are gathered for a few tiles of queries at a time, in both directions; what a call
keeps is its inputs and the chosen blocks. The equations are `importance` and `choose_blocks` in
`reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..core.call import (
    CrossAttentionCall,
    TopKAttentionCall,
    TopKAttentionResult,
    TopKBlocksCall,
    shared_fields,
)
from ..core.kernel_op import Gradients, Needs
from ..core.layout import AttentionResults, empty_results, rows_like
from ..reference import QUERIES_PER_CHOICE, n_blocks, pooled_call
from .topk_attention import (
    CHUNK,
    gathered_rows,
    gradient_like,
    sum_dtype,
    top_indices,
)

NEG_INF = float("-inf")


def result_of(
    call: TopKAttentionCall, chosen: Tensor | None, results: AttentionResults
) -> TopKAttentionResult:
    """What the call asked for."""
    statistics = (results.entropy, results.max_probability)
    return TopKAttentionResult(
        results.out,
        results.lse if call.return_lse else None,
        reference.with_missing(chosen, call.topk_blocks[1]) if call.return_indices else None,
        *(statistics if call.return_statistics else (None, None)),
    )


def tiles_at_once(call: TopKAttentionCall, per_query: int) -> Iterator[tuple[int, slice, slice]]:
    """(batch element, tiles, their queries): so many that they have at most CHUNK numbers, or one
    tile."""
    T = -(-call.Nq // QUERIES_PER_CHOICE)
    tiles = max(1, CHUNK // max(QUERIES_PER_CHOICE * per_query, 1))
    for b in range(call.B):
        for first in range(0, T, tiles):
            end = min(first + tiles, T)
            queries = slice(first * QUERIES_PER_CHOICE, min(end * QUERIES_PER_CHOICE, call.Nq))
            yield b, slice(first, end), queries


def choose_gathered(call: TopKAttentionCall) -> Tensor:
    """`reference.choose_blocks` without the weights of all pooled keys at once."""
    N = n_blocks(call)
    wanted, T = min(call.topk_blocks[1], N), -(-call.Nq // QUERIES_PER_CHOICE)
    chosen = torch.empty((call.B, call.Hkv, T, wanted), dtype=torch.int64, device=call.device)
    pooled = pooled_call(call)
    for b, tiles, queries in tiles_at_once(call, call.Hq * N):
        part = reference.importance(pooled.part(slice(b, b + 1), queries))
        chosen[b : b + 1, :, tiles] = top_indices(part, wanted)
    return chosen


def forward(call: TopKBlocksCall) -> AttentionResults:
    """The results of attention to the chosen blocks. Only inputs are kept: the backward computes
    each part again."""
    results = empty_results(call)
    of_rows = (results.out, results.lse, results.entropy, results.max_probability)
    for part in parts(call):
        attended = reference.cross_attention(part.call)
        for t, tile in zip(of_rows, attended, strict=True):
            if t is not None:
                t[part.b, :, part.queries] = from_tiles(tile, part.queries).to(t.dtype)
    return results


class Part(NamedTuple):
    """Some tiles of queries of one batch element, as a call whose batch is the tiles."""

    b: int
    queries: slice
    call: CrossAttentionCall
    places: Tensor  # int64 [Hkv, tiles, keys]: rows of the keys among those of all key heads


def parts(call: TopKBlocksCall) -> Iterator[Part]:
    """The call in parts of bounded memory."""
    keys, dtype = call.chosen.shape[3] * call.topk_blocks[0], sum_dtype(call.q)
    first = torch.arange(call.Hkv, device=call.device)[:, None, None] * call.Nk
    per_query = keys * max(call.Hq, call.Hkv * (call.D + call.Dv) // QUERIES_PER_CHOICE)
    none = dict.fromkeys(("bias", "start", "stop", "seed", "softcap"))
    shared = shared_fields(call, "CrossAttentionCall") | none
    for b, tiles, queries in tiles_at_once(call, per_query):
        j, exists = keys_of(call, call.chosen[b, :, tiles])
        allowed = allowed_at(call, b, queries, j, exists)
        # no padding meets a p of 0
        seen = allowed.unflatten(1, (call.Hkv, -1)).any(3).any(2)[..., None]
        k, v = (
            gathered_rows(t[b], j + first).to(dtype).transpose(0, 1).masked_fill(~seen, 0.0)
            for t in (call.k, call.v)
        )
        q = to_tiles(call.q[b, :, queries].to(dtype))
        tensors = dict(q=q, k=k, v=v, mask=allowed, return_lse=True, return_statistics=True)
        yield Part(b, queries, CrossAttentionCall(**shared | tensors), j + first)


def keys_of(call: TopKAttentionCall, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(keys, whether there is one) of the chosen blocks, [Hkv, tiles, n * block_size] both."""
    size = call.topk_blocks[0]
    j = chosen[..., None] * size + torch.arange(size, device=chosen.device)
    exists = (chosen >= 0)[..., None] & (j < call.Nk)
    return j.flatten(2).clamp(0, call.Nk - 1), exists.flatten(2)


def allowed_at(
    call: TopKAttentionCall, b: int, queries: slice, j: Tensor, exists: Tensor
) -> Tensor:
    """bool [tiles, Hq, QUERIES_PER_CHOICE or 1, keys]: whether a query may see key j."""
    # [tiles, Hq, 1, keys]
    j, allowed = (
        t.repeat_interleave(call.group, 0).transpose(0, 1)[:, :, None] for t in (j, exists)
    )
    if call.start is not None:
        bounds = (call.start, call.stop)
        start, stop = (to_tiles(t[b, queries][None, :, None]) for t in bounds)
        allowed = allowed & (j >= start) & (j < stop)
    if call.mask is not None:
        rows = to_tiles(call.mask.expand(call.B, call.Hq, call.Nq, call.Nk)[b, :, queries])
        allowed = allowed & rows.gather(3, j.expand(-1, -1, QUERIES_PER_CHOICE, -1))
    return allowed


def to_tiles(t: Tensor) -> Tensor:
    """[tiles, H, QUERIES_PER_CHOICE, width] of rows [H, N, width], zeros after the last."""
    missing = -t.shape[1] % QUERIES_PER_CHOICE
    t = F.pad(t, (0, 0, 0, missing))
    return t.unflatten(1, (-1, QUERIES_PER_CHOICE)).transpose(0, 1)


def from_tiles(t: Tensor, queries: slice) -> Tensor:
    """[H, N, ...] of the tiles."""
    return t.transpose(0, 1).flatten(1, 2)[:, : queries.stop - queries.start]


def backward(
    upstream: AttentionResults, call: TopKBlocksCall, results: AttentionResults, needs: Needs
) -> Gradients:
    """The gradients that `needs` names, of q, k, v and scale_tensor."""
    q, k, v, dtype = call.q, call.k, call.v, sum_dtype(call.q)
    dq = rows_like(q)
    dk, dv = (t.new_zeros((call.B, call.Hkv * call.Nk, t.shape[3]), dtype=dtype) for t in (k, v))
    scale = call.scale_tensor
    dscale = None if scale is None else torch.zeros_like(scale, dtype=dtype)
    for part in parts(call):
        b, queries = part.b, part.queries
        empty = results.lse[b, :, queries] == NEG_INF
        part_upstream = [
            None if t is None else to_tiles(row_gradient(t[b, :, queries], empty).to(dtype))
            for t in (upstream.out, upstream.lse, upstream.entropy)
        ]
        grads = gradients_of_part(part.call, part_upstream)
        dq[b, :, queries] = from_tiles(grads["q"], queries).to(q.dtype)
        for total, g in ((dk, grads["k"]), (dv, grads["v"])):
            rows = g.transpose(0, 1).reshape(-1, g.shape[3])
            total[b].index_add_(0, part.places.reshape(-1), rows)
        if scale is not None:
            dscale += grads["scale_tensor"]
    dk, dv = (gradient_like(g.view(t.shape), t) for g, t in ((dk, k), (dv, v)))
    grads = {"q": dq, "k": dk, "v": dv}
    if scale is not None:
        grads["scale_tensor"] = dscale.to(scale.dtype)
    return grads


def gradients_of_part(call: CrossAttentionCall, upstream: list[Tensor | None]) -> dict[str, Tensor]:
    """The gradients of a call that is computed again, by the names of its fields and by eq. ds.

    `upstream` are those of out, lse and entropy, [tiles, Hq, QUERIES_PER_CHOICE, width or 1].
    """
    dout, dlse, dentropy = upstream
    s = reference.scores(call)
    p, lse, entropy, _ = reference.softmax(s)
    missing, empty = s == NEG_INF, (lse == NEG_INF)[..., None]
    q = call.q.masked_fill(empty, 0.0)
    k, v = (t.repeat_interleave(call.group, 1) for t in (call.k, call.v))
    dp, dv = torch.zeros_like(p), torch.zeros_like(v)
    if dout is not None:
        dp = (dout @ v.mT).masked_fill(missing, 0.0)
        dp = dp - (p * dp).sum(-1, keepdim=True)
        dv = p.mT @ dout
    if dlse is not None:
        dp = dp + dlse
    if dentropy is not None:
        log_p = (s - lse[..., None]).masked_fill(p == 0, 0.0)
        dp = dp - dentropy * (log_p + entropy[..., None])
    ds = (p * dp).masked_fill(missing, 0.0)
    grads = {}
    if call.scale_tensor is not None:
        dscale = (ds * (q @ k.mT)).sum((0, 2, 3))
        dscale = dscale if call.scale_tensor.numel() > 1 else dscale.sum()
        grads["scale_tensor"] = dscale.view_as(call.scale_tensor)
    ds = ds * call.scale_of_heads(ds.dtype)
    grads |= {"q": ds @ k}
    for name, g in (("k", ds.mT @ q), ("v", dv)):
        grads[name] = g.unflatten(1, (call.Hkv, call.group)).sum(2)
    return grads


def row_gradient(t: Tensor, empty: Tensor) -> Tensor:
    """[H, rows, width or 1]: a gradient of rows, 0 at those without a key, whatever arrives."""
    t = t if t.dim() == 3 else t[..., None]
    return t.masked_fill(empty[..., None], 0.0)
