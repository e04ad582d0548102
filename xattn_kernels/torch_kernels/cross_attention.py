"""The backend named `torch`: PyTorch's own kernels, on what the mask leaves and nothing else.

Rows of equal interval are one call of `F.scaled_dot_product_attention` on slices of q, k and v:
what is masked is not computed, and there is no mask. Where runs of such rows are short (causal,
windows, random intervals), a block of at most BLOCK_ROWS rows is one call over the union of its
intervals, with a small mask that the backward builds again: intervals never become Nq x Nk. Empty
rows meet no key at all, so their zeros are exact. On a GPU each call waits for the device once, to
read the intervals.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.call import CrossAttentionCall, CrossAttentionResult
from ..core.dispatch import without_autocast
from .slices import (
    ALL,
    Pasted,
    slices,
    wants_grad,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BLOCK_ROWS = 256
WIDE_ROWS = 192  # from here on torch's CPU kernel takes larger tiles
SHORT_CALL = 2**16  # (row, key) pairs; below, torch's CPU backward is slowest in 16 bit


class Region(NamedTuple):
    """What one call of torch's kernel computes; `exact`: each row sees each key. Empty rows have
    keys 0:0."""

    batch: slice
    rows: slice
    keys: slice
    exact: bool = True


def reasons(call: CrossAttentionCall) -> list[str]:
    """Why `F.scaled_dot_product_attention` cannot compute this call; empty when it can."""
    dtype = call.q.dtype
    lacks = {
        f"dtype {dtype} is not float64, float32, float16 or bfloat16": dtype not in DTYPES,
        "torch's kernels have no softcap": call.softcap is not None,
        "torch's kernels cannot drop the weights that the seed says": call.dropout_p > 0.0,
        "torch's kernels return no lse": call.return_lse,
        "torch's kernels return no entropy or max_probability": call.return_statistics,
        "on the meta device a KeyInterval has no values": call.start is not None and call.q.is_meta,
        "a head width of 1 whose rows reach over 2^31 elements: BLAS counts 32 bits": any(
            t.is_cpu and t.shape[3] == 1 and (t.shape[2] - 1) * t.stride(2) >= 2**31
            for t in (call.q, call.k, call.v)
        ),
    }
    return [reason for reason, applies in lacks.items() if applies]


def cross_attention(call: CrossAttentionCall) -> CrossAttentionResult:
    """out [B, Hq, Nq, Dv] in the dtype of q, by one call of torch's kernel per run of rows."""
    regions = plan(call)
    q, k, v, bias, scale = prepare(call, regions)
    rows = [(c.batch, ALL, c.rows) for c in regions]
    keys = [(c.batch, ALL, c.keys) for c in regions]
    apart = keys_apart(regions)
    parts = zip(
        regions,
        slices(q, rows),
        slices(k, keys, apart),
        slices(v, keys, apart),
        slices(bias, pairs(bias, regions), apart=False),
        slices(call.mask, pairs(call.mask, regions)),
        strict=True,
    )
    outs = []
    for region, *tensors in parts:
        if region.exact and not wants_grad(bias):
            outs.append(attend(scale, Slices(*tensors)))
        else:
            bounds = (None, None)
            if not region.exact:
                bounds = (call.start[region[:2]], call.stop[region[:2]])
            outs.append(Recomputed.apply(scale, region.keys.start, *tensors, *bounds))
    out = outs[0] if len(outs) == 1 else Pasted.apply((call.B, call.Nq), rows, *outs)
    return CrossAttentionResult(out[..., : call.Dv].to(call.q.dtype))


def plan(call: CrossAttentionCall) -> list[Region]:
    """The regions; together they have every row of every batch element once."""
    if call.start is None or 0 in (call.B, call.Nq, call.Nk):
        regions = [Region(slice(0, call.B), slice(0, call.Nq), slice(0, call.Nk))]
    else:
        width = call.Hq * (call.D + call.Dv)
        regions = [region for runs in equal_rows(call) for region in merge(*runs, width)]
    if wants_grad(call.bias) and call.Nq:  # for it torch forms the scores, so few rows at once
        regions = [
            region._replace(rows=slice(row, min(row + BLOCK_ROWS, region.rows.stop)))
            for region in regions
            for row in range(region.rows.start, region.rows.stop, BLOCK_ROWS)
        ]
    return regions


def equal_rows(call: CrossAttentionCall) -> Iterator[tuple[slice, list[int], list[list[int]]]]:
    """(batch, rows, keys) for neighbouring batch elements that share their intervals.

    Each row from rows[i] to rows[i + 1] sees the keys from keys[i][0] to keys[i][1]; 0 to 0: none.
    """
    start, stop = call.start, call.stop
    shared = start.stride(0) == stop.stride(0) == 0
    # [B or 1, Nq, 2]
    bounds = torch.stack((start, stop), -1)[: 1 if shared else None].cpu().clamp(0, call.Nk)
    bounds[bounds[..., 0] >= bounds[..., 1]] = 0
    new_row = (bounds[:, 1:] != bounds[:, :-1]).any(-1)
    new_element = (bounds[1:] != bounds[:-1]).flatten(1).any(1)
    for batch in pairwise([0, *(new_element.nonzero().flatten() + 1).tolist(), call.B]):
        rows = [0, *(new_row[batch[0]].nonzero().flatten() + 1).tolist()]
        yield slice(*batch), [*rows, call.Nq], bounds[batch[0], rows].tolist()


def merge(batch: slice, rows: list[int], keys: list[list[int]], width: int) -> Iterator[Region]:
    """Joins runs into blocks of at most BLOCK_ROWS rows where one call costs less than several.

    A block's keys have no gap, for keys in nobody's interval may hold anything; empty rows stay
    alone. Costs are in (row, key) pairs, fitted to a CPU; width is Hq * (D + Dv).
    """
    starts, stops = zip(*keys, strict=True)
    islands, end = [], -1  # the first key of each stretch of keys that are in some interval
    for start, stop in sorted(keys):
        if start > end:
            islands.append(start)
        end = max(end, stop)
    per_call = 1e3 + 1e6 / (width * length(batch))

    def cost(i: int, j: int) -> float:
        n = rows[j] - rows[i]
        # 24: few rows fill a tile badly; 1.3: tiles are small; 1.5: mask, and the forward twice
        factor = (1.3 if n < WIDE_ROWS else 1.0) * (1.0 if j - i == 1 else 1.5)
        return per_call + (n + 24) * (max(stops[i:j]) - min(starts[i:j])) * factor

    alone = [0.0, *accumulate(cost(i, i + 1) for i in range(len(keys)))]

    def joined(i: int, j: int) -> Iterator[Region]:
        n, first, stop = rows[j] - rows[i], min(starts[i:j]), max(stops[i:j])
        middle = (i + j) // 2
        if n > BLOCK_ROWS:  # the half with a whole number of blocks
            target = rows[i] + -(-n // (2 * BLOCK_ROWS)) * BLOCK_ROWS
            middle = bisect_left(rows, target, i + 1, max(i + 1, j - 1))
        one = j == i + 1
        if not one and n <= BLOCK_ROWS and min(stops[i:j]):
            gapless = bisect_right(islands, first) == bisect_right(islands, stop - 1)
            several = min(cost(i, middle) + cost(middle, j), alone[j] - alone[i])
            one = gapless and cost(i, j) <= several
        if one:
            yield Region(batch, slice(rows[i], rows[j]), slice(first, stop), exact=j == i + 1)
        else:
            yield from joined(i, middle)
            yield from joined(middle, j)

    yield from joined(0, len(keys))


def prepare(call: CrossAttentionCall, regions: list[Region]) -> tuple:
    """(q, k, v, bias, scale) as torch's kernels are fast and accurate on; scale is a float."""
    q, k, v, bias, scale = call.q, call.k, call.v, call.bias, call.scale
    if q.dtype.itemsize == 2 and len(regions) > 1 and any(map(wants_grad, (q, k, v))):
        work = sum(length(c.rows) * length(c.keys) for c in regions)
        if q.is_cpu and work < SHORT_CALL * len(regions):
            q, k, v = q.float(), k.float(), v.float()
        elif not keys_apart(regions):  # regions add up in the gradients
            k, v = k.float(), v.float()
    if wants_grad(bias):  # likewise
        bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    if call.scale_tensor is not None:
        wide = torch.promote_types(q.dtype, torch.float32)
        q, scale = (q.to(wide) * call.scale_of_heads(wide)).to(q.dtype), 1.0
    if q.is_cpu and call.D != call.Dv:  # the CPU kernel that forms no scores has one width for all
        q, k, v = (F.pad(t, (0, max(call.D, call.Dv) - t.shape[3])) for t in (q, k, v))
    return q, k, v, bias, scale


class Slices(NamedTuple):
    """The tensors of a region; `start` and `stop` [b, rows] make a mask [b, 1, rows, keys]."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    start: Tensor | None = None
    stop: Tensor | None = None


def attend(scale: float, tensors: Slices, first_key: int = 0) -> Tensor:
    """The output of one call of torch's kernel; the bounds count from key 0, k from `first_key`."""
    q, k, v, bias, mask, start, stop = tensors
    k, v = k.to(q.dtype), v.to(q.dtype)
    may_be_empty = mask is not None or bias is not None
    if start is not None:
        j = torch.arange(first_key, first_key + k.shape[2], dtype=torch.int32, device=k.device)
        mask = ((start[..., None] <= j) & (j < stop[..., None]))[:, None]
    if bias is not None:
        if bias.dtype != q.dtype:
            bias = bias.to(torch.promote_types(q.dtype, torch.float32))
        mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
    B, Hq, rows, D = q.shape
    Hkv, empty = k.shape[1], k.shape[2] == 0
    if Hq != Hkv and (mask is None or empty):  # a group's heads as rows: each key is read once
        q = q.reshape(B, Hkv, Hq // Hkv * rows, D)
    if empty:  # zeros; torch's kernel makes them as 0 * q, which keeps a NaN
        return (q[..., :0] @ k[..., :0].mT @ v).reshape(B, Hq, rows, v.shape[3])
    grouped = q.shape[1] != Hkv
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    if may_be_empty and out.requires_grad:  # NaN that arrives at a row without keys stays there
        is_bool = mask.dtype == torch.bool
        no_key = ~mask.any(-1, True) if is_bool else mask.detach().amax(-1, True) == float("-inf")
        out = out.masked_fill(no_key, 0.0)
    return out.reshape(B, Hq, rows, v.shape[3])


class Recomputed(torch.autograd.Function):
    """`attend` that keeps its inputs only: masks and scores would add up to Nq x Nk."""

    @staticmethod
    def forward(ctx, scale, first_key, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.scale, ctx.first_key = scale, first_key
        return attend(scale, Slices(*tensors), first_key)

    @staticmethod
    def backward(ctx, dout):
        options = {"create_graph": torch.is_grad_enabled(), "materialize_grads": True}
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:6]
        wanted = [t for t, need in zip(saved, needed, strict=False) if need]
        with without_autocast(dout.device):
            with torch.enable_grad():
                out = attend(ctx.scale, Slices(*saved), ctx.first_key)
            grads = map(torch.zeros_like, wanted)
            if out.requires_grad:  # which a bias alone does not bring about without keys
                grads = iter(torch.autograd.grad(out, wanted, dout, **options))
        return None, None, *(next(grads) if need else None for need in needed), *[None] * 3


def pairs(t: Tensor | None, regions: list[Region]) -> list[tuple]:
    """The region of each call in a tensor that broadcasts to [B, Hq, Nq, Nk]."""
    sizes = (0,) * 4 if t is None else t.shape
    full = [(region.batch, ALL, region.rows, region.keys) for region in regions]
    return [tuple(ALL if n == 1 else s for n, s in zip(sizes, r, strict=True)) for r in full]


def keys_apart(regions: list[Region]) -> bool:
    """Whether no key of a batch element is in two regions."""
    if len(regions) == 1:  # the sizes of which may be symbols, which cannot be sorted
        return True
    spans = sorted((c.batch.start, c.keys.start, c.keys.stop) for c in regions)
    return all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(spans))


def length(span: slice) -> int:
    return span.stop - span.start
