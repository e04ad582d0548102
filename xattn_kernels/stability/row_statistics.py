"""The lse, entropy and largest probability of the rows of a call, without its output."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import reference
from ..core.call import (
    CrossAttentionCall,
    CrossAttentionResult,
    TopKAttentionCall,
    TopKAttentionResult,
)
from ..core.dispatch import without_autocast
from ..ops.cross_attention import cross_attention
from ..ops.topk_attention import topk_attention
from ..torch_kernels.topk_attention import chunks

NARROW = 16  # the width of values that are not needed; kernels are no faster with fewer


def row_statistics(
    x: CrossAttentionCall, backend: str | None = None
) -> CrossAttentionResult | TopKAttentionResult:
    """The statistics of the call `x` before dropout; lse and entropy have gradients for q, k, bias
    and scale.

    `backend` computes them where it can, else the first kernels that can. Without any, or with
    "eager", the equations do for at most CHUNK scores at a time, which the backward recomputes.
    """
    options = dict(dropout_p=0.0, seed=None, return_lse=True, return_statistics=True)
    y = replace(x, v=x.v[..., :NARROW].detach(), **options)
    sparse = isinstance(x, TopKAttentionCall)
    backends = (topk_attention if sparse else cross_attention).backends
    for b in sorted(backends, key=lambda b: b.name != backend):
        if "eager" not in (b.name, backend) and not b.reasons(y):
            with without_autocast(y.device):
                return b.run(y)
    with without_autocast(y.device):
        return reference.topk_attention(y) if sparse else in_chunks(y)


def in_chunks(x: CrossAttentionCall) -> CrossAttentionResult:
    """The statistics by the equations, for at most CHUNK scores at a time."""
    if 0 in (x.B, x.Nq):
        return reference.cross_attention(x)
    recompute, by_batch = torch.is_grad_enabled(), []
    for batch in chunks(x.B, x.Hq * x.Nq * x.Nk):
        rows = chunks(x.Nq, (batch.stop - batch.start) * x.Hq * x.Nk)
        parts = [x.part(batch, r) for r in rows]
        by_rows = [
            checkpoint(statistics, p, use_reentrant=False) if recompute else statistics(p)
            for p in parts
        ]
        by_batch.append([torch.cat(t, dim=2) for t in zip(*by_rows, strict=True)])
    return CrossAttentionResult(None, *(torch.cat(t) for t in zip(*by_batch, strict=True)))


def statistics(x: CrossAttentionCall) -> tuple[Tensor, ...]:
    """(lse, entropy, max_probability) by the equations."""
    return reference.softmax(reference.scores(x))[1:]
