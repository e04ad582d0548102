"""`PerceiverResampler`: any number of media tokens becomes a fixed number of latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import masks
from ..core.arguments import check_choice, check_sizes, kind
from ..masks import KeyInterval
from ..ops.cross_attention import cross_attention
from .gated_cross_attention import feed_forward
from .masked_cross_attention import (
    BACKENDS,
    check_like_weights,
    merge_heads,
    split_heads,
)


class PerceiverAttention(nn.Module):
    """Latents attend to media and to themselves, both normed, without biases.

    Arguments, parameters and source are those of a layer of `PerceiverResampler`.
    """

    def __init__(self, *, dim, dim_head=64, heads=8, backend=None, device=None, dtype=None) -> None:
        check_sizes(dim=dim, dim_head=dim_head, heads=heads)
        check_choice("backend", backend, None, *BACKENDS)
        super().__init__()
        self.dim_head, self.backend = dim_head, backend
        made = dict(device=device, dtype=dtype)
        self.norm_media = nn.LayerNorm(dim, **made)
        self.norm_latents = nn.LayerNorm(dim, **made)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False, **made)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False, **made)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **made)

    @staticmethod
    def attention_sides(x: Tensor, latents: Tensor, *_) -> tuple[Tensor, Tensor]:
        """(queries' side, keys' side), for those who watch the layer."""
        return latents, x

    def forward(self, x: Tensor, latents: Tensor, mask: KeyInterval | None = None) -> Tensor:
        """x [B, n, dim], latents [B, m, dim] -> [B, m, dim]; `mask` is over [latents; x]."""
        x, latents = self.norm_media(x), self.norm_latents(latents)
        q = split_heads(self.to_q(latents), self.dim_head)
        # The originals have the latents last; attention does not mind the order of its keys, and
        # here the padding of x is at the end, so that what is left is an interval.
        k, v = self.to_kv(torch.cat((latents, x), dim=1)).chunk(2, dim=-1)
        k, v = split_heads(k, self.dim_head), split_heads(v, self.dim_head)
        return self.to_out(merge_heads(cross_attention(q, k, v, mask=mask, backend=self.backend)))


class PerceiverResampler(nn.Module):
    """Learned latents read media of any size: `depth` layers of cross-attention and feed-forward.

    One class for both published modules; state dicts load. They differ in their embeddings:

        lucidrains      num_media_embeds (there 4)    media_pos_emb [num_media_embeds, 1, dim]
        OpenFlamingo    max_num_media                 media_time_embs [max_num_media, 1, dim]
                        max_num_frames                frame_embs [max_num_frames, dim]

    The first two do the same under two names, so one of them at most; what is None is not added.

    Args:
        dim, depth, dim_head, heads: width, number of layers, width and number of heads.
        num_latents: latents per media.
        ff_mult: hidden width of the feed-forward by dim, rounded down.
        backend: "triton", "cuda", "torch" or "eager" for every call; None chooses for each.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Jaegle et al., "Perceiver" (2021); Alayrac et al., "Flamingo" (2022).
    """

    def __init__(
        self, *, dim, depth=6, dim_head=64, heads=8, num_latents=64, num_media_embeds=None,
        max_num_media=None, max_num_frames=None, ff_mult=4, backend=None, device=None, dtype=None,
    ) -> None:  # fmt: skip
        if num_media_embeds is not None and max_num_media is not None:
            raise ValueError(
                "num_media_embeds and max_num_media name one embedding, in lucidrains' and in "
                f"OpenFlamingo's state dict; got {num_media_embeds} and {max_num_media}"
            )
        embeddings = {
            "media_pos_emb": (num_media_embeds, 1, dim),
            "media_time_embs": (max_num_media, 1, dim),
            "frame_embs": (max_num_frames, dim),
        }
        named = dict(num_media_embeds=num_media_embeds, max_num_media=max_num_media)
        named |= dict(max_num_frames=max_num_frames)
        check_sizes(dim=dim, depth=depth, num_latents=num_latents)
        check_sizes(**{name: n for name, n in named.items() if n is not None})
        super().__init__()
        self.dim = dim
        made = dict(device=device, dtype=dtype)
        self.latents = nn.Parameter(torch.randn(num_latents, dim, **made))
        for name, shape in embeddings.items():
            new = None if shape[0] is None else nn.Parameter(torch.randn(shape, **made))
            self.register_parameter(name, new)
        options = dict(dim=dim, dim_head=dim_head, heads=heads, backend=backend)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attend = PerceiverAttention(**options, **made)
            self.layers.append(nn.ModuleList([attend, feed_forward(dim, ff_mult, **made)]))
        self.norm = nn.LayerNorm(dim, **made)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """[B, T, num_latents, dim] for T media, normed.

        Args:
            x: [B, n, dim] (T is 1), [B, T, n, dim], or frames [B, T, F, v, dim]. T and F are at
                most the number of their embeddings, where there are any.
            key_lengths: int32 or int64 [B, T], or [B] for a 3-D x: the real tokens of each media,
                the first of its n or F * v; the rest is padding, finite and otherwise arbitrary,
                that no latent reads. None: all are real.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape, dtype or range.
        """
        x = self._embed(x)
        B, T, n, _ = x.shape
        mask = None if key_lengths is None else self._mask(key_lengths, B, T, n, x.device)
        x = x.flatten(0, 1)
        latents = self.latents.expand(B * T, -1, -1)
        for attend, feed in self.layers:
            latents = attend(x, latents, mask) + latents
            latents = feed(latents) + latents
        return self.norm(latents).unflatten(0, (B, T))

    def _embed(self, x) -> Tensor:
        """[B, T, n, dim] with what there is of embeddings."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {kind(x)}")
        if x.dim() not in (3, 4, 5) or x.shape[-1] != self.dim:
            raise ValueError(
                "x must be [B, n, dim], [B, T, n, dim] or [B, T, F, v, dim] with dim = "
                f"{self.dim}, got {list(x.shape)}"
            )
        check_like_weights("x", x, self.latents)
        if self.frame_embs is not None:
            if x.dim() != 5:
                raise ValueError(f"max_num_frames needs x [B, T, F, v, dim], got {list(x.shape)}")
            x = x + first("frames", self.frame_embs, x.shape[2])[:, None]
        x = x[:, None] if x.dim() == 3 else x.flatten(2, 3) if x.dim() == 5 else x
        for embedding in (self.media_pos_emb, self.media_time_embs):
            if embedding is not None:
                x = x + first("media", embedding, x.shape[1])
        return x

    def _mask(self, key_lengths, B: int, T: int, n: int, device) -> KeyInterval:
        if not isinstance(key_lengths, Tensor):
            raise TypeError(f"key_lengths must be an integer tensor, got {kind(key_lengths)}")
        shape = list(key_lengths.shape)
        if shape != [B, T] and not (T == 1 and shape == [B]):
            raise ValueError(
                f"key_lengths must be an integer tensor [B, T] = {[B, T]}, got {shape}"
            )
        if key_lengths.device != device:
            raise ValueError(f"key_lengths must be on {device}, got {key_lengths.device}")
        real = masks.padding(key_lengths.flatten(), Nk=n)
        return KeyInterval(real.start, real.stop + len(self.latents))


def first(what: str, embedding: Tensor, n: int) -> Tensor:
    """The embeddings of the first n; raises when there are not as many."""
    if n > len(embedding):
        raise ValueError(f"x has {n} {what}, more than the {len(embedding)} with an embedding")
    return embedding[:n]
