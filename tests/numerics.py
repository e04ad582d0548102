"""The one tolerance rule: our error against float64 is at most twice that of eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

# What is left when eager happens to be exact: a few roundings of a value of the output's size.
FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


def assert_as_accurate(
    ours: Tensor, eager: Tensor, truth: Tensor, name: str = "result", factor: float = 2.0
) -> None:
    """`ours` and `eager` share a dtype, `truth` is the same function in float64.

    The largest error of `ours` may be `factor` times that of `eager`, plus FLOOR of its dtype
    times the size of the truth; the positions of inf and nan must be those of the truth.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, not {eager.dtype}"
    ours, eager, truth = ours.detach(), eager.detach(), truth.detach().double()
    floor = FLOOR[ours.dtype]
    ours, eager = ours.double(), eager.double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(truth)), f"{name}: {kind.__name__} at other positions"
    finite = torch.isfinite(truth)
    if not finite.any():
        return
    size = truth[finite].abs().max().item()
    error, allowed = (
        torch.where(finite, t - truth, 0.0).abs().max().item() for t in (ours, eager)
    )
    bound = factor * allowed + floor * max(size, 1e-3)
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} (eager {allowed:.3e})"
