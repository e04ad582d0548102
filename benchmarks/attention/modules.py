"""`nn.MultiheadAttention` and ours in its place, called as by default: with averaged weights.

Projections are the identity, so the result is that of the op and is held against the same truth;
their time is in both. Numbers of attended work count the attention alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import xattn_kernels

from .case import Case


def module_reasons(case: Case) -> list[str]:
    """The module knows one head width and one number of heads."""
    found = ["D != Dv"] if case.workload.D != case.workload.Dv else []
    return found + (["grouped heads"] if case.groups > 1 else [])


def prepare_module(case: Case, ours: bool):
    """attend(q, k, v) for a module of `case`'s sizes, with a KeyInterval or torch's dense mask."""
    w = case.workload
    kind = xattn_kernels.MultiheadAttention if ours else nn.MultiheadAttention
    module = kind(w.Hq * w.D, w.Hq, batch_first=True, device=case.device, dtype=case.dtype)
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
    eye = torch.eye(module.embed_dim)
    module.in_proj_weight.copy_(eye.repeat(3, 1))
    module.out_proj.weight.copy_(eye)
