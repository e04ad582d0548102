"""Masked cross-attention: allocates, and launches the CUDA kernels of csrc/.

The launchers take and give what those of `triton_kernels/cross_attention.py` and
`cross_attention_backward.py` do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.layout import broadcast_strides, empty_rows, zero_gradients
from . import launch
from .launch import DTYPES, extension, numbers


def heads(t: Tensor | None) -> Any:
    """Of [B, H, N, width], or None."""
    if t is None:
        return extension().HeadTensor()
    return extension().HeadTensor(launch.pointer(t), t.stride()[:3])


def bounds(t: Tensor | None) -> Any:
    """Of int32 [B, Nq], or None."""
    if t is None:
        return extension().RowBounds()
    return extension().RowBounds(launch.pointer(t), t.stride())


def pairs(t: Tensor | None) -> Any:
    """Of a bool or floating-point tensor that broadcasts to [B, Hq, Nq, Nk], or of the words of
    bits that stand for a bool one, or None."""
    _cuda = extension()
    if t is None:
        return _cuda.PairTensor()
    dtype = getattr(_cuda.DType, DTYPES.get(t.dtype, "float32"))  # bytes have none
    return _cuda.PairTensor(launch.pointer(t), broadcast_strides(t), dtype)


def call_of(q, k, v, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p) -> Any:
    _cuda = extension()
    B, Hq, Nq, D = q.shape
    Hkv, Nk, Dv = v.shape[1:]
    shape = (B, Hq, Hkv, Nq, Nk, D, Dv, getattr(_cuda.DType, DTYPES[q.dtype]))
    per_head = scale_tensor is not None and scale_tensor.numel() > 1
    return _cuda.CrossAttentionCall(
        heads(q), heads(k), heads(v), bounds(start), bounds(stop), pairs(mask), pairs(bias),
        numbers(scale_tensor), scale_tensor.stride(0) if per_head else 0, launch.pointer(seed),
        round(dropout_p * 2**32), scale, softcap, 1.0 / (1.0 - dropout_p),
        _cuda.CrossAttentionShape(*shape), mask is not None and mask.dtype == torch.int32,
    )  # fmt: skip


def as_float32(scale_tensor: Tensor | None) -> Tensor | None:
    """A scale as the kernels read it, also one of float64."""
    return scale_tensor.float() if scale_tensor is not None else None


def forward(
    q, k, v, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p, statistics,
    allow_tf32=False,
):  # fmt: skip
    """(out, lse, lse_low, entropy, max_probability): what was not asked for has no elements.

    As `forward` of the Triton kernels; float32 takes three products of TF32, also where one may do.
    """
    scale_tensor = as_float32(scale_tensor)
    out = empty_rows(q, v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    wanted = (bias is not None, statistics, statistics)
    rows = (lse, *(torch.empty_like(lse) if w else None for w in wanted))
    if k.shape[2] == 0:
        for t, empty in zip((out, *rows), (0.0, float("-inf"), 0.0, 0.0, 0.0), strict=True):
            t is None or t.fill_(empty)
    elif out.numel():
        _cuda = extension()
        call = call_of(
            q, k, v, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p
        )
        n_splits = launch.splits(_cuda.cross_attention_forward_splits, call, q.device)
        params = _cuda.CrossAttentionForwardParams(
            heads(out), [*map(launch.pointer, rows)], call, n_splits
        )
        parts = new_parts(_cuda.cross_attention_forward_parts(params), q)
        params.parts = launch.pointer(parts)
        launch.submit("cross_attention_forward", params, q.device)
    return tuple(lse.new_empty(0) if t is None else t for t in (out, *rows))


def new_parts(n: int, like: Tensor) -> Tensor | None:
    return like.new_empty(n, dtype=torch.float32) if n else None


def backward(
    dout, dlse, dentropy, q, k, v, bias, scale_tensor, start, stop, mask, seed, out, lse, lse_low,
    entropy, scale, softcap, dropout_p, allow_tf32, needs,
):  # fmt: skip
    """(dq, dk, dv, dbias, dscale); those that are not in the five `needs` have no elements. As
    `backward` of the Triton kernels."""
    if k.shape[2] == 0 or out.numel() == 0:
        return zero_gradients((q, k, v, bias, scale_tensor), needs, 3)
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(3) != 1:
        dout = dout.contiguous()
    rows = [None if t is None else t.contiguous() for t in (lse, lse_low, dlse, dentropy, entropy)]
    if bias is None:
        rows[1] = None
    if dentropy is None:
        rows[4] = None
    scales = as_float32(scale_tensor)
    call = call_of(q, k, v, bias, scales, start, stop, mask, seed, scale, softcap, dropout_p)
    dq = empty_rows(q, q.shape[3]) if needs[0] else None
    dk, dv = (empty_rows(t, t.shape[3]) if needs[1] or needs[2] else None for t in (k, v))

    _cuda = extension()
    params = _cuda.CrossAttentionBackwardParams(
        *map(heads, (dq, dk, dv, out, dout)), [*map(launch.pointer, rows)], call,
        (1,) * 4 if bias is None else tuple(bias.shape),
    )  # fmt: skip
    launch.splits(_cuda.cross_attention_backward_splits, params, q.device)
    dbias, dscale = dbias_and_dscale(params, q, bias, needs)
    parts = new_parts(_cuda.cross_attention_backward_parts(params), q)
    params.parts = launch.pointer(parts)
    launch.submit("cross_attention_backward", params, q.device)
    if dscale is not None:
        over = (0, 1, 3) if scale_tensor.numel() > 1 else (0, 1, 2, 3)
        dscale = dscale.sum(over).to(scale_tensor.dtype).view_as(scale_tensor)
    if dbias is not None:
        dbias = dbias.sum(0).to(bias.dtype)
    grads = (dq, dk, dv, dbias, dscale)
    return tuple(t if needed else q.new_empty(0) for t, needed in zip(grads, needs, strict=True))


def dbias_and_dscale(params: Any, q: Tensor, bias: Tensor | None, needs: list[bool]) -> tuple:
    """What each of the splits adds to them, to be summed, or None; `params` has its pointers."""
    dbias = dscale = None
    if needs[3]:
        dbias = q.new_empty((params.dbias_splits, *bias.shape), dtype=torch.float32)
        params.dbias = launch.pointer(dbias)
    if needs[4]:
        dscale = q.new_empty((params.dq_splits, *q.shape[:3]), dtype=torch.float32)
        params.dscale = launch.pointer(dscale)
    return dbias, dscale
