"""Comparison of every result with float64, before anything is timed.

The rule is that of the tests: the largest error is at most twice that of eager code in the same
dtype, plus a small floor, and no result has inf or nan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Truth:
    """The results of a case in float64, and the allowed error of each."""

    names: tuple[str, ...]
    truth: list[Tensor]
    allowed: list[float]

    def for_provider(self, provider: str) -> Truth:
        """The truth of this provider, another one if it computes another function."""
        return self

    def verdict(self, results: tuple[Tensor, ...]) -> tuple[str, float]:
        """("", the largest share of an allowed error) if right, else (what is wrong, its share)."""
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
    """The truth, with allowed errors from those of eager code in this dtype.

    `sizes` holds by name the size of the terms of a result that is a sum, as they may cancel.
    """
    allowed = []
    for name, rough, exact in zip(names, eager, truth, strict=True):
        size = max(largest(exact), sizes.get(name, 0.0), 1e-3)
        allowed.append(FACTOR * largest(rough.double() - exact) + FLOOR[dtype] * size)
    return Truth(names, truth, allowed)


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0
