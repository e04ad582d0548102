"""Writers of reports, against stubs of TensorBoard and wandb; thresholds by their words."""

from __future__ import annotations

import math
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

from xattn_kernels import (
    StabilityReport,
    StabilityWarning,
    TensorBoardWriter,
    Thresholds,
)
from xattn_kernels import WandbWriter as Wandb

WARNING = StabilityWarning(7, "cross", "entropy", 0.1, 0.5, "cross: attention collapses")
REPORT = StabilityReport(7, {"loss": 2.0, "attention/cross/entropy": 0.1}, [WARNING])


class Recorder:
    """Notes every call: [(method, arguments, keywords)]."""

    def __init__(self, *args):
        self.calls = [("made", args, {})]

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def test_tensorboard(monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Recorder
    monkeypatch.setitem(sys.modules, module.__name__, module)
    write = TensorBoardWriter("runs/here")
    write(REPORT)
    write(REPORT._replace(step=8, warnings=[]))
    scalars = [(name, REPORT.values[name], step) for step in (7, 8) for name in REPORT.values]
    assert write.writer.calls[0] == ("made", ("runs/here",), {})
    assert [args for f, args, _ in write.writer.calls if f == "add_scalar"] == scalars
    texts = [args for f, args, _ in write.writer.calls if f == "add_text"]
    assert texts == [("warnings", WARNING.message, 7)]
    mine = Recorder()
    assert TensorBoardWriter(mine).writer is mine


def test_wandb(monkeypatch):
    run, module = Recorder(), ModuleType("wandb")
    module.run, module.init = None, lambda: run
    monkeypatch.setitem(sys.modules, "wandb", module)
    write = Wandb()
    write(REPORT)
    name, (logged,), options = run.calls[-1]
    assert name == "log" and "step" not in options  # a late report would be lost by wandb's step
    assert logged == {
        "stability/loss": 2.0, "stability/attention/cross/entropy": 0.1, "stability/step": 7,
        "stability/warnings": 1,
    }  # fmt: skip
    assert ("define_metric", ("stability/*",), {"step_metric": "stability/step"}) in run.calls
    module.run, module.init = Recorder(), None
    assert Wandb().run is module.run
    assert Wandb(run).run is run


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoardWriter()
    with pytest.raises(ImportError, match="pip install wandb"):
        Wandb()


def test_a_run_that_is_none_is_named():
    with pytest.raises(TypeError, match="run must be a wandb run or None, got str"):
        Wandb("my-project")


def test_nobody_imports_them_unasked():
    code = (
        "import sys, torch, xattn_kernels as x; m = x.StabilityMonitor(torch.nn.Linear(2, 2)); "
        "m.step(); unasked = {'wandb', 'tensorboard', 'torch.utils.tensorboard'}; "
        "assert not unasked & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# (value's name, value, keys of a row, the threshold that it passes)
CASES = [
    ("attention/a.b/entropy", 0.49, 9, "entropy"),
    ("attention/a.b/entropy", 0.51, 9, None),
    ("attention/a.b/entropy", 0.4, 2, "entropy"),
    ("attention/a.b/entropy", 0.0, 1, None),  # one key has no more
    ("attention/a.b/max_probability", 0.995, 9, "max_probability"),
    ("attention/a.b/max_probability", 1.0, 1, None),
    ("attention/a.b/peak_probability", 1.0, 9, None),
    ("attention/a.b/max_score", 100.5, 9, "max_score"),
    ("attention/a.b/max_score", 99.5, 9, None),
    ("features/a.b/scale_ratio", 10.5, 9, "scale_ratio"),
    ("features/a.b/scale_ratio", 0.09, 9, "scale_ratio"),
    ("features/a.b/scale_ratio", 0.2, 9, None),
    ("features/a.b/key_norm", math.inf, 9, "finite"),
    ("grad_norm/total", 101.0, 0, "gradient_norm"),
    ("grad_norm/cross_attention", 101.0, 0, None),  # the total's to say
    ("grad_norm/total", math.nan, 0, "finite"),
    ("loss", -math.inf, 0, "finite"),
    ("gates/entropy", 0.1, 0, None),  # a parameter of that name
]


@pytest.mark.parametrize("name, value, keys, passed", CASES)
def test_thresholds(name, value, keys, passed):
    layer = "a.b" if "a.b" in name else ""
    found = Thresholds().warnings(3, {name: value}, {"a.b": keys})
    assert [(w.step, w.layer, w.statistic) for w in found] == [(3, layer, passed)] * bool(passed)
    for warning in found:
        nearest = {10.5: 10.0, 0.09: 0.1}
        assert warning.limit == nearest.get(value, warning.limit)
        assert warning.message.startswith(f"{layer}: " if layer else warning.message[:1])
    never = Thresholds(**dict.fromkeys(vars(Thresholds())))
    assert bool(never.warnings(3, {name: value}, {"a.b": keys})) == (passed == "finite")


def test_a_threshold_of_ones_own():
    values = SimpleNamespace(peak={"attention/a/peak_probability": 0.97})
    (warning,) = Thresholds(peak_probability=0.9).warnings(0, values.peak, {"a": 4})
    assert warning.limit == 0.9 and warning.value == 0.97 and "0.97 > 0.9" in warning.message
