"""Cross-attention in CUDA C++, emulated or on a GPU: the cases of the Triton kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ops.test_cross_attention_values import assert_exact_zeros, visible
from support.calls import assert_agrees, assert_right, build, run, written_out
from support.cases import CASES, Case
from support.cuda_emulation import splits_of
from support.modes import case_params, modes, needs_extension
from xattn_kernels import KeyInterval, cross_attention
from xattn_kernels.cuda_kernels import cross_attention as launcher
from xattn_kernels.cuda_kernels import launch
from xattn_kernels.ops.cross_attention import cuda_reasons
from xattn_kernels.reference import philox_keep

pytestmark = needs_extension
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# An instruction has the same meaning on each: one architecture for a dtype compiles half as much.
ARCH_OF = {torch.float16: "sm_80", torch.bfloat16: "sm_90", torch.float32: "sm_80"}
emulated = pytest.mark.parametrize("mode", modes("cuda_sm_80", "cuda_gpu"), indirect=True)
on_both = pytest.mark.parametrize(
    "mode", modes("cuda_sm_80", "cuda_sm_90", "cuda_gpu"), indirect=True
)
SPLIT = dict(B=1, Hq=1, Hkv=1, Nk=700, D=32)


def everywhere() -> list:
    """(mode, case, dtype): each case emulated in one dtype, on a GPU in all."""
    found = []
    for n, case in enumerate(CASES):
        dtype = DTYPES[n % 3]
        found.append((f"cuda_{ARCH_OF[dtype]}", case, dtype, [pytest.mark.emulated]))
        found += [("cuda_gpu", case, dtype, [pytest.mark.gpu]) for dtype in DTYPES]
    return case_params(found)


@pytest.mark.parametrize(("mode", "case", "dtype"), everywhere(), indirect=["mode"])
def test_cuda(mode, case, dtype):
    assert cuda_reasons(build(case, dtype, mode.device).inputs()) == []
    assert_right(case, "cuda", dtype, mode.device)


@on_both
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("flags", [False, True], ids=["plain", "flags"])
def test_dtypes(mode, dtype, flags):
    """Many tiles of both kinds of kernels, in every dtype on every architecture."""
    more = dict(bias="1H1K", softcap=3.0, dropout_p=0.2) if flags else dict(returns="lse")
    case = Case("cuda_dtypes", mask="unsorted", B=2, Hq=4, Hkv=2, Nq=37, Nk=150, D=40, **more)
    assert_right(case, "cuda", dtype, mode.device)


@pytest.fixture
def force_splits(monkeypatch):
    """A function that sets how many blocks share each loop."""

    return lambda n: monkeypatch.setattr(launch, "splits", splits_of(n))


SPLITS = {
    "plain": dict(Nq=5, returns="lse"),
    "masked": dict(Nq=9, mask="empty_rows"),
    "statistics": dict(Nq=6, mask="unsorted", bias="1111", dropout_p=0.3),
    "far_below": dict(Nq=5, bias="B11K", values="bias_lowest_keys"),
    "low": dict(Nq=6, bias="QK", values="bias_minus_1e9"),
    "many_rows": dict(Nq=300, Nk=70, bias="B1Q1", scale=(0.3,)),
    "heads": dict(B=2, Hq=4, Hkv=2, Nq=5, Nk=150, scale=(0.3, 0.2, -0.1, 0.4)),
}


@emulated
@pytest.mark.parametrize("n", [2, 3, 40])
@pytest.mark.parametrize("name", SPLITS)
def test_splits(mode, name, n, force_splits):
    """More splits than there are tiles included."""
    force_splits(n)
    assert_right(
        Case(f"cuda_split_{name}", **SPLIT | SPLITS[name]), "cuda", DTYPES[n % 3], mode.device
    )


def test_splits_fill_the_device():
    """Few queries over many keys share them; many rows do not."""
    _cuda = launch.extension()

    def splits(B, Hq, Hkv, Nq, Nk):
        shape = _cuda.CrossAttentionShape(
            B=B, Hq=Hq, Hkv=Hkv, Nq=Nq, Nk=Nk, D=64, Dv=64, dtype=_cuda.DType.float16
        )
        call = _cuda.CrossAttentionCall(scale=1.0, keep_scale=1.0, shape=shape)
        return _cuda.cross_attention_forward_splits(call, 132)

    assert splits(1, 8, 8, 64, 16384) == 33  # 264 blocks for 8 heads
    assert splits(1, 8, 1, 1, 16384) == 64  # no split below four tiles
    assert splits(64, 16, 16, 512, 4096) == 1
    assert splits(1, 1, 1, 1, 64) == 1


@on_both
@pytest.mark.parametrize(
    "mask", ["empty_rows", "unsorted", "empty_batch", "all_empty", "both_ends"]
)
def test_empty_rows_and_unseen_keys(mode, mask):
    c = Case(f"zeros_{mask}", mask=mask, B=2, Hq=2, Hkv=2, Nq=70, Nk=75, D=32)
    call = written_out(build(c, torch.bfloat16, mode.device))
    assert_exact_zeros(run(call, "cuda"), visible(c, call.options["mask"]))


@emulated
@pytest.mark.parametrize("returns", ["out", "statistics"])
@pytest.mark.parametrize("mask", ["padding", "padding_left"])
def test_what_padding_holds(mode, mask, returns):
    """Not even NaN before the first and behind the last key that anybody sees."""
    c = Case("cuda_padding", mask=mask, B=2, Hq=4, Hkv=2, Nq=40, Nk=150, D=32, returns=returns)
    call = written_out(build(c, torch.bfloat16, mode.device))
    expected = run(call, "cuda")
    seen = visible(c, call.options["mask"]).any(1)
    assert not seen.all()
    leaves = {n: t.detach().clone() for n, t in call.leaves.items()}
    for name in ("k", "v"):
        leaves[name].transpose(1, 2)[~seen] = math.nan
        leaves[name].requires_grad_()
    leaves["q"].requires_grad_()
    found = run(replace(call, leaves=leaves), "cuda")
    for name, t in expected.items():
        assert torch.equal(found[name], t), name


@emulated
def test_nan_makes_its_row_nan(mode):
    q, k, v = (torch.randn(1, 2, n, 32, device=mode.device).bfloat16() for n in (70, 75, 75))
    q[0, 0, 3, 5] = math.nan
    out, lse, *_ = cross_attention(q, k, v, return_lse=True, backend="cuda")
    rows = torch.zeros(q.shape[:3], dtype=torch.bool, device=mode.device)
    rows[0, 0, 3] = True
    assert torch.equal(out.isnan().all(-1), rows) and torch.equal(lse.isnan(), rows)
    assert torch.equal(out.isnan().any(-1), rows)


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "softcap"])
def test_an_infinite_key_stays_out_of_rows_that_are_not_there(mode, softcap, dtype):
    """A tile of rows holds zeros behind the last one: 0 * inf would be in its dk and dv."""
    q, k, v, dout = (torch.rand(1, 1, n, 16, device=mode.device).to(dtype) for n in (5, 70, 70, 5))
    k[0, 0, 7] = -math.inf
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = cross_attention(*leaves, softcap=softcap, backend="cuda")
    _, dk, dv = torch.autograd.grad(out, leaves, dout)
    assert dk.isfinite().all() and dv.isfinite().all()


@emulated
@pytest.mark.parametrize("n", [1, 2])
def test_nan_that_others_see_stays_out_of_a_row_without_keys(mode, n, force_splits):
    force_splits(n)
    q, k, v = (torch.randn(1, 1, n, 16, device=mode.device).half() for n in (3, 300, 300))
    v[0, 0, 3] = math.nan
    stop = torch.tensor([[300, 0, 200]], dtype=torch.int32, device=mode.device)
    mask = KeyInterval(torch.zeros_like(stop), stop)
    out = cross_attention(q, k, v, mask=mask, backend="cuda")[0, 0]
    assert out[0].isnan().all() and out[2].isnan().all() and not out[1].any()


@emulated
def test_dropout_has_the_bits_of_the_reference(mode):
    """With v the identity out is what dropout keeps."""
    B, H, N = 2, 3, 40
    q = torch.zeros(B, H, 33, 16, device=mode.device, dtype=torch.float16)
    k = torch.zeros(B, H, N, 16, device=mode.device, dtype=torch.float16)
    v = torch.eye(N, device=mode.device, dtype=torch.float16).expand(B, H, N, N)
    seed = torch.tensor([2**40 + 7], device=mode.device)
    out = cross_attention(q, k, v, dropout_p=0.4, seed=seed, backend="cuda")
    assert torch.equal(out != 0, philox_keep(seed, 0.4, B, H, 33, N))


@emulated
def test_results_are_the_same_bits_each_time(mode, force_splits):
    force_splits(3)
    case = Case("cuda_again", mask="unsorted", bias="1H1K", scale=(0.2, 0.3), Nq=40, Nk=300)
    first, second = (run(build(case, torch.bfloat16, mode.device), "cuda") for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@emulated
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("mask", ["unsorted", "all_empty", "bool_BHQK"])
def test_every_output_is_written(mode, mask, n, force_splits):
    from fuzz.judge import poisoned

    force_splits(n)
    case = Case("cuda_written", mask=mask, bias="1H1K", scale=(0.2, 0.3), B=2, Hq=2, Nq=9, Nk=150)
    with poisoned():
        assert_right(case, "cuda", DTYPES[n % 2], mode.device)


@emulated
def test_bounds_outside_of_the_keys_are_clamped(mode):
    """In the launchers: the op refuses those on a CPU."""
    q, k, v = (
        torch.randn(2, 2, n, 16, device=mode.device, dtype=torch.float16) for n in (5, 70, 70)
    )
    start = torch.full((2, 5), -7, dtype=torch.int32, device=mode.device)
    stop = torch.full((2, 5), 2**31 - 1, dtype=torch.int32, device=mode.device)
    start[0, 1], stop[1, 2] = 100, -3
    results = []
    for bounds in ((start, stop), (start.clamp(0, 70), stop.clamp(0, 70))):
        call = replace(cross_attention.check(q, k, v), start=bounds[0], stop=bounds[1])
        found = launcher.forward(call)
        upstream = type(found)(found.out, None, None, None, None)
        grads = launcher.backward(upstream, call, found, ["q", "k", "v"])
        results.append([found.out, found.lse, *grads.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@emulated
def test_layout_of_the_results(mode):
    """Heads next to each other in memory where q has them so; gradients like their inputs."""
    case = Case("cuda_layout", layout="BNHD", Hq=4)
    call = build(case, torch.float16, mode.device)
    found = run(call, "cuda")
    assert found["out"].transpose(1, 2).is_contiguous()
    assert (
        found["dq"].transpose(1, 2).is_contiguous() and found["dk"].transpose(1, 2).is_contiguous()
    )
    assert_agrees(found, case, torch.float16, mode.device)


@emulated
@pytest.mark.parametrize("flags", [{}, dict(dropout_p=0.3, softcap=30.0)], ids=["plain", "flags"])
def test_a_small_scale_costs_no_precision(mode, flags):
    """It is applied to sums: ds times 2^-15 is too small for float16, dk of large q is not. By
    powers of two, so that nothing else differs."""
    case = Case("small_scale", B=1, Hq=2, Hkv=2, Nq=20, Nk=40, D=24, **flags)
    found = []
    for factor in (1.0, 1024.0):
        call = build(replace(case, scale=2.0**-5 / factor), torch.float16, mode.device)
        with torch.no_grad():
            call.leaves["q"] *= factor
        found.append(run(call, "cuda"))
    for name in ("out", "dk", "dv"):
        assert torch.equal(found[0][name], found[1][name]), name


@emulated
def test_a_gradient_may_have_any_strides(mode):
    """That of a sum is one number, expanded; columns may lie apart."""
    q, k, v = (torch.randn(2, 2, n, 16, device=mode.device).half() for n in (5, 40, 40))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = cross_attention(*leaves, backend="cuda")
    apart = torch.randn(2, 2, 16, 5, device=mode.device).half().mT
    for dout in (torch.ones_like(out[0, 0, 0, 0]).expand_as(out), apart):
        found = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        written = torch.autograd.grad(out, leaves, dout.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, written, strict=True))


@pytest.mark.parametrize("mode", modes("cuda_sm_80"), indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_no_bank_conflicts(mode, D, dtype):
    """In any kernel of the forward and the backward."""
    case = Case("conflicts", B=1, Hq=1, Hkv=1, Nq=70, Nk=130, D=D, returns="lse")
    run(build(case, dtype, mode.device), "cuda")
    assert len(mode.session.launched) >= 4
    for name, stats in mode.session.launched:
        loads, ideal_loads, stores, ideal_stores = stats.shared_wavefronts
        assert (loads, stores) == (ideal_loads, ideal_stores), name
