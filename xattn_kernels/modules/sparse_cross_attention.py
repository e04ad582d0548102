"""`SparseCrossAttention`: multi-head attention of the top keys, or blocks of keys, only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.call import CrossAttentionCall, TopKAttentionCall, shared_fields
from ..core.dispatch import choice, choose, tell
from ..masks import KeyInterval
from ..ops.topk_attention import check_chosen, topk_attention
from .multihead_attention import MultiheadAttention, _inputs


class SparseCrossAttention(MultiheadAttention):
    """`MultiheadAttention` over the `top_k` highest-scoring keys of each query and head.

    Constructor, parameters and call are those of `MultiheadAttention`, whose state dict it loads
    and gives; the choice of keys is that of `topk_attention`. There are no weights to return, no
    dropout of them, and no additive masks.

    Args:
        top_k: keys per query and head; None for all, which is dense attention.
        topk_blocks: (block_size, n_blocks) in place of top_k, as in `topk_attention`.
        The others are those of `MultiheadAttention`.

    Raises:
        TypeError, ValueError: top_k is no int of at least 1, topk_blocks no such pair, or both are
            given; dropout is not 0 beside either.
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
        self._choose(top_k, topk_blocks)

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
        new._choose(top_k, topk_blocks)
        return new

    def extra_repr(self) -> str:
        chosen = {"top_k": self.top_k, "topk_blocks": self.topk_blocks}
        own = [f"{name}={n}" for name, n in chosen.items() if n is not None]
        return ", ".join([*filter(None, [super().extra_repr()]), *own])

    @property
    def sparse(self) -> bool:
        """Whether some keys are chosen; dense attention otherwise."""
        return self.top_k is not None or self.topk_blocks is not None

    def _choose(self, top_k, topk_blocks) -> None:
        self.top_k, self.topk_blocks = top_k, topk_blocks
        self._check_choice()

    def _check_choice(self) -> None:
        """Of attributes, which a user may have set since."""
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
        """(output, None), arguments as in `MultiheadAttention.forward`, but need_weights is False
        unless it is asked for; without a top_k or topk_blocks its result.

        Raises:
            ValueError: need_weights beside a top_k or topk_blocks.
            TypeError: a mask beside them is not bool.
            The others are those of `MultiheadAttention.forward`.
        """
        if self.sparse:
            self._check_choice()
            self._check_call(key_padding_mask, need_weights, attn_mask)
        return super().forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
            is_causal, mask=mask,
        )  # fmt: skip

    def _check_call(self, key_padding_mask, need_weights: bool, attn_mask) -> None:
        if need_weights:
            raise ValueError("need_weights must be False: sparse attention has no weights")
        for name, t in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if t is not None and t.dtype != torch.bool:
                raise TypeError(
                    f"{name} must be bool (True = not allowed) in sparse attention, got {t.dtype}"
                )

    def _attend(self, x: CrossAttentionCall, average: bool | None):
        """(out, weights); no weights if `average` is None."""
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
        x = _inputs(self, *args, need_weights=need_weights, **kwargs)
        backends = topk_attention.backends
        print(choice("SparseCrossAttention", backends, self._sparse_inputs(x), self.backend))

    def _sparse_inputs(self, x: CrossAttentionCall) -> TopKAttentionCall:
        """The same call for some keys. Of two bool masks the second one comes as a bias of -inf."""
        mask = x.mask
        if x.bias is not None:
            allowed = x.bias == 0
            mask = allowed if mask is None else mask & allowed
        fields = shared_fields(x, CrossAttentionCall) | dict(
            mask=mask, bias=None, dropout_p=0.0, seed=None
        )
        return TopKAttentionCall(
            **fields, top_k=self.top_k, topk_blocks=self.topk_blocks, return_indices=False
        )
