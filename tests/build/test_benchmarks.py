"""The benchmarks: counts by brute force, no time for wrong results, rows, scaling, commands."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.attention import (
    case,
    document,
    workloads,
)
from benchmarks.attention import (
    truth as check,
)
from benchmarks.attention.case import Case
from benchmarks.attention.providers import BY_NAME, Provider, prepare_eager
from benchmarks.attention.workloads import Workload, fit
from benchmarks.harness import (
    rows,
    runner,
    timing,
)
from support.benchmark_runs import resident_peak
from xattn_kernels import KeyInterval

ALL = workloads.load()
TINY = Workload("tiny", B=2, Nq=12, Nk=24, Hq=4, Hkv=2, D=8, Dv=16, mask="none", regime="test")
MASKED = {
    "none": TINY,
    "padding": replace(TINY, mask="padding"),
    "packed": replace(TINY, mask="packed", segments=4),
    "media_last": replace(TINY, mask="media_last", tokens_per_media=8, empty_rows=2),
}
TINY_GFLOP = "0.002"


@pytest.fixture(params=MASKED)
def tiny(request) -> Case:
    return case.build(MASKED[request.param], MASKED[request.param], "cpu", torch.float32)


def dense(c: Case) -> torch.Tensor:
    """bool [B, Nq, Nk] of a case, from its interval."""
    w = c.workload
    if c.interval is None:
        return torch.ones(w.B, w.Nq, w.Nk, dtype=torch.bool)
    return c.interval.dense(w.Nk).expand(w.B, w.Nq, w.Nk)


def run_one(provider: Provider, c: Case, modes=("both",), **settings) -> list[rows.Row]:
    chosen = runner.Settings(modes=modes, budget=120.0, memory=False, **settings)
    return [
        row for group in runner.run([c], 1, [provider], chosen, check.truth_of) for row in group
    ]


def test_flops_are_those_of_the_attended_pairs(tiny):
    w, pairs = tiny.workload, int(dense(tiny).sum()) * tiny.workload.Hq
    products = {"forward": (w.D, w.Dv), "backward": (w.D, w.Dv, w.Dv, w.D, w.D)}
    for mode, widths in products.items():
        assert tiny.flops(mode) == 2 * pairs * sum(widths)
    assert tiny.flops("both") == tiny.flops("forward") + tiny.flops("backward")


def test_flops_with_equal_widths_are_the_usual_formula():
    w = replace(TINY, Dv=TINY.D)
    assert w.dense_flops == 4 * w.B * w.Hq * w.Nq * w.Nk * w.D
    assert workloads.flops(w, None, "forward") == w.dense_flops
    assert workloads.flops(w, None, "backward") == 2.5 * w.dense_flops


def test_bytes_count_only_keys_that_some_row_attends_to(tiny):
    w, seen = tiny.workload, dense(tiny).any(1).sum().item()
    assert workloads.attended_keys(w, tiny.interval) == seen
    q, out = w.B * w.Hq * w.Nq * w.D, w.B * w.Hq * w.Nq * w.Dv
    forward = q + w.Hkv * seen * (w.D + w.Dv) + out
    assert tiny.min_bytes("forward") == 4 * forward
    gradients = q + w.B * w.Hkv * w.Nk * (w.D + w.Dv)
    assert tiny.min_bytes("backward") == 4 * (forward + out + gradients)


@pytest.mark.parametrize("name", ALL)
def test_every_workload_builds_at_a_small_size_and_shows_it(name):
    original = ALL[name]
    w = fit(original, dense_flops=2e7)
    assert w.dense_flops <= 2e7
    assert (w.D, w.Dv, w.Hq // w.Hkv) == (original.D, original.Dv, original.Hq // original.Hkv)
    c = case.build(w, original, "cpu", torch.bfloat16)
    assert 0 < c.flops("forward") <= w.dense_flops
    for size in workloads.SHAPE:
        before, after = getattr(original, size), getattr(w, size)
        assert (f"{size}={before}->{after}" in c.label) == (before != after)


def test_a_workload_that_fits_keeps_its_size_and_name():
    w = ALL["flamingo-32shot"]
    assert fit(w, 1e10) is w and w.label(w) == "flamingo-32shot"
    train = fit(ALL["flamingo-train"], 1e10)
    assert train.label(ALL["flamingo-train"]) == "flamingo-train[B=8->2]"


def test_the_same_seed_builds_the_same_case():
    a, b, other = (case.build(TINY, TINY, "cpu", torch.float32, seed) for seed in (1, 1, 2))
    assert torch.equal(a.q, b.q) and not torch.equal(a.q, other.q)


def test_mask_mod_dense_mask_and_segments_say_the_same(tiny):
    expected, w = dense(tiny), tiny.workload
    if tiny.interval is not None:
        assert torch.equal(tiny.dense_mask().expand(w.B, 1, w.Nq, w.Nk)[:, 0], expected)
        b, i, j = (torch.arange(n) for n in (w.B, w.Nq, w.Nk))
        by_mod = tiny.mask_mod()(b[:, None, None], 0, i[:, None], j)
        assert torch.equal(by_mod.expand_as(expected), expected)
        empty = tiny.empty_rows()
        assert (0 if empty is None else int(empty.expand(w.B, 1, w.Nq, 1).sum())) == int(
            (~expected.any(2)).sum()
        )
    flat = torch.zeros(w.B * w.Nq, w.B * w.Nk, dtype=torch.bool)
    cu_q, cu_k = tiny.segments.cu_q.tolist(), tiny.segments.cu_k.tolist()
    for s in range(len(cu_q) - 1):
        flat[cu_q[s] : cu_q[s + 1], cu_k[s] : cu_k[s + 1]] = True
    assert torch.equal(flat, torch.block_diag(*expected.int()).bool())
    assert (cu_q[-1], cu_k[-1]) == (w.B * w.Nq, w.B * w.Nk)


def test_overlapping_intervals_are_no_segments():
    start, stop = torch.tensor([0, 4, 2]).int(), torch.tensor([4, 8, 6]).int()
    c = case.build(replace(TINY, Nq=3), TINY, "cpu", torch.float32)
    assert replace(c, interval=KeyInterval(start, stop)).segments is None


ON_CPU = [
    "eager",
    "sdpa-math",
    "sdpa-flash",
    "xattn-eager",
    "xattn-torch",
    "xattn-mha",
    "torch-mha",
]


@pytest.mark.parametrize("name", ON_CPU)
def test_providers_on_a_cpu_are_right_where_they_can(name, tiny, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # what a CPU without it would take
    monkeypatch.delenv("XATTN_TRITON_ON_CPU", raising=False)
    w = replace(tiny.workload, Dv=tiny.workload.D, Hkv=tiny.workload.Hq)
    plain = case.build(w, w, "cpu", torch.float32)
    nan_rows = name == "torch-mha" and plain.empty_rows() is not None
    for row in run_one(BY_NAME[name], plain, ("forward", "backward", "both")):
        if nan_rows:
            assert row.status == "wrong" and "nan" in row.reason
            continue
        assert row.status == "ok" and row.ms > 0 and row.error_share <= 1, row.reason
        assert row.repeats >= timing.FEWEST
        assert row.tflops == pytest.approx(row.flops / row.ms / 1e9)
    for row in run_one(BY_NAME[name], tiny):  # grouped heads, D != Dv
        limited = name.endswith("mha") or name == "sdpa-flash"
        assert row.status == ("unsupported" if limited else "ok") and (row.ms is None) == limited


def spoiled(spoil) -> Provider:
    """Eager attention whose result goes through `spoil(out, q)`."""

    def prepare(c: Case):
        attend = prepare_eager(c)
        return lambda q, k, v: spoil(attend(q, k, v), q)

    return Provider("spoiled", lambda c, mode: [], prepare)


def nan_somewhere(out, q):
    return torch.where(torch.arange(out.shape[2])[:, None] == 3, float("nan"), out)


WRONG = {
    "out: error": lambda out, q: out * 1.001,
    "out has inf or nan": nan_somewhere,
    "out has shape": lambda out, q: out[:, :, :-1],
    "dq: error": lambda out, q: out + 1e-3 * (q - q.detach()).sum(-1, keepdim=True),
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_wrong_result_gets_no_time(reason, tiny):
    mode = "forward" if "shape" in reason else "both"
    (row,) = run_one(spoiled(WRONG[reason]), tiny, (mode,))
    assert row.status == "wrong" and row.reason.startswith(reason)
    assert row.ms is row.tflops is row.peak_mib is row.percent_of_product is None


def test_an_error_and_a_slow_first_call_become_rows(tiny):
    def fail(out, q):
        raise RuntimeError("no such kernel\nand a long trace")

    def sleep(out, q):
        time.sleep(5)

    (row,) = run_one(spoiled(fail), tiny)
    assert (row.status, row.reason) == ("error", "RuntimeError: no such kernel")
    (row,) = run_one(spoiled(sleep), tiny, first_call=0.2)
    assert row.status == "error" and "longer than" in row.reason


def test_reasons_and_a_spent_budget_become_rows(tiny):
    (row,) = run_one(replace(BY_NAME["eager"], reasons=lambda c, mode: ["no", "never"]), tiny)
    assert (row.status, row.reason, row.ms) == ("unsupported", "no; never", None)
    settings = runner.Settings(modes=("both",), budget=0.0)
    ((row,),) = runner.run([tiny], 1, [BY_NAME["eager"]], settings, check.truth_of)
    assert row.status == "skipped" and row.ms is None


def test_the_truth_in_pieces_is_the_truth(tiny, monkeypatch):
    whole = check.truth_of(tiny, gradients=True)
    monkeypatch.setitem(check.CHUNK, "cpu", 1)
    for a, b in zip(whole.truth, check.truth_of(tiny, gradients=True).truth, strict=True):
        torch.testing.assert_close(a, b)


def test_peak_memory_sees_what_a_provider_allocates(tmp_path):
    w = replace(TINY, Nq=1024, Nk=1024)
    scores = 4 * w.B * w.Hq * w.Nq * w.Nk
    peak = resident_peak(case.build(w, w, "cpu", torch.float32), "eager", tmp_path)
    assert 2 * scores <= peak <= 8 * scores


def test_rows_survive_csv_and_json(tmp_path, tiny):
    done = run_one(BY_NAME["eager"], tiny) + run_one(spoiled(WRONG["out: error"]), tiny)
    paths = rows.save(done, tmp_path, "set")
    assert [rows.load(path) for path in paths] == [done, done]
    assert paths[1].read_text().splitlines()[0] == ",".join(rows.COLUMNS)
    assert all(row.device and row.torch and row.triton and row.commit and row.date for row in done)


def test_tables_fit_a_terminal(tiny):
    long = replace(tiny, original=replace(TINY, B=64, Nq=4096, Nk=100230, Hq=64, Hkv=32))
    done = run_one(BY_NAME["eager"], long, ("forward", "both"))
    done.append(replace(done[0], provider="xattn-torch"))
    done.append(replace(done[0], provider="x", status="skipped"))
    text = rows.table(done) + "\n" + rows.summary(done)
    assert max(map(len, text.splitlines())) <= 100
    assert "1.00" in rows.summary(done[:1] + done[2:3])


def test_the_document_is_the_same_each_time_and_images_stand_at_lines():
    w = fit(ALL["flamingo-train"], 1e8)
    a, b = (document.build(w, w, "cpu", torch.float32) for _ in range(2))
    assert torch.equal(a.k, b.k) and torch.equal(a.interval.start, b.interval.start)
    _, starts = document.text(w.B, w.Nq)
    places = document.image_places(w, starts)
    assert (places.diff() > 0).all() and (places >= w.empty_rows).all()
    changes = dense(a).int().diff(dim=1).abs().sum(2).nonzero()[:, 1] + 1
    assert sorted(changes.tolist()) == sorted(places[places > 0].tolist())
    assert a.empty_rows() is not None and a.q.std() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("task", ["run", "main"])
def test_the_command_writes_rows_and_plots(task, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    chosen = f"--workload openflamingo-mmc4 --provider eager,sdpa-flash --dense-gflop {TINY_GFLOP}"
    limits = f"--budget-seconds 120 --no-memory --device cpu --out {tmp_path} --name set"
    assert main([task, *chosen.split(), *limits.split()]) == 0
    done = rows.load(tmp_path / "set.csv")
    assert [(r.provider, r.mode) for r in done] == [
        (p, mode) for mode in ("forward", "both") for p in ("eager", "sdpa-flash")
    ]
    assert all(r.status == "ok" and "openflamingo-mmc4[B=8->" in r.workload for r in done)
    assert (tmp_path / "set-time.png").exists() and (tmp_path / "set-flops.png").exists()
    assert "openflamingo-mmc4[B=8->" in capsys.readouterr().out


def test_an_unknown_name_ends_with_what_there_is():
    with pytest.raises(SystemExit, match="unknown provider nobody; there are xattn-triton"):
        main(["run", "--provider", "nobody"])
