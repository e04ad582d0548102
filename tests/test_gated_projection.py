"""The gated residual of a linear layer's output, and its gradients without that output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conftest import modes
from numerics import assert_as_accurate
from xattn_kernels import explain, gated_projection

VARIANTS = {
    "one": {}, "vector": dict(vector=True), "no_bias": dict(bias=False), "closed": dict(gate=0.0),
    "masked": dict(vector=True, mask=True), "no_rows": dict(shape=(2, 0)),
    "one_row": dict(shape=()),
    "frozen_weight": dict(frozen=("weight", "bias")), "frozen_gate": dict(frozen=("gate",)),
    "frozen_a": dict(frozen=("a", "x")), "one_column": dict(dim=1), "transposed": dict(turned=True),
}  # fmt: skip


def build(
    dtype, device="cpu", *, shape=(3, 7), dim=24, width=40, vector=False, bias=True, gate=None,
    mask=False, frozen=(), turned=False,
):  # fmt: skip
    """(leaves, row_mask, dy)"""
    g = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=g, dtype=torch.float64).to(device, dtype)

    leaves = {"x": normal(*shape, dim), "a": normal(*shape, width)}
    leaves["gate"] = 0.5 * normal(dim if vector else 1)
    if gate is not None:
        leaves["gate"] = torch.full_like(leaves["gate"], gate)
    leaves["weight"] = normal(dim, width) / width**0.5
    if bias:
        leaves["bias"] = normal(dim)
    row_mask = torch.rand(shape, generator=g).to(device) < 0.5 if mask else None
    dy = normal(*shape, dim)
    if turned:
        leaves |= {n: leaves[n].transpose(0, 1).contiguous().transpose(0, 1) for n in "xa"}
        dy = dy.transpose(0, 1).contiguous().transpose(0, 1)
    for name, t in leaves.items():
        t.requires_grad_(name not in frozen)
    return leaves, row_mask, dy


def run(leaves, row_mask, dy, backend):
    y = gated_projection(**leaves, row_mask=row_mask, backend=backend)
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y} | {f"d{n}": t for n, t in zip(wanted, grads, strict=True)}


def in_double(leaves, row_mask, dy):
    doubled = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in leaves.items()}
    return doubled, row_mask, dy.double()


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gradient(mode, variant):
    for dtype in (torch.float32, *mode.dtypes[:1]):
        call = build(dtype, mode.device, **VARIANTS[variant])
        ours, eager = run(*call, "triton"), run(*call, "eager")
        truth = run(*in_double(*call), "eager")
        leaves, dy = in_double(*call)[0], call[2].double()
        h = F.linear(leaves["a"], leaves["weight"], leaves.get("bias"))
        size = {"dgate": (dy * h).norm().item(), "dbias": dy.norm().item()}
        for name, t in ours.items():
            terms = dict(size=size.get(name, 0.0))
            assert_as_accurate(t, eager[name], truth[name], f"{variant}: {name}", **terms)


def test_eager_gradients():
    leaves, row_mask, _ = build(torch.float64, shape=(4,), dim=3, width=5, vector=True, mask=True)
    names = list(leaves)

    def op(*tensors):
        return gated_projection(**dict(zip(names, tensors, strict=True)), row_mask=row_mask)

    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_the_product_is_not_kept(mode):
    leaves, _, _ = build(torch.float32, mode.device, dim=32, width=8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_projection(**leaves, backend="triton")
    assert max(t.numel() for t in kept) < leaves["x"].numel()
    assert kept


def test_gemm_onto_x_rounds_more():
    """The form without a kernel, in bfloat16: as accurate at best, so the other one is shipped."""
    leaves, _, dy = build(torch.bfloat16, shape=(512,), dim=64, width=512, bias=False)
    x, a, gate, weight = (t.detach() for t in leaves.values())
    truth = gated_projection(*(t.double() for t in (x, a, gate, weight)))

    def error(y):
        return (y.double() - truth).square().mean().sqrt()

    onto_x = torch.addmm(x, a, (weight * torch.tanh(gate.float())).bfloat16().mT)
    ours = x.float() + torch.tanh(gate.float()) * F.linear(a, weight).float()
    assert error(ours.bfloat16()) <= 1.02 * error(onto_x)


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
