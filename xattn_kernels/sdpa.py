"""The backend named `sdpa`: PyTorch's own kernels, on what the mask leaves and nothing else.

Rows of equal interval are one call of `F.scaled_dot_product_attention` on slices of q, k and v:
what is masked is not computed, and there is no mask. Where runs of such rows are short (causal,
windows, random intervals), a block of at most BLOCK_ROWS rows is one call over the union of its
intervals, with a small mask that the backward builds again. Memory beside the inputs' own size is
O(Nq + Nk). Empty rows meet no key at all, so their zeros are exact.

Gradients are autograd's, but for the slicing: a plain slice has a zero-filled gradient of full
size, once per call. Here each tensor has one gradient, which its slices fill in or add up in.

Intervals are read on the host, so on a GPU each call waits once for the device.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .inputs import CrossAttentionInputs, CrossAttentionResult

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BLOCK_ROWS = 256
WIDE_ROWS = 192  # from here on torch's CPU kernel takes larger tiles
SHORT_CALL = 2**16  # (row, key) pairs; below, torch's CPU backward is slowest in 16 bit
ALL = slice(None)


class Run(NamedTuple):
    """Rows row:row_stop see keys key:key_stop, each row all of them if `exact`; 0:0 for none."""

    row: int
    row_stop: int
    key: int
    key_stop: int
    exact: bool = True


class Call(NamedTuple):
    """One call of torch's kernel; `exact` when each of its rows sees each of its keys."""

    batch: slice
    rows: slice
    keys: slice
    exact: bool = True


def reasons(x: CrossAttentionInputs) -> list[str]:
    """Why `F.scaled_dot_product_attention` cannot compute this call; empty when it can."""
    found = []
    if x.q.dtype not in DTYPES:
        found.append(f"dtype {x.q.dtype} is not float64, float32, float16 or bfloat16")
    if x.softcap is not None:
        found.append("torch's kernels have no softcap")
    if x.dropout_p > 0.0:
        found.append("torch's kernels cannot drop the weights that the seed says")
    if x.return_statistics:
        found.append("torch's kernels return no lse, entropy or max_probability")
    elif x.return_lse:
        found.append("torch's kernels return no lse")
    if x.interval is not None and x.interval.device.type == "meta":
        found.append("intervals on the meta device have no values to split the rows by")
    return found


def cross_attention(x: CrossAttentionInputs) -> CrossAttentionResult:
    """out [B, Hq, Nq, Dv] in the dtype of q, by one call of torch's kernel per run of rows."""
    calls = plan(x)
    q, k, v, bias, scale = prepare(x, calls)
    start, stop = x.bounds()
    rows = [(c.batch, ALL, c.rows) for c in calls]
    keys = [(c.batch, ALL, c.keys) for c in calls]
    apart = keys_apart(calls)
    parts = zip(
        calls,
        slices(q, rows),
        slices(k, keys, apart),
        slices(v, keys, apart),
        slices(bias, pairs(bias, calls), apart=False),
        slices(x.mask, pairs(x.mask, calls)),
        strict=True,
    )
    outs = []
    for call, *tensors in parts:
        if call.exact and not wants_grad(bias):
            outs.append(attend(scale, *tensors))
            continue
        bounds = (None, None) if call.exact else (start[call[:2]], stop[call[:2]])
        outs.append(Recomputed.apply(scale, *tensors, *bounds, call.keys.start))
    out = outs[0] if len(outs) == 1 else Pasted.apply((x.B, x.Nq), rows, *outs)
    return CrossAttentionResult(out[..., : x.Dv].to(x.q.dtype))


def plan(x: CrossAttentionInputs) -> list[Call]:
    """The calls; together they have every row of every batch element once."""
    if x.interval is None or 0 in (x.B, x.Nq, x.Nk):
        calls = [Call(slice(0, x.B), slice(0, x.Nq), slice(0, x.Nk))]
    else:
        calls = []
        for batch, runs in equal_rows(x):
            per_call = 1e3 + 1e6 / ((batch.stop - batch.start) * x.Hq * (x.D + x.Dv))
            for run in merge(runs, islands(runs), per_call):
                calls.append(Call(batch, slice(*run[:2]), slice(*run[2:4]), run.exact))
    if wants_grad(x.bias) and x.Nq:  # for it torch forms the scores, so few rows at once
        calls = [
            call._replace(rows=slice(row, min(row + BLOCK_ROWS, call.rows.stop)))
            for call in calls
            for row in range(call.rows.start, call.rows.stop, BLOCK_ROWS)
        ]
    return calls


def equal_rows(x: CrossAttentionInputs) -> Iterator[tuple[slice, list[Run]]]:
    """Neighbouring batch elements that share their intervals, and their runs of equal rows."""
    start, stop = x.bounds()
    shared = start.stride(0) == stop.stride(0) == 0
    # [B or 1, Nq, 2]
    bounds = torch.stack((start, stop), -1)[: 1 if shared else None].cpu().clamp(0, x.Nk)
    bounds[bounds[..., 0] >= bounds[..., 1]] = 0
    new_row = (bounds[:, 1:] != bounds[:, :-1]).any(-1)
    new_element = (bounds[1:] != bounds[:-1]).flatten(1).any(1)
    for first, last in pairwise([0, *(new_element.nonzero().flatten() + 1).tolist(), x.B]):
        rows = [0, *(new_row[first].nonzero().flatten() + 1).tolist()]
        keys = bounds[first, rows].tolist()
        spans = zip(pairwise([*rows, x.Nq]), keys, strict=True)
        yield slice(first, last), [Run(*row, *key) for row, key in spans]


def islands(runs: list[Run]) -> list[int]:
    """The first key of each stretch of keys without one that is in nobody's interval."""
    found, end = [], -1
    for _, _, key, stop, _ in sorted(runs, key=lambda run: run.key):
        if key > end:
            found.append(key)
        end = max(end, stop)
    return found


def merge(runs: list[Run], islands: list[int], per_call: float) -> list[Run]:
    """Joins runs into blocks of at most BLOCK_ROWS rows where one call costs less than several.

    A block's keys have no gap, for keys in nobody's interval may hold anything; empty rows stay
    alone. Costs are in (row, key) pairs, fitted to a CPU.
    """
    if len(runs) == 1:
        return runs

    def cost(run: Run) -> float:
        rows = run.row_stop - run.row
        # 24: few rows fill a tile badly; 1.3: tiles are small; 1.5: mask, and the forward twice
        factor = (1.3 if rows < WIDE_ROWS else 1.0) * (1.0 if run.exact else 1.5)
        return per_call + (rows + 24) * (run.key_stop - run.key) * factor

    rows = runs[-1].row_stop - runs[0].row
    if rows <= BLOCK_ROWS:
        middle = len(runs) // 2
        halves = runs[:middle], runs[middle:]
        block = union(runs)
        gapless = bisect(islands, block.key) == bisect(islands, block.key_stop - 1)
        if gapless and all(run.key_stop for run in runs):
            several = min(sum(map(cost, map(union, halves))), sum(map(cost, runs)))
            if cost(block) <= several:
                return [block]
    else:
        target = runs[0].row + -(-rows // (2 * BLOCK_ROWS)) * BLOCK_ROWS
        middle = min(bisect(runs, (target,)) or 1, len(runs) - 1)
        halves = runs[:middle], runs[middle:]
    return [run for half in halves for run in merge(half, islands, per_call)]


def union(runs: list[Run]) -> Run:
    if len(runs) == 1:
        return runs[0]
    key, key_stop = min(run.key for run in runs), max(run.key_stop for run in runs)
    return Run(runs[0].row, runs[-1].row_stop, key, key_stop, exact=False)


def prepare(x: CrossAttentionInputs, calls: list[Call]) -> tuple:
    """(q, k, v, bias, scale) as torch's kernels are fast and accurate on; scale is a float."""
    q, k, v, bias, scale = x.q, x.k, x.v, x.bias, x.scale
    if q.dtype.itemsize == 2 and any(map(wants_grad, (q, k, v))) and len(calls) > 1:
        total = sum((c.rows.stop - c.rows.start) * (c.keys.stop - c.keys.start) for c in calls)
        if q.is_cpu and total < SHORT_CALL * len(calls):
            q, k, v = q.float(), k.float(), v.float()
        elif not keys_apart(calls):  # calls add up in the gradients
            k, v = k.float(), v.float()
    if wants_grad(bias):  # likewise
        bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    if isinstance(scale, Tensor):
        wide = torch.promote_types(q.dtype, torch.float32)
        q, scale = (q.to(wide) * scale.to(wide).view(1, -1, 1, 1)).to(q.dtype), 1.0
    if q.is_cpu and x.D != x.Dv:  # the CPU kernel that forms no scores has one width for all
        q, k, v = (F.pad(t, (0, max(x.D, x.Dv) - t.shape[3])) for t in (q, k, v))
    return q, k, v, bias, scale


def attend(scale: float, q, k, v, bias, mask, start=None, stop=None, first_key=0) -> Tensor:
    """One call of torch's kernel; `start` and `stop` [b, rows] make a mask [b, 1, rows, keys]."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if start is not None:
        j = torch.arange(first_key, first_key + k.shape[2], dtype=torch.int32, device=k.device)
        mask = ((start[..., None] <= j) & (j < stop[..., None]))[:, None]
    if bias is not None:
        if bias.dtype != q.dtype:
            bias = bias.to(torch.promote_types(q.dtype, torch.float32))
        mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
    B, Hq, rows, D = q.shape
    Hkv = k.shape[1]
    if Hq != Hkv and mask is None:  # the heads of a group as more rows: each key is read once
        q = q.reshape(B, Hkv, Hq // Hkv * rows, D)
    grouped = q.shape[1] != Hkv
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    return out.reshape(B, Hq, rows, v.shape[3])


class Recomputed(torch.autograd.Function):
    """`attend` that keeps its inputs only: masks and scores would add up to Nq x Nk."""

    @staticmethod
    def forward(ctx, scale, q, k, v, bias, mask, start, stop, first_key):
        ctx.save_for_backward(q, k, v, bias, mask, start, stop)
        ctx.scale, ctx.first_key = scale, first_key
        return attend(scale, q, k, v, bias, mask, start, stop, first_key)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        needed = ctx.needs_input_grad[1:5]
        qkvb = [t if t is None else t.detach() for t in ctx.saved_tensors[:4]]
        wanted = [t.requires_grad_() for t, need in zip(qkvb, needed, strict=True) if need]
        with torch.enable_grad():
            out = attend(ctx.scale, *qkvb, *ctx.saved_tensors[4:], ctx.first_key)
        grads = iter(torch.autograd.grad(out, wanted, dout))
        return None, *(next(grads) if need else None for need in needed), *[None] * 4


def slices(t: Tensor | None, regions: list[tuple], apart: bool = True) -> Iterator[Tensor | None]:
    """t at each region: views that share one gradient, see `Cut` and `Peeled`.

    A chain of `Peeled` is advanced as it is asked for: so the backward comes to each link between
    two calls, and does not hold the gradients of all slices at once.
    """
    if t is None:
        yield from (None for _ in regions)
    elif len(regions) == 1 or not wants_grad(t):
        yield from (t[region] for region in regions)
    elif apart:
        yield from Cut.apply(t, regions)
    else:
        for region in regions:
            t, part = Peeled.apply(t, region)
            yield part


class Cut(torch.autograd.Function):
    """Regions without overlap; each gradient is copied to its place in that of t."""

    @staticmethod
    def forward(ctx, t, regions):
        ctx.set_materialize_grads(False)
        ctx.regions, ctx.like = regions, torch.empty_like(t, device="meta")
        return tuple(t[region] for region in regions)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dparts):
        given = [(r, d) for r, d in zip(ctx.regions, dparts, strict=True) if d is not None]
        like, covered = given[0][1], sum(d.numel() for _, d in given)
        make = torch.empty_like if covered == ctx.like.numel() else torch.zeros_like
        dt = make(ctx.like, device=like.device)
        for region, dpart in given:
            dt[region] = dpart
        return dt, None


class Peeled(torch.autograd.Function):
    """(t, t[region]); the gradient of the region is added to that of t in place.

    Which is safe: the gradient of the returned t comes from the next link of the chain alone.
    """

    @staticmethod
    def forward(ctx, t, region):
        ctx.set_materialize_grads(False)
        ctx.region, ctx.like = region, torch.empty_like(t, device="meta")
        return t.view_as(t), t[region]

    @staticmethod
    @once_differentiable
    def backward(ctx, dt, dpart):
        if dpart is not None:
            dt = torch.zeros_like(ctx.like, device=dpart.device) if dt is None else dt
            dt[ctx.region] += dpart
        return dt, None


class Pasted(torch.autograd.Function):
    """The opposite of `Cut`: [B, H, Nq, Dv] of its regions, in the order torch's kernels store."""

    @staticmethod
    def forward(ctx, size, regions, *parts):
        ctx.regions = regions
        _, H, _, Dv = parts[0].shape
        out = parts[0].new_empty(*size, H, Dv).transpose(1, 2)
        for region, part in zip(regions, parts, strict=True):
            out[region] = part
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return None, None, *(dout[region] for region in ctx.regions)


def pairs(t: Tensor | None, calls: list[Call]) -> list[tuple]:
    """The region of each call in a tensor that broadcasts to [B, Hq, Nq, Nk]."""
    if t is None:
        return [()] * len(calls)
    full = [(call.batch, ALL, call.rows, call.keys) for call in calls]
    return [tuple(ALL if n == 1 else s for n, s in zip(t.shape, r, strict=True)) for r in full]


def keys_apart(calls: list[Call]) -> bool:
    """Whether no key of a batch element is in two calls."""
    spans = sorted((c.batch.start, c.keys.start, c.keys.stop) for c in calls)
    return all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(spans))


def wants_grad(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad and torch.is_grad_enabled()
