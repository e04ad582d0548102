"""`topk_attention`: the choice, values and gradients of every backend, and what it keeps."""

from __future__ import annotations

import math

import pytest
import torch

from support.calls import run
from support.cases import Case
from support.largest_tensor import LargestTensor
from support.modes import each_compiled_mode, enter_backend, modes
from support.numerics import assert_as_accurate
from support.topk_cases import CASES, assert_right, case, topk_call
from xattn_kernels import KeyInterval, cross_attention, reference, topk_attention

QUICK = ("plain", "one", "many_keys", "mask_empty_rows", "ties", "everything")


@pytest.fixture(params=["kept", "recomputed"])
def scores_are(request, monkeypatch):
    """Scores in registers, or computed again in every step, as in rows too long to keep."""
    pytest.importorskip("triton")
    if request.param == "recomputed":
        from xattn_kernels.triton_kernels import configs

        monkeypatch.setattr(configs, "KEPT_TILES", ())
    return request.param


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_kernels(name, backend, dtype):
    assert_right(*case(name), backend, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_triton(mode, name):
    assert_right(*case(name), "triton", torch.float32, mode.device)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("name", QUICK)
def test_triton_of_long_rows(mode, name, scores_are):
    assert_right(*case(name), "triton", torch.float16, mode.device)


@each_compiled_mode
@pytest.mark.parametrize("name", CASES)
def test_compiled(mode, name):
    assert_right(*case(name, D=32), "triton", mode.dtypes[0], mode.device)


@each_compiled_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", QUICK)
def test_compiled_of_long_rows(mode, name, dtype, scores_are):
    assert_right(*case(name, D=32), "triton", dtype, mode.device)


@pytest.fixture(params=["torch", "eager", *modes("interpreter", "sm_90", "gpu")])
def backend(request):
    """(backend, device)."""
    with enter_backend(request.param) as found:
        yield found


def quantised(device: str, Nq=5, Nk=70):
    """Small integers, whose scores are exact in float32 and equal by the dozen."""
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 2, Nq, 16), (2, 2, Nk, 16), (2, 2, Nk, 16))
    return [torch.randint(-1, 2, s, generator=g).to(device, torch.float16) for s in shapes]


@pytest.mark.parametrize("top_k", [1, 8, 33])
def test_lower_keys_win_ties(backend, top_k, scores_are):
    name, device = backend
    q, k, v = quantised(device)
    q[:, :, 0], k[:, :, 40:] = 0, k[:, :, :30].clone()
    mask = KeyInterval(*torch.tensor([3, 69], dtype=torch.int32, device=device))
    found = topk_attention(
        q, k, v, top_k, mask=mask, scale=0.5, return_indices=True, backend=name
    ).indices
    s = 0.5 * q.double() @ k.double().mT
    s[..., :3], s[..., 69:] = -math.inf, -math.inf
    assert torch.equal(found, reference.top_indices(s, top_k).int())
    assert torch.equal(found[:, :, 0, 0].unique(), torch.tensor([3], device=device))


@pytest.mark.parametrize("factor", [2.0**61, 2.0**-70])
def test_scores_at_the_limits_of_float32(backend, factor, scores_are):
    """Squares of scores overflow, or scores are subnormal: no guess is of use."""
    name, device = backend
    q, k, v = (t.float() for t in quantised(device))
    options = dict(scale=1.0, return_indices=True, backend=name)
    found = topk_attention(q * factor, k * factor, v, 9, **options).indices
    assert torch.equal(found, reference.top_indices(q.double() @ k.double().mT, 9).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_only_key_gives_its_value(backend, dtype):
    name, device = backend
    q, k, v = (torch.randn(2, 2, n, 16, device=device, dtype=dtype) for n in (5, 40, 40))
    found = topk_attention(q, k, v, 1, return_indices=True, return_lse=True, backend=name)
    value = v.gather(2, found.indices.long().expand(-1, -1, -1, 16))
    if dtype == torch.float16:
        assert torch.equal(found.out, value)
    torch.testing.assert_close(found.out, value)
    eager, truth = ((q @ k.mT / 4).float().amax(-1), (q.double() @ k.double().mT / 4).amax(-1))
    assert_as_accurate(found.lse, eager, truth, "lse", rounded_to=dtype)


@pytest.mark.parametrize("top_k", [40, 1000])
def test_all_keys_are_cross_attention(backend, top_k):
    name, device = backend
    q, k, v = (torch.randn(2, 2, n, 16, device=device) for n in (5, 40, 40))
    mask = KeyInterval(*torch.tensor([3, 30], dtype=torch.int32, device=device))
    found = topk_attention(q, k, v, top_k, mask=mask, return_indices=True, backend=name)
    dense = cross_attention(q, k, v, mask=mask, backend="triton" if name == "triton" else "eager")
    if name == "torch":
        torch.testing.assert_close(found.out, dense)
    else:
        assert torch.equal(found.out, dense)
    keys = torch.full((top_k,), -1, dtype=torch.int32, device=device)
    keys[:27] = torch.arange(3, 30)
    assert torch.equal(found.indices, keys.expand_as(found.indices))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_what_is_not_finite_makes_its_rows_nan(backend, bad, where, scores_are):
    """Whoever sees it is NaN, and no index is out of bounds."""
    name, device = backend
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn((1, 1, n, 16), generator=g).to(device) for n in (6, 70, 70))
    seen = torch.ones(6, dtype=torch.bool, device=device)
    if where == "q":
        q[:, :, 2, 3] = bad
        seen = torch.arange(6, device=device) == 2
    else:
        k[:, :, 50, 3] = bad
        seen = torch.arange(6, device=device) < 3
        if math.isinf(bad):  # the score is -inf where q is negative: a key that is not allowed
            seen = seen & (q[0, 0, :, 3] > 0)
    stop = torch.full((1, 6), 70, dtype=torch.int32, device=device)
    if where == "k":
        stop[:, 3:] = 50
    mask = KeyInterval(torch.zeros_like(stop), stop)
    found = topk_attention(
        q, k, v, 7, mask=mask, return_lse=True, return_indices=True, backend=name
    )
    assert torch.equal(found.out[0, 0].isnan().all(-1), seen)
    assert found.out[0, 0][~seen].isfinite().all()
    assert ((found.indices >= -1) & (found.indices < 70)).all()
    assert (found.indices[0, 0][~seen] >= 0).all()


@pytest.mark.parametrize("Nk, top_k", [(300, 2), (300, 20), (40, 3), (70, 64)])
def test_the_saved_choice_is_small(backend, Nk, top_k):
    """At most min(Nk / 8, 4 top_k) + 64 bytes of each row and head."""
    name, device = backend
    if name == "eager":
        pytest.skip("the equations keep the matrix of scores")
    q, k, v = (torch.randn(1, 2, n, 16, device=device, requires_grad=True) for n in (6, Nk, Nk))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        topk_attention(q, k, v, top_k, backend=name)
    choice = [t for t in saved if t.dtype == torch.int32]
    limit = min(Nk / 8, 4 * top_k) + 64 if name == "triton" else 4 * top_k
    assert len(choice) == 1 and choice[0].nbytes <= limit * 2 * 6
    others = [t for t in saved if t.dtype != torch.int32]
    assert max(t.nbytes for t in others) <= max(q.nbytes, k.nbytes)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("Nk, top_k", [(600, 4), (600, 40)])
def test_no_score_is_stored(mode, Nk, top_k):
    """No tensor that is made, in either direction, has as many numbers as there are scores."""
    q, k, v = (
        torch.randn(1, 1, n, 16, device=mode.device, requires_grad=True) for n in (64, Nk, Nk)
    )
    with LargestTensor() as largest:
        out = topk_attention(q, k, v, top_k, backend="triton")
        out.sum().backward()
    assert largest.nbytes < 64 * Nk * 2


@pytest.mark.parametrize("mask", ["padding", "padding_left"])
@pytest.mark.parametrize("Nq", [6, 70])
def test_padding_may_hold_anything(backend, Nq, mask):
    """Keys and values that no query sees: results are those beside zeros, bit for bit."""
    name, device = backend
    c = Case("topk_garbage", B=2, Hq=1, Hkv=1, Nq=Nq, Nk=75, D=32, mask=mask)
    found = []
    for fill in (0.0, math.nan):
        call = topk_call(c, 7, torch.float16, device)
        unseen = ~call.options["mask"].dense(c.Nk).any(1)
        assert unseen.any()
        with torch.no_grad():
            for n in "kv":
                call.leaves[n].transpose(0, 1)[:, unseen.expand(c.B, -1)] = fill
        found.append(run(call, name))
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())


@pytest.mark.parametrize("mode", modes("interpreter", "sm_80", "gpu"), indirect=True)
def test_saved_indices_become_bits_again(mode):
    from xattn_kernels.triton_kernels.topk_selection import to_bits, to_indices

    g = torch.Generator().manual_seed(5)
    chosen = torch.rand((2, 2, 9, 100), generator=g) < 0.2
    chosen[:, :, 3] = False
    words = torch.nn.functional.pad(chosen, (0, 28)).unflatten(-1, (4, 32)).long()
    bits = (words << torch.arange(32)).sum(-1).to(mode.device, torch.int32)
    indices = to_indices(bits, 100, 40)
    assert torch.equal((indices >= 0).sum(-1), chosen.sum(-1).to(mode.device))
    assert torch.equal(to_bits(indices, 100), bits)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
def test_two_runs_are_bitwise_equal(mode):
    c, top_k = case("everything")
    call = topk_call(c, top_k, mode.dtypes[1], mode.device)
    results = []
    for _ in range(2):
        found = call.op(**call.leaves, **call.options, backend="triton")
        grads = torch.autograd.grad(found.out, list(call.leaves.values()), call.upstream["out"])
        results.append([found.out, found.lse, found.indices, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
@pytest.mark.parametrize("name", ["few_of_many_keys", "plain", "mask_all_empty", "mask_padding"])
def test_every_output_is_written(mode, name):
    from fuzz.judge import poisoned

    with poisoned():
        assert_right(*case(name), "triton", mode.dtypes[1], mode.device)


def test_the_backward_takes_the_keys_of_the_forward(backend):
    """Not those of its own scores: k changes in between, behind autograd's back."""
    name, device = backend
    if name == "eager":
        pytest.skip("autograd keeps the scores themselves")
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((1, 1, n, 16), generator=g).to(device) for n in (4, 70, 70))
    v.requires_grad_()
    found = topk_attention(q, k, v, 3, return_indices=True, backend=name)
    k.data.neg_()
    dv = torch.autograd.grad(found.out.sum(), v)[0]
    touched = dv[0, 0].abs().amax(-1).nonzero().flatten()
    assert set(touched.tolist()) <= set(found.indices.flatten().tolist())


@pytest.mark.parametrize(
    "top_k, error", [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_top_k_is_a_positive_int(top_k, error):
    q = torch.randn(1, 1, 3, 16)
    with pytest.raises(error, match="top_k must be an int >= 1, got"):
        topk_attention(q, q, q, top_k)
