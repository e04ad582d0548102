"""`GatedCrossAttentionBlock`: gated cross-attention and feed-forward between frozen layers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.arguments import (
    check_bools,
    check_choice,
    check_number,
    check_positive,
    check_sizes,
)
from ..ops.gated_residual import gated_residual, gated_residual_norm
from .masked_cross_attention import NORMS, MaskedCrossAttention
from .media_cache import MediaCache


class SwiGLU(nn.Module):
    """The product silu(a) * b of the halves a, b of the last dimension.

    Source: Shazeer, "GLU variants improve transformer" (2020).
    """

    def forward(self, x: Tensor) -> Tensor:
        """The product [..., width] of the halves of x [..., 2 * width]."""
        a, b = x.chunk(2, dim=-1)
        return F.silu(a) * b


class GatedCrossAttentionBlock(nn.Module):
    """A cross-attention to media, then a feed-forward, each behind a tanh gate that starts at 0.

        y = x + tanh(attn_gate) * attn(x, media)        z = y + tanh(ff_gate) * ff(y)

    The parameters are `attn.*`, `attn_gate`, `ff.0` (norm), `ff.1`, `ff.3` (no biases) and
    `ff_gate`; state dicts of the blocks of OpenFlamingo and of lucidrains load. Each residual is
    one pass over memory. The first pass also computes the norm `ff.0` from its weights, without a
    call of the module: hooks on it do not run. Arguments give the blocks of other models:

        Llama 3.2 Vision    kv_heads=8, qk_norm=True, norm="rms", ff="swiglu", ff_mult=3.5,
                            ff_without_media=False, without_media="all" as in transformers or
                            "empty" as in the code of Meta
        Idefics             norm="rms", ff="swiglu", vector_gate=True, without_media="empty"

    Args:
        dim, dim_visual, dim_head, heads, only_attend_immediate_media, kv_heads, qk_norm,
            without_media: as in `MaskedCrossAttention`.
        ff_mult: hidden width of the feed-forward as a multiple of dim, rounded down.
        ff: "gelu" (erf), or "swiglu" with gate and value in one `ff.1`, the gate first.
        ff_without_media: whether the feed-forward also runs on the rows that see no media.
        norm, norm_eps: "layer" or "rms", for both sub-layers.
        vector_gate: whether a gate has dim values in place of 1.
        backend: "triton", "cuda", "torch" or "eager" for every call; None chooses for each call.
            With "torch" the gated residuals, which have no such backend, are plain PyTorch
            ("eager"). With "triton" and "cuda" the first one, with its norm, has a largest dim, see
            `gated_residual_norm`.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Alayrac et al., "Flamingo: a visual language model for few-shot learning" (2022).
    """

    def __init__(
        self, *, dim, dim_visual=None, dim_head=64, heads=8, only_attend_immediate_media=True,
        ff_mult=4, kv_heads=None, qk_norm=False, without_media=None, ff="gelu",
        ff_without_media=True, norm="layer", norm_eps=1e-5, vector_gate=False,
        backend=None, device=None, dtype=None,
    ) -> None:  # fmt: skip
        check_bools(ff_without_media=ff_without_media, vector_gate=vector_gate)
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.attn = MaskedCrossAttention(
            dim=dim, dim_visual=dim_visual, dim_head=dim_head, heads=heads,
            only_attend_immediate_media=only_attend_immediate_media, kv_heads=kv_heads,
            qk_norm=qk_norm, norm=norm, norm_eps=norm_eps, without_media=without_media,
            backend=backend, **factory,
        )  # fmt: skip
        self.attn_gate = nn.Parameter(torch.zeros(dim if vector_gate else 1, **factory))
        self.ff = feed_forward(dim, ff_mult, ff, norm, norm_eps, **factory)
        self.ff_gate = nn.Parameter(torch.zeros(dim if vector_gate else 1, **factory))
        self.norm_kind, self.ff_without_media = norm, ff_without_media
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        media: Tensor | MediaCache,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        """The result z [B, N, dim] in the dtype of x.

        The arguments and errors are those of `MaskedCrossAttention`.
        """
        h = self.attn(x, media, media_locations, use_cached_media)
        rows = None
        if not self.ff_without_media:
            rows = self.attn.sees_media(x, media, media_locations, use_cached_media)
        backend = "eager" if self.backend == "torch" else self.backend
        norm, widen, activate, narrow = self.ff
        weights = norm.weight, getattr(norm, "bias", None)
        options = dict(norm=self.norm_kind, eps=norm.eps, backend=backend)
        y, normed = gated_residual_norm(x, h, self.attn_gate, *weights, **options)
        h = narrow(activate(widen(normed)))
        return gated_residual(y, h, self.ff_gate, row_mask=rows, backend=backend)

    def cache_media(self, media: Tensor) -> MediaCache:
        """The cache of `MaskedCrossAttention.cache_media`, to pass to this block as its media."""
        return self.attn.cache_media(media)

    def gates(self) -> dict[str, Tensor]:
        """The tanh of "attn_gate" and of "ff_gate", each [1] or [dim] and detached; 0 is closed."""
        with torch.no_grad():
            return {name: torch.tanh(getattr(self, name)) for name in ("attn_gate", "ff_gate")}


def feed_forward(
    dim: int, mult: float, kind="gelu", norm="layer", norm_eps=1e-5, device=None, dtype=None
) -> nn.Sequential:
    """A feed-forward [..., dim] -> [..., dim]: norm, linear, activation, linear, without biases."""
    check_sizes(dim=dim)
    check_choice("norm", norm, *NORMS)
    check_choice("ff", kind, "gelu", "swiglu")
    check_positive("norm_eps", norm_eps)
    hidden = int(dim * mult) if 0 < check_number("ff_mult", mult, "a number") < math.inf else 0
    if hidden < 1:
        raise ValueError(f"ff_mult must make dim * ff_mult at least 1, got {mult} with dim = {dim}")
    factory = dict(device=device, dtype=dtype)
    return nn.Sequential(
        NORMS[norm](dim, eps=norm_eps, **factory),
        nn.Linear(dim, hidden * (2 if kind == "swiglu" else 1), bias=False, **factory),
        SwiGLU() if kind == "swiglu" else nn.GELU(),
        nn.Linear(hidden, dim, bias=False, **factory),
    )
