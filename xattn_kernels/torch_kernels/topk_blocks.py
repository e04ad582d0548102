"""Top-k attention by blocks of keys in plain PyTorch: the path of a CPU.

Keys and values are gathered for a few tiles of queries at a time, in both directions; what a call
keeps is its inputs and the chosen blocks. The equations are `importance` and `choose_blocks` in
`reference.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..core.call import CrossAttentionInputs, TopKAttentionInputs, TopKAttentionResult
from ..core.kernel_op import refuse_double_backward
from ..masks import KeyInterval
from ..reference import QUERIES_PER_CHOICE, n_blocks, pooled_call
from .topk_attention import (
    CHUNK,
    gathered_rows,
    sum_dtype,
    top_indices,
)

NEG_INF = float("-inf")


def result_of(
    x: TopKAttentionInputs, blocks: Tensor | None, out, lse, entropy, max_probability
) -> TopKAttentionResult:
    """What was asked for."""
    return TopKAttentionResult(
        out,
        lse if x.return_lse else None,
        reference.with_missing(blocks, x.topk_blocks[1]) if x.return_indices else None,
        *((entropy, max_probability) if x.return_statistics else (None, None)),
    )


def topk_blocks(x: TopKAttentionInputs) -> TopKAttentionResult:
    """In PyTorch's operations, on the keys and values of a few tiles of queries at a time."""
    with torch.no_grad():
        blocks = choose_gathered(x)
    scale = x.scale if isinstance(x.scale, Tensor) else None
    start, stop = x.bounds()
    plain = replace(x, q=None, k=None, v=None, scale=x.scale if scale is None else None,
                    interval=None, mask=None)  # fmt: skip
    results = BlocksGathered.apply(x.q, x.k, x.v, scale, blocks, start, stop, x.mask, plain)
    return result_of(x, blocks, *results)


def tiles_at_once(x: TopKAttentionInputs, per_query: int) -> Iterator[tuple[int, slice, slice]]:
    """(batch element, tiles, their queries): so many that they have at most CHUNK numbers, or one
    tile."""
    T = -(-x.Nq // QUERIES_PER_CHOICE)
    tiles = max(1, CHUNK // max(QUERIES_PER_CHOICE * per_query, 1))
    for b in range(x.B):
        for first in range(0, T, tiles):
            end = min(first + tiles, T)
            queries = slice(first * QUERIES_PER_CHOICE, min(end * QUERIES_PER_CHOICE, x.Nq))
            yield b, slice(first, end), queries


def choose_gathered(x: TopKAttentionInputs) -> Tensor:
    """`reference.choose_blocks` without the weights of all pooled keys at once."""
    N = n_blocks(x)
    wanted, T = min(x.topk_blocks[1], N), -(-x.Nq // QUERIES_PER_CHOICE)
    blocks = torch.empty((x.B, x.Hkv, T, wanted), dtype=torch.int64, device=x.q.device)
    y = pooled_call(x)
    for b, tiles, queries in tiles_at_once(x, x.Hq * N):
        part = reference.importance(rows_of(y, b, queries))
        blocks[b : b + 1, :, tiles] = top_indices(part, wanted)
    return blocks


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


class BlocksGathered(torch.autograd.Function):
    """(out, lse, entropy, max_probability) of the chosen blocks. Only inputs are kept: the backward
    computes each part again."""

    @staticmethod
    def forward(ctx, q, k, v, scale, blocks, start, stop, mask, plain):
        ctx.set_materialize_grads(False)
        x = whole_call(q, k, v, scale, start, stop, mask, plain)
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        rows = [q.new_empty(q.shape[:3], dtype=sum_dtype(q)) for _ in range(3)]
        for b, queries, call, _ in parts(x, blocks):
            found = reference.cross_attention(call)
            for t, tile in zip((out, *rows), found, strict=True):
                t[b, :, queries] = from_tiles(tile, queries).to(t.dtype)
        ctx.save_for_backward(q, k, v, scale, blocks, start, stop, mask, rows[0])
        ctx.plain = plain
        ctx.mark_non_differentiable(rows[2])
        return out, *rows

    @staticmethod
    def backward(ctx, dout, dlse, dentropy, _):
        *tensors, lse = ctx.saved_tensors
        with torch.no_grad():
            grads = gradients(dout, dlse, dentropy, *tensors, lse, ctx.plain, ctx.needs_input_grad)
        grads = refuse_double_backward("topk_attention", grads, (dout, *tensors[:4]))
        return *grads, *[None] * 5


def whole_call(q, k, v, scale, start, stop, mask, plain) -> TopKAttentionInputs:
    interval = None if start is None else KeyInterval(start, stop)
    scale = plain.scale if scale is None else scale
    return replace(plain, q=q, k=k, v=v, scale=scale, interval=interval, mask=mask)


class Part(NamedTuple):
    """Some tiles of queries of one batch element, as a call whose batch is the tiles."""

    b: int
    queries: slice
    call: CrossAttentionInputs
    at: Tensor  # int64 [Hkv, tiles, keys]: rows of the keys among those of all key heads


def parts(x: TopKAttentionInputs, blocks: Tensor) -> Iterator[Part]:
    keys, dtype = blocks.shape[3] * x.topk_blocks[0], sum_dtype(x.q)
    first = torch.arange(x.Hkv, device=x.q.device)[:, None, None] * x.Nk
    per_query = keys * max(x.Hq, x.Hkv * (x.D + x.Dv) // QUERIES_PER_CHOICE)
    for b, tiles, queries in tiles_at_once(x, per_query):
        j, there = keys_of(x, blocks[b, :, tiles])
        allowed = allowed_at(x, b, queries, j, there)
        # no padding meets a p of 0
        seen = allowed.unflatten(1, (x.Hkv, -1)).any(3).any(2)[..., None]
        k, v = (
            gathered_rows(t[b], j + first).to(dtype).transpose(0, 1).masked_fill(~seen, 0.0)
            for t in (x.k, x.v)
        )
        q = to_tiles(x.q[b, :, queries].to(dtype))
        call = CrossAttentionInputs(
            q=q, k=k, v=v, interval=None, mask=allowed, bias=None, scale=x.scale, softcap=None,
            dropout_p=0.0, seed=None, return_lse=True, return_statistics=True, deterministic=False,
        )  # fmt: skip
        yield Part(b, queries, call, j + first)


def keys_of(x: TopKAttentionInputs, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(keys, whether there is one) of the chosen blocks, [Hkv, tiles, n * block_size] both."""
    size = x.topk_blocks[0]
    j = chosen[..., None] * size + torch.arange(size, device=chosen.device)
    there = (chosen >= 0)[..., None] & (j < x.Nk)
    return j.flatten(2).clamp(0, x.Nk - 1), there.flatten(2)


def allowed_at(x: TopKAttentionInputs, b: int, queries: slice, j: Tensor, there: Tensor) -> Tensor:
    """bool [tiles, Hq, QUERIES_PER_CHOICE or 1, keys]: whether a query may see key j."""
    group = x.Hq // x.Hkv
    # [tiles, Hq, 1, keys]
    j, allowed = (t.repeat_interleave(group, 0).transpose(0, 1)[:, :, None] for t in (j, there))
    if x.interval is not None:
        start, stop = (to_tiles(t[b, queries][None, :, None]) for t in x.bounds())
        allowed = allowed & (j >= start) & (j < stop)
    if x.mask is not None:
        rows = to_tiles(x.mask.expand(x.B, x.Hq, x.Nq, x.Nk)[b, :, queries])
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


def gradients(
    dout, dlse, dentropy, q, k, v, scale, blocks, start, stop, mask, lse, plain, needs
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dscale), None for what is not needed."""
    x = whole_call(q, k, v, scale, start, stop, mask, plain)
    if dout is None and dlse is None and dentropy is None:
        tensors = (q, k, v, scale)
        return tuple(
            torch.zeros_like(t) if n else None for t, n in zip(tensors, needs, strict=False)
        )
    dtype = sum_dtype(q)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (t.new_zeros((x.B, x.Hkv * x.Nk, t.shape[3]), dtype=dtype) for t in (k, v))
    dscale = None if scale is None else torch.zeros_like(scale, dtype=dtype)
    for b, queries, call, at in parts(x, blocks):
        empty = lse[b, :, queries] == NEG_INF
        given = [
            None if t is None else to_tiles(row_gradient(t[b, :, queries], empty).to(dtype))
            for t in (dout, dlse, dentropy)
        ]
        grads = gradients_of_part(call, given, None if scale is None else scale.to(dtype))
        dq[b, :, queries] = from_tiles(grads[0], queries).to(q.dtype)
        for t, g in ((dk, grads[1]), (dv, grads[2])):
            t[b].index_add_(0, at.reshape(-1), g.transpose(0, 1).reshape(-1, g.shape[3]))
        if scale is not None:
            dscale += grads[3]
    dscale = None if scale is None else dscale.to(scale.dtype)
    found = (dq, dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype), dscale)
    return tuple(t if needed else None for t, needed in zip(found, needs, strict=False))


def gradients_of_part(
    call: CrossAttentionInputs, given: list[Tensor | None], scale: Tensor | None
) -> tuple[Tensor, ...]:
    """(dq, dk, dv) and, of a scale that is a tensor, dscale, of a call that is computed again."""
    inputs = [t.detach().requires_grad_() for t in (call.q, call.k, call.v, scale) if t is not None]
    with torch.enable_grad():
        names = ("q", "k", "v", "scale")[: len(inputs)]
        found = reference.cross_attention(replace(call, **dict(zip(names, inputs, strict=True))))
    pairs = zip(found[:3], given, strict=True)  # out, lse, entropy
    outputs, given = zip(*((t, g.view(t.shape)) for t, g in pairs if g is not None), strict=True)
    return torch.autograd.grad(outputs, inputs, given, materialize_grads=True)


def row_gradient(t: Tensor, empty: Tensor) -> Tensor:
    """[H, rows, width or 1]: a gradient of rows, 0 at those without a key, whatever arrives."""
    t = t if t.dim() == 3 else t[..., None]
    return t.masked_fill(empty[..., None], 0.0)
