"""`SparseCrossAttention`: multi-head attention to the top keys, or blocks of keys, alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.call import CrossAttentionCall, TopKAttentionCall, shared_fields
from ..core.dispatch import choice, choose, tell
from ..masks import KeyInterval
from ..ops.topk_attention import check_chosen, topk_attention
from .multihead_attention import ForwardArguments, MultiheadAttention, _inputs


class SparseCrossAttention(MultiheadAttention):
    """A `MultiheadAttention` over the `top_k` highest-scoring keys of each query and head.

    The constructor, parameters and call are those of `MultiheadAttention`, and state dicts load
    both ways. The choice of keys is that of `topk_attention`. It has no weights to return, no
    dropout, and no additive masks.

    Args:
        top_k: number of keys per query and head; None means all, which is dense attention.
        topk_blocks: (block_size, n_blocks) in place of top_k, as in `topk_attention`.
        The other arguments are those of `MultiheadAttention`.

    Raises:
        TypeError, ValueError: top_k is no int of at least 1, topk_blocks is no such pair, both are
            set, or dropout is not 0 beside one of them.
    """

    top_k: int | None = None
    topk_blocks: tuple[int, int] | None = None

    def __init__(
        self,
        embed_dim,
        num_heads,
        *args,
        top_k: int | None = None,
        topk_blocks: tuple[int, int] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(embed_dim, num_heads, *args, **kwargs)
        self._set_choice(top_k, topk_blocks)

    @classmethod
    def from_torch(
        cls,
        module: nn.MultiheadAttention,
        *,
        top_k: int | None = None,
        topk_blocks: tuple[int, int] | None = None,
        backend=None,
    ) -> SparseCrossAttention:
        """A new module with the same Parameter objects, as `MultiheadAttention.from_torch`."""
        new = super().from_torch(module, backend=backend)
        new._set_choice(top_k, topk_blocks)
        return new

    def extra_repr(self) -> str:
        options = {"top_k": self.top_k, "topk_blocks": self.topk_blocks}
        parts = [f"{name}={n}" for name, n in options.items() if n is not None]
        return ", ".join([*filter(None, [super().extra_repr()]), *parts])

    @property
    def sparse(self) -> bool:
        """Whether the attention chooses some keys, or else is dense."""
        return self.top_k is not None or self.topk_blocks is not None

    def _set_choice(self, top_k, topk_blocks) -> None:
        """Sets which keys to choose; raises for values that are not allowed."""
        self.top_k, self.topk_blocks = top_k, topk_blocks
        self._check_choice()

    def _check_choice(self) -> None:
        """Raises unless the attributes, which a user may set at any time, are allowed."""
        if self.sparse:
            self.top_k, self.topk_blocks = check_chosen(self.top_k, self.topk_blocks)
            if self.dropout != 0.0:
                raise ValueError(
                    f"dropout must be 0 beside a top_k or topk_blocks, got {self.dropout}"
                )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        mask: KeyInterval | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The pair (output, None); without top_k and topk_blocks that of `MultiheadAttention`.

        The arguments are those of `MultiheadAttention.forward`, but need_weights is False by
        default.

        Raises:
            ValueError: need_weights is True beside a top_k or topk_blocks.
            TypeError: a mask beside them is not bool.
            The other errors are those of `MultiheadAttention.forward`.
        """
        if self.sparse:
            self._check_choice()
            self._check_arguments(key_padding_mask, need_weights, attn_mask)
        return super().forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
            is_causal, mask=mask,
        )  # fmt: skip

    def _check_arguments(self, key_padding_mask, need_weights: bool, attn_mask) -> None:
        """Raises for weights and for masks that are not bool."""
        if need_weights:
            raise ValueError("need_weights must be False: sparse attention has no weights")
        for name, t in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if t is not None and t.dtype != torch.bool:
                raise TypeError(
                    f"{name} must be bool (True = not allowed) in sparse attention, got {t.dtype}"
                )

    def _attend(self, x: CrossAttentionCall, average: bool | None):
        """The pair (out, weights) in layout [B, H, N, D]; no weights if `average` is None."""
        if not self.sparse:
            return super()._attend(x, average)
        y = self._sparse_inputs(x)
        backend = choose("SparseCrossAttention", topk_attention.backends, y, self.backend)
        tell(y, backend.name)
        return backend.run(y).out, None

    def explain(self, *args, need_weights: bool = False, **kwargs) -> None:
        """Prints which backend `forward(*args, **kwargs)` takes, and why."""
        if not self.sparse:
            super().explain(*args, need_weights=need_weights, **kwargs)
            return
        x = _inputs(self, ForwardArguments(*args, need_weights=need_weights, **kwargs))
        backends = topk_attention.backends
        print(choice("SparseCrossAttention", backends, self._sparse_inputs(x), self.backend))

    def _sparse_inputs(self, x: CrossAttentionCall) -> TopKAttentionCall:
        """The same call over some keys."""
        # of two bool masks `_mask_and_bias` makes the second a bias of 0 and -inf
        mask = x.mask
        if x.bias is not None:
            allowed = x.bias == 0
            mask = allowed if mask is None else mask & allowed
        fields = shared_fields(x, "CrossAttentionCall") | dict(
            mask=mask, bias=None, dropout_p=0.0, seed=None
        )
        return TopKAttentionCall(
            **fields, top_k=self.top_k, topk_blocks=self.topk_blocks, return_indices=False
        )
