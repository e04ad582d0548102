"""`attention_weights` on every backend against the reference in float64, both directions."""

from dataclasses import replace

import pytest
import torch

import xattn_kernels
from support import custom_ops
from support.largest_tensor import LargestTensor
from support.modes import enter_backend, modes
from support.numerics import assert_as_accurate
from support.weights_cases import (
    CASES,
    HKV,
    HQ,
    NK,
    NQ,
    B,
    D,
    assert_case,
    assert_matches_reference,
    interval,
    make,
)
from xattn_kernels import KeyInterval, attention_weights, cross_attention, masks
from xattn_kernels.ops.attention_weights import weights_op

pytestmark = pytest.mark.usefixtures("seed")


@pytest.fixture(params=["torch", *modes("interpreter", "sm_90", "gpu")])
def backend(request):
    """ "torch", or "triton" where this process can run it; tensors are made on its device."""
    with enter_backend(request.param) as (name, device), torch.device(device):
        yield name


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("lse", [True, False], ids=["lse", "no_lse"])
@pytest.mark.parametrize("case", CASES)
def test_torch(case, lse, average):
    assert_case(case, "torch", torch.float32, lse, average)


@pytest.mark.slow
@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("lse", [True, False], ids=["lse", "no_lse"])
@pytest.mark.parametrize("case", CASES)
def test_triton(mode, case, lse):
    with torch.device(mode.device):
        assert_case(case, "triton", torch.float32, lse, average=lse)


def compiled() -> list:
    """(mode, case): one architecture each, some on both, all on a GPU."""
    found = [(("sm_80", "sm_90")[n % 2], case) for n, case in enumerate(CASES)]
    found += [("sm_90", case) for case in ("plain", "mask_and_bias")]
    found += [("sm_80", case) for case in ("interval", "everything")]
    found += [("gpu", case) for case in CASES]
    return [
        pytest.param(*modes(mode)[0].values, case, id=f"{case}-{mode}", marks=modes(mode)[0].marks)
        for mode, case in found
    ]


@pytest.mark.parametrize(("mode", "case"), compiled(), indirect=["mode"])
def test_compiled(mode, case):
    with torch.device(mode.device):
        sm_80 = mode.name == "sm_80"
        assert_case(case, "triton", mode.dtypes[0], lse=sm_80, average=not sm_80)


@pytest.mark.slow
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
def test_head_counts(heads, average, backend):
    options = {"average_heads": average}
    assert_matches_reference(make(torch.float32, *heads), options, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    assert_matches_reference(make(dtype), CASES["mask_and_bias"](), backend, dtype)


@pytest.mark.parametrize("needed", ["q", "k", "bias", "scale", "lse"])
def test_one_gradient_alone(needed, backend):
    """Each is computed also where it is the only one that is wanted."""

    def gradient(dtype, backend):
        leaves = {n: t.to(dtype) for n, t in make().items()}
        leaves |= {n: t.to(dtype) for n, t in given.items()}
        leaves["scale"] = given["scale"].float()
        leaves[needed].requires_grad_()
        weights = attention_weights(**leaves, mask=interval(), backend=backend)
        return torch.autograd.grad(weights.square().sum(), leaves[needed])[0]

    given = {"bias": torch.randn(1, HQ, 1, NK), "scale": torch.linspace(0.2, 0.9, HQ)}
    given["lse"] = 3 + torch.rand(B, HQ, NQ)
    found = []
    for dtype, by in ((torch.float32, backend), (torch.float32, "eager"), (torch.float64, "eager")):
        torch.manual_seed(1)
        found.append(gradient(dtype, by))
    assert_as_accurate(*found, needed)


def test_with_the_lse_of_cross_attention_it_is_softmax(backend):
    """The gradients that pass through lse and those that do not add up to those of softmax."""
    options = {"mask": interval(), "bias": torch.randn(1, HQ, 1, NK)}

    def softmax(dtype, backend, with_lse):
        q, k = (t.to(dtype).requires_grad_() for t in make().values())
        bias = options["bias"].to(dtype)
        lse = None
        if with_lse:
            attend = "triton" if backend == "triton" else "eager"
            result = cross_attention(
                q, k, k, mask=options["mask"], bias=bias, return_lse=True, backend=attend
            )
            lse = result.lse
        weights = attention_weights(q, k, lse=lse, mask=options["mask"], bias=bias, backend=backend)
        return weights, *torch.autograd.grad(weights.square().sum(), (q, k))

    torch.manual_seed(1)
    truth = softmax(torch.float64, "eager", False)
    torch.manual_seed(1)
    eager = softmax(torch.float32, "eager", True)
    torch.manual_seed(1)
    ours = softmax(torch.float32, backend, True)
    for name, *results in zip(("weights", "dq", "dk"), ours, eager, truth, strict=True):
        assert_as_accurate(*results, name)
    rows = ours[0].sum(-1)[~options["mask"].dense(NK).any(-1)]
    assert rows.numel() and torch.equal(rows, torch.zeros_like(rows))


def test_drops_what_cross_attention_drops(backend):
    q, k = make().values()
    v = torch.randn(B, HKV, NK, 16)
    options = {"dropout_p": 0.4, "seed": torch.tensor(11)}
    weights = attention_weights(q, k, average_heads=False, backend=backend, **options)
    out = weights @ v.repeat_interleave(HQ // HKV, dim=1)
    expected = cross_attention(q, k, v, backend="eager", **options)
    assert_as_accurate(out, expected, expected)
    assert 0.5 < (weights != 0).float().mean() < 0.7


@pytest.mark.parametrize("average", [True, False])
def test_every_output_is_written(request, average, backend):
    """Deterministic algorithms fill new memory with NaN: what nobody writes shows."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    assert_case("interval", backend, torch.float32, lse=True, average=average)


def test_padding_may_hold_anything(backend):
    q, k = (t.requires_grad_() for t in make().values())
    lengths = torch.tensor([NK - 5, 0], dtype=torch.int32)[:, None]
    options = {"mask": KeyInterval(torch.zeros_like(lengths), lengths), "backend": backend}
    expected = attention_weights(q, k, **options)
    padded = torch.arange(NK) >= lengths
    poisoned = torch.where(padded[:, None, :, None], torch.nan, k.detach()).requires_grad_()
    weights = attention_weights(q, poisoned, **options)
    assert torch.equal(weights, expected) and not weights[:, :, NK - 5 :].any()
    grads = torch.autograd.grad(weights.square().sum(), (q, poisoned))
    for ours, clean in zip(
        grads, torch.autograd.grad(expected.square().sum(), (q, k)), strict=True
    ):
        assert torch.equal(ours, clean)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("lse", [True, False], ids=["lse", "no_lse"])
def test_gradients_of_weights_outside_the_intervals_stay_out(mode, lse):
    """Such as those of log(0): infinite, or NaN."""
    with torch.device(mode.device):
        q, k = (t.requires_grad_() for t in make().values())
        options = {"mask": interval(), "backend": "triton"}
        row = torch.randn(B, HQ, NQ).add(5).requires_grad_()
        options |= {"lse": row} if lse else {}
        dweights = torch.randn(B, NQ, NK)
    unseen = ~options["mask"].dense(NK)
    assert unseen.any() and not unseen.all()
    weights = attention_weights(q, k, **options)
    leaves = [q, k, row] if lse else [q, k]
    expected = torch.autograd.grad(weights, leaves, dweights, retain_graph=True)
    for value in (torch.inf, torch.nan):
        dirty = dweights.masked_fill(unseen, value)
        for ours, clean in zip(
            torch.autograd.grad(weights, leaves, dirty, retain_graph=True), expected, strict=True
        ):
            assert torch.equal(ours, clean)


@pytest.mark.parametrize("sizes", [(0, 1, 3, 4), (1, 2, 0, 4), (2, 1, 3, 0), (1, 1, 1, 1)])
def test_degenerate_sizes(sizes, backend):
    b, h, nq, nk = sizes
    q = torch.randn(b, h, nq, 16, requires_grad=True)
    k = torch.randn(b, h, nk, 16, requires_grad=True)
    weights = attention_weights(q, k, mask=torch.ones(nq, nk, dtype=torch.bool), backend=backend)
    assert weights.shape == (b, nq, nk)
    weights.sum().backward()
    exact = [(weights, 1.0), (q.grad, 0.0), (k.grad, 0.0)]  # of one key; p rounds, and so do they
    for t, value in exact:
        truth = torch.full_like(t, value)
        assert_as_accurate(t, truth, truth.double(), size=1.0)


def test_strides_and_broadcast_batch(backend):
    q = torch.randn(1, HQ, NQ, 2 * D)[..., :D].expand(B, -1, -1, -1)
    k = torch.randn(B, NK, HKV, D + 1)[..., 1:].transpose(1, 2)
    options = {"bias": torch.randn(NK, NQ).T, "mask": torch.rand(B, NK, NQ).mT[:, None] < 0.5}
    options["lse"] = torch.randn(B, NQ, HQ).transpose(1, 2) + 5
    plain = {name: t.contiguous() for name, t in options.items()}
    expected = attention_weights(q.contiguous(), k.contiguous(), backend="eager", **plain)
    assert_as_accurate(attention_weights(q, k, backend=backend, **options), expected, expected)


@pytest.mark.parametrize("case", ["plain", "interval", "padding", "dropout", "bias_of_keys"])
def test_mean_never_exists_per_head(case, backend):
    if backend == "triton" and case != "dropout":
        pytest.skip("slow in the interpreter; the launcher's allocations do not depend on masks")
    heads, n = 4, 40
    tensors = [torch.randn(1, heads, n, 16, requires_grad=True) for _ in range(2)]
    options = {
        "interval": {"mask": masks.window(n, n, left=9)},
        "padding": {"mask": torch.arange(n) < 33},
        "bias_of_keys": {"bias": torch.randn(n, requires_grad=True)},
        "dropout": {"dropout_p": 0.5},
    }.get(case, {})
    with LargestTensor() as largest:
        attention_weights(*tensors, backend=backend, **options).square().sum().backward()
    assert 4 * n * n <= largest.nbytes <= 4 * heads * n * n // 2


@pytest.mark.parametrize("mode", modes("interpreter"), indirect=True)
@pytest.mark.slow
@pytest.mark.parametrize("own_lse", [True, False])
def test_custom_ops_and_compile(own_lse, mode):
    q, k = (t.requires_grad_() for t in make().values())
    lse = None if own_lse else torch.randn(B, HQ, NQ).add(5).requires_grad_()
    bias = torch.randn(1, HQ, 1, NK, requires_grad=True)

    def loss(q, k, bias, lse):
        return attention_weights(q, k, lse=lse, bias=bias, backend="triton").square().sum()

    leaves = [t for t in (q, k, bias, lse) if t is not None]
    expected = torch.autograd.grad(loss(q, k, bias, lse), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(
        torch.autograd.grad(compiled(q, k, bias, lse), leaves), expected, strict=True
    ):
        assert torch.equal(ours, theirs)
    with pytest.raises(RuntimeError, match="no double backward"):
        (dq,) = torch.autograd.grad(loss(q, k, bias, lse), q, create_graph=True)
        dq.sum().backward()
    row = torch.randn(B, HQ, NQ).add(5).requires_grad_(not own_lse)
    call = replace(attention_weights.check(q, k, lse=row, bias=bias), lse_is_own=own_lse)
    upstream = {"weights": torch.randn(B, 1, NQ, NK)}
    custom_ops.check(custom_ops.launches(weights_op, call, "triton", upstream))


def test_explain_and_errors(capsys):
    q, k = make().values()
    xattn_kernels.explain(attention_weights, q, k)
    assert "attention_weights takes" in capsys.readouterr().out
    for message, call in {
        "lse must be a tensor or None, got float": {"lse": 1.0},
        r"lse must be torch.float32 .* got torch.float64": {"lse": torch.zeros(B, HQ, NQ).double()},
        r"lse must be \[B, Hq, Nq\] = \[2, 2, 19\]": {"lse": torch.zeros(B, HQ, NQ + 1)},
        "bias must broadcast": {"bias": torch.zeros(NK, NQ)},
        "dropout_p must be in": {"dropout_p": 1.0},
        "mask as a tensor must be bool": {"mask": torch.zeros(NQ, NK)},
        "unknown backend 'cudnn'": {"backend": "cudnn"},
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            attention_weights(q, k, **call)
    with pytest.raises(ValueError, match="q and k must share a head width"):
        attention_weights(q, k[..., :8])
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run .*float64 is not"):
        attention_weights(q.double(), k.double(), backend="triton")
