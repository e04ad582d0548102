"""The Flamingo modules against recorded outputs and gradients of the published ones.

The recordings, one file per class in `data/conformance/`, are lists of cases: constructor
arguments, state dict, inputs, output and every gradient, computed in float64 by the code that
`source` and `commit` name.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import xattn_kernels
from conftest import modes
from numerics import assert_as_accurate

DATA = Path(__file__).parent / "data" / "conformance"
FILES = ("gated_cross_attention_block", "masked_cross_attention", "perceiver_resampler")
CASES = [c for name in FILES for c in torch.load(DATA / f"{name}.pt", weights_only=True)]


def name(case: dict) -> str:
    return f"{case['cls']}|{case['name']}"


each_case = pytest.mark.parametrize("case", CASES, ids=name)
QUICK = ("open_flamingo|text_before", "open_flamingo|more_images", "lucidrains|media_locations")
QUICK += ("cached_media_tq1", "2x9x20", "media3|frames2")


def run(case: dict, dtype: torch.dtype, backend: str | None, device="cpu") -> dict:
    """Output and the gradients of inputs and parameters, by name."""
    options = dict(backend=backend, device=device, dtype=dtype)
    module = getattr(xattn_kernels, case["cls"])(**case["config"], **options)
    module.load_state_dict(case["state_dict"], strict=True)
    inputs = {n: t.to(device, dtype).requires_grad_() for n, t in case["inputs"].items()}
    other = {n: t.to(device) if hasattr(t, "to") else t for n, t in case["other"].items()}
    out = module(**inputs, **other)
    (out * case["grad_output"].to(device, dtype)).sum().backward()
    named = inputs | dict(module.named_parameters())
    return {"output": out.detach()} | {f"d{n}": t.grad for n, t in named.items()}


def recorded(case: dict) -> dict:
    grads = case["grad_inputs"] | case["grad_params"]
    return {"output": case["output"]} | {f"d{n}": t for n, t in grads.items()}


@each_case
def test_eager_in_float64_is_the_original(case):
    truth, found = recorded(case), run(case, torch.float64, "eager")
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        size = 1.0 if name == "output" else expected.abs().max().item()
        error = (found[name] - expected).abs().max().item()
        assert error <= 1e-9 * size, f"{name}: error {error:.1e} of {size:.1e}"


@each_case
def test_default_off_the_gpu(case, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("XATTN_TRITON_ON_CPU", raising=False)
    assert_accurate(case, run(case, torch.float32, None))


def assert_accurate(case: dict, found: dict) -> None:
    truth, eager = recorded(case), run(case, torch.float32, "eager")
    assert found.keys() == truth.keys()
    # a gate's gradient sums terms of either sign, one for each number of a branch
    terms = max(t.abs().max().item() for t in truth.values())
    for name, expected in truth.items():
        size = terms if name.endswith("_gate") else 0.0
        assert_as_accurate(found[name].cpu(), eager[name], expected, name, size=size)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=[] if any(q in c["name"] for q in QUICK) else pytest.mark.slow)
        for c in CASES
    ],
    ids=name,
)
def test_kernels(mode, case):
    assert_accurate(case, run(case, torch.float32, "triton", mode.device))
