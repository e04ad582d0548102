"""Clipping of gradients: of groups apart, and by the norms that there were.

Of all gradients together PyTorch's own `torch.nn.utils.clip_grad_norm_(parameters, 1.0)` is the
best form, and `clip_grad_value_` of each number; both of these build on the former's parts.
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
    """Clips the gradients of cross-attention and all others apart, each to its own norm.

    Args:
        max_norm: of the others.
        xattn_max_norm: of `xattn_parameters(model, match)`.
        match: see `xattn_parameters`.

    Returns:
        {"cross_attention", "other"}: the norms before, on the device; nothing waits for it.

    Raises:
        TypeError, ValueError: an argument is not among those named here.
    """
    check_positive("max_norm", max_norm)
    check_positive("xattn_max_norm", xattn_max_norm)
    ours = {id(p) for p in xattn_parameters(model, match).values()}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in model.parameters():
        groups[id(p) in ours].append(p)
    return {
        "cross_attention": clip_grad_norm_(groups[True], xattn_max_norm),
        "other": clip_grad_norm_(groups[False], max_norm),
    }


class AdaptiveClip:
    """Clips the norm of all gradients to a percentile of the norms of the last steps.

        threshold = percentile of {||g_t||, ||g_t-1||, ...}        g *= min(1, threshold / ||g||)

    The norms are those before clipping, this step's included; a step without any gradient has none.
    One that is not finite is not remembered: its gradients become 0 where they are finite, and the
    rest stays NaN. Norms stay on the device, and nothing waits for it.

    Args:
        parameters: whose gradients are clipped, together.
        percentile: from 0 to 100; 100 clips nothing but what `max_norm` does.
        history: steps that are remembered.
        warmup_steps: calls before the percentile counts.
        max_norm: a threshold that always holds too, None for none.

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
        given = [parameters] if isinstance(parameters, Tensor) else parameters
        self.parameters = check_several("parameters", given, Tensor, "a parameter")
        self.percentile, self.warmup_steps, self.max_norm = percentile, warmup_steps, max_norm
        self.steps = 0
        device = self.parameters[0].device
        self.norms = torch.full((history,), math.nan, dtype=torch.float32, device=device)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Clips, and returns the norm before, on the device."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = total_norm(grads).to(self.norms.device)
        if not grads:
            return norm
        kept = torch.where(norm.isfinite(), norm, math.nan)
        self.norms[self.steps % len(self.norms)] = kept
        self.steps += 1
        # torch clips to a Python number, which would wait for the device: here 1, of a ratio
        ratio = norm / self.threshold.clamp(min=torch.finfo(torch.float32).tiny)
        ratio = torch.where(norm.isfinite(), ratio, math.inf)
        clip_grads_with_norm_(self.parameters, 1.0, ratio)
        return norm

    @property
    def threshold(self) -> Tensor:
        """To which norm the next call would clip, if it had this history; infinite for none."""
        found = torch.full_like(self.norms[0], math.inf if self.max_norm is None else self.max_norm)
        if self.steps <= self.warmup_steps:
            return found
        of_history = torch.nanquantile(self.norms, self.percentile / 100)
        return torch.fmin(of_history, found)  # NaN, of no history, is not taken

    def state_dict(self) -> dict:
        """{"norms", "steps"}."""
        return {"norms": self.norms.clone(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state_dict` was taken, of the same `history`."""
        if state["norms"].shape != self.norms.shape:
            raise ValueError(
                f"state must be of history={len(self.norms)}, got {len(state['norms'])}"
            )
        self.norms.copy_(state["norms"])
        self.steps = state["steps"]
