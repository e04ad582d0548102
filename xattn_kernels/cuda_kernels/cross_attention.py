"""The launchers of the CUDA kernels of masked cross-attention, which allocate what csrc/ writes.

Their arguments and results are those of the launchers in `triton_kernels/cross_attention.py` and
`cross_attention_backward.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.call import AttentionCall, CrossAttentionCall
from ..core.kernel_op import Gradients, Needs
from ..core.layout import (
    AttentionResults,
    broadcast_strides,
    empty_results,
    row_gradient,
    rows_like,
    scale_gradient,
    zero_gradients,
)
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


def struct_of(call: AttentionCall) -> Any:
    """The struct of a call, whose scale_tensor is one that the kernels read."""
    _cuda = extension()
    dtype = getattr(_cuda.DType, DTYPES[call.q.dtype])
    shape = _cuda.CrossAttentionShape(
        B=call.B, Hq=call.Hq, Hkv=call.Hkv, Nq=call.Nq, Nk=call.Nk, D=call.D, Dv=call.Dv,
        dtype=dtype,
    )  # fmt: skip
    scale_tensor, mask = call.scale_tensor, call.mask
    per_head = scale_tensor is not None and scale_tensor.numel() > 1
    return _cuda.CrossAttentionCall(
        q=heads(call.q),
        k=heads(call.k),
        v=heads(call.v),
        start=bounds(call.start),
        stop=bounds(call.stop),
        mask=pairs(mask),
        bias=pairs(call.bias),
        scales=numbers(scale_tensor),
        scale_stride=scale_tensor.stride(0) if per_head else 0,
        seed=launch.pointer(call.seed),
        threshold=round(call.dropout_p * 2**32),
        scale=1.0 if call.scale is None else call.scale,
        softcap=call.softcap or 0.0,
        keep_scale=1.0 / (1.0 - call.dropout_p),
        shape=shape,
        mask_is_bits=mask is not None and mask.dtype == torch.int32,
    )


def readable(call: AttentionCall) -> AttentionCall:
    """The call with its scale in the dtype that the kernels read. A scale may also be float64."""
    if call.scale_tensor is None:
        return call
    return replace(call, scale_tensor=call.scale_tensor.float())


def forward(call: CrossAttentionCall) -> AttentionResults:
    """The results of a call, as `forward` of the Triton kernels returns them.

    float32 takes three products of TF32 even if `allow_tf32`.
    """
    results, call = empty_results(call), readable(call)
    if call.Nk == 0:
        results.out.zero_(), results.lse.fill_(float("-inf"))
        for t in results[2:]:
            t is None or t.zero_()
    elif results.out.numel():
        _cuda, struct = extension(), struct_of(call)
        params = _cuda.CrossAttentionForwardParams(
            out=heads(results.out),
            lse=launch.pointer(results.lse),
            lse_low=launch.pointer(results.lse_low),
            entropy=launch.pointer(results.entropy),
            max_probability=launch.pointer(results.max_probability),
            call=struct,
            n_splits=launch.splits(_cuda.cross_attention_forward_splits, struct, call.device),
        )
        parts = new_parts(_cuda.cross_attention_forward_parts(params), call.q)
        params.parts = launch.pointer(parts)
        launch.submit("cross_attention_forward", params, call.device)
    return results


def new_parts(n: int, like: Tensor) -> Tensor | None:
    """Room for n floats, or None for none."""
    return like.new_empty(n, dtype=torch.float32) if n else None


def backward(
    upstream: AttentionResults, call: CrossAttentionCall, results: AttentionResults, needs: Needs
) -> Gradients:
    """The gradients that `needs` names, as `backward` of the Triton kernels returns them."""
    if call.Nk == 0 or results.out.numel() == 0:
        return zero_gradients(call, needs)
    bias, scale_tensor, call = call.bias, call.scale_tensor, readable(call)
    dout = row_gradient(upstream.out, results.out)
    dlse, dentropy, lse, lse_low = (
        None if t is None else t.contiguous()
        for t in (upstream.lse, upstream.entropy, results.lse, results.lse_low)
    )
    dq = rows_like(call.q) if "q" in needs else None
    of_keys = "k" in needs or "v" in needs
    dk, dv = (rows_like(t) if of_keys else None for t in (call.k, call.v))

    _cuda = extension()
    params = _cuda.CrossAttentionBackwardParams(
        dq=heads(dq),
        dk=heads(dk),
        dv=heads(dv),
        out=heads(results.out),
        dout=heads(dout),
        lse=launch.pointer(lse),
        lse_low=launch.pointer(lse_low),
        dlse=launch.pointer(dlse),
        dentropy=launch.pointer(dentropy),
        entropy=launch.pointer(None if dentropy is None else results.entropy),
        call=struct_of(call),
        bias_sizes=(1,) * 4 if bias is None else bias.shape,
    )
    launch.splits(_cuda.cross_attention_backward_splits, params, call.device)
    dbias, dscale = summed_gradients(params, call, needs)
    parts = new_parts(_cuda.cross_attention_backward_parts(params), call.q)
    params.parts = launch.pointer(parts)
    launch.submit("cross_attention_backward", params, call.device)
    grads = {"q": dq, "k": dk, "v": dv}
    if dscale is not None:
        grads["scale_tensor"] = scale_gradient(dscale, scale_tensor)
    if dbias is not None:
        grads["bias"] = dbias.sum(0).to(bias.dtype)
    return grads


def summed_gradients(
    params: Any, call: CrossAttentionCall, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """(dbias, dscale) of each split, or None; sets their pointers in `params`."""
    dbias = dscale = None
    if "bias" in needs:
        shape = (params.dbias_splits, *call.bias.shape)
        dbias = call.q.new_empty(shape, dtype=torch.float32)
        params.dbias = launch.pointer(dbias)
    if "scale_tensor" in needs:
        shape = (params.dq_splits, *call.q.shape[:3])
        dscale = call.q.new_empty(shape, dtype=torch.float32)
        params.dscale = launch.pointer(dscale)
    return dbias, dscale
