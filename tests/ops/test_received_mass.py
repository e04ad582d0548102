"""`received_mass` on every backend against the reference in float64, both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support import custom_ops
from support.largest_tensor import LargestTensor
from support.modes import each_compiled_mode, enter_backend, modes
from support.numerics import assert_as_accurate
from support.weights_cases import CASES, NK, NQ, B, exact_in, interval, make, terms_of_dscale
from xattn_kernels import (
    KeyInterval,
    attention_weights,
    cross_attention,
    explain,
    masks,
    received_mass,
)
from xattn_kernels.ops.received_mass import chunks, mass_op

pytestmark = pytest.mark.usefixtures("seed")

NAMES = [name for name in CASES if name != "dropout"]
each_case = pytest.mark.parametrize("case", NAMES)


@pytest.fixture(params=["torch", *modes("interpreter", "sm_90", "gpu")])
def backend(request):
    """ "torch", or "triton" where this process can run it; tensors are made on its device."""
    with enter_backend(request.param) as (name, device), torch.device(device):
        yield name


def options_of(case: str, dtype: torch.dtype) -> dict:
    options = {name: exact_in(dtype, t) for name, t in CASES[case]().items()}
    return {name: t for name, t in options.items() if name not in ("dropout_p", "seed")}


def run(tensors: dict, options: dict, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The mass and every gradient, by name; weights of rows stay in the dtype of the sums."""

    def leaf(name, t):
        is_float = isinstance(t, Tensor) and t.is_floating_point()
        sums = torch.promote_types(dtype, torch.float32)
        return t.detach().to(sums if name == "row_weight" else dtype) if is_float else t

    named = {name: leaf(name, t) for name, t in (tensors | options).items()}
    leaves = {n: t for n, t in named.items() if isinstance(t, Tensor) and t.is_floating_point()}
    for t in leaves.values():
        t.requires_grad_()
    mass = received_mass(**named, backend=backend)
    upstream = torch.randn(mass.shape, generator=torch.Generator().manual_seed(1))
    mass.backward(upstream.to(mass))
    return {"mass": mass} | {f"d{name}": t.grad for name, t in leaves.items()}


def assert_right(case: str, backend: str, dtype: torch.dtype, weighted: bool, average: bool):
    tensors, options = make(dtype), options_of(case, dtype)
    options["average_heads"] = average
    if weighted:
        tensors["row_weight"] = torch.rand(B, NQ)
    truth = run(tensors, options, "eager", torch.float64)
    eager, ours = (run(tensors, options, name, dtype) for name in ("eager", backend))
    for name, value in truth.items():
        size = 0.0
        if name == "dscale":
            size = terms_of_dscale(make(dtype), options | {"average_heads": True}) * NQ
        assert_as_accurate(ours[name], eager[name], value, name, size=size, rounded_to=dtype)


@pytest.mark.parametrize("weighted", [True, False])
@each_case
def test_torch(case, weighted):
    assert_right(case, "torch", torch.float32, weighted, average=not weighted)


@pytest.mark.slow
@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("weighted", [True, False])
@each_case
def test_triton(mode, case, weighted):
    with torch.device(mode.device):
        assert_right(case, "triton", torch.float32, weighted, average=weighted)


@each_compiled_mode
@pytest.mark.parametrize("case", ["interval", "mask_and_bias", "bias_lowest", "everything"])
def test_compiled(mode, case):
    with torch.device(mode.device):
        assert_right(case, "triton", mode.dtypes[0], True, average=False)


def test_it_is_the_sum_of_the_weights(backend):
    q, k = make().values()
    mask = interval()
    weights = attention_weights(q, k, mask=mask, average_heads=False, backend=backend)
    mass = received_mass(q, k, mask=mask, backend=backend)
    torch.testing.assert_close(mass, weights.sum(2).mean(1))
    seen = (mask.start < mask.stop).sum(-1).to(mass)
    torch.testing.assert_close(mass.sum(-1), seen)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("splits", [1, 3])
def test_heads_and_programs(backend, heads, splits, force_splits):
    """Each key head has its own query heads, and rows may be shared by several programs."""
    force_splits(splits)
    tensors = make(torch.float32, *heads)

    def mass(backend: str, dtype: torch.dtype) -> Tensor:
        q, k = (t.to(dtype) for t in tensors.values())
        mask = masks.causal(NQ, NK)
        return received_mass(q, k, mask=mask, average_heads=False, backend=backend)

    truth = mass("eager", torch.float64)
    assert_as_accurate(mass(backend, torch.float32), mass("eager", torch.float32), truth, "mass")


def test_a_choice_of_queries(backend):
    q, k = make().values()
    chosen = torch.zeros(NQ).index_fill_(0, torch.tensor([2, 11]), 1.0)
    found = received_mass(q, k, row_weight=chosen, backend=backend)
    torch.testing.assert_close(found, received_mass(q[:, :, [2, 11]], k, backend=backend))


def test_lse_that_is_known_saves_computing_it(backend):
    q, k = (t.requires_grad_() for t in make().values())
    mask = interval()
    if backend == "triton":
        lse = cross_attention(q, k, k, mask=mask, return_lse=True, backend=backend).lse
    else:
        lse = cross_attention(q, k, k, mask=mask, return_lse=True, backend="eager").lse
    found = [received_mass(q, k, mask=mask, lse=t, backend=backend) for t in (lse, None)]
    torch.testing.assert_close(*found)
    grads = [torch.autograd.grad(t.square().sum(), (q, k), retain_graph=True) for t in found]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_keys_that_nobody_sees_may_hold_anything(backend):
    q, k = make().values()
    mask = masks.padding(torch.tensor([20, 30]))
    clean = received_mass(q, k, mask=mask, backend=backend)
    for b, length in enumerate((20, 30)):
        k[b, :, length:] = torch.nan
    found = received_mass(q, k, mask=mask, backend=backend)
    assert torch.equal(found, clean)
    assert not found[0, 20:].any() and not found[1, 30:].any()


def test_it_is_differentiable_through_q_to_the_second_order_on_eager_only(backend):
    q, k = (t.requires_grad_() for t in make().values())
    (dq,) = torch.autograd.grad(
        received_mass(q, k, backend="eager").square().sum(), q, create_graph=True
    )
    assert torch.autograd.grad(dq.sum(), k)[0].isfinite().all()
    if backend == "triton":
        mass = received_mass(q, k, backend=backend)
        (dq,) = torch.autograd.grad(mass.square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="received_mass: the kernels have no double"):
            dq.sum().backward()


@pytest.mark.parametrize(("Nq", "Nk"), [(0, 5), (3, 0), (1, 1)])
def test_few_rows_and_keys(backend, Nq, Nk):
    q, k = torch.randn(2, 2, Nq, 16), torch.randn(2, 1, Nk, 16, requires_grad=True)
    mass = received_mass(q, k, average_heads=False, backend=backend)
    assert mass.shape == (2, 1, Nk) and mass.dtype == torch.float32
    torch.testing.assert_close(mass, torch.full_like(mass, Nq / max(Nk, 1)))
    (dk,) = torch.autograd.grad(mass.sum(), k)
    torch.testing.assert_close(dk, torch.zeros_like(k))


@pytest.mark.slow
@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_no_matrix_of_weights_is_made(mode):
    N = 256
    q, k = (torch.randn(1, 2, N, 16, device=mode.device, requires_grad=True) for _ in "qk")
    with LargestTensor() as largest:
        received_mass(q, k, backend="triton").square().sum().backward()
    assert largest.nbytes <= 2 * 2 * N * 16 * 4


def test_a_cpu_has_the_weights_of_some_queries_at_a_time():
    rows = list(chunks(10_000, 2**20))
    assert len(rows) > 1000 and rows[-1].stop == 10_000


@pytest.mark.slow
@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_torch_compile_takes_it_whole(mode):
    q, k = (t.to(mode.device).requires_grad_() for t in make().values())
    weight = torch.rand(B, NQ, device=mode.device, requires_grad=True)

    def model(q, k, weight):
        mask = masks.causal(q.shape[2], k.shape[2], device=q.device)
        return received_mass(q, k, row_weight=weight, mask=mask, backend="triton").square().sum()

    torch._dynamo.reset()
    found = []
    for f in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss = f(q, k, weight)
        found.append([loss, *torch.autograd.grad(loss, (q, k, weight))])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.slow
@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_custom_ops(mode):
    q, k = (t.to(mode.device).requires_grad_() for t in make().values())
    call = received_mass.check(q, k, lse=torch.zeros(q.shape[:3], device=mode.device))
    upstream = {"mass": torch.ones(k.shape[:3], device=mode.device)}
    custom_ops.check(custom_ops.launches(mass_op, call, "triton", upstream))


Q, K = torch.zeros(2, 2, 3, 16), torch.zeros(2, 1, 5, 16)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (dict(row_weight=1.0), TypeError, "row_weight must be a tensor or None, got float"),
        (dict(row_weight=torch.ones(3).long()), TypeError, "floating-point, got torch.int64"),
        (dict(row_weight=torch.ones(2)), ValueError, r"broadcast to \[B, Nq\] = \[2, 3\]"),
        (dict(row_weight=torch.ones(1, 2, 3)), ValueError, r"got \[1, 2, 3\]"),
        (dict(lse=torch.zeros(2, 3)), ValueError, r"lse must be \[B, Hq, Nq\]"),
        (dict(mask=torch.ones(4, 5).bool()), ValueError, "mask"),
        (dict(average_heads=1), TypeError, "average_heads must be a bool, got int"),
        (dict(backend="cuda"), ValueError, "unknown backend 'cuda'"),
    ],
)
def test_bad_arguments_are_named(change, error, said):
    with pytest.raises(error, match=said):
        received_mass(Q, K, **change)


def test_explain(capsys):
    explain(received_mass, Q, K, mask=KeyInterval(*torch.tensor([[0], [3]], dtype=torch.int32)))
    said = capsys.readouterr().out
    assert said.startswith("received_mass takes") and "torch    can run" in said
