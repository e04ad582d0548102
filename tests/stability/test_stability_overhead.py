"""What `StabilityMonitor` adds to training, counted: it is under 3 % of the work of every step when
it looks once in 100. Times are printed by `python -m benchmarks.stability.monitor_overhead`."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stability import monitor_overhead as overhead
from stability.test_stability_monitor import (
    Model,
    hooks_of,
    inputs,
    trained,
)
from support.checkout import ROOT
from xattn_kernels import StabilityMonitor

WAITS = ("aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default")
BOUND = 0.03
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-1-thread"


class Counted(TorchDispatchMode):
    """Every operation by name, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.ops, self.bytes = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops[str(func)] += 1
        if not func.is_view:
            for t in torch.utils._pytree.tree_leaves((args, kwargs, out)):
                self.bytes += t.numel() * t.element_size() if isinstance(t, torch.Tensor) else 0
        return out


def counted(model, monitor=None) -> Counted:
    with Counted() as found:
        loss = model(*inputs())
        loss.backward()
        if monitor is not None:
            monitor.step(loss)
    model.zero_grad()
    return found


def test_steps_in_between_are_the_plain_ones():
    """Not one operation more, no hook, and nothing that waits for the device."""
    model = Model()
    plain = counted(model)
    monitor = StabilityMonitor(model, every=10, nan_every=5)
    for step in range(1, 10):
        if step == 1:
            trained(model, monitor)
            model.zero_grad()
        found = counted(model, monitor)
        assert hooks_of(model) == 0 or step == 9
        if step != 5:
            assert found.ops == plain.ops
        extra = found.ops - plain.ops
        assert not any(extra[name] for name in WAITS)
    assert hooks_of(model) > 0  # the next is a look


def test_a_look_waits_for_nothing_but_its_own_copy():
    model = Model()
    plain = counted(model)
    extra = counted(model, StabilityMonitor(model)).ops - plain.ops
    assert not any(extra[name] for name in WAITS) and sum(extra.values()) > 0


def of_kind(kind: str, counter):
    """What `counter` found in one step of the benchmark's model."""
    calls = overhead.steps_of(torch.device("cpu"), dim=128, text=64, layers=2)
    calls["plain"]()  # there are gradients, and the optimiser has a state
    with counter:
        calls[kind]()
    return counter


def test_work_is_under_the_bound(monkeypatch):
    """Arithmetic and traffic of a look, of the checks of finite gradients, and of the others."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # what is interpreted is not counted
    flops = {
        kind: of_kind(kind, FlopCounterMode(display=False)).get_total_flops()
        for kind in ("plain", *overhead.STEPS)
    }
    moved = {kind: of_kind(kind, Counted()).bytes for kind in ("plain", *overhead.STEPS)}
    assert flops["between"] == flops["finite"] == 0 < flops["plain"] < flops["look"]
    assert moved["between"] == 0 < moved["finite"] < moved["plain"] < moved["look"]
    shares = {name: overhead.share(of) for name, of in dict(flops=flops, bytes=moved).items()}
    assert all(0.0 < share < BOUND for share in shares.values()), shares


def test_share_is_of_all_steps():
    assert overhead.share(dict(plain=2.0, look=12.0, finite=1.0, between=0.1)) == pytest.approx(
        (10 + 9 * 1.0 + 90 * 0.1) / 200
    )
    assert sum(overhead.STEPS.values()) == overhead.EVERY


def test_the_benchmark_prints_times_and_keeps_their_ratios(capsys, tmp_path):
    sizes = ["--seconds", "0.1", "--dim", "16", "--text", "8", "--layers", "1"]
    assert overhead.main([*sizes, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    print(printed)
    assert "share of every=100, nan_every=10: " in printed
    assert all(f"\n{kind} " in printed for kind in ("plain", *overhead.STEPS))
    record = json.loads((tmp_path / "monitor-overhead-dim16.json").read_text())
    assert record["share"] == pytest.approx(overhead.share(record["of_plain"]))
    assert record["of_plain"]["plain"] == 1 and {"device", "torch", "commit"} <= record.keys()


@pytest.mark.parametrize("dim", [512, 64])
def test_the_page_has_the_figures_of_the_committed_runs(dim):
    record = json.loads((RESULTS / f"monitor-overhead-dim{dim}.json").read_text())
    parts, text = record["of_plain"], (ROOT / "docs" / "stability.md").read_text()
    (row,) = [line for line in text.splitlines() if f"width {dim}," in line]
    figures = f"{parts['look']:.3f} | {parts['finite']:.4f} | {parts['between']:.4f}"
    assert f"| {figures} | {100 * record['share']:.2f} % |" in row
