"""`AttentionPooler`, CoCa's learned queries over an image, and its cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.arguments import (
    check_bools,
    check_choice,
    check_sizes,
    kind,
)
from ..masks import KeyInterval
from ..ops.cross_attention import cross_attention
from .masked_cross_attention import (
    BACKENDS,
    check_tensor,
    merge_heads,
    split_heads,
)
from .multihead_attention import MultiheadAttention

# what lucidrains' whole model calls the parts of its pooler
PUBLISHED = {"img_queries": "query", "img_attn_pool.": "attn.", "img_attn_pool_norm.": "norm."}


class CoCaCrossAttention(nn.Module):
    """Cross-attention with one key and value head for all query heads, no biases.

        x' = norm(x)        out = attn(x', context) + ff(x')        the second only with parallel_ff

    Parameters `norm`, `context_norm` (each `gamma`, and a buffer `beta` of zeros), `to_q`, `to_kv`
    (keys first), `to_out` and `ff.0`, `ff.2`; state dicts of lucidrains' module load. The
    residual, where there is one, is the caller's.

    Args:
        dim, context_dim: widths of x and of the context; context_dim=None is dim.
        dim_head, heads: width and number of the query heads.
        parallel_ff, ff_mult: a SwiGLU feed-forward on the same normed x, its hidden width by dim.
        norm_context: the context is normed too.
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
        made = dict(device=device, dtype=dtype)
        self.norm = GammaNorm(dim, **made)
        self.context_norm = GammaNorm(context_dim, **made) if norm_context else nn.Identity()
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False, **made)
        self.to_kv = nn.Linear(context_dim, 2 * dim_head, bias=False, **made)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **made)
        hidden = ff_mult * dim
        widen = nn.Linear(dim, 2 * hidden, bias=False, **made) if parallel_ff else None
        narrow = nn.Linear(hidden, dim, bias=False, **made) if parallel_ff else None
        self.ff = nn.Sequential(widen, GateLast(), narrow) if parallel_ff else None

    def forward(self, x: Tensor, context: Tensor, *, mask=None) -> Tensor:
        """x [B, N, dim], context [B, Nk, context_dim] -> [B, N, dim]; mask as `cross_attention`."""
        check_tensor("x", x, "[B, N, dim]", self.dim, self.to_q.weight)
        check_context(context, self.context_dim, self.to_kv.weight)
        if x.shape[0] != context.shape[0]:
            raise ValueError(
                f"the batch of x, {x.shape[0]}, must be that of context, {context.shape[0]}"
            )
        return self.attend(self.norm(x), context, mask)

    def attend(self, x: Tensor, context: Tensor, mask) -> Tensor:
        """`forward` of an x that is normed and of any batch that broadcasts to the context's."""
        q = split_heads(self.to_q(x), self.dim_head).expand(context.shape[0], -1, -1, -1)
        k, v = self.to_kv(self.context_norm(context)).chunk(2, dim=-1)
        k, v = split_heads(k, self.dim_head), split_heads(v, self.dim_head)
        out = self.to_out(merge_heads(cross_attention(q, k, v, mask=mask, backend=self.backend)))
        return out if self.ff is None else out + self.ff(x)


class AttentionPooler(nn.Module):
    """Learned queries attend once to image tokens: 1 for an embedding, 256 for a captioner.

    In two published forms, whose state dicts load:

        one_kv_head=False   open_clip's: `query` [n_queries, dim], `ln_q`, `ln_k` and `attn`, a
                            `MultiheadAttention`, with biases; a layer norm before it on both sides
        one_kv_head=True    lucidrains': `query`, `attn`, a `CoCaCrossAttention` that norms both
                            sides, and `norm` on what it returns; also under the names of his whole
                            model, `img_queries`, `img_attn_pool`, `img_attn_pool_norm`

    Args:
        dim, context_dim: widths of the result and of the image tokens; context_dim=None is dim.
        heads: query heads.
        n_queries: rows of the result.
        one_kv_head: see above.
        dim_head: width of a head; without one_kv_head it is dim / heads and not an argument.
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
        made = dict(device=device, dtype=dtype)
        self.query = nn.Parameter(torch.randn(n_queries, dim, **made))
        if one_kv_head:
            self.attn = CoCaCrossAttention(
                dim=dim, context_dim=context_dim, dim_head=64 if dim_head is None else dim_head,
                heads=heads, norm_context=True, backend=backend, **made,
            )  # fmt: skip
            self.norm = GammaNorm(dim, **made)
            self.register_load_state_dict_pre_hook(rename_published)
        else:
            self.attn = MultiheadAttention(
                dim, heads, kdim=context_dim, vdim=context_dim, batch_first=True, backend=backend,
                **made,
            )  # fmt: skip
            self.ln_q, self.ln_k = nn.LayerNorm(dim, **made), nn.LayerNorm(context_dim, **made)

    def forward(self, context: Tensor, *, mask: KeyInterval | None = None) -> Tensor:
        """context [B, Nk, context_dim] -> [B, n_queries, dim].

        `mask`: the tokens that each query reads, such as `masks.padding(lengths)`; None: all.
        """
        check_context(context, self.context_dim, self.query)
        if mask is not None and not isinstance(mask, KeyInterval):
            raise TypeError(f"mask must be a KeyInterval or None, got {kind(mask)}")
        if self.one_kv_head:  # the queries are projected once for the whole batch
            return self.norm(self.attn.attend(self.attn.norm(self.query)[None], context, mask))
        q, k = self.ln_q(self.query).expand(context.shape[0], -1, -1), self.ln_k(context)
        return self.attn(q, k, k, need_weights=False, mask=mask)[0]


class GammaNorm(nn.Module):
    """LayerNorm with a weight `gamma` and, as the bias, a buffer `beta` that is not learned."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.register_buffer("beta", torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class GateLast(nn.Module):
    """a * silu(b) of the halves a, b of the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return a * F.silu(b)


def check_context(context, width: int, weight: Tensor) -> None:
    check_tensor("context", context, "[B, Nk, context_dim]", width, weight)


def rename_published(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    for name in [n for n in state_dict if n.startswith(prefix)]:
        for theirs, ours in PUBLISHED.items():
            if name.startswith(prefix + theirs):
                tail = name[len(prefix + theirs) :]
                state_dict[prefix + ours + tail] = state_dict.pop(name)
