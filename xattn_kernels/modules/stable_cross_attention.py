"""`NormalizedCrossAttention` and `StableCrossAttention`, whose training does not collapse."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core.arguments import (
    check_bools,
    check_choice,
    check_number,
    check_positive,
    check_sizes,
)
from ..core.dispatch import run
from ..core.tensor_arguments import check_attention
from ..ops.cross_attention import cross_attention
from ..ops.gated_residual import gated_residual
from .masked_cross_attention import (
    NORMS,
    check_tensor,
    merge_heads,
    split_heads,
)

# PyTorch's kernels lack dropout and statistics: a call with them may take `eager` by default
WITH_DROPOUT = tuple(b._replace(by_name=False) for b in cross_attention.backends)


class NormalizedCrossAttention(nn.Module):
    """A cross-attention with a norm on both sides and a learned temperature for each head.

        q = to_q(query_norm(x))     k, v = to_k(m), to_v(m)     with m = key_norm(media)
        p = softmax(key_scale / temperature_h q k^T / sqrt(dim_head))    out = to_out(dropout(p) v)

    The norms make the logits independent of the scale of the features of an encoder. The learned
    parameters are `log_temperature` [heads], so that a temperature stays positive, and `key_scale`
    [1]; both are in the scale of the op. There are no biases: a row that sees no key gets 0.

    Args:
        dim, dim_visual: widths of text and media; dim_visual=None means dim.
        heads, dim_head: number and width of the heads; dim_head=None means dim / heads.
        dropout: probability of dropping an attention weight in training.
        temperature: temperature of every head at the start; above 1 it flattens the attention.
        zero_output: whether `to_out` starts at 0. Other projections start by Xavier's rule.
        norm, norm_eps: "layer" or "rms", on both sides.
        backend: "triton", "cuda", "torch" or "eager" for every call; None chooses for each: on a
            CPU "torch", or "eager" with dropout or statistics, which PyTorch's own kernels lack.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Xiong et al., "On layer normalization in the transformer architecture" (2020); Henry et
    al., "Query-key normalization for transformers" (2020), for a scale that is learned.
    """

    def __init__(
        self, *, dim, dim_visual=None, heads=8, dim_head=None, dropout=0.0, temperature=1.0,
        zero_output=False, norm="layer", norm_eps=1e-5, backend=None, device=None, dtype=None,
    ) -> None:  # fmt: skip
        dim_visual = dim if dim_visual is None else dim_visual
        check_sizes(dim=dim, dim_visual=dim_visual, heads=heads)
        if dim_head is None and dim % heads:
            raise ValueError(f"heads must divide dim = {dim} without a dim_head, got {heads}")
        dim_head = dim // heads if dim_head is None else dim_head
        check_sizes(dim_head=dim_head)
        check_dropout(dropout)
        check_positive("temperature", temperature)
        check_bools(zero_output=zero_output)
        check_choice("norm", norm, *NORMS)
        check_positive("norm_eps", norm_eps)
        check_choice("backend", backend, None, *(b.name for b in WITH_DROPOUT))
        super().__init__()
        self.dim, self.dim_visual, self.dim_head = dim, dim_visual, dim_head
        self.dropout, self.backend = dropout, backend
        factory, inner = dict(device=device, dtype=dtype), heads * dim_head
        self.query_norm = NORMS[norm](dim, eps=norm_eps, **factory)
        self.key_norm = NORMS[norm](dim_visual, eps=norm_eps, **factory)
        self.to_q = nn.Linear(dim, inner, bias=False, **factory)
        self.to_k = nn.Linear(dim_visual, inner, bias=False, **factory)
        self.to_v = nn.Linear(dim_visual, inner, bias=False, **factory)
        self.to_out = nn.Linear(inner, dim, bias=False, **factory)
        for linear in (self.to_q, self.to_k, self.to_v, self.to_out):
            nn.init.xavier_uniform_(linear.weight)
        if zero_output:
            nn.init.zeros_(self.to_out.weight)
        self.log_temperature = nn.Parameter(torch.full((heads,), math.log(temperature), **factory))
        self.key_scale = nn.Parameter(torch.ones(1, **factory))

    def forward(self, x: Tensor, media: Tensor, *, mask=None, return_statistics: bool = False):
        """The attention [B, N, dim] of x [B, N, dim] to media [B, Nk, dim_visual].

        Args:
            mask: as in `cross_attention`; with None every row sees all of media.
            return_statistics: whether to return (out, statistics), with the
                `CrossAttentionResult` of the heads, whose lse and entropy [B, heads, N] are
                differentiable.
        """
        check_arguments(self, x, media)
        check_bools(return_statistics=return_statistics)
        media = self.key_norm(media)
        projected = self.to_q(self.query_norm(x)), self.to_k(media), self.to_v(media)
        q, k, v = (split_heads(t, self.dim_head) for t in projected)
        options = dict(mask=mask, scale=self.scale(), return_statistics=return_statistics)
        options |= dict(dropout_p=self.dropout if self.training else 0.0)
        inputs = check_attention(q, k, v, **options)
        result = run(type(self).__name__, WITH_DROPOUT, inputs, self.backend)
        out = self.to_out(merge_heads(result.out))
        return (out, result) if return_statistics else out

    def scale(self) -> Tensor:
        """The factor of a product of query and key, [heads]."""
        return self.key_scale * torch.exp(-self.log_temperature) * self.dim_head**-0.5

    def temperature(self) -> Tensor:
        """The temperature of each head, [heads], detached."""
        return self.log_temperature.detach().exp()

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"


class StableCrossAttention(nn.Module):
    """A `NormalizedCrossAttention` behind a tanh gate and a residual, without effect at first.

        y = x + tanh(gate) * attn(x, media)

    At the start the output projection is 0 and the gate is small but open, or with
    `zero_output=False` the gate may be 0. The constructor refuses 0 for both: they would stay at 0,
    since the gradient of each has the other as a factor. A row that sees no key is x.

    Args:
        gate_init: first value of `gate` [1].
        zero_output: whether the output projection starts at 0.
        backend: as in `NormalizedCrossAttention`; with "torch" the residual is plain PyTorch.
        The other arguments are those of `NormalizedCrossAttention`.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: those of `NormalizedCrossAttention`; Alayrac et al., "Flamingo: a visual language model
    for few-shot learning" (2022), for the gate; Zhang et al., "Fixup initialization" (2019), for
    an output projection of 0.
    """

    def __init__(
        self, *, dim, dim_visual=None, heads=8, dim_head=None, dropout=0.1, temperature=1.0,
        gate_init=0.1, zero_output=True, norm="layer", norm_eps=1e-5, backend=None, device=None,
        dtype=None,
    ) -> None:  # fmt: skip
        check_bools(zero_output=zero_output)
        if not math.isfinite(check_number("gate_init", gate_init, "a number")):
            raise ValueError(f"gate_init must be finite, got {gate_init}")
        if zero_output and gate_init == 0:
            raise ValueError(
                "gate_init must not be 0 with zero_output=True: neither would ever get a gradient"
            )
        super().__init__()
        self.attn = NormalizedCrossAttention(
            dim=dim, dim_visual=dim_visual, heads=heads, dim_head=dim_head, dropout=dropout,
            temperature=temperature, zero_output=zero_output, norm=norm, norm_eps=norm_eps,
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        self.gate = nn.Parameter(torch.full((1,), float(gate_init), device=device, dtype=dtype))

    def forward(self, x: Tensor, media: Tensor, *, mask=None, return_statistics: bool = False):
        """The result y [B, N, dim] in the dtype of x, or (y, statistics).

        The arguments are those of `NormalizedCrossAttention`.
        """
        result = self.attn(x, media, mask=mask, return_statistics=return_statistics)
        h, *statistics = result if return_statistics else (result,)
        backend = "eager" if self.attn.backend == "torch" else self.attn.backend
        y = gated_residual(x, h, self.gate, backend=backend)
        return (y, *statistics) if return_statistics else y


def check_dropout(dropout: float) -> None:
    """Raises unless dropout is a probability below 1."""
    if not 0.0 <= check_number("dropout", dropout, "a number") < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


def check_arguments(module: NormalizedCrossAttention, x, media) -> None:
    """Raises unless the tensors fit `module` and each other."""
    check_tensor("x", x, "[B, N, dim]", module.dim, module.to_q.weight)
    check_tensor("media", media, "[B, Nk, dim_visual]", module.dim_visual, module.to_k.weight)
    if x.shape[0] != media.shape[0]:
        raise ValueError(f"the batch of x, {x.shape[0]}, must be that of media, {media.shape[0]}")
