"""Zeros that are exact, garbage that must not leak, memory that must be written, dropout's bits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from support.calls import build, run, written_out
from support.cases import Case
from support.modes import modes
from xattn_kernels import KeyInterval, cross_attention
from xattn_kernels.reference import philox_keep

BASE = dict(B=2, Hq=2, Hkv=2, Nk=75, D=32)
# few and many rows; tiles that are whole, and nothing but out: two loops in 16 bit
ONE_HEAD = dict(B=1, Hq=1, Hkv=1)
SIZES = {
    "short": dict(Nq=6),
    "long": dict(Nq=70),
    "out": dict(Nq=70, Nk=150, returns="out", **ONE_HEAD),
}
each_size = pytest.mark.parametrize(
    "size",
    [pytest.param(s, marks=[pytest.mark.slow] * (n == "out"), id=n) for n, s in SIZES.items()],
)
each_length = pytest.mark.parametrize("Nq", [6, 70], ids=["short", "long"])


def visible(c: Case, mask) -> torch.Tensor:
    """bool [B, Nq, Nk]."""
    return mask.dense(c.Nk).expand(c.B, c.Nq, c.Nk)


def assert_exact_zeros(found: dict, seen: torch.Tensor) -> None:
    empty, unseen = ~seen.any(2), ~seen.any(1)
    assert empty.any() or unseen.any()
    expected = {"out": 0.0, "lse": -math.inf, "entropy": 0.0, "max_probability": 0.0, "dq": 0.0}
    for name in expected.keys() & found.keys():
        rows = found[name].transpose(0, 1)[:, empty]
        assert (rows == expected[name]).all(), f"{name} of a row without keys"
    for name in ("dk", "dv"):
        assert (found[name].transpose(0, 1)[:, unseen] == 0).all(), f"{name} of a key nobody sees"


@pytest.mark.taking_turns
@each_size
@pytest.mark.parametrize(
    "mask", ["empty_rows", "unsorted", "empty_batch", "all_empty", "both_ends"]
)
def test_empty_rows_and_unseen_keys(mode, mask, size):
    c = Case(f"zeros_{mask}", mask=mask, **mode.sizes | size)
    call = written_out(build(c, mode.dtypes[0], mode.device))
    assert_exact_zeros(run(call, "triton"), visible(c, call.options["mask"]))


@each_length
@pytest.mark.parametrize("mask", ["empty_rows", "unsorted", "all_empty", "both_ends"])
@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_empty_rows_and_unseen_keys_elsewhere(backend, mask, Nq):
    c = Case(f"zeros_{mask}", mask=mask, Nq=Nq, returns="out", **BASE)
    call = build(c, torch.float32)
    assert_exact_zeros(run(call, backend), visible(c, call.options["mask"]))


GARBAGE = ["padding", "padding_left", "same_for_all", "all_empty", "empty_batch"]


def assert_garbage_stays_out(c: Case, backend: str, dtype: torch.dtype, device: str, value: float):
    """K and V hold `value` beyond every interval; the call must not notice."""
    clean, dirty = (written_out(build(c, dtype, device)) for _ in range(2))
    unseen = ~visible(c, clean.options["mask"]).any(1)
    assert unseen.any()
    with torch.no_grad():
        for name in ("k", "v"):
            for call, fill in ((clean, 0.0), (dirty, value)):
                call.leaves[name].transpose(0, 1)[:, unseen] = fill
    expected = run(clean, backend)
    for name, t in run(dirty, backend).items():
        assert torch.equal(t, expected[name]), name


@pytest.mark.taking_turns
@each_size
@pytest.mark.parametrize(
    ("mask", "value", "bias"),
    [
        *((m, math.nan, None) for m in GARBAGE),
        ("padding", math.inf, None),
        ("padding_left", math.nan, "BHQK"),
    ],
)
def test_padding_may_hold_anything(mode, mask, value, bias, size):
    c = Case(f"garbage_{mask}", mask=mask, bias=bias, **mode.sizes | size)
    assert_garbage_stays_out(c, "triton", mode.dtypes[0], mode.device, value)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@each_size
def test_intervals_beyond_the_keys_are_clamped(mode, size, monkeypatch):
    """By the kernels: tensors on a GPU are not looked at before."""
    monkeypatch.setattr(KeyInterval, "check", lambda self, Nk: None)
    c = Case("beyond", mask="same_for_all", **mode.sizes | size)
    call = build(c, mode.dtypes["returns" not in size], mode.device)
    found = []
    for start, stop in ((0, c.Nk), (-3, c.Nk + 5)):
        bounds = torch.tensor([start, stop], dtype=torch.int32, device=mode.device)
        call.options["mask"] = KeyInterval(*bounds)
        found.append(run(written_out(call), "triton"))
    for name, t in found[0].items():
        assert torch.equal(t, found[1][name]), name


@each_length
@pytest.mark.parametrize("mask", GARBAGE)
def test_padding_may_hold_anything_in_torch(mask, Nq):
    c = Case(f"garbage_{mask}", mask=mask, Nq=Nq, returns="out", **BASE)
    assert_garbage_stays_out(c, "torch", torch.float32, "cpu", math.nan)


@each_length
@pytest.mark.parametrize("mask", ["empty_rows", "bool_empty_rows"])
@pytest.mark.parametrize("where", ["out", "v"])
def test_what_is_not_finite_stays_out_of_rows_without_keys(mode, mask, where, Nq):
    """A NaN that arrives at such a row, or an infinite value beside it, leaves its dq zero."""
    c = Case(f"not_finite_{mask}", **mode.sizes | dict(mask=mask, Nq=Nq, returns="out"))
    call = written_out(build(c, mode.dtypes[0], mode.device))
    allowed = call.options["mask"]
    seen = allowed if isinstance(allowed, torch.Tensor) else visible(c, allowed)[:, None]
    empty = ~seen.expand(c.B, c.Hq, Nq, c.Nk).any(3)
    assert empty.any() and not empty.all()
    with torch.no_grad():
        if where == "out":
            call.upstream["out"][empty] = math.nan
        else:
            call.leaves["v"][:, :, 1, 3] = math.inf
    ours, eager = run(call, "triton"), run(call, "eager")
    assert (ours["dq"][empty] == 0).all()
    if where == "out":  # sums of inf are NaN in any order
        for name in ("dq", "dk"):  # dv has 0 * NaN, for more or fewer keys as tiles fall
            assert torch.equal(ours[name].isnan(), eager[name].isnan()), name


@pytest.mark.parametrize("mode", modes("interpreter", "sm_80", "gpu"), indirect=True)
@each_length
@pytest.mark.parametrize("mask", ["nonempty", "causal"])
def test_an_infinite_gradient_stays_within_its_interval(mode, mask, Nq):
    """Beyond it dv alone may be 0 * inf, as far as tiles reach."""
    c = Case("infinite_dout", Nq=Nq, mask=mask, returns="out", **mode.sizes)
    call, row = build(c, mode.dtypes[0], mode.device), Nq // 2
    call.upstream["out"][:, :, row] = math.inf
    ours = run(call, "triton")
    assert ours["out"].isfinite().all()
    finite = ours["dq"].isfinite().all((0, 1, 3))
    assert finite.sum() == Nq - 1 and not finite[row]
    seen = visible(c, call.options["mask"])[:, None, row]
    assert not seen.all()
    assert torch.equal(~ours["dk"].isfinite().all(3), seen.expand(ours["dk"].shape[:3]))


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@each_length
def test_a_row_whose_scores_are_all_minus_infinity_has_no_gradient(mode, Nq):
    """No mask says so, and its infinite lse hands a NaN back."""
    c = Case("minus_infinity", Nq=Nq, returns="lse", **mode.sizes)
    call = build(c, mode.dtypes[1], mode.device)
    with torch.no_grad():
        call.leaves["q"][:, :, 2, 0], call.leaves["k"][..., 0] = math.inf, -1.0
        call.upstream["lse"][:, :, 2] = math.nan
    ours = run(call, "triton")
    assert (ours["out"][:, :, 2] == 0).all() and (ours["lse"][:, :, 2] == -math.inf).all()
    assert (ours["dq"][:, :, 2] == 0).all()


@pytest.fixture
def poison():
    """torch.empty and its kin give NaN, and integers their largest value."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.taking_turns
@pytest.mark.slow
@each_length
@pytest.mark.parametrize(
    "flags",
    [
        {},
        dict(mask="unsorted", bias="B11K", scale=(0.3,), dropout_p=0.3, softcap=2.0),
        dict(mask="all_empty", bias="BHQK"),
        dict(mask="blocks", D=23, Dv=9, layout="BNHD"),
    ],
    ids=["plain", "flags", "empty", "blocks"],
)
@pytest.mark.parametrize("splits", [1, 3])
def test_every_output_is_written(mode, poison, flags, splits, Nq, force_splits):
    """Nothing that a launcher returns is memory as it was found, also from a buffer of parts."""
    force_splits(splits)
    c = Case("poison", **mode.sizes | dict(Nq=Nq) | flags)
    for name, t in run(written_out(build(c, mode.dtypes[0], mode.device)), "triton").items():
        bad = t.isnan() if name == "lse" else ~t.isfinite()
        assert not bad.any(), f"{name}: {int(bad.sum())} of {bad.numel()} values not written"


@pytest.mark.parametrize(
    ("seed", "p"), [(0, 0.25), (12345678901234, 0.9), (-1, 0.25), (2**63 - 1, 0.9)]
)
def test_dropout_keeps_what_the_reference_keeps(mode, p, seed):
    """With v = identity, out is the probabilities: which are 0 shows every bit."""
    B, Hq, Hkv, Nq, Nk = 2, 4, 2, 37, 40
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(B, h, n, 16, generator=g) for h, n in ((Hq, Nq), (Hkv, Nk)))
    v = torch.eye(Nk).expand(B, Hkv, Nk, Nk)
    q, k, v = (t.to(mode.device, mode.dtypes[1]) for t in (q, k, v))
    out = cross_attention(q, k, v, dropout_p=p, seed=seed, backend="triton")
    keep = philox_keep(torch.tensor(seed, device=mode.device), p, B, Hq, Nq, Nk)
    assert torch.equal(out != 0, keep)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_dropout_of_the_backward_is_that_of_the_forward(mode):
    """Where a weight is dropped, dv gets nothing from it: dout = identity shows every bit."""
    c = replace(Case("bits", **BASE), Nq=40, Nk=24, D=40, Hkv=1, dropout_p=0.5, returns="out")
    call = build(c, mode.dtypes[1], mode.device)
    call.upstream["out"] = torch.zeros_like(call.upstream["out"])
    call.upstream["out"][:, 0] = torch.eye(40, dtype=mode.dtypes[1], device=mode.device)
    dv = run(call, "triton")["dv"]
    seed = torch.tensor(call.options["seed"], device=mode.device)
    keep = philox_keep(seed, 0.5, c.B, c.Hq, c.Nq, c.Nk)[:, :1]
    assert torch.equal(dv != 0, keep.mT)
