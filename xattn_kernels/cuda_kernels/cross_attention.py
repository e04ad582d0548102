"""Masked cross-attention: allocates, and launches the CUDA kernels of csrc/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import launch
from .launch import DTYPES, extension

WIDEST = 128


def heads(t: Tensor) -> Any:
    return extension().HeadTensor(launch.pointer(t), t.stride()[:3])


def bounds(t: Tensor | None) -> Any:
    """Of int32 [B, Nq], or None."""
    if t is None:
        return extension().RowBounds()
    return extension().RowBounds(launch.pointer(t), t.stride())


def forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, stop: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out like q, lse float32 [B, Hq, Nq]); q, k, v [B, H, N, width] of 16 bits, every row of
    them beginning at a multiple of 16 bytes."""
    B, Hq, Nq, D = q.shape
    Hkv, Nk, Dv = v.shape[1:]
    out = q.new_empty((B, Nq, Hq, Dv)).transpose(1, 2)
    lse = q.new_empty((B, Hq, Nq), dtype=torch.float32)
    if out.numel():
        _cuda = extension()
        dtype = getattr(_cuda.DType, DTYPES[q.dtype])
        params = _cuda.CrossAttentionForwardParams(
            heads(out), launch.pointer(lse), heads(q), heads(k), heads(v), bounds(start),
            bounds(stop), _cuda.CrossAttentionShape(B, Hq, Hkv, Nq, Nk, D, Dv, dtype, scale),
        )  # fmt: skip
        launch.submit("cross_attention_forward", params, q.device)
    return out, lse
