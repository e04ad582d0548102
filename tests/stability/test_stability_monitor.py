"""`StabilityMonitor`: what it measures, warns of and leaves alone."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import nn

from support.numerics import assert_as_accurate
from xattn_kernels import (
    GatedCrossAttentionBlock,
    MultiheadAttention,
    StabilityMonitor,
    Thresholds,
    stability,
)
from xattn_kernels.stability import measures

DIM, KEYS = 32, 9
STEPS = 25


class Model(nn.Module):
    """Self-attention, cross-attention behind an open gate, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.self_attn = MultiheadAttention(DIM, 2, batch_first=True)
        self.block = GatedCrossAttentionBlock(dim=DIM, dim_head=16, heads=2)
        self.cross_attn = MultiheadAttention(DIM, 2, batch_first=True)
        self.head = nn.Linear(DIM, 1)
        nn.init.constant_(self.block.attn_gate, 0.5)

    def forward(self, x, media):
        x = x + self.self_attn(x, x, x, need_weights=False)[0]
        x = self.block(x, media[:, None])
        x = x + self.cross_attn(x, media, media, need_weights=False)[0]
        return self.head(x).square().mean()


def inputs(scale=1.0):
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 5, DIM, generator=generator)
    return text, scale * torch.randn(2, KEYS, DIM, generator=generator)


def trained(model, monitor, steps=1, scale=1.0):
    reports = []
    for _ in range(steps):
        loss = model(*inputs(scale))
        model.zero_grad()
        loss.backward()
        reports.append(monitor.step(loss))
    return reports


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_values_by_definition():
    model = Model()
    (report,) = trained(model, monitor := StabilityMonitor(model))
    text, media = inputs()
    with torch.no_grad():
        x = text + model.self_attn(text, text, text, need_weights=False)[0]
        x = model.block(x, media[:, None])
        weights = model.cross_attn.in_proj_weight.chunk(3)  # biases begin as 0
        q, k = ((t @ w.T).unflatten(-1, (2, -1)) for t, w in zip((x, media), weights, strict=False))
        scores = torch.einsum("bihd, bjhd -> bhij", q, k) / 4
        p = scores.softmax(-1)
    grads = {n: p.grad.square().sum() for n, p in model.named_parameters() if p.grad is not None}
    ours = [g for n, g in grads.items() if n.startswith(("block", "cross_attn"))]
    largest, lengths = p.amax(-1), [t.norm(dim=-1).mean() for t in (x, media)]
    expected = {
        "attention/cross_attn/rows": torch.tensor(20.0),
        "attention/cross_attn/entropy": -(p * p.log()).sum(-1).mean(),
        "attention/cross_attn/max_probability": largest.mean(),
        "attention/cross_attn/peak_probability": largest.max(),
        "attention/cross_attn/max_score": scores.max(),
        "features/cross_attn/query_norm": lengths[0],
        "features/cross_attn/key_norm": lengths[1],
        "features/cross_attn/scale_ratio": lengths[1] / lengths[0],
        "gates/block.attn_gate": torch.tensor(math.tanh(0.5)),
        "gates/block.ff_gate": torch.tensor(0.0),
        "grad_norm/total": torch.stack(list(grads.values())).sum().sqrt(),
        "grad_norm/cross_attention": torch.stack(ours).sum().sqrt(),
        "parameter_norm": torch.cat([p.detach().flatten() for p in model.parameters()]).norm(),
        "loss": model(*inputs()).detach(),
    }
    assert not any("self_attn" in name for name in report.values)
    assert {n.split("/")[1] for n in report.values if n.startswith("attention")} == {
        "block.attn", "cross_attn",
    }  # fmt: skip
    for name, truth in expected.items():
        found = torch.tensor(report.values[name])
        assert_as_accurate(found, truth.float(), truth.float(), name)
    assert not report.warnings and monitor.last is report
    assert monitor.history["loss"][0] == (0, report.values["loss"])


def test_training_is_left_as_it_was():
    """The same loss and gradients bit for bit, dropout included, and the same random numbers."""
    found = []
    for watched in (False, True):
        model = Model()
        model.cross_attn.dropout = 0.2
        monitor = StabilityMonitor(model, every=1) if watched else None
        torch.manual_seed(3)
        loss = model(*inputs())
        loss.backward()
        _ = monitor and monitor.step(loss)
        found.append([loss, torch.rand(3), *(p.grad for p in model.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_it_looks_when_it_should_and_only_then(monkeypatch):
    """No hook and no number on the steps in between: these cost one comparison of integers."""
    looks, norms = [], []
    monkeypatch.setattr(measures, "layer_sums", counted(measures.layer_sums, looks))
    monitors = stability.monitor
    monkeypatch.setattr(monitors, "gradient_norms", counted(monitors.gradient_norms, norms))
    model = Model()
    monitor, hooked = StabilityMonitor(model, every=10, nan_every=5), []
    for step in range(STEPS):
        hooked.append(hooks_of(model) > 0)
        (report,) = trained(model, monitor)
        assert (report is not None) == (step % 5 == 0)
        if report is not None:
            assert ("parameter_norm" in report.values) == (step % 10 == 0)
            assert {"loss", "grad_norm/total", "grad_norm/cross_attention"} <= report.values.keys()
    assert [i for i, there in enumerate(hooked) if there] == [0, 10, 20]
    assert len(looks) == 3 * 2 and len(norms) == 5
    assert [step for step, _ in monitor.history["loss"]] == [0, 5, 10, 15, 20]


def test_a_training_that_goes_on_keeps_its_numbers():
    model, found = Model(), {}
    whole = trained(model, StabilityMonitor(model, every=4, nan_every=3), steps=10)
    with StabilityMonitor(model, every=4, nan_every=3, first_step=5) as monitor:
        for step in range(5, 10):
            found[step] = hooks_of(model) > 0
            (report,) = trained(model, monitor)
            assert report == whole[step]
    assert found == {5: False, 6: False, 7: False, 8: True, 9: False}
    assert [step for step, _ in monitor.history["loss"]] == [6, 8, 9]


def counted(f, calls):
    return lambda *args: calls.append(1) or f(*args)


def test_numbers_that_come_late_are_of_their_step(monkeypatch):
    """As from a GPU: nobody waits, until `flush`."""
    monkeypatch.setattr(stability.host_copies.HostCopies, "arrived", lambda self: False)
    model, received = Model(), []
    with StabilityMonitor(model, every=2, nan_every=None, callbacks=[received.append]) as monitor:
        assert trained(model, monitor, 4) == [None] * 4 and not received
        monitor.flush()
        assert [r.step for r in received] == [0, 2] and monitor.last is received[-1]
        assert trained(model, monitor) == [None]
    assert [r.step for r in received] == [0, 2, 4]


def test_validation_does_not_count_and_calls_add_up():
    model = Model()
    monitor = StabilityMonitor(model, every=1)
    with torch.no_grad():
        model(*inputs(50.0))
    loss = model(*inputs()) + model(*inputs())  # of two micro-batches
    loss.backward()
    once = StabilityMonitor(copied := copy.deepcopy(model), every=1)
    twice, (one,) = monitor.step(loss), trained(copied, once)
    for name in ("attention/cross_attn/entropy", "attention/cross_attn/max_score"):
        assert twice.values[name] == pytest.approx(one.values[name])
    assert twice.values["attention/cross_attn/rows"] == 2 * one.values["attention/cross_attn/rows"]


def test_close_takes_every_hook_and_copies_have_none_that_act():
    model = Model()
    with StabilityMonitor(model) as monitor:
        assert hooks_of(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(*inputs()).backward()
        assert not monitor.attention.seen
    assert not hooks_of(model)


def test_collapse_mismatch_and_infinity_are_reported(caplog):
    model, received = Model(), []
    with torch.no_grad():
        model.cross_attn.in_proj_weight[: 2 * DIM] *= 12.0
        model.block.attn_gate.zero_()
    monitor = StabilityMonitor(model, every=1, callbacks=[received.append])
    with caplog.at_level(logging.INFO, "xattn_kernels.stability"):
        (report,) = trained(model, monitor, scale=60.0)
    assert received == [report]
    found = {(w.layer, w.statistic) for w in report.warnings}
    assert {
        ("cross_attn", "entropy"), ("cross_attn", "max_probability"), ("cross_attn", "max_score"),
        ("cross_attn", "scale_ratio"),
    } <= found  # fmt: skip
    assert "cross_attn: attention collapses, entropy" in caplog.text and "loss" in caplog.text
    caplog.clear()
    with torch.no_grad():
        model.head.weight[0, 3] = math.nan
    (report,) = trained(model, monitor)
    finite = [w for w in report.warnings if w.statistic == "finite"]
    assert {"loss is nan", "grad_norm/total", "parameter_norm is nan"} & {
        w.message for w in finite
    } >= {"loss is nan", "parameter_norm is nan"}
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert any("gradients not finite now: " in e and "self_attn" in e for e in errors)


def test_rows_without_keys_are_no_collapse():
    model = Model()
    monitor = StabilityMonitor(model, every=1)
    (x, media), nowhere = inputs(), torch.ones(2, KEYS, dtype=torch.bool)
    loss = model.cross_attn(x, media, media, key_padding_mask=nowhere, need_weights=False)[0].sum()
    loss.backward()
    report = monitor.step(loss)
    assert not report.warnings and not any(name.startswith("attention/") for name in report.values)


def test_compiled_once_with_hooks_and_once_without():
    """Hooks that come and go compile nothing after that; gates, gradients and loss are seen."""
    torch._dynamo.reset()
    model, graphs = Model(), []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    monitor = StabilityMonitor(model, every=3, nan_every=None)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    reports, compilations = [], []
    for _ in range(7):
        reports.append(trained_once(compiled, model, monitor))
        compilations.append(len(graphs))
    assert compilations[1] == compilations[-1] <= 2
    assert [r is not None for r in reports] == [True, False, False] * 2 + [True]
    assert "gates/block.attn_gate" in reports[3].values and not reports[3].warnings


def trained_once(call, model, monitor):
    loss = call(*inputs())
    model.zero_grad()
    loss.backward()
    return monitor.step(loss)


M = nn.Linear(2, 2)
WRONG = {
    "model must be an nn.Module, got function": lambda: StabilityMonitor(inputs),
    "every must be at least 1, got 0": lambda: StabilityMonitor(M, every=0),
    "nan_every must be an int, got float": lambda: StabilityMonitor(M, nan_every=1.0),
    "thresholds must be Thresholds, got dict": lambda: StabilityMonitor(M, thresholds={}),
    r"callbacks\[0\] must be a function of a report, got int": lambda: StabilityMonitor(
        M, callbacks=[3]
    ),
    "callbacks must be a list of functions": lambda: StabilityMonitor(M, callbacks=print),
    "logger must be a logging.Logger or None, got str": lambda: StabilityMonitor(M, logger="log"),
    "first_step must be at least 0, got -1": lambda: StabilityMonitor(M, first_step=-1),
    r"loss must be a tensor of one value or None, got \[2\]": lambda: StabilityMonitor(M).step(
        torch.ones(2)
    ),
    "scale_ratio must be ": lambda: Thresholds(scale_ratio=(3.0, 1.0)),
    "max_score must be a number or None": lambda: Thresholds(max_score="many"),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
