"""The Flamingo modules against recorded outputs and gradients of the published ones."""

from __future__ import annotations

import pytest
import torch

import xattn_kernels
from support.modes import modes
from support.numerics import assert_as_accurate
from support.recordings import assert_is_original, load, recorded, results

CASES = load("gated_cross_attention_block", "masked_cross_attention", "perceiver_resampler")


def name(case: dict) -> str:
    return f"{case['cls']}|{case['name']}"


each_case = pytest.mark.parametrize("case", CASES, ids=name)
QUICK = ("open_flamingo|text_before", "open_flamingo|more_images", "lucidrains|media_locations")
QUICK += ("cached_media_tq1", "2x9x20", "media3|frames2")


def run(case: dict, dtype: torch.dtype, backend: str | None, device="cpu") -> dict:
    options = dict(backend=backend, device=device, dtype=dtype)
    module = getattr(xattn_kernels, case["cls"])(**case["config"], **options)
    other = {n: t.to(device) if hasattr(t, "to") else t for n, t in case["other"].items()}
    return results(case, module, other)


@each_case
def test_eager_in_float64_is_the_original(case):
    assert_is_original(case, run(case, torch.float64, "eager"))


@each_case
def test_default_off_the_gpu(case, as_users_run_it):
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
