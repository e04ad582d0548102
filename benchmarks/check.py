"""Right before fast: every result is held against float64 before anything is timed.

The rule is that of the tests: a largest error of at most twice that of eager code in the same
dtype, plus a small floor, and inf and nan only where the truth has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from xattn_kernels import cross_attention

from .case import Case, Piece

FACTOR = 2.0
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAMES = ("out", "dq", "dk", "dv")
CHUNK = {"cpu": 2**25, "cuda": 2**27}  # scores that are held at once, in elements
ROWS = 256


@dataclass(frozen=True)
class Truth:
    """A case's results in float64, and for each the error that is allowed."""

    names: tuple[str, ...]
    truth: list[Tensor]
    allowed: list[float]

    def of(self, provider: str) -> Truth:
        """What this provider is held against; another truth where it computes something else."""
        return self

    def verdict(self, results: tuple[Tensor, ...]) -> tuple[str, float]:
        """("", largest share of an allowed error) if right, else what is wrong and its share."""
        worst = 0.0
        expected = zip(self.names, self.truth, self.allowed, strict=True)
        for (name, truth, allowed), result in zip(expected, results, strict=False):
            if result.shape != truth.shape:
                return f"{name} has shape {tuple(result.shape)}, not {tuple(truth.shape)}", math.inf
            if not torch.isfinite(result).all():
                return f"{name} has inf or nan where float64 has none", math.inf
            error = largest(result.double() - truth)
            if error > allowed:
                return f"{name}: error {error:.1e}, allowed {allowed:.1e}", error / allowed
            worst = max(worst, error / allowed)
        return "", worst


def allow(
    names: tuple[str, ...],
    eager: Iterable[Tensor],
    truth: list[Tensor],
    dtype: torch.dtype,
    **sizes: float,
) -> Truth:
    """The truth with the errors that eager code of this dtype allows; `sizes` by name: that of the
    terms of a sum, where they may cancel."""
    allowed = []
    for name, rough, exact in zip(names, eager, truth, strict=True):
        size = max(largest(exact), sizes.get(name, 0.0), 1e-3)
        allowed.append(FACTOR * largest(rough.double() - exact) + FLOOR[dtype] * size)
    return Truth(names, truth, allowed)


def truth_of(case: Case, gradients: bool) -> Truth:
    """Of attention; with `gradients`, dq, dk and dv for the case's dout belong to it.

    Computed piece by piece, so that memory stays bounded, and in float64 without keys that no row
    of a piece attends to.
    """
    truth = compute(case, torch.float64, gradients, row_pieces(case))
    eager = compute(case, case.dtype, gradients, head_pieces(case))
    return allow(NAMES if gradients else NAMES[:1], eager, truth, case.dtype)


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def head_pieces(case: Case) -> Iterator[Piece]:
    """Whole rows of some batches and heads: at most CHUNK scores, or one key head."""
    w = case.workload
    scores = w.Hq * w.Nq * w.Nk
    heads = w.Hkv if scores <= CHUNK[case.device.type] else 1
    batches = max(1, CHUNK[case.device.type] // scores)
    for b in range(0, w.B, batches):
        for h in range(0, w.Hkv, heads):
            q_heads = slice(h * case.groups, (h + heads) * case.groups)
            kv_heads = slice(h, h + heads)
            yield Piece(slice(b, b + batches), q_heads, kv_heads, slice(0, w.Nq), slice(0, w.Nk))


def row_pieces(case: Case) -> Iterator[Piece]:
    """The same, with a mask cut further into blocks of rows over the keys that they attend to."""
    for piece in head_pieces(case):
        if case.bounds is None:
            yield piece
            continue
        start, stop = (t.expand(case.workload.B, -1)[piece.b].cpu() for t in case.bounds)
        for row in range(0, case.workload.Nq, ROWS):
            rows = slice(row, row + ROWS)
            full = start[:, rows] < stop[:, rows]
            if full.any():
                keys = slice(int(start[:, rows][full].min()), int(stop[:, rows][full].max()))
                yield piece._replace(rows=rows, keys=keys)


def compute(
    case: Case, dtype: torch.dtype, gradients: bool, pieces: Iterator[Piece]
) -> list[Tensor]:
    """[out] or [out, dq, dk, dv] by the eager reference in `dtype`, put together in float64."""
    shaped = (case.dout, case.q, case.k, case.v) if gradients else (case.dout,)
    results = [torch.zeros_like(t, dtype=torch.float64) for t in shaped]
    for piece in pieces:
        b, q_heads, kv_heads, rows, keys = piece
        parts = piece_results(case, dtype, gradients, piece)
        for name, result, part in zip(NAMES, results, parts, strict=False):
            of_queries = name in ("out", "dq")
            result[(b, q_heads, rows) if of_queries else (b, kv_heads, keys)] += part
    return results


def piece_results(
    case: Case, dtype: torch.dtype, gradients: bool, piece: Piece
) -> tuple[Tensor, ...]:
    b, q_heads, kv_heads, rows, keys = piece
    places = ((case.q, q_heads, rows), (case.k, kv_heads, keys), (case.v, kv_heads, keys))
    q, k, v = (t[b, h, n].detach().to(dtype).requires_grad_(gradients) for t, h, n in places)
    out = cross_attention(q, k, v, mask=case.mask_of(piece), backend="eager")
    if not gradients:
        return (out,)
    dout = case.dout[b, q_heads, rows].to(dtype)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)
