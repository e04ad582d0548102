"""Workloads in the shapes of real models, counts of their work, and smaller ones for a machine."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from xattn_kernels import KeyInterval, masks

FILE = Path(__file__).with_name("workloads.json")
MODES = ("forward", "backward", "both")
SHAPE = ("B", "Nq", "Nk", "Hq", "Hkv", "D", "Dv")


@dataclass(frozen=True)
class Workload:
    """One row of workloads.json: q [B,Hq,Nq,D], k [B,Hkv,Nk,D], v [B,Hkv,Nk,Dv] and a mask.

    mask: "none", "media_last" (a text row sees the block of `tokens_per_media` keys of the last
    image before it; the first `empty_rows` rows see nothing), "padding" (ragged key lengths) or
    "packed" (`segments` equal sequences laid end to end).
    """

    name: str
    B: int
    Nq: int
    Nk: int
    Hq: int
    Hkv: int
    D: int
    Dv: int
    mask: str
    regime: str
    tokens_per_media: int = 0
    empty_rows: int = 0
    segments: int = 0

    @property
    def shape(self) -> str:
        return " ".join(f"{name}={getattr(self, name)}" for name in SHAPE)

    @property
    def n_media(self) -> int:
        return self.Nk // self.tokens_per_media if self.tokens_per_media else 0

    @property
    def dense_flops(self) -> int:
        """The floating-point operations of a forward pass over every pair."""
        return 2 * self.B * self.Hq * self.Nq * self.Nk * (self.D + self.Dv)

    def label(self, original: Workload) -> str:
        """The name, with every size that was scaled down: `flamingo-train[B=8->2]`."""
        changed = [
            f"{size}={getattr(original, size)}->{getattr(self, size)}"
            for size in SHAPE
            if getattr(original, size) != getattr(self, size)
        ]
        return self.name + (f"[{','.join(changed)}]" if changed else "")


def load() -> dict[str, Workload]:
    """Every workload of workloads.json by name."""
    rows = json.loads(FILE.read_text())["workloads"]
    return {row["name"]: Workload(**row) for row in rows}


def fit(w: Workload, dense_flops: float = float("inf"), elements: float = float("inf")) -> Workload:
    """The largest version with at most this many dense FLOPs and tensor elements.

    The batch is reduced first, then heads in the same grouping, then segments or images, then the
    longer sequence; head widths, grouping and the size of a packed segment stay those of the model.
    """
    while w.dense_flops > dense_flops or count_elements(w) > elements:
        smaller = _smaller(w)
        if smaller == w:
            break
        w = smaller
    return w


def count_elements(w: Workload) -> int:
    """The number of elements of q, k, v and out together."""
    return w.B * (w.Hq * w.Nq + w.Hkv * w.Nk) * (w.D + w.Dv)


def _smaller(w: Workload) -> Workload:
    if w.B > 1:
        return replace(w, B=w.B // 2)
    if w.Hkv > 1:
        return replace(w, Hkv=w.Hkv // 2, Hq=w.Hq // w.Hkv * (w.Hkv // 2))
    if w.segments > 1:
        segments = w.segments // 2
        rows, keys = w.Nq // w.segments, w.Nk // w.segments
        return replace(w, segments=segments, Nq=rows * segments, Nk=keys * segments)
    if w.n_media > 1:
        n_media = w.n_media // 2
        Nq = max(w.Nq * n_media // w.n_media, 2 * w.empty_rows, n_media)
        return replace(w, Nk=n_media * w.tokens_per_media, Nq=min(Nq, w.Nq))
    if w.Nk > w.Nq:
        Nk = (w.Nk + 1) // 2
        return replace(w, Nk=Nk, tokens_per_media=min(w.tokens_per_media, Nk))
    return replace(w, Nq=max((w.Nq + 1) // 2, min(w.Nq, 2 * w.empty_rows)))


def interval(w: Workload, generator: torch.Generator) -> KeyInterval | None:
    """The mask of a workload with random lengths and places, on the CPU; None for no mask."""
    if w.mask == "none":
        return None
    if w.mask == "padding":
        lengths = torch.randint(w.Nk // 2, w.Nk + 1, (w.B,), generator=generator)
        lengths[0] = w.Nk
        return masks.padding(lengths)
    if w.mask == "packed":
        ends = torch.arange(w.segments + 1, dtype=torch.int32)
        rows, keys = w.Nq // w.segments, w.Nk // w.segments
        return masks.packed(ends * rows, ends * keys, Nq=w.Nq)
    if w.mask == "media_last":
        return media_last(w, torch.stack([_places(w, generator) for _ in range(w.B)]))
    raise ValueError(f"workload {w.name!r}: unknown mask {w.mask!r}")


def media_last(w: Workload, places: Tensor) -> KeyInterval:
    """The mask of the last image before each text row, of images at rows `places` [B, n_media]."""
    locations = torch.zeros(w.B, w.Nq, dtype=torch.bool)
    locations.scatter_(1, places, True)
    return masks.media(locations, w.tokens_per_media, w.n_media)


def _places(w: Workload, generator: torch.Generator) -> Tensor:
    """The sorted text rows of the images: the first is at `empty_rows`, the others are after it."""
    others = torch.randperm(w.Nq - w.empty_rows - 1, generator=generator)[: w.n_media - 1]
    first = torch.tensor([w.empty_rows])
    return torch.cat([first, others + w.empty_rows + 1]).sort().values


def visible(w: Workload, mask: KeyInterval | None) -> Tensor:
    """The number of keys that each row attends to, int64 [B, Nq]."""
    if mask is None:
        return torch.full((w.B, w.Nq), w.Nk)
    start, stop = mask.expand(w.B, w.Nq)
    return (stop.long() - start.long()).clamp(min=0)


def flops(w: Workload, mask: KeyInterval | None, mode: str) -> int:
    """The operations on attended pairs: s and out forward; s, dp, dq, dk, dv backward.

    With D = Dv they are 4 * Hq * D per pair forward and 2.5 times that backward.
    """
    pairs = w.Hq * int(visible(w, mask).sum())
    forward, backward = 2 * pairs * (w.D + w.Dv), 2 * pairs * (3 * w.D + 2 * w.Dv)
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def min_bytes(w: Workload, mask: KeyInterval | None, mode: str, itemsize: int) -> int:
    """The fewest bytes that must move: each needed input is read once, each output written once.

    Keys that no row attends to are not read; their gradients are still written.
    """
    keys = w.Hkv * attended_keys(w, mask) * (w.D + w.Dv)
    all_keys = w.B * w.Hkv * w.Nk * (w.D + w.Dv)
    queries, outs = w.B * w.Hq * w.Nq * w.D, w.B * w.Hq * w.Nq * w.Dv
    forward = queries + keys + outs
    backward = queries + keys + 2 * outs + queries + all_keys
    return itemsize * {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def attended_keys(w: Workload, mask: KeyInterval | None) -> int:
    """The number of keys of the batch that at least one row attends to."""
    if mask is None:
        return w.B * w.Nk
    start, stop = (bound.long() for bound in mask.expand(w.B, w.Nq))
    full = (stop > start).long()
    depth = torch.zeros(w.B, w.Nk + 1, dtype=torch.int64, device=start.device)
    depth.scatter_add_(1, start.clamp(0, w.Nk), full).scatter_add_(1, stop.clamp(0, w.Nk), -full)
    return int((depth.cumsum(1)[:, : w.Nk] > 0).sum())
