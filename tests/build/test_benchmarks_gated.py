"""The benchmark of the gated residual: bytes by brute force, right results, its command."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.attention.providers import Provider
from benchmarks.gated import providers as gated_providers
from benchmarks.gated import workloads as gated
from benchmarks.gated.workloads import GatedCase, GatedWorkload
from benchmarks.harness import rows
from support import benchmark_runs

TINY = {
    form: GatedWorkload("tiny", 6, 16, form, width=8 * (form == "projection"))
    for form in ("plain", "layer", "rms", "projection")
}
run_one = partial(benchmark_runs.run_one, gated_providers.truth_of)


@pytest.fixture(params=TINY)
def tiny(request) -> GatedCase:
    return gated.build(TINY[request.param], TINY[request.param], "cpu", torch.float32)


def test_bytes_are_those_of_distinct_inputs_and_outputs(tiny):
    inputs = {n: t.numel() for n, t in tiny.leaves.items()}
    x, normed = inputs.pop("x"), len(tiny.upstream) == 2
    forward = x + sum(inputs.values()) + (2 if normed else 1) * x
    assert tiny.min_bytes("forward") == 4 * forward
    # without a norm dx is dy; with one it is written, and y read
    read = (2 if normed else 1) * x + sum(inputs.values()) + (x if normed else 0)
    written = sum(inputs.values()) + (x if normed else 0)
    assert tiny.min_bytes("backward") == 4 * (read + written)
    assert tiny.min_bytes("both") == tiny.min_bytes("forward") + tiny.min_bytes("backward")


@pytest.mark.parametrize("name", ["eager", "xattn-eager", "addmm"])
def test_providers_on_a_cpu_are_right_where_they_can(name, tiny):
    for row in run_one(gated_providers.BY_NAME[name], tiny, ("forward", "backward", "both")):
        can = name != "addmm" or tiny.workload.form == "projection"
        assert row.status == ("ok" if can else "unsupported"), row.reason
        assert not can or row.error_share <= 1
        assert (row.tflops is None) == (not can or tiny.workload.form != "projection")


@pytest.mark.slow
def test_the_compiled_rival_is_right(tiny):
    (row,) = run_one(gated_providers.BY_NAME["compiled"], tiny)
    assert row.status == "ok", row.reason


@pytest.mark.parametrize("name", ["liger", "flash-attn"])
def test_what_is_not_there_or_has_no_such_form_says_so(name, tiny):
    (row,) = run_one(gated_providers.BY_NAME[name], tiny)
    forms = {"liger": ("rms",), "flash-attn": ("rms", "layer")}[name]
    said = "runs on CUDA only" if tiny.workload.form in forms else "has no counterpart of the form"
    assert row.status == "unsupported" and said in row.reason


def test_a_wrong_gradient_of_the_gate_gets_no_time(tiny):
    def prepare(case):
        call = gated_providers.prepare_eager(case)
        return lambda x, h, gate, *rest: call(x, h, 0.9 * gate.detach() + 0.1 * gate, *rest)

    (row,) = run_one(Provider("spoiled", lambda c, mode: [], prepare), tiny)
    assert row.status == "wrong" and row.reason.startswith("dgate: error")


def test_few_rows_fit_a_small_machine_and_the_label_says_so():
    w = gated.BY_NAME["flamingo-9b"]
    small = gated.fit(w, flops=1e9)
    assert small.elements <= 1e6 and small.dim == w.dim
    assert small.label(w) == f"flamingo-9b[rows=16384->{small.rows}]"
    assert gated.fit(w) is w and w.label(w) == "flamingo-9b"


def test_peak_memory_sees_what_eager_code_allocates(tmp_path):
    w = replace(TINY["plain"], rows=4096, dim=256)
    case = gated.build(w, w, "cpu", torch.float32)
    peak = benchmark_runs.resident_peak(case, "eager", tmp_path)
    assert 1.9 * 4 * w.elements <= peak <= 4 * 4 * w.elements  # the product and the sum


def test_the_command_writes_rows(tmp_path, capsys):
    chosen = "--workload flamingo-9b-norm,flamingo-9b-decode --provider eager --dense-gflop 0.01"
    limits = f"--budget-seconds 60 --no-memory --device cpu --out {tmp_path}"
    assert main(["gated", *chosen.split(), *limits.split()]) == 0
    done = rows.load(tmp_path / "gated-float32.csv")
    assert [r.mode for r in done] == ["forward", "both"] * 2
    assert all(r.status == "ok" and r.percent_of_product is None for r in done)
    assert "flamingo-9b-norm[rows=16384->" in capsys.readouterr().out
