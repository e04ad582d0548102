"""Cases: workloads with their tensors, which every provider receives."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xattn_kernels import KeyInterval

from . import workloads
from .workloads import Workload


class Piece(NamedTuple):
    """A part of a case, by its batches, query heads, key heads, rows and keys."""

    b: slice
    q_heads: slice
    kv_heads: slice
    rows: slice
    keys: slice


class Segments(NamedTuple):
    """The same mask for packed (varlen) kernels: cumulative lengths over the flattened batch.

    cu_q, cu_k: int32 [S + 1] on the case's device; max_q, max_k: the greatest lengths.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True, eq=False)
class Case:
    """q [B,Hq,Nq,D], k [B,Hkv,Nk,D], v [B,Hkv,Nk,Dv], dout [B,Hq,Nq,Dv] and the mask of a workload.

    Tensors are transposed views of [B, N, H, D], as a model's projections leave them. `original`
    is the workload before it was scaled to this machine.
    """

    workload: Workload
    original: Workload
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    interval: KeyInterval | None

    suite = "benchmarks.suites:attention"

    @property
    def upstream(self) -> tuple[Tensor]:
        """The gradients of the results of a provider."""
        return (self.dout,)

    @property
    def label(self) -> str:
        return self.workload.label(self.original)

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    @property
    def groups(self) -> int:
        """The number of query heads per key head."""
        return self.workload.Hq // self.workload.Hkv

    def flops(self, mode: str) -> int:
        return workloads.flops(self.workload, self.interval, mode)

    def min_bytes(self, mode: str) -> int:
        return workloads.min_bytes(self.workload, self.interval, mode, self.dtype.itemsize)

    def visible_fraction(self) -> float:
        mask, Nk = self.interval, self.workload.Nk
        return 1.0 if mask is None else mask.visible_fraction(Nk).item()

    def inputs(self, requires_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as leaves of a fresh graph; no copy."""
        return tuple(t.detach().requires_grad_(requires_grad) for t in (self.q, self.k, self.v))

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """(start, stop), contiguous [B, Nq], or [1, Nq] where all batches are alike."""
        if self.interval is None:
            return None
        w, mask = self.workload, self.interval
        alike = max(mask.start.dim(), mask.stop.dim()) < 2
        return tuple(t.contiguous() for t in mask.expand(1 if alike else w.B, w.Nq))

    def mask_of(self, piece: Piece) -> KeyInterval | None:
        """The mask of a piece, whose keys are numbered from its first one."""
        if self.bounds is None:
            return None
        batches = piece.b if self.bounds[0].shape[0] > 1 else slice(None)
        first, last = piece.keys.start, piece.keys.stop
        shifted = (t[batches, piece.rows].clamp(first, last) - first for t in self.bounds)
        return KeyInterval(*shifted)

    def dense_mask(self) -> Tensor | None:
        """bool [B or 1, 1, Nq, Nk], True = attend."""
        if self.bounds is None:
            return None
        return KeyInterval(*self.bounds).dense(self.workload.Nk)[:, None]

    def empty_rows(self) -> Tensor | None:
        """bool [B or 1, 1, Nq, 1], True for rows that attend to nothing; None if no row does."""
        if self.bounds is None:
            return None
        empty = (self.bounds[0] >= self.bounds[1])[:, None, :, None]
        return empty if empty.any() else None

    def mask_mod(self):
        """FlexAttention's predicate on (b, h, i, j), with the bounds as captured tensors."""
        start, stop = self.bounds
        if start.shape[0] == 1:
            start, stop = start[0], stop[0]
            return lambda b, h, i, j: (j >= start[i]) & (j < stop[i])
        return lambda b, h, i, j: (j >= start[b, i]) & (j < stop[b, i])

    @cached_property
    def segments(self) -> Segments | None:
        """The runs of rows with equal intervals, as packed sequences over the flattened batch.

        Keys between two runs become a segment without rows, so that K and V are used in place. It
        is None if intervals overlap or go backwards.
        """
        w = self.workload
        if self.interval is None:
            batches = [[(w.Nq, w.Nk)]] * w.B
        else:
            bounds = [t.cpu() for t in self.interval.expand(w.B, w.Nq)]
            batches = [_segments(*rows, w.Nk) for rows in zip(*bounds, strict=True)]
        if None in batches:
            return None
        lengths = torch.tensor([part for parts in batches for part in parts]).T
        cumulative = F.pad(lengths.cumsum(1), (1, 0)).to(self.device, torch.int32)
        return Segments(*cumulative, *lengths.amax(1).tolist())

    def first_rows(self, rows: int) -> Case:
        """The case of the first `rows` queries."""
        mask = self.bounds and KeyInterval(*(t[:, :rows] for t in self.bounds))
        w = replace(self.workload, Nq=min(rows, self.workload.Nq))
        queries = {"q": self.q[:, :, :rows], "dout": self.dout[:, :, :rows]}
        return replace(self, workload=w, interval=mask, **queries)

    def save(self, path: Path) -> None:
        bounds = (self.interval.start, self.interval.stop) if self.interval else None
        tensors = (self.q, self.k, self.v, self.dout)
        torch.save((vars(self.workload), vars(self.original), tensors, bounds), path)

    @staticmethod
    def load(path: Path) -> Case:
        workload, original, tensors, bounds = torch.load(path)
        mask = KeyInterval(*bounds) if bounds else None
        return Case(Workload(**workload), Workload(**original), *tensors, mask)


def build(w: Workload, original: Workload, device, dtype: torch.dtype, seed: int = 0) -> Case:
    """A case of random normal tensors and a random mask, fixed by workload, seed and dtype."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(w.name.encode()))
    mask = workloads.interval(w, generator)
    on_device = torch.Generator(device).manual_seed(seed + zlib.crc32(w.name.encode()))

    def heads(N: int, H: int, D: int) -> Tensor:
        flat = torch.randn(w.B, N, H, D, device=device, generator=on_device)
        return flat.to(dtype).transpose(1, 2)

    q, k = heads(w.Nq, w.Hq, w.D), heads(w.Nk, w.Hkv, w.D)
    v, dout = heads(w.Nk, w.Hkv, w.Dv), heads(w.Nq, w.Hq, w.Dv)
    return Case(w, original, q, k, v, dout, mask.to(device) if mask else None)


def _segments(start: Tensor, stop: Tensor, Nk: int) -> list[tuple[int, int]] | None:
    """[(rows, keys), ...] that cover all rows and keys of one batch in order, or None."""
    runs, counts = torch.stack([start, stop]).unique_consecutive(dim=1, return_counts=True)
    parts, cursor = [], 0
    for (first, last), rows in zip(runs.T.tolist(), counts.tolist(), strict=True):
        if first >= last:
            parts.append((rows, 0))
            continue
        if first < cursor:
            return None
        if first > cursor:
            parts.append((0, first - cursor))
        parts.append((rows, last - first))
        cursor = last
    return parts + ([(0, Nk - cursor)] if cursor < Nk else [])
