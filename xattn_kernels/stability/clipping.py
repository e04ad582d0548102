"""Clipping of gradients: cross-attention apart from the rest, or to a percentile of past norms.

PyTorch's `torch.nn.utils.clip_grad_norm_(parameters, 1.0)` clips all gradients together best, and
`clip_grad_value_` clips single values; this module builds on the parts of the former.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_

from ..core.arguments import (
    check_counts,
    check_number,
    check_positive,
    check_several,
    check_sizes,
)
from .measures import total_norm
from .parameters import Match, xattn_parameters


def clip_gradients(
    model: nn.Module,
    *,
    max_norm: float = 1.0,
    xattn_max_norm: float = 0.5,
    match: Match | None = None,
) -> dict[str, Tensor]:
    """Clips the gradients of cross-attention and all other gradients, each group to its own norm.

    Args:
        max_norm: the largest norm of the other gradients.
        xattn_max_norm: the largest norm of the gradients of `xattn_parameters(model, match)`.
        match: see `xattn_parameters`.

    Returns:
        {"cross_attention", "other"}: the norms before clipping, on the device, which nothing waits
            for.

    Raises:
        TypeError, ValueError: an argument is not among those named here.
    """
    check_positive("max_norm", max_norm)
    check_positive("xattn_max_norm", xattn_max_norm)
    xattn_ids = {id(p) for p in xattn_parameters(model, match).values()}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in model.parameters():
        groups[id(p) in xattn_ids].append(p)
    return {
        "cross_attention": clip_grad_norm_(groups[True], xattn_max_norm),
        "other": clip_grad_norm_(groups[False], max_norm),
    }


class AdaptiveClip:
    """Clips the norm of all gradients to a percentile of the norms of the last steps.

        threshold = percentile of {||g_t||, ||g_t-1||, ...}        g *= min(1, threshold / ||g||)

    The norms are those before clipping, with that of this step; a step without gradients has no
    norm. A norm that is not finite is not remembered: finite gradients of its step become 0, and
    the others become or stay NaN. Norms stay on the device, and nothing waits for it.

    Args:
        parameters: the parameters whose gradients are clipped together.
        percentile: from 0 to 100; with 100 only `max_norm` clips.
        history: the number of steps that are remembered.
        warmup_steps: the number of calls before the percentile counts.
        max_norm: an upper bound of the threshold from the first step on, or None.

    Raises:
        TypeError, ValueError: an argument is not among those named here.

    Source: Seetharaman et al., "AutoClip" (2020).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, percentile: float = 10.0, history: int = 1000,
        warmup_steps: int = 10, max_norm: float | None = None,
    ) -> None:  # fmt: skip
        if not 0.0 <= check_number("percentile", percentile, "from 0 to 100") <= 100.0:
            raise ValueError(f"percentile must be from 0 to 100, got {percentile}")
        check_sizes(history=history)
        check_counts(warmup_steps=warmup_steps)
        if max_norm is not None:
            check_positive("max_norm", max_norm)
        several = [parameters] if isinstance(parameters, Tensor) else parameters
        self.parameters = check_several("parameters", several, Tensor, "a parameter")
        self.percentile, self.warmup_steps, self.max_norm = percentile, warmup_steps, max_norm
        self.steps = 0
        device = self.parameters[0].device
        self.norms = torch.full((history,), math.nan, dtype=torch.float32, device=device)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Clips, and returns the norm before clipping, on the device."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(grads).to(self.norms.device)
        if not grads:
            return norm
        remembered = torch.where(norm.isfinite(), norm, math.nan)
        self.norms[self.steps % len(self.norms)] = remembered
        self.steps += 1
        # torch clips to a Python number: a threshold read from the device would wait for it,
        # so the ratio of the norm to it is clipped to 1
        ratio = norm / self.threshold.clamp(min=torch.finfo(torch.float32).tiny)
        ratio = torch.where(norm.isfinite(), ratio, math.inf)
        clip_grads_with_norm_(self.parameters, 1.0, ratio)
        return norm

    @property
    def threshold(self) -> Tensor:
        """The norm to which a call with the present history clips, inf where it does not clip."""
        most = torch.full_like(self.norms[0], math.inf if self.max_norm is None else self.max_norm)
        if self.steps <= self.warmup_steps:
            return most
        percentile = torch.nanquantile(self.norms, self.percentile / 100)
        return torch.fmin(percentile, most)  # the percentile of no norm is NaN, which fmin skips

    def state_dict(self) -> dict:
        """The remembered norms and the number of steps: {"norms", "steps"}."""
        return {"norms": self.norms.clone(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state_dict` was taken; raises ValueError if its `history` differs."""
        if state["norms"].shape != self.norms.shape:
            raise ValueError(
                f"state must be of history={len(self.norms)}, got {len(state['norms'])}"
            )
        self.norms.copy_(state["norms"])
        self.steps = state["steps"]
