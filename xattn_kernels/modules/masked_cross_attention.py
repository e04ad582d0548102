"""`MaskedCrossAttention`: text attends to the media before it, as in Flamingo."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import masks
from ..core.arguments import (
    check_bools,
    check_choice,
    check_positive,
    check_sizes,
    kind,
)
from ..core.dispatch import autocasts
from ..masks import KeyInterval
from ..ops.cross_attention import cross_attention
from .media_cache import MediaCache, Weights

BACKENDS = tuple(b.name for b in cross_attention.backends)
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class MaskedCrossAttention(nn.Module):
    """The attention of text over the media before it, with a norm on the text and no biases.

    The parameters are `norm`, `to_q`, `to_kv` (keys first) and `to_out`; state dicts of the modules
    of OpenFlamingo and of lucidrains load. Rows that see no media are also as in these modules:

        only_attend_immediate_media=True    0 before the first media token; after more media
                                            tokens than there are media, the mean of all values
        only_attend_immediate_media=False   the mean of all values before the first media token

    Without any media (T or n is 0) every row is 0.

    Args:
        dim, dim_visual: widths of text and media; dim_visual=None means dim.
        dim_head, heads: width and number of the query heads.
        only_attend_immediate_media: whether a token sees only the last media before it, or all.
        kv_heads: number of key and value heads, a divisor of heads; None means heads.
        qk_norm: whether each query and key head has an RMSNorm, `q_norm` and `k_norm` (Llama 3.2
            Vision, and qk_layer_norms in Idefics).
        norm, norm_eps: "layer" or "rms" on the text; `q_norm` and `k_norm` have the same eps.
        without_media: the rows that see no media: None as above, "empty" 0 (Idefics, and Llama 3.2
            Vision by Meta), "all" attention over every key (Llama 3.2 Vision in transformers).
        backend: "triton", "cuda", "torch" or "eager" for every call; None chooses for each.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Alayrac et al., "Flamingo: a visual language model for few-shot learning" (2022).
    """

    def __init__(
        self, *, dim, dim_visual=None, dim_head=64, heads=8, only_attend_immediate_media=True,
        kv_heads=None, qk_norm=False, norm="layer", norm_eps=1e-5, without_media=None,
        backend=None, device=None, dtype=None,
    ) -> None:  # fmt: skip
        dim_visual = dim if dim_visual is None else dim_visual
        kv_heads = heads if kv_heads is None else kv_heads
        check_sizes(
            dim=dim, dim_visual=dim_visual, dim_head=dim_head, heads=heads, kv_heads=kv_heads
        )
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads = {heads}, got {kv_heads}")
        check_choice("norm", norm, *NORMS)
        check_positive("norm_eps", norm_eps)
        check_bools(only_attend_immediate_media=only_attend_immediate_media, qk_norm=qk_norm)
        check_choice("without_media", without_media, None, "empty", "all")
        check_choice("backend", backend, None, *BACKENDS)
        super().__init__()
        self.dim, self.dim_visual, self.dim_head = dim, dim_visual, dim_head
        self.only_attend_immediate_media = only_attend_immediate_media
        self.without_media, self.backend = without_media, backend
        factory = dict(device=device, dtype=dtype)
        self.norm = NORMS[norm](dim, eps=norm_eps, **factory)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False, **factory)
        self.to_kv = nn.Linear(dim_visual, 2 * kv_heads * dim_head, bias=False, **factory)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **factory)
        self.q_norm = nn.RMSNorm(dim_head, eps=norm_eps, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(dim_head, eps=norm_eps, **factory) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        media: Tensor | MediaCache,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
    ) -> Tensor:
        """The result of the attention, [B, N, dim], without gate and residual.

        Args:
            x: [B, N, dim], floating-point.
            media: [B, T, n, dim_visual], T media of n tokens each, or its `cache_media`.
            media_locations: bool [B, N], True at the one token that stands for a media and sees
                it. With None every token sees all media.
            use_cached_media: whether x continues a text, whose tokens `media_locations` [B, any]
                describes. Each token of x then sees the media of the last token of that text.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or device, or a cache
                comes from other weights.
        """
        check_arguments(self, x, media, media_locations, use_cached_media)
        cache = media if isinstance(media, MediaCache) else self._project_media(media)
        mask = averaged = None
        if media_locations is not None:
            immediate, Nk = self.only_attend_immediate_media, cache.k.shape[2]
            mask = visible_keys(media_sizes(cache), immediate, media_locations, use_cached_media)
            mask, averaged = with_policy(mask, Nk, self.without_media, immediate)
        q = self.to_q(self.norm(x))
        if averaged is not None:  # equal scores: the mean of all values, without a gradient to q
            q = q.masked_fill(averaged[..., None], 0.0)
        q = normed(self.q_norm, split_heads(q, self.dim_head))
        check_dtypes(q, cache)
        out = cross_attention(q, cache.k, cache.v, mask=mask, backend=self.backend)
        return self.to_out(merge_heads(out))

    def cache_media(self, media: Tensor) -> MediaCache:
        """The keys and values of `media` [B, T, n, dim_visual], to pass to `forward` in its place.

        Raises TypeError or ValueError for a wrong shape or dtype, and for weights from
        `torch.inference_mode()`, whose changes PyTorch does not count.
        """
        weight = self.to_kv.weight
        check_tensor("media", media, "[B, T, n, dim_visual]", self.dim_visual, weight)
        return replace(self._project_media(media), made_with=Weights(*self._media_modules()))

    def sees_media(
        self, x: Tensor, media: Tensor | MediaCache, media_locations, use_cached_media=False
    ) -> Tensor:
        """The rows that see some media, bool [B, N], for the arguments of `forward`."""
        check_arguments(self, x, media, media_locations, use_cached_media)
        sizes, immediate = media_sizes(media), self.only_attend_immediate_media
        if media_locations is None:
            return x.new_full(x.shape[:2], 0 not in sizes, dtype=torch.bool)
        seen = visible_keys(sizes, immediate, media_locations, use_cached_media)
        return (seen.start < seen.stop).expand(x.shape[:2])

    def _project_media(self, media: Tensor) -> MediaCache:
        k, v = self.to_kv(media.flatten(1, 2)).chunk(2, dim=-1)
        k, v = split_heads(k, self.dim_head), split_heads(v, self.dim_head)
        return MediaCache(normed(self.k_norm, k), v, *media_sizes(media))

    def _media_modules(self) -> list[nn.Module]:
        """The modules whose weights a cache of media depends on."""
        return [m for m in (self.to_kv, self.k_norm) if m is not None]


def visible_keys(
    sizes: tuple[int, int], immediate: bool, media_locations: Tensor, use_cached_media: bool
) -> KeyInterval:
    """The keys of each row [B, N] by `media_locations`, or those of its last token [B, 1]."""
    if use_cached_media:  # the text may have no tokens
        media_locations = F.pad(media_locations, (1, 0))
    n_media, tokens = sizes
    visible = masks.media(media_locations, tokens, n_media, "last" if immediate else "all")
    if not use_cached_media:
        return visible
    return KeyInterval(*(bound[:, -1:] for bound in visible.expand(*media_locations.shape)))


def with_policy(
    visible: KeyInterval, Nk: int, without_media: str | None, immediate: bool
) -> tuple[KeyInterval, Tensor | None]:
    """The keys of each row by `without_media`, and the rows, bool, that get the mean of all values.

    The second is None if no row gets the mean.
    """
    if without_media == "empty":
        return visible, None
    full = visible.start >= visible.stop
    if without_media is None and immediate:
        full = full & (visible.start > 0)  # start is 0 before the first media, Nk after the last
    mask = KeyInterval(visible.start.masked_fill(full, 0), torch.where(full, Nk, visible.stop))
    return mask, full if without_media is None else None


def split_heads(x: Tensor, dim_head: int) -> Tensor:
    """The view [B, heads, N, dim_head] of x [B, N, heads * dim_head]."""
    return x.unflatten(-1, (-1, dim_head)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """The heads of x [B, heads, N, dim_head] side by side, [B, N, heads * dim_head]."""
    return x.transpose(1, 2).flatten(2)


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """norm(x) in the dtype of x, computed in that of the weights, which autocast leaves wider."""
    return x if norm is None else norm(x.to(norm.weight.dtype)).to(x.dtype)


def media_sizes(media: Tensor | MediaCache) -> tuple[int, int]:
    """The number of media and the number of tokens of each."""
    cached = isinstance(media, MediaCache)
    return (media.n_media, media.tokens_per_media) if cached else tuple(media.shape[1:3])


def check_arguments(module, x, media, media_locations, use_cached_media) -> None:
    """Raises unless the arguments of `forward` fit `module` and each other."""
    check_bools(use_cached_media=use_cached_media)
    check_tensor("x", x, "[B, N, dim]", module.dim, module.to_q.weight)
    if isinstance(media, MediaCache):
        if media.made_with is None:
            raise ValueError("media must be a cache that cache_media returned")
        media.made_with.check(*module._media_modules())
        B, source = media.k.shape[0], "of the cached media"
    else:
        weight = module.to_kv.weight
        check_tensor("media", media, "[B, T, n, dim_visual]", module.dim_visual, weight)
        B, source = media.shape[0], "of media"
    if x.shape[0] != B:
        raise ValueError(f"the batch of x, {x.shape[0]}, must be that {source}, {B}")
    if media_locations is None:
        return
    if not isinstance(media_locations, Tensor) or media_locations.dtype != torch.bool:
        raise TypeError(f"media_locations must be a bool tensor, got {kind(media_locations)}")
    if media_locations.device != x.device:
        raise ValueError(
            f"media_locations must be on the device of x, {x.device}, got {media_locations.device}"
        )
    shape = list(media_locations.shape)
    if use_cached_media and (len(shape) != 2 or shape[0] != B):
        raise ValueError(f"media_locations must be [B, tokens of the text], B = {B}, got {shape}")
    if not use_cached_media and shape != list(x.shape[:2]):
        raise ValueError(
            f"media_locations must be [B, N] = {list(x.shape[:2])}, one for each token of x, got "
            f"{shape}; use_cached_media=True takes those of the text that x continues"
        )


def check_dtypes(q: Tensor, cache: MediaCache) -> None:
    """Raises unless the queries and the cached keys share dtype and device."""
    k = cache.k
    if (q.dtype, q.device) != (k.dtype, k.device):
        raise ValueError(
            f"keys and values of media are {k.dtype} on {k.device}, the queries {q.dtype} on "
            f"{q.device}; a cache must be made on the same device and under the same autocast"
        )


def check_tensor(name: str, t, dims: str, width: int, weight: Tensor) -> None:
    """Raises unless `t` is a floating-point tensor `dims` whose last dimension is `width`.

    Its device and dtype must be those of `weight`; under autocast the dtype is free.
    """
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor {dims}, got {kind(t)}")
    if t.dim() != dims.count(",") + 1 or t.shape[-1] != width:
        last = dims.rpartition(" ")[2].rstrip("]")
        raise ValueError(f"{name} must be {dims} with {last} = {width}, got {list(t.shape)}")
    check_like_weights(name, t, weight)


def check_like_weights(name: str, t: Tensor, weight: Tensor) -> None:
    """Raises unless `t` has the device of `weight` and, without autocast, its dtype."""
    if t.device != weight.device:
        raise ValueError(
            f"{name} must be on the device of the weights, {weight.device}, got {t.device}"
        )
    plain = weight.is_floating_point() and weight.element_size() > 1  # it is not quantised
    if plain and t.dtype != weight.dtype and not autocasts(t.device):
        raise TypeError(f"{name} must have the dtype of the weights, {weight.dtype}, got {t.dtype}")
