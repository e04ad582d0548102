"""Providers from `nn.MultiheadAttention` and ours, called with averaged weights as by default.

Their projections are the identity, so that the results are those of the op and have the same truth.
The times contain the projections, but the counts of operations and bytes do not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import xattn_kernels

from .case import Case


def module_reasons(case: Case) -> list[str]:
    """Why the modules, which have one head width and one number of heads, cannot run the case."""
    reasons = ["D != Dv"] if case.workload.D != case.workload.Dv else []
    return reasons + (["grouped heads"] if case.groups > 1 else [])


def prepare_module(case: Case, ours: bool):
    """attend(q, k, v) for a module of `case`'s sizes, with a KeyInterval or torch's dense mask."""
    w = case.workload
    module_class = xattn_kernels.MultiheadAttention if ours else nn.MultiheadAttention
    module = module_class(w.Hq * w.D, w.Hq, batch_first=True, device=case.device, dtype=case.dtype)
    make_identity(module.requires_grad_(False))
    options = {"mask": case.interval} if ours else {"attn_mask": forbidden(case)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
        out, _weights = module(*flat, **options)
        return out.unflatten(2, (w.Hq, w.D)).transpose(1, 2)

    return attend


def forbidden(case: Case) -> Tensor | None:
    """bool [Nq, Nk], or [B * Hq, Nq, Nk] where batches differ; True = not allowed."""
    mask = case.dense_mask()
    if mask is None:
        return None
    if mask.shape[0] == 1:
        return ~mask[0, 0]
    return ~mask.expand(-1, case.workload.Hq, -1, -1).flatten(0, 1)


@torch.no_grad()
def make_identity(module: nn.Module) -> None:
    """Sets all projections to the identity."""
    eye = torch.eye(module.embed_dim)
    module.in_proj_weight.copy_(eye.repeat(3, 1))
    module.out_proj.weight.copy_(eye)
