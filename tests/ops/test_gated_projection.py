"""The gated residual of a linear layer's output, and its gradients without that output."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from support.modes import modes
from support.numerics import assert_as_accurate
from support.projection_cases import ProjectionCase, assert_right
from xattn_kernels import explain, gated_projection

VARIANTS = {
    "one": {}, "vector": dict(vector=True), "no_bias": dict(bias=False), "closed": dict(gate=0.0),
    "masked": dict(vector=True, mask=True), "no_rows": dict(shape=(2, 0)),
    "one_row": dict(shape=()),
    "frozen_weight": dict(frozen="weight bias"), "frozen_gate": dict(frozen="gate"),
    "frozen_a": dict(frozen="a x"), "one_column": dict(dim=1), "transposed": dict(turned=True),
    "scalar": dict(scalar=True), "scalar_one_column": dict(scalar=True, dim=1),
    "no_width": dict(width=0),
}  # fmt: skip


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient(mode, variant):
    for dtype in (torch.float32, *mode.dtypes[:1]):
        assert_right(ProjectionCase(**VARIANTS[variant]), "triton", dtype, mode.device)


def test_eager_gradients():
    case = ProjectionCase(shape=(4,), dim=3, width=5, vector=True, mask=True)
    call = case.build(torch.float64)
    names = list(call.leaves)

    def op(*tensors):
        return gated_projection(**dict(zip(names, tensors, strict=True)), row_mask=call.row_mask)

    assert torch.autograd.gradcheck(op, tuple(call.leaves.values()))


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_the_product_is_not_kept(mode):
    leaves = ProjectionCase(dim=32, width=8).build(torch.float32, mode.device).leaves
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_projection(**leaves, backend="triton")
    assert max(t.numel() for t in kept) < leaves["x"].numel()
    assert kept


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_a_closed_gate_of_float16_has_finite_gradients(mode):
    """Whose terms, not yet times the gate, float16 does not hold."""
    call = ProjectionCase(shape=(2048,), dim=16, width=8, gate=0.0, seed=1)
    call = call.build(torch.float16, mode.device)
    with torch.no_grad():
        call.leaves["a"].abs_()
    call = replace(call, dy=torch.full_like(call.dy, 64.0))
    found, truth = call.run("triton"), call.in_double().run("eager")
    assert not found["dweight"].any() and not found["dbias"].any()
    expected = truth["dgate"].half()
    assert_as_accurate(found["dgate"], expected, truth["dgate"], "dgate")


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_a_backward_under_autocast_casts_nothing(mode):
    call = ProjectionCase().build(torch.float32, mode.device)
    expected = call.run("triton")
    with torch.autocast(mode.device, torch.bfloat16):
        found = call.run("triton")
    for name, t in expected.items():
        assert torch.equal(found[name], t), name


@pytest.mark.parametrize("gate", [0.1, 0.5, 1.0, 3.0])
def test_gemm_onto_x_is_about_as_accurate(gate):
    """The form without a kernel, in bfloat16: neither is better by more than a fifth."""
    case = ProjectionCase(shape=(512,), dim=64, width=512, bias=False, gate=gate)
    leaves = {n: t.detach() for n, t in case.build(torch.bfloat16).leaves.items()}
    truth = gated_projection(**{n: t.double() for n, t in leaves.items()})

    def error(y):
        return (y.double() - truth).square().mean().sqrt()

    x, a, gates, weight = leaves.values()
    onto_x = error(torch.addmm(x, a, (weight * torch.tanh(gates.float())).bfloat16().mT))
    ours = error((x.float() + torch.tanh(gates.float()) * F.linear(a, weight).float()).bfloat16())
    assert max(ours, onto_x) <= 1.2 * min(ours, onto_x)


X, A, W, GATE = torch.randn(2, 3, 8), torch.randn(2, 3, 5), torch.randn(8, 5), torch.zeros(1)


@pytest.mark.parametrize(("change", "error", "said"), [
    (dict(a=A[:1]), ValueError, r"leading dimensions of x, \[2, 3\], got \[1, 3, 5\]"),
    (dict(weight=W.mT), ValueError, r"weight must be \[dim, width\] = \[8, 5\], got \[5, 8\]"),
    (dict(bias=torch.zeros(5)), ValueError, r"bias must be \[dim\] = \[8\], got \[5\]"),
    (dict(weight=W.half()), TypeError, "weight must have the dtype of a, torch.float32, got"),
    (dict(weight=None), TypeError, "weight must be a tensor, got NoneType"),
    (dict(gate=torch.zeros(2)), ValueError, "gate must be a scalar"),
    (dict(a=A.double(), weight=W.double()), TypeError, "h must have the dtype of x"),
])  # fmt: skip
def test_wrong_arguments(change, error, said):
    with pytest.raises(error, match=said):
        gated_projection(**dict(x=X, a=A, gate=GATE, weight=W) | change)


def test_explain(capsys):
    explain(gated_projection, X, A, GATE, W)
    said = capsys.readouterr().out
    assert said.startswith("gated_projection takes") and "eager    can run" in said
