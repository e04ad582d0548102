"""The benchmark of top-k attention: counts by brute force, which rows count, its command."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.attention.providers import Provider
from benchmarks.harness import rows
from benchmarks.topk import error as topk_error
from benchmarks.topk import providers as topk_providers
from benchmarks.topk import workloads as topk
from benchmarks.topk.workloads import TopKCase, TopKWorkload
from support import benchmark_runs
from xattn_kernels import topk_attention
from xattn_kernels.reference import named

SIZES = dict(B=2, Nq=70, Nk=96, Hq=4, Hkv=2, D=16, Dv=32, mask="none", regime="top-k")
TINY = {
    "keys": TopKWorkload("tiny", **SIZES, top_k=8),
    "blocks": TopKWorkload("tiny", **SIZES, topk_blocks=(16, 2)),
}
MODES = ("forward", "backward", "both")
run_one = partial(benchmark_runs.run_one, topk_providers.truth_of)


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    """What is timed here is what a CPU would be timed with, not kernels in the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(params=TINY)
def tiny(request) -> TopKCase:
    return topk.build(TINY[request.param], TINY[request.param], "cpu", torch.float32)


def chosen_by_eager(case: TopKCase) -> torch.Tensor:
    """bool [B, Hq, Nq, Nk] from what the eager backend returns in float64."""
    w = case.workload
    q, k, v = (t.double() for t in case.inputs(False))
    call = dict(**w.choice, return_indices=True, backend="eager")
    found = named(topk_attention(q, k, v, **call).indices, case.workload.compared)
    if w.topk_blocks is None:
        return found
    by_key = found.repeat_interleave(w.topk_blocks[0], 3)
    return by_key.repeat_interleave(64, 2)[:, :, : w.Nq].repeat_interleave(case.groups, 1)


def test_the_chosen_keys_are_those_of_the_reference_in_float64(tiny):
    assert torch.equal(named(tiny.chosen, tiny.workload.Nk), chosen_by_eager(tiny))
    assert tiny.visible_fraction() == pytest.approx(chosen_by_eager(tiny).double().mean().item())


def test_flops_and_bytes_are_those_of_the_choice_and_of_the_chosen_pairs(tiny):
    w, chosen = tiny.workload, chosen_by_eager(tiny)
    pairs, queries = int(chosen.sum()), w.B * w.Hq * w.Nq
    forward = w.D * queries * w.Nk + w.Dv * pairs
    if w.topk_blocks:
        forward = w.D * queries * (w.Nk // 16) + (w.D + w.Dv) * pairs
    assert tiny.flops("forward") == 2 * forward
    assert tiny.flops("backward") == 2 * pairs * (3 * w.D + 2 * w.Dv)
    read = int(chosen.unflatten(1, (w.Hkv, -1)).any(3).any(2).sum())
    q, k, v, out = (t.numel() for t in (tiny.q, tiny.k, tiny.v, tiny.dout))
    assert tiny.min_bytes("forward") == 4 * (q + k + read * w.Dv + out)
    assert tiny.min_bytes("backward") == 4 * (q + read * (w.D + w.Dv) + 2 * out + q + k + v)
    for count in (tiny.flops, tiny.min_bytes):
        assert count("both") == count("forward") + count("backward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["xattn-torch", "xattn-eager", "eager-topk", "sdpa-mask", "dense"])
def test_providers_on_a_cpu_are_right_where_they_can(name, dtype, tiny):
    tiny = topk.build(tiny.workload, tiny.original, "cpu", dtype)
    for row in run_one(topk_providers.BY_NAME[name], tiny, MODES):
        can = tiny.workload.topk_blocks is None or name.startswith("xattn-") or name == "dense"
        if can and name != "dense" and tiny.left_out.sum() > tiny.left_out.numel() - 16:
            assert "certain" in row.reason
            continue
        assert row.status == ("ok" if can else "unsupported"), row.reason
        assert not can or row.error_share <= 1


@pytest.mark.slow
def test_flex_is_right_forward_and_says_that_it_cannot_more():
    case = topk.build(TINY["keys"], TINY["keys"], "cpu", torch.float32)
    forward, both = run_one(topk_providers.BY_NAME["flex"], case, ("forward", "both"))
    assert forward.status == "ok", forward.reason
    assert both.status == "unsupported" and "no backward on the CPU" in both.reason


def test_one_wrong_key_gets_no_time():
    case = topk.build(TINY["keys"], TINY["keys"], "cpu", torch.float32)

    def prepare(c):
        return lambda q, k, v: topk_attention(q, k, v, c.workload.top_k - 1)

    (row,) = run_one(Provider("spoiled", lambda c, mode: [], prepare), case)
    assert row.status == "wrong" and row.reason.startswith("out: error")


@pytest.mark.parametrize("kind", TINY)
def test_rows_whose_choice_rounding_may_change_count_in_nothing(kind, monkeypatch):
    """Keys that differ by less than float32 keeps apart: each is as good as the other."""
    w = TINY[kind]
    first = topk.case.build(w, w, "cpu", torch.float32)
    k = torch.cat((first.k[:, :, :48], first.k[:, :, :48] * (1 + 1e-7)), 2)
    doubtful = replace(first, k=k)
    monkeypatch.setattr(topk.case, "build", lambda *_: doubtful)
    odd = replace(w, top_k=7) if kind == "keys" else replace(w, topk_blocks=(16, 1))
    case = topk.build(odd, odd, "cpu", torch.float32)
    assert case.left_out.all() and not case.dout.any()
    monkeypatch.undo()
    (row,) = run_one(topk_providers.BY_NAME["xattn-torch"], case)
    assert row.status == "unsupported" and "choice of 0 rows certain" in row.reason
    truth = topk_providers.truth_of(case, False)
    other = torch.zeros_like(case.dout)  # as any other choice would be
    assert truth.verdict((other,))[0] == ""
    assert "inf or nan" in truth.verdict((other * float("nan"),))[0]
    assert truth.for_provider("dense").verdict((other,))[0].startswith("out: error")


@pytest.mark.parametrize("name", ["Nk4096-k64", "Nk65536-k512", "Nk16384-blocks64x16"])
def test_most_rows_are_certain_in_float32(name):
    original = topk.BY_NAME[name]
    w = topk.fit(original, flops=2e8)
    case = topk.build(w, original, "cpu", torch.float32)
    assert case.left_out.float().mean() < 0.2


def test_queries_fit_a_small_machine_first_and_the_label_says_so():
    w = topk.BY_NAME["Nk4096-k64"]
    small = topk.fit(w, flops=1e10)
    assert small.dense_flops <= 1e10 and (small.B, small.Hq, small.Nq) == (2, 16, 256)
    assert small.label(w) == "Nk4096-k64[Nq=512->256]"
    smaller = topk.fit(w, flops=5e8)
    assert (smaller.B, smaller.Hq, smaller.Hkv, smaller.Nq) == (1, 4, 4, 64)
    assert topk.fit(w) is w and w.label(w) == "Nk4096-k64"
    assert topk.fit(w, flops=1).Nq == 1


def test_the_grid_leaves_out_what_would_be_dense():
    assert all(w.kept < w.Nk for w in topk.WORKLOADS)
    assert len(topk.BY_NAME) == len(topk.WORKLOADS) == 21


def test_a_saved_case_is_the_same_and_its_first_rows_fit(tmp_path, tiny):
    tiny.save(tmp_path / "case.pt")
    loaded = TopKCase.load(tmp_path / "case.pt")
    assert loaded.workload == tiny.workload and torch.equal(loaded.k, tiny.k)
    few = loaded.first_rows(16)
    assert few.chosen.shape == (2, 4, 16, tiny.workload.kept) and few.left_out.shape == (2, 4, 16)
    (row,) = run_one(topk_providers.BY_NAME["dense"], few)
    assert row.status == "ok", row.reason


def test_dense_attention_is_a_yardstick_and_nobodys_rival():
    case = topk.build(TINY["keys"], TINY["keys"], "cpu", torch.float32)
    names = ("xattn-torch", "eager-topk", "dense")
    done = [row for name in names for row in run_one(topk_providers.BY_NAME[name], case)]
    done = [replace(row, ms=ms) for row, ms in zip(done, (4.0, 8.0, 1.0), strict=True)]
    ours, theirs = rows.best(done)
    assert (ours.provider, theirs.provider) == ("xattn-torch", "eager-topk")
    assert "2.00 eager-topk" in rows.summary(done)


def test_peak_memory_sees_the_gathered_values(tmp_path):
    w = replace(TINY["keys"], Nq=512, Dv=64)
    case = topk.build(w, w, "cpu", torch.float32)
    peak = benchmark_runs.resident_peak(case, "eager-topk", tmp_path)
    gathered = 4 * w.B * w.Hq * w.Nq * w.top_k * w.Dv
    assert gathered <= peak <= 3 * gathered


def test_the_command_writes_rows(tmp_path, capsys):
    chosen = "--workload Nk1024-k16,Nk16384-blocks64x16 --provider xattn-torch,xattn-eager"
    limits = f"--dense-gflop 0.1 --budget-seconds 60 --no-memory --device cpu --out {tmp_path}"
    assert main(["topk", *chosen.split(), *limits.split()]) == 0
    done = rows.load(tmp_path / "topk-float32.csv")
    assert [r.mode for r in done] == ["forward"] * 2 + ["both"] * 2 + ["forward"] * 2 + ["both"] * 2
    assert all(r.status == "ok" for r in done)
    assert "Nk1024-k16[B=2->" in capsys.readouterr().out


@pytest.mark.parametrize("kind", topk_error.KINDS)
def test_the_error_falls_as_more_is_kept_and_is_that_of_dense_attention_without_the_rest(kind):
    q, k, v = (t.double() for t in topk_error.inputs(kind, 256, torch.device("cpu")))
    scores = q @ k.mT * topk_error.D**-0.5
    found = topk_error.rows(kind, 256, torch.device("cpu"))
    by_key = [r for r in found if r.way == "keys"]
    assert [r.kept for r in by_key] == [16, 64, 128] and len(found) == 5
    for r in by_key:
        kept = scores >= scores.topk(r.kept).values[..., -1:]
        sparse = scores.masked_fill(~kept, float("-inf")).softmax(-1) @ v
        dense = scores.softmax(-1) @ v
        assert r.mass == pytest.approx((scores.softmax(-1) * kept).sum(-1).mean().item(), rel=1e-4)
        assert r.error == pytest.approx(((sparse - dense).norm() / dense.norm()).item(), rel=1e-4)
    for way in ("keys", "blocks"):
        line = [r for r in found if r.way == way]
        assert sorted(line, key=lambda r: r.kept) == sorted(line, key=lambda r: -r.error)


def test_neighbours_are_alike_in_regions_alone():
    def likeness(kind: str) -> float:
        _, k, _ = topk_error.inputs(kind, 1024, torch.device("cpu"))
        return float((k[:, :, 1:] * k[:, :, :-1]).mean())

    assert abs(likeness("normal")) < 0.01 and abs(likeness("peaked")) < 0.01
    assert likeness("regions") == pytest.approx(0.81 * 63 / 64, abs=0.08)
