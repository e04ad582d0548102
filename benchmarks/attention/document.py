"""The input of the main job: real photographs and text, interleaved as a Flamingo reads them.

Crops of two photographs are cut into patches whose pixels, under a fixed random projection, are the
keys and values; the words of the README, hashed to fixed random embeddings, are the queries;
images are placed where lines of the text begin. Attention patterns are therefore those of
correlated patches and repeated words, not of independent noise.
"""

from __future__ import annotations

import math
import re
import zlib
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harness.machine import ROOT
from .case import Case
from .workloads import Workload, media_last

INPUT = "2 photographs (scikit-learn), README.md"
WORKLOADS = ("openflamingo-mmc4", "flamingo-32shot", "flamingo-train", "blip2-224")
PATCH = 14  # pixels, as in CLIP's ViT-L/14
VOCABULARY = 4096


def build(w: Workload, original: Workload, device, dtype: torch.dtype, seed: int = 0) -> Case:
    """A case of a "media_last" workload (text over images) or of one without a mask (latents)."""
    if w.mask not in ("media_last", "none"):
        raise ValueError(f"no document for workload {w.name!r}: its mask is {w.mask!r}")
    generator = torch.Generator().manual_seed(seed)
    patches = image_patches(w.B * max(w.n_media, 1), w.tokens_per_media or w.Nk, generator)
    keys = patches.reshape(w.B, w.Nk, -1)

    def heads(features: Tensor, H: int, D: int) -> Tensor:
        projection = torch.randn(features.shape[-1], H * D, generator=generator)
        projected = features @ projection / math.sqrt(features.shape[-1])
        return projected.unflatten(-1, (H, D)).to(device, dtype).transpose(1, 2)

    mask = None
    if w.mask == "media_last":
        words, line_starts = text(w.B, w.Nq)
        table = torch.randn(VOCABULARY, 256, generator=generator)
        q, mask = heads(table[words], w.Hq, w.D), media_last(w, image_places(w, line_starts))
    else:
        q = heads(torch.randn(w.B, w.Nq, 256, generator=generator), w.Hq, w.D)
    dout = torch.randn(w.B, w.Nq, w.Hq, w.Dv, generator=generator).to(device, dtype).transpose(1, 2)
    k, v = heads(keys, w.Hkv, w.D), heads(keys, w.Hkv, w.Dv)
    return Case(w, original, q, k, v, dout, mask.to(device) if mask else None)


@lru_cache(None)
def photographs() -> tuple[Tensor, ...]:
    """Two photographs, float [3, height, width] in [0, 1]."""
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    return tuple(torch.from_numpy(image.copy()).permute(2, 0, 1) / 255.0 for image in images)


def image_patches(n_images: int, tokens: int, generator: torch.Generator) -> Tensor:
    """[n_images, tokens, 3 * PATCH ** 2], the standardised pixels of patches of different crops.

    Patches are a square grid in reading order; tokens beyond it (a class token) are their mean.
    """
    side = math.isqrt(tokens)
    crops = [crop(photographs()[i % 2], side * PATCH, generator) for i in range(n_images)]
    patches = F.unfold(torch.stack(crops), PATCH, stride=PATCH).transpose(1, 2)
    patches = (patches - patches.mean((0, 1))) / patches.std()
    extra = patches.mean(1, keepdim=True).expand(-1, tokens - side**2, -1)
    return torch.cat([extra, patches], 1)


def crop(photograph: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A random square of at least half the photograph's height, resized to [3, side, side]."""
    _, height, width = photograph.shape
    size = int(torch.randint(height // 2, height + 1, (), generator=generator))
    top = int(torch.randint(0, height - size + 1, (), generator=generator))
    left = int(torch.randint(0, width - size + 1, (), generator=generator))
    square = photograph[None, :, top : top + size, left : left + size]
    return F.interpolate(square, (side, side), mode="bilinear", antialias=True)[0]


def text(B: int, Nq: int) -> tuple[Tensor, Tensor]:
    """(word numbers int64, whether a line begins there bool), both [B, Nq], from the README.

    Words are cut into pieces of at most six characters and hashed; the text starts over at its end.
    """
    pieces, starts = [], []
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        line_pieces = re.findall(r"\w{1,6}|[^\w\s]", line)
        pieces += line_pieces
        starts += [i == 0 for i in range(len(line_pieces))]
    rows = torch.arange(B * Nq).view(B, Nq) % len(pieces)
    words = torch.tensor([zlib.crc32(piece.lower().encode()) % VOCABULARY for piece in pieces])
    return words[rows], torch.tensor(starts)[rows]


def image_places(w: Workload, line_starts: Tensor) -> Tensor:
    """The sorted text rows of the images, int64 [B, n_media], spread evenly over starts of lines.

    The first image is at the first start of a line after `empty_rows` rows; if a text has fewer
    lines than images, any row may have an image.
    """
    places = []
    for starts in line_starts:
        rows = starts.nonzero().flatten()
        rows = rows[rows >= w.empty_rows]
        if len(rows) < w.n_media:
            rows = torch.arange(w.empty_rows, w.Nq)
        places.append(rows[torch.arange(w.n_media) * len(rows) // w.n_media])
    return torch.stack(places)
