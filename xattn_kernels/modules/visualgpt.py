"""`VisualGPTBlock`, a decoder layer that looks at an image encoder, and `SRAU`, its gate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import masks
from ..core.arguments import check_choice, check_number, check_positive, check_sizes, kind
from ..core.tensor_arguments import check_mask
from ..masks import KeyInterval
from ..ops.cross_attention import cross_attention
from .masked_cross_attention import BACKENDS, check_tensor, merge_heads, split_heads

# buffers of the published layer: its causal mask, and its state between tokens
BUFFERS = ("attn.bias", "attn.running_keys", "attn.running_values", "enc_dec_attn.bias")


class SRAU(nn.Module):
    """A self-resurrecting activation unit, which gates each element of two streams on or off.

        alpha = sigmoid(fc_alpha([a, e]))
        out = alpha 1[alpha > tau] a + (1 - alpha) 1[1 - alpha > tau] e

    A gate below tau is closed. Its complement is then open and has a gradient, which can open the
    gate again: with tau < 0.5 the two are never closed together. The indicators have no gradient.
    The parameters are `fc_alpha.weight` [dim, 2 dim], a first, and `fc_alpha.bias`.

    Args:
        dim: width of both streams.
        tau: threshold, from 0 (plain complementary gates) to 1.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Chen et al., "VisualGPT: data-efficient adaptation of pretrained language models for
    image captioning" (2022), section 3.2.
    """

    def __init__(self, *, dim: int, tau: float = 0.2, device=None, dtype=None) -> None:
        check_sizes(dim=dim)
        check_tau(tau)
        super().__init__()
        self.tau = tau
        self.fc_alpha = nn.Linear(2 * dim, dim, device=device, dtype=dtype)

    def forward(self, a: Tensor, e: Tensor) -> Tensor:
        """The gated sum [B, N, dim] of a (language) and e (vision), both [B, N, dim]."""
        for name, t in {"a": a, "e": e}.items():
            check_tensor(name, t, "[B, N, dim]", self.fc_alpha.out_features, self.fc_alpha.weight)
        if a.shape != e.shape:
            raise ValueError(f"a and e must share a shape, got {list(a.shape)} and {list(e.shape)}")
        return resurrect(a, e, self.fc_alpha, self.tau)

    def extra_repr(self) -> str:
        return f"tau={self.tau}"


def resurrect(a: Tensor, e: Tensor, fc_alpha: nn.Linear, tau: float) -> Tensor:
    """The gated sum of a and e by the equation of `SRAU`."""
    alpha = torch.sigmoid(fc_alpha(torch.cat((a, e), dim=-1)))
    return alpha * (alpha > tau) * a + (1 - alpha) * (1 - alpha > tau) * e


class VisualGPTBlock(nn.Module):
    """A layer of GPT-2 that attends to several levels of an image encoder, gated by SRAUs.

        a = x + attn(ln_1(x))               e_l = enc_dec_attn(ln_1(a), ln_1(encoder_output_l))
        y = sum_l srau_l(a, e_l) / sqrt(n_levels)           z = y + mlp(ln_2(y))

    The levels share `enc_dec_attn` and `ln_1`, and each level has its gate. State dicts of the
    published layer load, with `fc_alpha1`, `fc_alpha2`, ... and the [in, out] weights of GPT-2; its
    buffers are skipped. The layer has no dropout.

    Args:
        dim, heads: width, and number of heads of both attentions.
        n_levels: number of levels of the encoder.
        tau: threshold of the gates, see `SRAU`.
        ff_mult: hidden width of the feed-forward as a multiple of dim; the activation is the GELU
            by tanh.
        norm_eps: eps of the LayerNorms.
        backend: "triton", "cuda", "torch" or "eager" for every call; None chooses for each.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: as `SRAU`, and its published code, Vision-CAIR/VisualGPT.
    """

    def __init__(
        self, *, dim, heads, n_levels=3, tau=0.2, ff_mult=4, norm_eps=1e-5, backend=None,
        device=None, dtype=None,
    ) -> None:  # fmt: skip
        check_sizes(dim=dim, heads=heads, n_levels=n_levels, ff_mult=ff_mult)
        if dim % heads:
            raise ValueError(f"heads must divide dim = {dim}, got {heads}")
        check_tau(tau)
        check_positive("norm_eps", norm_eps)
        check_choice("backend", backend, None, *BACKENDS)
        super().__init__()
        self.dim, self.heads, self.n_levels, self.tau = dim, heads, n_levels, tau
        factory = dict(device=device, dtype=dtype)
        self.ln_1, self.ln_2 = (nn.LayerNorm(dim, eps=norm_eps, **factory) for _ in range(2))
        self.attn = SelfAttention(dim, heads, backend, factory)
        self.enc_dec_attn = EncoderAttention(dim, heads, backend, factory)
        hidden = ff_mult * dim
        self.mlp = nn.ModuleDict(
            dict(c_fc=Conv1D(dim, hidden, **factory), c_proj=Conv1D(hidden, dim, **factory))
        )
        for n in range(1, n_levels + 1):
            self.add_module(f"fc_alpha{n}", nn.Linear(2 * dim, dim, **factory))
        self.register_load_state_dict_pre_hook(leave_out_buffers)

    def forward(
        self, x: Tensor, encoder_output: Tensor, *, mask=None, media_mask=None, row_mask=None
    ) -> Tensor:
        """The result z [B, N, dim] of x [B, N, dim], encoder_output [B, n_levels, Nk, dim].

        Args:
            mask: the mask of the self-attention, as in `cross_attention`; None means causal.
            media_mask: the keys of each level for each row, as in `cross_attention`; None means
                all.
            row_mask: bool [B, N]; rows where it is False (padding) become 0.
        """
        check_arguments(self, x, encoder_output, mask, media_mask, row_mask)
        if mask is None:
            mask = masks.causal(x.shape[1], x.shape[1], device=x.device)
        a = x + self.attn(self.ln_1(x), mask)
        levels = self.enc_dec_attn(self.ln_1(a), self.ln_1(encoder_output), media_mask)
        y = self._gated(a, levels)
        if row_mask is not None:
            y = y.masked_fill(~row_mask[..., None], 0.0)
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(y)), approximate="tanh")
        z = y + self.mlp["c_proj"](hidden)
        return z if row_mask is None else z.masked_fill(~row_mask[..., None], 0.0)

    def _gated(self, a: Tensor, levels: list[Tensor]) -> Tensor:
        """The scaled sum y of the gated levels."""
        total = 0.0
        for n, e in enumerate(levels, 1):
            total = total + resurrect(a, e, getattr(self, f"fc_alpha{n}"), self.tau)
        return total / math.sqrt(self.n_levels)


class SelfAttention(nn.Module):
    """The self-attention of GPT-2: one matrix gives queries, keys and values."""

    def __init__(self, dim: int, heads: int, backend: str | None, factory: dict) -> None:
        super().__init__()
        self.dim_head, self.backend = dim // heads, backend
        self.c_attn, self.c_proj = Conv1D(dim, 3 * dim, **factory), Conv1D(dim, dim, **factory)

    @staticmethod
    def attention_sides(x: Tensor, *_) -> tuple[Tensor, Tensor]:
        """The inputs of the queries and of the keys, for a monitor of the layer."""
        return x, x

    def forward(self, x: Tensor, mask: KeyInterval | Tensor | None) -> Tensor:
        """The attention of x [B, N, dim] to itself, [B, N, dim]."""
        return self.c_proj(attend(self, *self.c_attn(x).chunk(3, dim=-1), mask))


class EncoderAttention(nn.Module):
    """The cross-attention to an encoder, with the same projections for every level."""

    def __init__(self, dim: int, heads: int, backend: str | None, factory: dict) -> None:
        super().__init__()
        self.dim_head, self.backend = dim // heads, backend
        self.fc_q, self.fc_k, self.fc_v = (nn.Linear(dim, dim, **factory) for _ in range(3))
        self.c_proj = Conv1D(dim, dim, **factory)

    def forward(self, x: Tensor, media: Tensor, mask: KeyInterval | Tensor | None) -> list[Tensor]:
        """The attention of x [B, N, dim] to each level of media [B, n_levels, Nk, dim]."""
        q, k, v = self.fc_q(x), self.fc_k(media), self.fc_v(media)
        levels = zip(k.unbind(1), v.unbind(1), strict=True)
        return [self.c_proj(attend(self, q, *level, mask)) for level in levels]


def attend(module, q: Tensor, k: Tensor, v: Tensor, mask: KeyInterval | Tensor | None) -> Tensor:
    """The attention of projected q to k and v, with heads as in `module`, before its `c_proj`."""
    q, k, v = (split_heads(t, module.dim_head) for t in (q, k, v))
    return merge_heads(cross_attention(q, k, v, mask=mask, backend=module.backend))


class Conv1D(nn.Module):
    """The linear layer x @ weight + bias, whose weight is [in, out] as in GPT-2."""

    def __init__(self, n_in: int, n_out: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(n_out, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)  # as in GPT-2

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.mT, self.bias)


def check_tau(tau: float) -> None:
    """Raises unless tau is a number from 0 to 1."""
    if not 0.0 <= check_number("tau", tau, "a number") <= 1.0:
        raise ValueError(f"tau must be between 0 and 1, got {tau}")


def check_arguments(block: VisualGPTBlock, x, encoder_output, mask, media_mask, row_mask) -> None:
    """Raises unless the arguments of `forward` fit `block` and each other."""
    weight = block.ln_1.weight
    check_tensor("x", x, "[B, N, dim]", block.dim, weight)
    check_tensor("encoder_output", encoder_output, "[B, n_levels, Nk, dim]", block.dim, weight)
    expected = [x.shape[0], block.n_levels]
    if list(encoder_output.shape[:2]) != expected:
        raise ValueError(
            f"encoder_output must begin with [B, n_levels] = {expected}, got "
            f"{list(encoder_output.shape)}"
        )
    rows = split_heads(x, block.dim // block.heads)
    check_mask(mask, rows, rows)
    check_mask(media_mask, rows, encoder_output, name="media_mask")
    if row_mask is None:
        return
    if not isinstance(row_mask, Tensor) or row_mask.dtype != torch.bool:
        raise TypeError(f"row_mask must be a bool tensor, got {kind(row_mask)}")
    if row_mask.shape != x.shape[:2]:
        raise ValueError(
            f"row_mask must be [B, N] = {list(x.shape[:2])}, got {list(row_mask.shape)}"
        )


def leave_out_buffers(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Removes the buffers of the published layer, which this one does not have, in place."""
    for name in BUFFERS:
        state_dict.pop(prefix + name, None)
