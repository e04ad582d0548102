"""Right before fast: every result is held against float64 before anything is timed.

The rule is that of the tests: a largest error of at most twice that of eager code in the same
dtype, plus a small floor, and inf and nan only where the truth has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from xattn_kernels import KeyInterval, cross_attention

from .case import Case

FACTOR = 2.0
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAMES = ("out", "dq", "dk", "dv")
CHUNK = {"cpu": 2**25, "cuda": 2**27}  # scores that are held at once, in elements


class Truth:
    """A case's results in float64, and for each the error that is allowed.

    With `gradients`, dq, dk and dv for the case's dout belong to it. Computed in pieces of the
    batch and of the key heads, so that memory stays bounded.
    """

    def __init__(self, case: Case, gradients: bool):
        self.names = NAMES if gradients else NAMES[:1]
        shaped = (case.dout, case.q, case.k, case.v)[: len(self.names)]
        self.truth = [torch.empty_like(t, dtype=torch.float64) for t in shaped]
        errors = [0.0] * len(shaped)
        for b, q_heads, kv_heads in pieces(case):
            exact, eager = (
                piece_results(case, b, q_heads, kv_heads, dtype, gradients)
                for dtype in (torch.float64, case.dtype)
            )
            for i, name in enumerate(self.names):
                self.truth[i][b, q_heads if name in ("out", "dq") else kv_heads] = exact[i]
                errors[i] = max(errors[i], largest(eager[i].double() - exact[i]))
        floor = FLOOR[case.dtype]
        self.allowed = [
            FACTOR * error + floor * max(largest(truth), 1e-3)
            for error, truth in zip(errors, self.truth, strict=True)
        ]

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


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def pieces(case: Case) -> Iterator[tuple[slice, slice, slice]]:
    """(batches, query heads, key heads): slices of at most CHUNK scores, or of one key head."""
    w = case.workload
    scores = w.Hq * w.Nq * w.Nk
    heads = w.Hkv if scores <= CHUNK[case.device.type] else 1
    batches = max(1, CHUNK[case.device.type] // scores)
    for b in range(0, w.B, batches):
        for h in range(0, w.Hkv, heads):
            q_heads = slice(h * case.groups, (h + heads) * case.groups)
            yield slice(b, b + batches), q_heads, slice(h, h + heads)


def piece_results(
    case: Case, b: slice, q_heads: slice, kv_heads: slice, dtype: torch.dtype, gradients: bool
) -> tuple[Tensor, ...]:
    """out, and with `gradients` dq, dk, dv, of one piece by the eager reference in `dtype`."""
    places = ((case.q, q_heads), (case.k, kv_heads), (case.v, kv_heads))
    q, k, v = (t[b, h].detach().to(dtype).requires_grad_(gradients) for t, h in places)
    mask = None
    if case.bounds is not None:
        whole = case.bounds[0].shape[0] == 1
        mask = KeyInterval(*(t if whole else t[b] for t in case.bounds))
    out = cross_attention(q, k, v, mask=mask, backend="eager")
    if not gradients:
        return (out,)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), case.dout[b, q_heads].to(dtype))
