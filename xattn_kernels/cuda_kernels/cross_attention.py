"""The launchers of the CUDA kernels of masked cross-attention, which allocate what csrc/ writes.

Their arguments and results are those of the launchers in `triton_kernels/cross_attention.py` and
`cross_attention_backward.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.layout import broadcast_strides, empty_rows, zero_gradients
from . import launch
from .launch import DTYPES, extension, numbers


def heads(t: Tensor | None) -> Any:
    """The struct of a tensor [B, H, N, width], or of None."""
    if t is None:
        return extension().HeadTensor()
    return extension().HeadTensor(data=launch.pointer(t), strides=t.stride()[:3])


def bounds(t: Tensor | None) -> Any:
    """The struct of an int32 tensor [B, Nq], or of None."""
    if t is None:
        return extension().RowBounds()
    return extension().RowBounds(data=launch.pointer(t), strides=t.stride())


def pairs(t: Tensor | None) -> Any:
    """The struct of a mask or bias that broadcasts to [B, Hq, Nq, Nk], or of None. A mask may have
    words of bits in place of bools."""
    _cuda = extension()
    if t is None:
        return _cuda.PairTensor()
    tensor = _cuda.PairTensor(data=launch.pointer(t), strides=broadcast_strides(t))
    if t.is_floating_point():
        tensor.dtype = getattr(_cuda.DType, DTYPES[t.dtype])
    return tensor


def call_of(q, k, v, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p) -> Any:
    _cuda = extension()
    B, Hq, Nq, D = q.shape
    Hkv, Nk, Dv = v.shape[1:]
    dtype = getattr(_cuda.DType, DTYPES[q.dtype])
    shape = _cuda.CrossAttentionShape(B=B, Hq=Hq, Hkv=Hkv, Nq=Nq, Nk=Nk, D=D, Dv=Dv, dtype=dtype)
    per_head = scale_tensor is not None and scale_tensor.numel() > 1
    return _cuda.CrossAttentionCall(
        q=heads(q),
        k=heads(k),
        v=heads(v),
        start=bounds(start),
        stop=bounds(stop),
        mask=pairs(mask),
        bias=pairs(bias),
        scales=numbers(scale_tensor),
        scale_stride=scale_tensor.stride(0) if per_head else 0,
        seed=launch.pointer(seed),
        threshold=round(dropout_p * 2**32),
        scale=scale,
        softcap=softcap,
        keep_scale=1.0 / (1.0 - dropout_p),
        shape=shape,
        mask_is_bits=mask is not None and mask.dtype == torch.int32,
    )


def as_float32(scale_tensor: Tensor | None) -> Tensor | None:
    """The scale in the dtype that the kernels read. A scale may also be float64."""
    return scale_tensor.float() if scale_tensor is not None else None


def forward(
    q, k, v, bias, scale_tensor, start, stop, mask, seed, scale, softcap, dropout_p, statistics,
    allow_tf32=False,
):  # fmt: skip
    """(out, lse, lse_low, entropy, max_probability). Those that are not wanted have no elements.

    The arguments are those of `forward` of the Triton kernels. float32 takes three products of TF32
    even if `allow_tf32`.
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
            out=heads(out),
            lse=launch.pointer(rows[0]),
            lse_low=launch.pointer(rows[1]),
            entropy=launch.pointer(rows[2]),
            max_probability=launch.pointer(rows[3]),
            call=call,
            n_splits=n_splits,
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
    """(dq, dk, dv, dbias, dscale). Those that the five `needs` exclude have no elements. The
    arguments are those of `backward` of the Triton kernels."""
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
        dq=heads(dq),
        dk=heads(dk),
        dv=heads(dv),
        out=heads(out),
        dout=heads(dout),
        lse=launch.pointer(rows[0]),
        lse_low=launch.pointer(rows[1]),
        dlse=launch.pointer(rows[2]),
        dentropy=launch.pointer(rows[3]),
        entropy=launch.pointer(rows[4]),
        call=call,
        bias_sizes=(1,) * 4 if bias is None else bias.shape,
    )
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
    """The tensors of the sums of each split, or None; sets their pointers in `params`."""
    dbias = dscale = None
    if needs[3]:
        dbias = q.new_empty((params.dbias_splits, *bias.shape), dtype=torch.float32)
        params.dbias = launch.pointer(dbias)
    if needs[4]:
        dscale = q.new_empty((params.dq_splits, *q.shape[:3]), dtype=torch.float32)
        params.dscale = launch.pointer(dscale)
    return dbias, dscale
