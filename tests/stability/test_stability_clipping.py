"""Clipping by groups, and to a percentile of the norms that there were."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from support.numerics import assert_as_accurate
from xattn_kernels import AdaptiveClip, clip_gradients


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.cross_attn, self.unused = (nn.Linear(3, 3) for _ in range(3))


def with_gradients(scale=1.0):
    torch.manual_seed(0)
    model = Model()
    for name, p in model.named_parameters():
        if "unused" not in name:
            p.grad = scale * torch.randn_like(p)
    return model


@contextmanager
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def norm_of(parameters) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_groups_are_clipped_apart(scale):
    model, before = with_gradients(scale), with_gradients(scale)
    found = clip_gradients(model, max_norm=1.0, xattn_max_norm=0.25)
    for name, limit in (("cross_attention", 0.25), ("other", 1.0)):
        part = "cross_attn" if name == "cross_attention" else "head"
        norm = norm_of(getattr(before, part).parameters())
        assert_as_accurate(found[name], norm, norm)
        for ours, own in zip(
            *(getattr(m, part).parameters() for m in (model, before)), strict=True
        ):
            truth = own.grad * min(1.0, limit / (norm.item() + 1e-6))
            assert_as_accurate(ours.grad, truth, truth)
    mine = clip_gradients(with_gradients(), match=lambda name, p: False)
    assert mine["cross_attention"].item() == 0.0 < mine["other"].item()


@pytest.mark.parametrize("max_norm", [None, 1.5])
def test_the_percentile_of_a_history(max_norm):
    """By numpy's definition of a percentile, over a ring of 8 norms; outliers are remembered."""
    p = nn.Parameter(torch.zeros(4))
    clip = AdaptiveClip([p], percentile=40, history=8, warmup_steps=3, max_norm=max_norm)
    norms = torch.tensor([1.0, 2.0, 9.0, 3.0, 0.5, 2.5, 50.0, 1.0, 2.0, 0.1, 4.0, 3.0]).double()
    for step, size in enumerate(norms.tolist()):
        p.grad = torch.full((4,), size / 2)
        found = clip()
        assert_as_accurate(found.double(), norms[step], norms[step])
        limit = math.inf
        if step >= 3:
            kept = norms[max(0, step - 7) : step + 1].sort().values
            place = 0.4 * (len(kept) - 1)
            low, rest = int(place), place - int(place)
            limit = (kept[low] + rest * (kept[min(low + 1, len(kept) - 1)] - kept[low])).item()
        limit = min(limit, max_norm or math.inf)
        truth = torch.tensor(min(size, limit))
        assert_as_accurate(p.grad.norm(), truth, truth, f"step {step}")


def test_what_is_not_finite_is_not_remembered():
    p, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    clip = AdaptiveClip((p, other), percentile=50, warmup_steps=0)
    for grad in (1.0, math.nan, 3.0, math.inf):
        p.grad, other.grad = torch.tensor([grad, 0.0]), torch.zeros(2)
        assert torch.equal(clip().isfinite(), torch.tensor(math.isfinite(grad)))
        assert not other.grad.any()
        assert p.grad[1] == 0.0 and p.grad[0].isfinite() == math.isfinite(grad)
    assert clip.threshold.item() == 2.0
    p.grad = other.grad = None
    assert clip().item() == 0.0 and clip.threshold.item() == 2.0


def test_sharded_gradients_are_clipped_to_the_norm_of_the_whole():
    grad = torch.arange(4.0)
    with one_process() as mesh:
        p = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        clip = AdaptiveClip([p], warmup_steps=0, max_norm=0.5)
        p.grad = distribute_tensor(grad.clone(), mesh, [Shard(0)])
        assert_as_accurate(clip(), grad.norm(), grad.norm())
        clipped = p.grad.full_tensor()
    assert_as_accurate(clipped, 0.5 * grad / grad.norm(), 0.5 * grad / grad.norm())


def test_a_state_goes_on():
    def clipped(clip, p, sizes):
        found = []
        for size in sizes:
            p.grad = torch.full((4,), size)
            clip()
            found.append(p.grad.clone())
        return found

    p, sizes = nn.Parameter(torch.zeros(4)), torch.rand(20).tolist()
    options = dict(percentile=30, history=6, warmup_steps=2)
    whole = clipped(AdaptiveClip([p], **options), p, sizes)
    first, second = AdaptiveClip(p, **options), AdaptiveClip(p, **options)
    parts = clipped(first, p, sizes[:9])
    state = first.state_dict()
    clipped(first, p, [7.0])  # the state is a copy
    second.load_state_dict(state)
    parts += clipped(second, p, sizes[9:])
    assert all(torch.equal(*pair) for pair in zip(whole, parts, strict=True))
    with pytest.raises(ValueError, match="state must be of history=1000, got 6"):
        AdaptiveClip(p).load_state_dict(state)


def test_nothing_waits_for_a_device():
    """On meta tensors, whose values nobody can read."""
    p = nn.Parameter(torch.zeros(4, device="meta"))
    p.grad = torch.zeros(4, device="meta")
    clip = AdaptiveClip([p], warmup_steps=0, max_norm=1.0)
    assert clip().device.type == clip.threshold.device.type == "meta"
    model = Model().to("meta")
    model.head.weight.grad = torch.zeros(3, 3, device="meta")
    assert clip_gradients(model)["other"].device.type == "meta"


P = nn.Parameter(torch.zeros(2))
WRONG = {
    "max_norm must be a positive number, got 0": lambda: clip_gradients(Model(), max_norm=0),
    "xattn_max_norm must be a number, got str": lambda: clip_gradients(Model(), xattn_max_norm="a"),
    "model must be an nn.Module, got list": lambda: clip_gradients([P]),
    "percentile must be from 0 to 100, got 101": lambda: AdaptiveClip([P], percentile=101),
    "history must be at least 1, got 0": lambda: AdaptiveClip([P], history=0),
    "warmup_steps must be at least 0, got -1": lambda: AdaptiveClip([P], warmup_steps=-1),
    "parameters must have at least one, each a parameter": lambda: AdaptiveClip([]),
    "parameters must be a list, each a parameter, got Linear": lambda: AdaptiveClip(
        nn.Linear(2, 2)
    ),
    r"parameters\[0\] must be a parameter, got tuple": lambda: AdaptiveClip([("p", P)]),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
