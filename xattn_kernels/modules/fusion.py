"""The fusion of two modalities: `EarlyFusion`, `MidFusion` and `LateFusion`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import masks
from ..core.arguments import (
    check_bools,
    check_choice,
    check_positive,
    check_several,
    check_sizes,
)
from ..masks import KeyInterval
from .attention_pooler import AttentionPooler
from .gated_cross_attention import GatedCrossAttentionBlock
from .masked_cross_attention import BACKENDS, check_tensor
from .media_cache import MediaCache
from .multihead_attention import MultiheadAttention

MERGES = ("concat", "add", "product")
POOLS = ("mean", "attention")


class FusedTokens(NamedTuple):
    """The tokens vision [B, Nv, dim] and text [B, Nt, dim]; rows of padding are arbitrary."""

    vision: Tensor
    text: Tensor


class FusedPair(NamedTuple):
    """The vectors vision and text [B, dim], each from one side alone, and their merger.

    merged is [B, dim], or [B, 2 dim] with merge="concat".
    """

    vision: Tensor
    text: Tensor
    merged: Tensor


class EarlyFusion(nn.Module):
    """A transformer over the tokens of both modalities, where a token may attend to all tokens.

        x = [vision_proj(vision) + type_0 ; text_proj(text) + type_1]
        x = x + self_attn(norm1(x))        x = x + linear2(gelu(linear1(norm2(x))))       per layer
        out = norm(x)

    No mask matrix exists: the module moves the real tokens of vision behind their padding, so that
    the real tokens of a pair are neighbours and every row sees one interval of keys. `layers` and
    `norm` have the parameters of `nn.TransformerEncoder` with norm_first=True, and its state dicts
    load into them. A projection exists only where a width is not `dim`.

    Args:
        dim, depth, heads: width, number of layers and heads of the transformer.
        dim_visual, dim_text: widths of the tokens; None means dim.
        causal_text: whether a word sees only the image and the text up to itself, and the image
            only itself, as in a language model with a prefix (SimVLM). With False every token sees
            every other one (VisualBERT).
        ff_mult: hidden width of the feed-forwards as a multiple of dim.
        norm_eps: eps of the LayerNorms.
        backend: "triton", "cuda", "torch" or "eager" for every call; None chooses for each.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Li et al., "VisualBERT: a simple and performant baseline for vision and language"
    (2019); Wang et al., "SimVLM: simple visual language model pretraining with weak supervision"
    (2022).
    """

    def __init__(
        self, *, dim, depth, heads, dim_visual=None, dim_text=None, causal_text=False, ff_mult=4,
        norm_eps=1e-5, backend=None, device=None, dtype=None,
    ) -> None:  # fmt: skip
        dim_visual = dim if dim_visual is None else dim_visual
        dim_text = dim if dim_text is None else dim_text
        check_sizes(dim=dim, depth=depth, heads=heads, dim_visual=dim_visual, dim_text=dim_text)
        check_sizes(ff_mult=ff_mult)
        if dim % heads:
            raise ValueError(f"heads must divide dim = {dim}, got {heads}")
        check_bools(causal_text=causal_text)
        check_positive("norm_eps", norm_eps)
        check_choice("backend", backend, None, *BACKENDS)
        super().__init__()
        self.dim_visual, self.dim_text, self.causal_text = dim_visual, dim_text, causal_text
        factory = dict(device=device, dtype=dtype)
        self.vision_proj, self.text_proj = (
            nn.Identity() if width == dim else nn.Linear(width, dim, **factory)
            for width in (dim_visual, dim_text)
        )
        self.type_embeddings = nn.Parameter(torch.randn(2, dim, **factory) * 0.02)
        self.layers = nn.ModuleList(
            EncoderLayer(dim, heads, ff_mult * dim, norm_eps, backend, **factory)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps, **factory)

    def forward(
        self,
        vision: Tensor,
        text: Tensor,
        *,
        vision_lengths: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> FusedTokens:
        """The fused tokens of vision [B, Nv, dim_visual] and text [B, Nt, dim_text].

        Args:
            vision, text: tokens that include their position embeddings; Nv or Nt may be 0.
            vision_lengths, text_lengths: int32 or int64 [B], the number of real tokens of each. The
                others are padding on the right that no row sees. With None all tokens are real.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or range.
        """
        lengths = check_pair(self, vision, text, vision_lengths, text_lengths)
        Nv, Nt = vision.shape[1], text.shape[1]
        places, back = None, None
        if lengths[0] is not None:
            places, back = behind_padding(lengths[0], Nv)
            vision = vision.gather(1, places[..., None].expand_as(vision))
        vision_type, text_type = self.type_embeddings
        vision, text = self.vision_proj(vision) + vision_type, self.text_proj(text) + text_type
        x = torch.cat((vision, text), dim=1)
        mask = joint_mask(Nv, Nt, *lengths, self.causal_text, x.device)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        vision, text = x[:, :Nv], x[:, Nv:]
        if back is not None:
            vision = vision.gather(1, back[..., None].expand_as(vision))
        return FusedTokens(vision, text)


class EncoderLayer(nn.Module):
    """A layer of `EarlyFusion`, with the parameters of `nn.TransformerEncoderLayer`."""

    def __init__(self, dim, heads, hidden, eps, backend, device=None, dtype=None) -> None:
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.self_attn = MultiheadAttention(
            dim, heads, batch_first=True, backend=backend, **factory
        )
        self.linear1 = nn.Linear(dim, hidden, **factory)
        self.linear2 = nn.Linear(hidden, dim, **factory)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=eps, **factory) for _ in range(2))

    def forward(self, x: Tensor, mask: KeyInterval | None) -> Tensor:
        """The tokens [B, N, dim] after this layer, in the shape of x."""
        y = self.norm1(x)
        x = x + self.self_attn(y, y, y, need_weights=False, mask=mask)[0]
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


class MidFusion(nn.Module):
    """The layers of a language model, with a gated cross-attention block before every n-th layer.

        x = blocks[i / every](x, media)  where every divides i        x = layers[i](x)

    The gates of the blocks start at 0, so that the module begins as the language model itself, bit
    for bit. The layers are the modules in the argument, not copies; they stay trainable unless they
    are frozen (`freeze`, `requires_grad_`).

    Args:
        layers: modules that take x [B, N, dim] and return it, or a tuple that begins with it.
        dim, dim_visual: widths of x and of the media; dim_visual=None means dim.
        every: the distance of blocks, which are before the layers 0, every, 2 every, ...
        block_options: the other arguments of `GatedCrossAttentionBlock`, such as `heads`.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Alayrac et al., "Flamingo: a visual language model for few-shot learning" (2022),
    section 2.2.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        *,
        dim: int,
        dim_visual: int | None = None,
        every: int = 1,
        **block_options,
    ) -> None:
        check_sizes(every=every)
        layers = check_several("layers", layers, nn.Module, "an nn.Module")
        super().__init__()
        self.layers, self.every = nn.ModuleList(layers), every
        options = dict(dim=dim, dim_visual=dim_visual) | block_options
        self.blocks = nn.ModuleList(GatedCrossAttentionBlock(**options) for _ in layers[::every])

    def forward(
        self,
        x: Tensor,
        media: Tensor | list[MediaCache],
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
        **layer_options,
    ) -> Tensor:
        """The result [B, N, dim] of the layers and blocks for x [B, N, dim].

        Args:
            media: [B, T, n, dim_visual], T media of n tokens each, or the result of `cache_media`.
            media_locations, use_cached_media: as in `GatedCrossAttentionBlock`.
            layer_options: arguments for every layer, such as its mask.

        Raises:
            TypeError, ValueError: the errors of `GatedCrossAttentionBlock`.
        """
        caches = isinstance(media, list)
        if caches and len(media) != len(self.blocks):
            raise ValueError(
                f"media must be one cache for each of {len(self.blocks)} blocks, got {len(media)}"
            )
        for i, layer in enumerate(self.layers):
            if i % self.every == 0:
                n = i // self.every
                block_media = media[n] if caches else media
                x = self.blocks[n](x, block_media, media_locations, use_cached_media)
            x = layer(x, **layer_options)
            x = x[0] if isinstance(x, tuple) else x
        return x

    def cache_media(self, media: Tensor) -> list[MediaCache]:
        """The projected media of each block, to pass to `forward` in place of `media`."""
        return [block.cache_media(media) for block in self.blocks]


class LateFusion(nn.Module):
    """A merger of two modalities, each of which becomes one vector before they meet.

        a = vision_proj(pool(vision))       b = text_proj(pool(text))
        merged = [a ; b], a + b, or a * b

    Neither vector depends on the other side, so either can be computed ahead and stored.
    `itc_loss(a, b)` trains the vectors to find each other, a head on `merged` to judge the pair.

    Args:
        dim: width of both vectors.
        dim_visual, dim_text: widths of the tokens; None means dim.
        merge: "concat", "add" or "product".
        pool: "mean" of the real tokens, or "attention", an `AttentionPooler` with one query for
            each side, as wide as its tokens.
        heads: number of heads of the poolers; only with pool="attention".
        backend: "triton", "cuda", "torch" or "eager" for every call; None chooses for each.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Radford et al., "Learning transferable visual models from natural language supervision"
    (2021), for the two towers; Yu et al., "CoCa" (2022), for pooling by attention.
    """

    def __init__(
        self, *, dim, dim_visual=None, dim_text=None, merge="concat", pool="mean", heads=None,
        backend=None, device=None, dtype=None,
    ) -> None:  # fmt: skip
        dim_visual = dim if dim_visual is None else dim_visual
        dim_text = dim if dim_text is None else dim_text
        check_sizes(dim=dim, dim_visual=dim_visual, dim_text=dim_text)
        check_choice("merge", merge, *MERGES)
        check_choice("pool", pool, *POOLS)
        check_choice("backend", backend, None, *BACKENDS)
        if (heads is None) != (pool == "mean"):
            raise ValueError(f"heads must be None without pool='attention', else not, got {heads}")
        super().__init__()
        self.dim_visual, self.dim_text, self.merge = dim_visual, dim_text, merge
        factory = dict(device=device, dtype=dtype)
        self.vision_pool, self.text_pool = None, None
        if pool == "attention":
            self.vision_pool, self.text_pool = (
                AttentionPooler(dim=width, heads=heads, n_queries=1, backend=backend, **factory)
                for width in (dim_visual, dim_text)
            )
        self.vision_proj = nn.Linear(dim_visual, dim, bias=False, **factory)
        self.text_proj = nn.Linear(dim_text, dim, bias=False, **factory)

    def forward(
        self,
        vision: Tensor,
        text: Tensor,
        *,
        vision_lengths: Tensor | None = None,
        text_lengths: Tensor | None = None,
    ) -> FusedPair:
        """The fused pair of vision [B, Nv, dim_visual] and text [B, Nt, dim_text].

        Args:
            vision_lengths, text_lengths: int32 or int64 [B], the number of real tokens of each. The
                others are padding on the right. With None all tokens are real. The mean of no token
                is 0.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or range.
        """
        vision_lengths, text_lengths = check_pair(self, vision, text, vision_lengths, text_lengths)
        a = self.vision_proj(pooled(self.vision_pool, vision, vision_lengths))
        b = self.text_proj(pooled(self.text_pool, text, text_lengths))
        if self.merge == "concat":
            return FusedPair(a, b, torch.cat((a, b), dim=-1))
        return FusedPair(a, b, a + b if self.merge == "add" else a * b)


def behind_padding(lengths: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """The indices (places, back), int64 [B, N], that move padding to the left and back again.

    A gather of the tokens by `places` moves them, and a gather by `back` undoes it.
    """
    position, shift = torch.arange(N, device=lengths.device), N - lengths[:, None]
    return (position - shift) % max(N, 1), (position + shift) % max(N, 1)


def joint_mask(Nv, Nt, vision_lengths, text_lengths, causal_text, device) -> KeyInterval | None:
    """The keys of each row among the Nv tokens of vision, padded on the left, and Nt of text."""
    if vision_lengths is None and text_lengths is None and not causal_text:
        return None
    rows = torch.arange(Nv + Nt, dtype=torch.int32, device=device)
    mask = KeyInterval(torch.zeros_like(rows), torch.full_like(rows, Nv + Nt))
    if causal_text:
        mask = KeyInterval(mask.start, (rows + 1).clamp(min=Nv))
    if vision_lengths is not None:
        start = masks.padding(vision_lengths, side="left", Nk=Nv).start
        mask &= KeyInterval(start, torch.full_like(start, Nv + Nt))
    if text_lengths is not None:
        mask &= masks.padding(text_lengths + Nv)
    return mask


def pooled(pool: AttentionPooler | None, x: Tensor, lengths: Tensor | None) -> Tensor:
    """The vector [B, width] of the tokens x [B, N, width], by attention or as their mean."""
    if pool is not None:
        return pool(x, mask=None if lengths is None else masks.padding(lengths))[:, 0]
    N = x.shape[1]
    if lengths is None:
        return x.sum(1) / max(N, 1)
    real = torch.arange(N, device=x.device) < lengths[:, None]
    # padding may hold anything, NaN too
    total = x.masked_fill(~real[..., None], 0.0).sum(1)
    return total / lengths.clamp(min=1)[:, None].to(x.dtype)


def check_pair(
    module: nn.Module, vision, text, vision_lengths, text_lengths
) -> tuple[Tensor | None, Tensor | None]:
    """The lengths as int32; raises unless tensors and lengths fit `module` and each other."""
    weight = next(module.parameters())
    check_tensor("vision", vision, "[B, Nv, dim_visual]", module.dim_visual, weight)
    check_tensor("text", text, "[B, Nt, dim_text]", module.dim_text, weight)
    if len(vision) != len(text):
        raise ValueError(f"the batch of text, {len(text)}, must be that of vision, {len(vision)}")
    checked = []
    for name, lengths, t in (("vision", vision_lengths, vision), ("text", text_lengths, text)):
        if lengths is not None:
            lengths = masks.check_lengths(f"{name}_lengths", lengths, most=t.shape[1])
            if len(lengths) != len(t) or lengths.device != t.device:
                raise ValueError(
                    f"{name}_lengths must be [B] = [{len(t)}] on {t.device}, got "
                    f"{list(lengths.shape)} on {lengths.device}"
                )
        checked.append(lengths)
    return tuple(checked)
