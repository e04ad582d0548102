"""Workloads of top-k attention, and cases with random tensors and the keys that float64 chooses.

A provider may choose another key than float64 where two scores differ by rounding alone. Rows whose
choice rounding may change get an upstream gradient of zero, so that they contribute to no gradient,
and their out is not compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from xattn_kernels import topk_attention
from xattn_kernels.reference import (
    QUERIES_PER_CHOICE,
    importance,
    named,
    pooled_call,
)

from ..attention import case
from ..attention.case import Case, Piece
from ..attention.truth import head_pieces
from ..attention.workloads import Workload, count_elements
from ..harness.truth import FACTOR

KEYS = (256, 1024, 4096, 16384, 65536)
TOP_K = (16, 64, 128, 512)


@dataclass(frozen=True)
class TopKWorkload(Workload):
    """A workload with `top_k` or `topk_blocks`, as in `xattn_kernels.topk_attention`."""

    top_k: int | None = None
    topk_blocks: tuple[int, int] | None = None

    @property
    def choice(self) -> dict:
        """The arguments that determine the choice."""
        return {"top_k": self.top_k, "topk_blocks": self.topk_blocks}

    @property
    def kept(self) -> int:
        """The number of keys that a query attends to."""
        return self.top_k or self.topk_blocks[0] * self.topk_blocks[1]

    @property
    def compared(self) -> int:
        """The number of keys, or of means of blocks, that a query is multiplied with to choose."""
        return self.Nk // (self.topk_blocks[0] if self.topk_blocks else 1)


def workload(Nk: int, top_k: int | None = None, topk_blocks: tuple[int, int] | None = None):
    """A workload with few queries beside many keys, as the scores of a rival must fit."""
    sizes = dict(B=2, Nq=64 if Nk >= 65536 else 512, Nk=Nk, Hq=16, Hkv=16, D=64, Dv=64)
    choice = f"k{top_k}" if top_k else "blocks{}x{}".format(*topk_blocks)
    name = f"Nk{Nk}-{choice}"
    return TopKWorkload(
        name, **sizes, mask="none", regime="top-k", top_k=top_k, topk_blocks=topk_blocks
    )


WORKLOADS = (
    *(workload(Nk, k) for Nk in KEYS for k in TOP_K if k < Nk),
    workload(16384, topk_blocks=(64, 16)),
    workload(65536, topk_blocks=(64, 16)),
)
BY_NAME = {w.name: w for w in WORKLOADS}


def fit(w: Workload, flops: float = float("inf"), elements: float = float("inf")):
    """The workload reduced until dense attention takes at most `flops` and its tensors `elements`.

    Queries are reduced first, down to a tile that shares its blocks, then batches, then heads.
    """
    while w.dense_flops > flops or count_elements(w) > elements:
        if w.Nq > QUERIES_PER_CHOICE:
            w = replace(w, Nq=max(w.Nq // 2, QUERIES_PER_CHOICE))
        elif w.B > 1:
            w = replace(w, B=w.B // 2)
        elif w.Hkv > 1:
            w = replace(w, Hq=w.Hq // w.Hkv * (w.Hkv // 2), Hkv=w.Hkv // 2)
        elif w.Nq > 1:
            w = replace(w, Nq=w.Nq // 2)
        else:
            break
    return w


@dataclass(frozen=True, eq=False)
class TopKCase(Case):
    """A workload with its tensors, `chosen` int32 [B, Hq, Nq, kept], the keys that float64 chooses,
    and `left_out` bool [B, Hq, Nq], the rows whose choice rounding may change."""

    chosen: Tensor
    left_out: Tensor

    suite = "benchmarks.suites:topk"

    def mask_of(self, piece: Piece) -> Tensor:
        """The chosen keys of a piece, bool [b, q_heads, rows, keys]."""
        chosen = self.chosen[piece.b, piece.q_heads, piece.rows]
        return named(chosen, self.workload.Nk)[..., piece.keys]

    def dense(self) -> Case:
        """The case of attention of the same tensors over all keys."""
        return Case(self.workload, self.original, self.q, self.k, self.v, self.dout, self.interval)

    @cached_property
    def attended_keys(self) -> int:
        """The number of keys, over all key heads, that at least one row attends to."""
        w = self.workload
        seen = torch.zeros((w.B, w.Hkv, w.Nk), dtype=torch.bool, device=self.device)
        seen.scatter_(2, self.chosen.reshape(w.B, w.Hkv, -1).long(), True)
        return int(seen.sum())

    def flops(self, mode: str) -> int:
        """The operations of all scores that the choice needs, then of the chosen pairs."""
        w = self.workload
        rows = w.B * w.Hq * w.Nq
        rescored = w.D if w.topk_blocks else 0  # a choice of blocks leaves the keys without scores
        forward = 2 * rows * (w.compared * w.D + w.kept * (rescored + w.Dv))
        backward = 2 * rows * w.kept * (3 * w.D + 2 * w.Dv)
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]

    def min_bytes(self, mode: str) -> int:
        """The fewest bytes that must move: the forward reads all of k and the chosen values, the
        backward the chosen keys and values."""
        w = self.workload
        q, out = (w.B * w.Hq * w.Nq * width for width in (w.D, w.Dv))
        k, dk_dv = (w.B * w.Hkv * w.Nk * width for width in (w.D, w.D + w.Dv))
        forward = q + k + self.attended_keys * w.Dv + out
        backward = q + self.attended_keys * (w.D + w.Dv) + 2 * out + q + dk_dv
        return self.dtype.itemsize * {
            "forward": forward, "backward": backward, "both": forward + backward,
        }[mode]  # fmt: skip

    def visible_fraction(self) -> float:
        return self.workload.kept / self.workload.Nk

    def first_rows(self, rows: int) -> TopKCase:
        fewer = {"chosen": self.chosen[:, :, :rows], "left_out": self.left_out[:, :, :rows]}
        return replace(super().first_rows(rows), **fewer)

    def save(self, path: Path) -> None:
        tensors = (self.q, self.k, self.v, self.dout, None, self.chosen, self.left_out)
        torch.save((vars(self.workload), vars(self.original), *tensors), path)

    @staticmethod
    def load(path: Path) -> TopKCase:
        workload, original, *rest = torch.load(path)
        return TopKCase(TopKWorkload(**workload), TopKWorkload(**original), *rest)


def build(
    w: TopKWorkload, original: TopKWorkload, device, dtype: torch.dtype, seed: int = 0
) -> TopKCase:
    """A case of random normal tensors, which depend on workload, seed and dtype."""
    plain = case.build(w, original, device, dtype, seed)
    shape = (w.B, w.Hq, w.Nq)
    chosen = torch.empty((*shape, w.kept), dtype=torch.int32, device=device)
    left_out = torch.empty(shape, dtype=torch.bool, device=device)
    choose = choose_blocks if w.topk_blocks else choose_keys
    for piece in head_pieces(plain):
        heads = piece.b, piece.q_heads
        q, k = plain.q[heads], plain.k[piece.b, piece.kv_heads]
        chosen[heads], left_out[heads] = choose(q, k, w)
    dout = plain.dout.masked_fill(left_out[..., None], 0.0)
    return TopKCase(w, original, plain.q, plain.k, plain.v, dout, None, chosen, left_out)


def choose_keys(q: Tensor, k: Tensor, w: TopKWorkload) -> tuple[Tensor, Tensor]:
    """(indices, rows to leave out) of scores in float64.

    A row is left out unless its k-th and (k+1)-th score stay in order when both are wrong by the
    bound of a float32 sum of D products and are then rounded to the dtype.
    """
    scale, dtype = w.D**-0.5, q.dtype
    q, k = (t.double() for t in (q, k.repeat_interleave(w.Hq // w.Hkv, 1)))
    top = (scale * q @ k.mT).topk(w.top_k + 1)
    bound = w.D * torch.finfo(torch.float32).eps / 2 * scale
    error = bound * q.norm(dim=-1) * k.norm(dim=-1).amax(-1, keepdim=True)
    last, next_one = top.values[..., -2] - error, top.values[..., -1] + error
    return top.indices[..., :-1], last.to(dtype) <= next_one.to(dtype)


def choose_blocks(q: Tensor, k: Tensor, w: TopKWorkload) -> tuple[Tensor, Tensor]:
    """(indices of all keys of the most important blocks, rows to leave out), in float64.

    A tile of rows is left out if the gap is within the errors that two importances may have, each
    FACTOR times the largest error of the eager backend in this dtype.
    """
    size, n = w.topk_blocks
    rough, exact = (weights_of_blocks(t, q, k, w).double() for t in (q.dtype, torch.float64))
    top = exact.topk(n + 1)
    error = (rough - exact).abs().amax(-1)
    near = top.values[..., -2] - top.values[..., -1] <= 2 * FACTOR * error
    within = torch.arange(size, device=q.device)
    keys = (top.indices[..., :-1, None] * size + within).flatten(-2)

    def by_row(t: Tensor) -> Tensor:
        rows = t.repeat_interleave(QUERIES_PER_CHOICE, 2)[:, :, : q.shape[2]]
        return rows.repeat_interleave(w.Hq // w.Hkv, 1)

    return by_row(keys), by_row(near)


def weights_of_blocks(dtype: torch.dtype, q: Tensor, k: Tensor, w: TopKWorkload) -> Tensor:
    """The eager backend's importance of each block, [b, kv_heads, tiles, blocks]."""
    q, k = q.to(dtype), k.to(dtype)
    return importance(pooled_call(topk_attention.check(q, k, k, **w.choice)))
