"""The truth of a case of attention, computed piece by piece in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xattn_kernels import cross_attention

from ..harness.truth import Truth, allow
from .case import Case, Piece

NAMES = ("out", "dq", "dk", "dv")
CHUNK = {"cpu": 2**25, "cuda": 2**27}  # scores that are held at once, in elements
ROWS = 256


def truth_of(case: Case, gradients: bool) -> Truth:
    """The truth of attention: out, and with `gradients` dq, dk and dv for the case's dout.

    It is computed piece by piece, so that memory stays bounded, and in float64 without keys that no
    row of a piece attends to.
    """
    truth = compute(case, torch.float64, gradients, row_pieces(case))
    eager = compute(case, case.dtype, gradients, head_pieces(case))
    return allow(NAMES if gradients else NAMES[:1], eager, truth, case.dtype)


def head_pieces(case: Case) -> Iterator[Piece]:
    """Pieces of whole rows of some batches and heads: at most CHUNK scores, or one key head."""
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
    """The same pieces, with a mask cut into blocks of rows over the keys that they attend to."""
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
            by_query = name in ("out", "dq")
            result[(b, q_heads, rows) if by_query else (b, kv_heads, keys)] += part
    return results


def piece_results(
    case: Case, dtype: torch.dtype, gradients: bool, piece: Piece
) -> tuple[Tensor, ...]:
    """(out,) or (out, dq, dk, dv) of one piece, by the eager reference in `dtype`."""
    b, q_heads, kv_heads, rows, keys = piece
    places = ((case.q, q_heads, rows), (case.k, kv_heads, keys), (case.v, kv_heads, keys))
    q, k, v = (t[b, h, n].detach().to(dtype).requires_grad_(gradients) for t, h, n in places)
    out = cross_attention(q, k, v, mask=case.mask_of(piece), backend="eager")
    if not gradients:
        return (out,)
    dout = case.dout[b, q_heads, rows].to(dtype)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)
