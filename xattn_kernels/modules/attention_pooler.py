"""`AttentionPooler`, the learned queries of CoCa over an image, and its cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.arguments import check_bools, check_choice, check_sizes, kind
from ..masks import KeyInterval
from ..ops.cross_attention import cross_attention
from .masked_cross_attention import BACKENDS, check_tensor, merge_heads, split_heads
from .multihead_attention import MultiheadAttention

# the names of the parts of the pooler in the whole model of lucidrains, and their names here
PUBLISHED = {"img_queries": "query", "img_attn_pool.": "attn.", "img_attn_pool_norm.": "norm."}


class CoCaCrossAttention(nn.Module):
    """A cross-attention with one key and value head for all query heads, without biases.

        x' = norm(x)        out = attn(x', context) + ff(x')        ff only with parallel_ff

    The parameters are `norm`, `context_norm` (each with `gamma` and a buffer `beta` of zeros),
    `to_q`, `to_kv` (keys first), `to_out`, `ff.0` and `ff.2`; state dicts of the module of
    lucidrains load. A residual is left to the user of the module.

    Args:
        dim, context_dim: widths of x and of the context; context_dim=None means dim.
        dim_head, heads: width and number of the query heads.
        parallel_ff: whether a SwiGLU feed-forward reads the same normed x.
        ff_mult: hidden width of this feed-forward as a multiple of dim.
        norm_context: whether the context has a norm too.
        backend: "triton", "cuda", "torch" or "eager" for every call; None chooses for each.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Yu et al., "CoCa: contrastive captioners are image-text foundation models" (2022);
    Shazeer, "Fast transformer decoding: one write-head is all you need" (2019).
    """

    def __init__(
        self, *, dim, context_dim=None, dim_head=64, heads=8, parallel_ff=False, ff_mult=4,
        norm_context=False, backend=None, device=None, dtype=None,
    ) -> None:  # fmt: skip
        context_dim = dim if context_dim is None else context_dim
        check_sizes(
            dim=dim, context_dim=context_dim, dim_head=dim_head, heads=heads, ff_mult=ff_mult
        )
        check_bools(parallel_ff=parallel_ff, norm_context=norm_context)
        check_choice("backend", backend, None, *BACKENDS)
        super().__init__()
        self.dim, self.context_dim, self.dim_head = dim, context_dim, dim_head
        self.backend = backend
        factory = dict(device=device, dtype=dtype)
        self.norm = GammaNorm(dim, **factory)
        self.context_norm = GammaNorm(context_dim, **factory) if norm_context else nn.Identity()
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False, **factory)
        self.to_kv = nn.Linear(context_dim, 2 * dim_head, bias=False, **factory)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **factory)
        hidden = ff_mult * dim
        widen = nn.Linear(dim, 2 * hidden, bias=False, **factory) if parallel_ff else None
        narrow = nn.Linear(hidden, dim, bias=False, **factory) if parallel_ff else None
        self.ff = nn.Sequential(widen, GateLast(), narrow) if parallel_ff else None

    def forward(self, x: Tensor, context: Tensor, *, mask=None) -> Tensor:
        """The result [B, N, dim] of x [B, N, dim] and context [B, Nk, context_dim].

        `mask` is as in `cross_attention`.
        """
        check_tensor("x", x, "[B, N, dim]", self.dim, self.to_q.weight)
        check_context(context, self.context_dim, self.to_kv.weight)
        if x.shape[0] != context.shape[0]:
            raise ValueError(
                f"the batch of x, {x.shape[0]}, must be that of context, {context.shape[0]}"
            )
        return self.attend(self.norm(x), context, mask)

    def attend(self, x: Tensor, context: Tensor, mask) -> Tensor:
        """`forward` for a normed x, whose batch may be 1 for any batch of the context."""
        q = split_heads(self.to_q(x), self.dim_head).expand(context.shape[0], -1, -1, -1)
        k, v = self.to_kv(self.context_norm(context)).chunk(2, dim=-1)
        k, v = split_heads(k, self.dim_head), split_heads(v, self.dim_head)
        out = self.to_out(merge_heads(cross_attention(q, k, v, mask=mask, backend=self.backend)))
        return out if self.ff is None else out + self.ff(x)


class AttentionPooler(nn.Module):
    """Learned queries that attend once to image tokens: 1 for an embedding, 256 for a captioner.

    The module has two published forms, whose state dicts load:

        one_kv_head=False   open_clip's: `query` [n_queries, dim], `ln_q`, `ln_k` and `attn`, a
                            `MultiheadAttention` with biases, behind a layer norm on both sides
        one_kv_head=True    lucidrains': `query`, `attn`, a `CoCaCrossAttention` with a norm on both
                            sides, and `norm` on its result; also under the names in his whole
                            model, `img_queries`, `img_attn_pool`, `img_attn_pool_norm`

    Args:
        dim, context_dim: widths of the result and of the image tokens; context_dim=None means dim.
        heads: number of query heads.
        n_queries: number of rows of the result.
        one_kv_head: whether the form is the second one above.
        dim_head: width of a head; None means 64. Without one_kv_head it must be None, and the width
            is dim / heads.
        backend: "triton", "cuda", "torch" or "eager" for every call; None chooses for each.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Yu et al., "CoCa: contrastive captioners are image-text foundation models" (2022),
    section 3.2; the code of mlfoundations/open_clip and of lucidrains/CoCa-pytorch.
    """

    def __init__(
        self, *, dim, context_dim=None, heads=8, n_queries=256, one_kv_head=False, dim_head=None,
        backend=None, device=None, dtype=None,
    ) -> None:  # fmt: skip
        context_dim = dim if context_dim is None else context_dim
        check_sizes(dim=dim, context_dim=context_dim, heads=heads, n_queries=n_queries)
        check_bools(one_kv_head=one_kv_head)
        check_choice("backend", backend, None, *BACKENDS)
        if not one_kv_head and dim_head is not None:
            raise ValueError(f"dim_head must be None without one_kv_head, got {dim_head}")
        if not one_kv_head and dim % heads:
            raise ValueError(f"heads must divide dim = {dim}, got {heads}")
        super().__init__()
        self.dim, self.context_dim, self.one_kv_head = dim, context_dim, one_kv_head
        factory = dict(device=device, dtype=dtype)
        self.query = nn.Parameter(torch.randn(n_queries, dim, **factory))
        if one_kv_head:
            self.attn = CoCaCrossAttention(
                dim=dim, context_dim=context_dim, dim_head=64 if dim_head is None else dim_head,
                heads=heads, norm_context=True, backend=backend, **factory,
            )  # fmt: skip
            self.norm = GammaNorm(dim, **factory)
            self.register_load_state_dict_pre_hook(rename_published)
        else:
            self.attn = MultiheadAttention(
                dim, heads, kdim=context_dim, vdim=context_dim, batch_first=True, backend=backend,
                **factory,
            )  # fmt: skip
            self.ln_q = nn.LayerNorm(dim, **factory)
            self.ln_k = nn.LayerNorm(context_dim, **factory)

    def forward(self, context: Tensor, *, mask: KeyInterval | None = None) -> Tensor:
        """The pooled tokens [B, n_queries, dim] of context [B, Nk, context_dim].

        `mask`: the tokens that each query reads, such as `masks.padding(lengths)`; None means all.
        """
        check_context(context, self.context_dim, self.query)
        if mask is not None and not isinstance(mask, KeyInterval):
            raise TypeError(f"mask must be a KeyInterval or None, got {kind(mask)}")
        if self.one_kv_head:  # the queries are projected once for the whole batch
            return self.norm(self.attn.attend(self.attn.norm(self.query)[None], context, mask))
        q, k = self.ln_q(self.query).expand(context.shape[0], -1, -1), self.ln_k(context)
        return self.attn(q, k, k, need_weights=False, mask=mask)[0]


class GammaNorm(nn.Module):
    """A LayerNorm with a weight `gamma` and, as the bias, a buffer `beta` that is not learned."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.register_buffer("beta", torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class GateLast(nn.Module):
    """The product a * silu(b) of the halves a, b of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return a * F.silu(b)


def check_context(context, width: int, weight: Tensor) -> None:
    """Raises unless `context` is [B, Nk, width] on the device and in the dtype of `weight`."""
    check_tensor("context", context, "[B, Nk, context_dim]", width, weight)


def rename_published(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Gives the weights of the whole model of lucidrains the names of this module, in place."""
    for name in [n for n in state_dict if n.startswith(prefix)]:
        for published, renamed in PUBLISHED.items():
            if name.startswith(prefix + published):
                tail = name[len(prefix + published) :]
                state_dict[prefix + renamed + tail] = state_dict.pop(name)
