"""The one tolerance rule: our error against float64 is at most twice that of eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

# What is left when eager happens to be exact: a few roundings of what is summed.
FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
SMALLEST = 1e-3


def assert_as_accurate(
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    name: str = "result",
    factor: float = 2.0,
    size: float = 0.0,
    rounded_to: torch.dtype | None = None,
    floors: float = 1.0,
) -> None:
    """`ours` and `eager` share a dtype, `truth` is the same function in float64.

    The largest error of `ours` may be `factor` times that of `eager`, plus FLOOR of its dtype
    times the size of the truth; the positions of inf and nan must be those of the truth. Where
    eager overflows and the truth does not, eager sets no standard and the floor is what is left.
    `size`: that of the terms of which the truth is a sum, where they may cancel; `rounded_to`:
    the dtype to which the terms were rounded, where the sum is kept in a finer one; `floors`: how
    many times that of its dtype the floor is.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, not {eager.dtype}"
    floor = floors * FLOOR[rounded_to or ours.dtype]
    ours, eager, truth = (t.detach().double() for t in (ours, eager, truth))
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(truth)), f"{name}: {kind.__name__} at other positions"
    finite = torch.isfinite(truth)
    if not finite.any():
        return
    size = max(size, truth[finite].abs().max().item(), SMALLEST)
    error = (ours - truth)[finite].abs().max().item()
    allowed = (eager - truth)[finite & torch.isfinite(eager)].abs()
    allowed = allowed.max().item() if allowed.numel() else 0.0
    bound = factor * allowed + floor * size
    assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e} (eager {allowed:.3e})"
