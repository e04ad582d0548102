"""Rates, layers and dropout over the steps of a training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from xattn_kernels import (
    AttentionDropout,
    LayerwiseWarmup,
    MultiheadAttention,
    SparseCrossAttention,
    cross_attention_layers,
    optimizer_groups,
    warmup_cosine,
)


class CrossAttention(MultiheadAttention):
    """By its class one of `cross_attention_layers`."""


class Model(nn.Module):
    def __init__(self, n=3):
        super().__init__()
        made = [CrossAttention(8, 2, dropout=0.5) for _ in range(n)]
        self.layers = nn.ModuleList(made)
        self.self_attn = MultiheadAttention(8, 2)
        self.torchs = nn.MultiheadAttention(8, 2)
        self.dropout = nn.Dropout(0.7)


def optimizer_of(model, **rates):
    return torch.optim.SGD(optimizer_groups(model, **rates), lr=1.0)


def rates(optimizer, schedule, steps):
    found = []
    for _ in range(steps):
        found.append({g["name"].split("/")[0]: g["lr"] for g in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    return found


def expected_rate(step, warmup, total, least):
    if step < warmup:
        return step / warmup
    t = min(step - warmup, total - warmup) / (total - warmup)
    return least + (1 - least) * (1 + math.cos(math.pi * t)) / 2


def test_warmup_and_cosine_of_each_group():
    optimizer = optimizer_of(Model(), lr=1e-2, xattn_lr=0.5)
    options = dict(warmup_steps=2, xattn_warmup_steps=5, total_steps=12, min_ratio=0.1)
    found = rates(optimizer, warmup_cosine(optimizer, **options), 15)
    for step, of in enumerate(found):
        truth = expected_rate(step, 5, 12, 0.1) * 0.5, expected_rate(step, 2, 12, 0.1) * 1e-2
        assert (of["cross_attention"], of["other"]) == pytest.approx(truth, abs=1e-15), step
    assert found[0]["other"] == 0.0 and found[5]["cross_attention"] == 0.5
    assert found[14]["other"] == found[12]["other"] == pytest.approx(1e-3)


def test_it_is_torchs_own_where_torch_has_it():
    """One warm-up for all groups: `SequentialLR` of torch's two schedulers, but for a start of 0,
    which torch's linear one does not have."""
    lr = torch.optim.lr_scheduler
    first, second = optimizer_of(Model()), optimizer_of(Model())
    ours = warmup_cosine(first, warmup_steps=4, total_steps=12)
    parts = [lr.LinearLR(second, 1e-12, total_iters=4), lr.CosineAnnealingLR(second, 12 - 4)]
    theirs = lr.SequentialLR(second, parts, [4])
    for found, of_torch in zip(rates(first, ours, 12), rates(second, theirs, 12), strict=True):
        assert found == pytest.approx(of_torch, abs=1e-12)


def test_a_schedule_goes_on():
    """From a state_dict, and from `last_epoch`."""
    options = dict(warmup_steps=3, total_steps=10)
    whole = rates(o := optimizer_of(Model()), warmup_cosine(o, **options), 8)
    first = optimizer_of(Model())
    schedule = warmup_cosine(first, **options)
    rates(first, schedule, 4)
    second = optimizer_of(Model())
    again = warmup_cosine(second, **options)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert rates(second, again, 4) == whole[4:]
    assert rates(first, warmup_cosine(first, **options, last_epoch=3), 4) == whole[4:]


def test_layers_wake_one_after_the_other():
    model = Model(3)
    layers = list(cross_attention_layers(model).values())
    assert layers == list(model.layers)
    bias = model.layers[1].in_proj_bias.requires_grad_(False)
    for order, ordered in (("first", layers), ("last", layers[::-1])):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        warmup = LayerwiseWarmup(layers, warmup_steps=7, order=order)
        for step in range(10):
            awake = min(3, int(step / 7 * 3) + 1)
            assert warmup.awake == awake
            for i, layer in enumerate(ordered):
                trains = {n for n, p in layer.named_parameters() if p.requires_grad}
                own = {n for n, _ in layer.named_parameters()}
                fixed = {"in_proj_bias"} if layer is layers[1] else set()
                assert trains == (own - fixed if i < awake else set())
                if i >= awake:
                    assert all(p.grad is None for p in layer.parameters() if p is not bias)
            warmup.step()
        assert model.self_attn.in_proj_weight.grad is not None
    again = LayerwiseWarmup(layers, warmup_steps=7)
    assert again.awake == 1 and not layers[1].in_proj_weight.requires_grad
    again.load_state_dict({"steps": 4})
    assert again.awake == 2 and layers[1].in_proj_weight.requires_grad
    assert again.state_dict() == {"steps": 4}


def test_optimisers_pass_sleeping_layers_over():
    model = Model(2)
    before = [layer.out_proj.weight.detach().clone() for layer in model.layers]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    warmup = LayerwiseWarmup(model.layers, warmup_steps=2)
    for step in range(2):
        x = torch.randn(3, 1, 8)
        for layer in model.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
        warmup.step()
        now = [layer.out_proj.weight for layer in model.layers]
        moved = [not torch.equal(*pair) for pair in zip(before, now, strict=True)]
        assert moved == [True, step > 0]


def test_dropout_of_attention_weights_alone():
    model = Model(2)
    model.sparse = SparseCrossAttention(8, 2, top_k=2)  # has none
    schedule = AttentionDropout(model, total_steps=5, start=0.3, end=0.1, every=2)
    targets, found = [*model.layers, model.self_attn, model.torchs], []
    for _ in range(8):
        assert all(m.dropout == schedule.value for m in targets)
        found.append(schedule.value)
        schedule.step()
    assert found == pytest.approx([0.3, 0.3, 0.22, 0.22, 0.14, 0.1, 0.1, 0.1])
    assert model.dropout.p == 0.7 and model.sparse.dropout == 0.0
    again = AttentionDropout(model, total_steps=5, start=0.3, end=0.1)
    assert model.torchs.dropout == 0.3
    again.load_state_dict(dict(steps=2))
    assert again.value == model.torchs.dropout == pytest.approx(0.22)
    assert again.state_dict() == dict(steps=2)


O = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
S = dict(warmup_steps=1, total_steps=3)
WRONG = {
    "warmup_steps must be from 0 to total_steps - 1 = 2, got 3": lambda: warmup_cosine(
        O, warmup_steps=3, total_steps=3
    ),
    "xattn_warmup_steps must be an int, got float": lambda: warmup_cosine(
        O, **S, xattn_warmup_steps=1.0
    ),
    "total_steps must be at least 1, got 0": lambda: warmup_cosine(O, **S | {"total_steps": 0}),
    "min_ratio must be from 0 to 1, got 2": lambda: warmup_cosine(O, **S, min_ratio=2),
    r"layers\[1\] must be an nn.Module, got int": lambda: LayerwiseWarmup(
        [Model(), 3], warmup_steps=2
    ),
    "layers must have at least one, each an nn.Module": lambda: LayerwiseWarmup([], warmup_steps=2),
    "layers must be a list, each an nn.Module, got Linear": lambda: LayerwiseWarmup(
        nn.Linear(2, 2), warmup_steps=2
    ),
    "optimizer must be a torch.optim.Optimizer, got list": lambda: warmup_cosine([O], **S),
    "order must be one of 'first', 'last', got 'up'": lambda: LayerwiseWarmup(
        [Model()], warmup_steps=2, order="up"
    ),
    r"start must be in \[0, 1\), got 1": lambda: AttentionDropout(Model(), total_steps=3, start=1),
    "model must have attention with a dropout": lambda: AttentionDropout(
        nn.ReLU(), total_steps=3
    ),
    "every must be at least 1, got 0": lambda: AttentionDropout(Model(), total_steps=3, every=0),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
