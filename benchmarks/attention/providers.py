"""The providers of attention, ours and those of others; see `harness/provider.py`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as dispatch
from torch.nn.attention import SDPBackend, sdpa_kernel

import xattn_kernels

from ..harness.provider import (
    Attend,
    Provider,
    needs_half_on_cuda,
    needs_package,
    our_backend,
    too_large,
)
from .case import Case
from .modules import module_reasons, prepare_module

# eager code, as a model file contains it


def prepare_eager(case: Case) -> Attend:
    mask, empty, scale = case.dense_mask(), case.empty_rows(), case.workload.D**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat_heads(case, k, v)
        s = (q * scale) @ k.transpose(-1, -2)
        if mask is not None:
            s = s.masked_fill(~mask, torch.finfo(s.dtype).min)
        p = s.softmax(-1, dtype=torch.float32).to(q.dtype)
        return (p if empty is None else p.masked_fill(empty, 0.0)) @ v

    return attend


def repeat_heads(case: Case, *tensors: Tensor) -> tuple[Tensor, ...]:
    if case.groups == 1:
        return tensors
    return tuple(t.repeat_interleave(case.groups, dim=1) for t in tensors)


# scaled_dot_product_attention with a dense mask, one kernel at a time


def sdpa_reasons(backend: SDPBackend, case: Case, mode: str) -> list[str]:
    if backend == SDPBackend.MATH:
        return too_large(case, mode, 4)
    if case.device.type != "cuda":
        if backend != SDPBackend.FLASH_ATTENTION:
            return ["runs on CUDA only"]
        return ["D != Dv"] if case.workload.D != case.workload.Dv else []
    can_use = {
        SDPBackend.FLASH_ATTENTION: dispatch.can_use_flash_attention,
        SDPBackend.EFFICIENT_ATTENTION: dispatch.can_use_efficient_attention,
        SDPBackend.CUDNN_ATTENTION: dispatch.can_use_cudnn_attention,
    }[backend]
    q, k, v = case.inputs(mode != "forward")
    gqa = case.groups > 1 and backend != SDPBackend.EFFICIENT_ATTENTION
    k, v = (k, v) if gqa else repeat_heads(case, k, v)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = dispatch.SDPAParams(q, k, v, case.dense_mask(), 0.0, False, gqa)
        if can_use(params, True):
            return []
    words = [str(w.message).split(" (Triggered")[0] for w in caught]
    return [w for w in words if "not used because" not in w] or ["torch says it cannot"]


def prepare_sdpa(backend: SDPBackend, case: Case) -> Attend:
    mask = case.dense_mask()
    repeats = backend == SDPBackend.EFFICIENT_ATTENTION
    gqa = case.groups > 1 and not repeats

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat_heads(case, k, v) if repeats else (k, v)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)

    return attend


# FlexAttention, compiled for the shape, with its BlockMask made beforehand


def flex_reasons(case: Case, mode: str) -> list[str]:
    if case.device.type == "cpu" and mode != "forward":
        return ["FlexAttention has no backward on the CPU"]
    return []


def prepare_flex(case: Case) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    w, block_mask = case.workload, None
    if case.bounds is not None:
        B = None if case.bounds[0].shape[0] == 1 else w.B
        block_mask = create_block_mask(case.mask_mod(), B, None, w.Nq, w.Nk, device=case.device)
    torch._dynamo.reset()  # a limit on recompilations would otherwise fall back to eager code
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return partial(compiled, block_mask=block_mask, enable_gqa=case.groups > 1)


# packed sequences: for interval masks made of consecutive runs, the honest rival


def segment_reasons(package: str, case: Case, mode: str) -> list[str]:
    reasons = needs_package(package) or needs_half_on_cuda(case)
    if reasons:
        return reasons
    if case.workload.D != case.workload.Dv:
        reasons.append("D != Dv")
    if case.segments is None:
        reasons.append("the intervals are not consecutive segments")
    return reasons


def flatten(t: Tensor) -> Tensor:
    """The packed [B * N, H, D] of [B, H, N, D], a view for a model's layout."""
    return t.transpose(1, 2).flatten(0, 1)


def prepare_segments(call: Callable, case: Case) -> Attend:
    segments, B = case.segments, case.workload.B

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = call(flatten(q), flatten(k), flatten(v), *segments)
        return out.unflatten(0, (B, -1)).transpose(1, 2)

    return attend


def torch_varlen_reasons(case: Case, mode: str) -> list[str]:
    if not needs_package("torch.nn.attention.varlen"):
        from torch.nn.attention.varlen import varlen_attn

        if case.groups > 1 and "enable_gqa" not in inspect.signature(varlen_attn).parameters:
            return ["this torch's varlen_attn has no grouped heads"]
    return segment_reasons("torch.nn.attention.varlen", case, mode)


def prepare_torch_varlen(case: Case) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    gqa = {"enable_gqa": True} if case.groups > 1 else {}
    return prepare_segments(partial(varlen_attn, **gqa), case)


def prepare_flash_attn(case: Case) -> Attend:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if case.interval is None:

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

        return attend
    return prepare_segments(flash_attn_varlen_func, case)


def xformers_reasons(case: Case, mode: str) -> list[str]:
    reasons = segment_reasons("xformers", case, mode)
    return reasons + (["grouped heads"] if case.groups > 1 else [])


def prepare_xformers(case: Case) -> Attend:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    lengths = (case.segments.cu_q.diff().tolist(), case.segments.cu_k.diff().tolist())
    bias = None if case.interval is None else BlockDiagonalMask.from_seqlens(*lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if bias is None:
            return memory_efficient_attention(q, k, v).transpose(1, 2)
        packed = memory_efficient_attention(*(t.flatten(0, 1)[None] for t in (q, k, v)), bias)
        return packed[0].unflatten(0, (q.shape[0], -1)).transpose(1, 2)

    return attend


# ours, per backend


def xattn_reasons(backend: str, case: Case, mode: str) -> list[str]:
    if backend == "eager":
        return too_large(case, mode, 6)
    op = xattn_kernels.cross_attention
    x = op.check(*case.inputs(mode != "forward"), mask=case.interval)
    return next(b for b in op.backends if b.name == backend).reasons(x)


def prepare_xattn(backend: str, case: Case) -> Attend:
    return partial(xattn_kernels.cross_attention, mask=case.interval, backend=backend)


ours = partial(our_backend, xattn_reasons, prepare_xattn)


def sdpa(word: str, backend: SDPBackend) -> Provider:
    return Provider(f"sdpa-{word}", partial(sdpa_reasons, backend), partial(prepare_sdpa, backend))


def module(name: str, is_ours: bool) -> Provider:
    """The provider from torch's module or from ours.

    torch's module makes weights [B, H, Nq, Nk], ours only their mean; both return [B, Nq, Nk].
    """

    def reasons(case: Case, mode: str) -> list[str]:
        return module_reasons(case) or too_large(case, mode, 1 if is_ours else 4)

    return Provider(name, reasons, partial(prepare_module, ours=is_ours))


# Providers run in this order; where time is short, the last are left out.
PROVIDERS = (
    ours("triton"),
    ours("cuda"),
    ours("torch"),
    sdpa("flash", SDPBackend.FLASH_ATTENTION),
    sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION),
    sdpa("cudnn", SDPBackend.CUDNN_ATTENTION),
    Provider("torch-varlen", torch_varlen_reasons, prepare_torch_varlen),
    Provider("flash-attn", partial(segment_reasons, "flash_attn"), prepare_flash_attn),
    Provider("xformers", xformers_reasons, prepare_xformers),
    Provider("eager", lambda case, mode: too_large(case, mode, 4), prepare_eager),
    Provider("flex", flex_reasons, prepare_flex, compiles=True),
    module("xattn-mha", True),
    module("torch-mha", False),
    sdpa("math", SDPBackend.MATH),
    ours("eager"),
)
BY_NAME = {p.name: p for p in PROVIDERS}
