"""The providers of top-k attention, ours and those of others; see `harness/provider.py`.

All work on the keys of a call is timed, the choice and masks that are made of it included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import xattn_kernels
from xattn_kernels.reference import named

from ..attention.providers import flex_reasons, repeat_heads
from ..attention.truth import truth_of as truth_of_attention
from ..harness.provider import Attend, Provider, no_reasons, our_backend, too_large
from ..harness.truth import Truth
from .workloads import TopKCase

FEWEST_ROWS = 16


def keys_only(case: TopKCase, mode: str) -> list[str]:
    return ["chooses keys, not blocks of them"] if case.workload.topk_blocks else []


# eager code, the composition that the literature describes


def eager_reasons(case: TopKCase, mode: str) -> list[str]:
    """Why the scores, the zeros and a copy of their gradient, and gathered values do not fit."""
    w = case.workload
    return keys_only(case, mode) or too_large(case, mode, 3 + -(-w.kept * w.Dv // w.Nk))


def prepare_eager(case: TopKCase) -> Attend:
    w = case.workload
    scale, heads = w.D**-0.5, torch.arange(w.B * w.Hq, device=case.device)
    first = (heads * w.Nk).view(w.B, w.Hq, 1, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeat_heads(case, k, v)
        top = (scale * q @ k.mT).topk(w.top_k)
        p = top.values.softmax(-1, dtype=torch.float32).to(v.dtype)
        # the gradient of torch.gather from expanded values would be Nq times as large as v
        values = v.flatten(0, 2).index_select(0, (top.indices + first).flatten())
        return (p[..., None, :] @ values.view(*p.shape, w.Dv)).squeeze(-2)

    return attend


# fused attention with a dense mask of the chosen keys


@torch.no_grad()
def dense_mask(case: TopKCase, q: Tensor, k: Tensor) -> Tensor:
    """The chosen keys, bool [B, Hq, Nq, Nk]; a positive scale would not change the choice."""
    s = q @ repeat_heads(case, k)[0].mT
    return named(s.topk(case.workload.top_k, sorted=False).indices, k.shape[2])


def mask_reasons(case: TopKCase, mode: str) -> list[str]:
    return keys_only(case, mode) or too_large(case, mode, 4)


def prepare_mask(case: TopKCase) -> Attend:
    gqa = case.groups > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = dense_mask(case, q, k)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)

    return attend


# FlexAttention, which cannot choose keys by score: its mask_mod reads the dense mask


def chosen_flex_reasons(case: TopKCase, mode: str) -> list[str]:
    return flex_reasons(case, mode) or mask_reasons(case, mode)


def prepare_flex(case: TopKCase) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    w = case.workload
    torch._dynamo.reset()  # a limit on recompilations would otherwise fall back to eager code
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = dense_mask(case, q, k)

        def mask_mod(b, h, i, j):
            return mask[b, h, i, j]

        block_mask = create_block_mask(mask_mod, w.B, w.Hq, w.Nq, w.Nk, device=q.device)
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=case.groups > 1)

    return attend


# ours, per backend, and attention over all keys


def ours_reasons(backend: str, case: TopKCase, mode: str) -> list[str]:
    if backend == "eager":
        return too_large(case, mode, 10)
    op = xattn_kernels.topk_attention
    x = op.check(*case.inputs(mode != "forward"), **case.workload.choice)
    return next(b for b in op.backends if b.name == backend).reasons(x)


def prepare_ours(backend: str, case: TopKCase) -> Attend:
    return partial(xattn_kernels.topk_attention, **case.workload.choice, backend=backend)


def prepare_dense(case: TopKCase) -> Attend:
    return xattn_kernels.cross_attention


def where_certain(provider: Provider) -> Provider:
    """The provider, not timed where rounding leaves too few rows with a certain choice."""

    def reasons(case: TopKCase, mode: str) -> list[str]:
        rows = int((~case.left_out).sum())
        if provider.name == "dense" or rows >= FEWEST_ROWS:
            return provider.reasons(case, mode)
        return [f"rounding to {case.dtype} leaves the choice of {rows} rows certain"]

    return replace(provider, reasons=reasons)


ours = partial(our_backend, ours_reasons, prepare_ours)
# Providers run in this order; where time is short, the last are left out.
PROVIDERS = tuple(
    where_certain(provider)
    for provider in (
        ours("triton"),
        ours("cuda"),
        ours("torch"),
        Provider("dense", no_reasons, prepare_dense),
        Provider("sdpa-mask", mask_reasons, prepare_mask),
        Provider("eager-topk", eager_reasons, prepare_eager),
        Provider("flex", chosen_flex_reasons, prepare_flex, compiles=True),
        ours("eager"),
    )
)
BY_NAME = {p.name: p for p in PROVIDERS}


@dataclass(frozen=True)
class TopKTruth(Truth):
    """The truth of top-k attention: `left_out`, bool [B, Hq, Nq], marks rows whose out need only be
    finite, and `dense` is the truth of attention to all keys."""

    left_out: Tensor
    dense: Truth

    def for_provider(self, provider: str) -> Truth:
        return self.dense if provider == "dense" else self

    def verdict(self, results: tuple[Tensor, ...]) -> tuple[str, float]:
        out, *grads = results
        if out.shape == self.truth[0].shape:
            unseen = self.left_out[..., None] & out.isfinite()
            out = torch.where(unseen, self.truth[0].to(out.dtype), out)
        return super().verdict((out, *grads))


def truth_of(case: TopKCase, gradients: bool) -> TopKTruth:
    """The truth of attention to exactly the keys that float64 chooses."""
    chosen = truth_of_attention(case, gradients)
    dense = truth_of_attention(case.dense(), gradients)
    return TopKTruth(**vars(chosen), left_out=case.left_out, dense=dense)
