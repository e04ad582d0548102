"""What the tests of fusion share: modules of every form, tokens, results by name."""

from __future__ import annotations

import torch
from torch import nn

from support.numerics import assert_as_accurate
from xattn_kernels import EarlyFusion, LateFusion, MidFusion

B, NV, NT, DIM, VISUAL, TEXT = 3, 7, 5, 24, 14, 10
VISION_LENGTHS, TEXT_LENGTHS = torch.tensor([7, 2, 0]), torch.tensor([5, 1, 3])
EARLY = [{}, dict(causal_text=True)]
LATE = [dict(merge=m) for m in ("concat", "add", "product")] + [dict(pool="attention", heads=2)]


def early(form=EARLY[0], **options) -> EarlyFusion:
    sizes = dict(dim=DIM, depth=2, heads=3, dim_visual=VISUAL, dim_text=TEXT)
    return EarlyFusion(**sizes | form | options)


def late(form=LATE[0], **options) -> LateFusion:
    return LateFusion(**dict(dim=DIM, dim_visual=VISUAL, dim_text=TEXT) | form | options)


def tokens(dtype=torch.float32, batch=B, n_vision=NV, n_text=NT, device="cpu"):
    vision = torch.randn(batch, n_vision, VISUAL, dtype=dtype, device=device)
    text = torch.randn(batch, n_text, TEXT, dtype=dtype, device=device)
    return vision.requires_grad_(), text.requires_grad_()


def randomise(module: nn.Module) -> nn.Module:
    """Biases, norms and gates are not those of the start."""
    for name, p in module.named_parameters():
        if p.dim() == 1:
            nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.5)
    return module


def results(outs, leaves: dict) -> dict:
    """Outputs, and the gradients of a weighted sum of them, by name."""
    weights = (torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device) for o in outs)
    total = sum((o * w.view_as(o)).sum() for o, w in zip(outs, weights, strict=True))
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = {f"out{i}": o.detach() for i, o in enumerate(outs)}
    return found | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def assert_equal(found: dict, truth: dict) -> None:
    size = max(t.abs().max().item() for t in truth.values())
    for name, expected in truth.items():
        assert_as_accurate(found[name], expected, expected, name, size=size)


class Layer(nn.Module):
    """A language model's layer that returns a tuple, as those of transformers do."""

    def __init__(self, dtype=None) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM, dtype=dtype)

    def forward(self, x, shift=0.0):
        return x + torch.tanh(self.linear(x)) + shift, "something else"


def middle(every=2, n_layers=3, dtype=None, **options) -> MidFusion:
    sizes = dict(dim=DIM, dim_visual=VISUAL, heads=3, dim_head=8, dtype=dtype)
    return MidFusion([Layer(dtype) for _ in range(n_layers)], every=every, **sizes | options)


def document(dtype=torch.float32, batch=B, n_text=NT, n_media=2, n=4):
    x = torch.randn(batch, n_text, DIM, dtype=dtype, requires_grad=True)
    return x, torch.randn(batch, n_media, n, VISUAL, dtype=dtype, requires_grad=True)
