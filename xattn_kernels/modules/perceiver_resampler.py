"""`PerceiverResampler`: latents, fixed in number, read any number of media tokens."""

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
    """The attention of latents to media and to themselves, both normed, without biases.

    Arguments, parameters and source are those of a layer of `PerceiverResampler`.
    """

    def __init__(self, *, dim, dim_head=64, heads=8, backend=None, device=None, dtype=None) -> None:
        check_sizes(dim=dim, dim_head=dim_head, heads=heads)
        check_choice("backend", backend, None, *BACKENDS)
        super().__init__()
        self.dim_head, self.backend = dim_head, backend
        factory = dict(device=device, dtype=dtype)
        self.norm_media = nn.LayerNorm(dim, **factory)
        self.norm_latents = nn.LayerNorm(dim, **factory)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False, **factory)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False, **factory)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False, **factory)

    @staticmethod
    def attention_sides(x: Tensor, latents: Tensor, *_) -> tuple[Tensor, Tensor]:
        """The inputs of the queries and of the keys, for a monitor of the layer."""
        return latents, x

    def forward(self, x: Tensor, latents: Tensor, mask: KeyInterval | None = None) -> Tensor:
        """The new latents [B, m, dim] of x [B, n, dim] and latents [B, m, dim].

        The keys of `mask` are [latents; x].
        """
        x, latents = self.norm_media(x), self.norm_latents(latents)
        q = split_heads(self.to_q(latents), self.dim_head)
        # The originals have the latents last. Attention does not depend on the order of its keys,
        # and here the padding of x is at the end, so that the other keys are an interval.
        k, v = self.to_kv(torch.cat((latents, x), dim=1)).chunk(2, dim=-1)
        k, v = split_heads(k, self.dim_head), split_heads(v, self.dim_head)
        return self.to_out(merge_heads(cross_attention(q, k, v, mask=mask, backend=self.backend)))


class PerceiverResampler(nn.Module):
    """The latents of media of any size: `depth` layers of cross-attention and feed-forward.

    The class stands for both published modules, whose state dicts load. Their embeddings differ:

        lucidrains      num_media_embeds (4)          media_pos_emb [num_media_embeds, 1, dim]
        OpenFlamingo    max_num_media                 media_time_embs [max_num_media, 1, dim]
                        max_num_frames                frame_embs [max_num_frames, dim]

    The first two are one embedding under two names, so at most one of them may be set. An argument
    that is None adds no embedding.

    Args:
        dim, depth, dim_head, heads: width, number of layers, width and number of heads.
        num_latents: number of latents per media.
        ff_mult: hidden width of the feed-forward as a multiple of dim, rounded down.
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
        factory = dict(device=device, dtype=dtype)
        self.latents = nn.Parameter(torch.randn(num_latents, dim, **factory))
        for name, shape in embeddings.items():
            new = None if shape[0] is None else nn.Parameter(torch.randn(shape, **factory))
            self.register_parameter(name, new)
        options = dict(dim=dim, dim_head=dim_head, heads=heads, backend=backend)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attend = PerceiverAttention(**options, **factory)
            self.layers.append(nn.ModuleList([attend, feed_forward(dim, ff_mult, **factory)]))
        self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """The normed latents [B, T, num_latents, dim] of T media.

        Args:
            x: [B, n, dim] (T is 1), [B, T, n, dim], or frames [B, T, F, v, dim]. T and F are at
                most the number of their embeddings, if they have any.
            key_lengths: int32 or int64 [B, T], or [B] for a 3-D x: the number of real tokens of
                each media, the first of its n or F * v. The others are padding, finite and
                otherwise arbitrary, that no latent reads. With None all tokens are real.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, dtype or range.
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
        """x as [B, T, n, dim] plus the embeddings that exist; raises unless x fits the module."""
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
        """The mask over [latents; real tokens]; raises unless `key_lengths` fits."""
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


def first(name: str, embedding: Tensor, n: int) -> Tensor:
    """The first n embeddings; raises if there are fewer."""
    if n > len(embedding):
        raise ValueError(f"x has {n} {name}, more than the {len(embedding)} with an embedding")
    return embedding[:n]
