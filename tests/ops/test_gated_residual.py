"""The gated residual, alone and with the next norm, on every backend against eager."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from support import custom_ops
from support.gated_cases import BY_NAME, CASES, GatedCase, assert_right, build
from support.modes import each_compiled_mode, modes
from support.numerics import assert_as_accurate
from xattn_kernels import explain, gated_projection, gated_residual, gated_residual_norm
from xattn_kernels.ops.gated_residual import gated_op

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@each_case
def test_triton(mode, case, dtype):
    assert_right(case, "triton", dtype, mode.device)


@each_compiled_mode
@each_case
def test_compiled(mode, case):
    assert_right(case, "triton", mode.dtypes[0], mode.device)


@pytest.mark.parametrize("form", ["plain_one", "layer_vector", "rms_one"])
def test_eager_gradients(form):
    """The oracle itself, by finite differences."""
    call = build(replace(BY_NAME[f"{form}_masked"], shape=(3, 4)), torch.float64)
    case, names = call.case, list(call.leaves)
    h = call.leaves["h"].detach().nan_to_num(0.3).requires_grad_()

    def run(*leaves):
        given = dict(zip(names, leaves, strict=True))
        found = replace(call, leaves=given, upstream={}).run("eager")
        return tuple(found[n] for n in ("y", "normed")[: 1 if case.norm is None else 2])

    leaves = tuple(h if n == "h" else t for n, t in call.leaves.items())
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_eager_norm_by_its_equation(norm):
    y, weight, bias = torch.randn(4, 24).double(), torch.randn(24).double(), torch.randn(24)
    h, gate = torch.zeros_like(y), torch.zeros(1)
    found = gated_residual_norm(y, h, gate, weight, bias, norm=norm, eps=1e-3, backend="eager")
    centred = y - y.mean(-1, keepdim=True) if norm == "layer" else y
    n = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert_as_accurate(found.normed, n * weight + bias, n * weight + bias)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
@pytest.mark.parametrize("vector", [False, True], ids=["one", "vector"])
def test_a_closed_gate_is_the_identity_and_learns(mode, vector):
    """Bit for bit; the gradient of the gate is then the plain sum, rounded once."""
    case = GatedCase("closed", vector=vector, gate=0.0)
    for dtype in mode.dtypes:
        call = build(case, dtype, mode.device)
        found = call.run("triton")
        x, h, dy = call.leaves["x"], call.leaves["h"], call.upstream["y"]
        assert torch.equal(found["y"], x) and torch.equal(found["dx"], dy)
        assert not found["dh"].any()
        expected = (dy.double() * h.detach().double()).sum((0, 1) if vector else None)
        rounded = expected.view_as(call.leaves["gate"]).to(dtype)
        assert_as_accurate(found["dgate"], rounded, expected.view_as(rounded), "dgate")


@pytest.mark.parametrize("mode", modes("interpreter", "sm_80", "gpu"), indirect=True)
@pytest.mark.parametrize("gate", [20.0, -20.0, float("inf")])
def test_an_open_gate_learns_nothing(mode, gate):
    for norm in (None, "rms"):
        found = build(GatedCase("open", gate=gate, norm=norm), torch.float32, mode.device)
        found = found.run("triton")
        assert found["y"].isfinite().all() and not found["dgate"].any()


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_nan_stays_out_of_rows_that_do_not_count(mode):
    call = build(
        replace(BY_NAME["plain_one_masked"], gate=float("nan")), torch.float32, mode.device
    )
    out = ~call.row_mask
    assert torch.equal(call.run("triton")["y"][out], call.leaves["x"][out])
    for name in ("plain_one_masked", "plain_vector_masked"):
        call = build(BY_NAME[name], torch.float32, mode.device)
        out = ~call.row_mask
        call.upstream["y"][out] = torch.nan
        found, eager = call.run("triton"), call.run("eager")
        assert not found["dh"][out].any() and found["dgate"].isfinite().all()
        torch.testing.assert_close(found["dgate"], eager["dgate"])


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
def test_gradients_are_the_same_bits_in_every_run(mode):
    call = build(replace(BY_NAME["many_rows"], vector=False), mode.dtypes[0], mode.device)
    first = call.run("triton")
    for name, t in call.run("triton").items():
        assert torch.equal(t, first[name]), name


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
def test_more_parts_of_a_gate_than_are_added_at_a_time(mode, monkeypatch):
    from xattn_kernels.triton_kernels import gated_residual as kernels

    monkeypatch.setattr(kernels, "PARTS", 4)
    case = replace(BY_NAME["many_tiles_plain"], vector=False)
    assert_right(case, "triton", mode.dtypes[0], mode.device)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_inputs_stay_as_they_are_and_dx_is_dy(mode):
    call = build(GatedCase("saved"), torch.float32, mode.device)
    before = {n: t.detach().clone() for n, t in call.leaves.items()}
    y = gated_residual(**call.leaves, backend="triton")
    for _ in range(2):
        y.backward(call.upstream["y"], retain_graph=True)
    assert all(torch.equal(t, before[n]) for n, t in call.leaves.items())
    assert torch.equal(call.leaves["x"].grad, 2 * call.upstream["y"])


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_rows_that_overlap(mode, norm):
    """Of such an x torch's own empty_like has no columns next to each other."""
    call = build(GatedCase("overlapping", shape=(4, 8), norm=norm), torch.float32, mode.device)
    windows = torch.arange(11.0, device=mode.device).sin().unfold(0, 8, 1)
    leaves = call.leaves | {"x": windows, "h": windows.detach().requires_grad_()}
    overlapping = replace(call, leaves=leaves)
    ours, eager = overlapping.run("triton"), overlapping.run("eager")
    for name, t in ours.items():
        torch.testing.assert_close(t, eager[name], msg=name)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_a_frozen_gate_keeps_nothing_of_h(mode):
    call = build(GatedCase("frozen", needs="x h"), torch.float32, mode.device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_residual(**call.leaves, backend="triton")
    assert max(t.untyped_storage().nbytes() for t in kept) < 100


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_gradient_of_a_sum_is_expanded(mode):
    def gradients(call, backend):
        found = gated_residual_norm(**call.leaves, backend=backend)
        return torch.autograd.grad(found.y.sum() + found.normed.sum(), list(call.leaves.values()))

    call = build(GatedCase("sum", norm="layer"), torch.float32, mode.device)
    exact = call.in_double()
    size = max(g.abs().max().item() for g in gradients(exact, "eager"))
    grads = gradients(call, "triton"), gradients(call, "eager"), gradients(exact, "eager")
    for name, ours, eager, truth in zip(call.leaves, *grads, strict=True):
        assert_as_accurate(ours, eager, truth, name, size=size)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_second_derivatives_are_refused(mode):
    call = build(GatedCase("twice"), torch.float32, mode.device)
    y = gated_residual(**call.leaves, backend="triton")
    (dh,) = torch.autograd.grad(y.sum(), call.leaves["h"], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager' for second derivatives"):
        dh.sum().backward()


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize(
    "name", ["plain_one_base", "layer_vector_masked", "only_normed", "rms_one_transposed"]
)
def test_custom_ops(mode, name):
    """Schema and fake implementations, of rows in either order of memory."""
    call = build(BY_NAME[name], torch.float32, mode.device)
    leaves = {name: t.detach().requires_grad_() for name, t in call.leaves.items()}
    options = {} if call.case.norm is None else dict(norm=call.case.norm)
    op = gated_residual if call.case.norm is None else gated_residual_norm
    checked = op.check(**leaves, **options, row_mask=call.row_mask)
    upstream = dict.fromkeys(("y", "normed"), torch.ones_like(leaves["x"]))
    custom_ops.check(custom_ops.launches(gated_op, checked, "triton", upstream))


COMPILED = {
    "plain": lambda x, h, gate, w: gated_residual(x, h, gate, backend="triton"),
    "itself": lambda x, h, gate, w: gated_residual(x, x, gate, backend="triton"),
    "norm": lambda x, h, gate, w: sum(gated_residual_norm(x, h, gate, w, w, backend="triton")),
    "projection": lambda x, h, gate, w: gated_projection(
        x, h, gate, torch.outer(w, w), w, backend="triton"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("form", COMPILED)
def test_torch_compile_takes_it_whole(mode, form):
    """No break of the graph, the launches as nodes of it, the same numbers."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    op = COMPILED[form]
    launch = "gated_projection" if form == "projection" else "gated_residual"
    compiled = torch.compile(op, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
                             fullgraph=True)  # fmt: skip
    x, h, w = (torch.randn(n, device=mode.device) for n in ((3, 8), (3, 8), (8,)))
    leaves = [t.requires_grad_() for t in (x, h, torch.full((1,), 0.4, device=mode.device), w)]
    found = [f(*leaves) for f in (compiled, op)]
    wanted = [t for t in leaves if form != "itself" or t is not h]
    wanted = [t for t in wanted if form in ("norm", "projection") or t is not w]
    grads = [torch.autograd.grad(y.square().sum(), wanted) for y in found]
    torch.testing.assert_close(found[0], found[1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert any(f"{launch}_forward" in str(node.target) for node in graphs[0].graph.nodes)


X = torch.randn(2, 3, 8)
GATE = torch.zeros(1)


@pytest.mark.parametrize(("change", "error", "said"), [
    (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    (dict(x=X.int()), TypeError, "x must be a floating-point tensor of 16.*got torch.int32"),
    (dict(h=X.to(torch.float8_e4m3fn)), TypeError, "h must be .*got torch.float8_e4m3fn"),
    (dict(h=X[:1]), ValueError, r"h must have the shape of x, \[2, 3, 8\], got \[1, 3, 8\]"),
    (dict(h=X.double()), TypeError, "h must have the dtype of x, torch.float32, or a narrower"),
    (dict(gate=torch.zeros(3)), ValueError, r"scalar, \[1\] or \[dim\] = \[8\], got shape \[3\]"),
    (dict(gate=0.5), TypeError, "gate must be a tensor, got float"),
    (dict(gate=torch.zeros(1, device="meta")), ValueError, "gate must be on the device of x"),
    (dict(row_mask=torch.ones(2, 3)), TypeError, "row_mask must be bool .*got torch.float32"),
    (dict(row_mask=torch.ones(3, dtype=torch.bool)), ValueError, r"row_mask .*\[2, 3\], got \[3\]"),
    (dict(row_mask=True), TypeError, "row_mask must be a bool tensor or None, got bool"),
    (dict(x=torch.tensor(1.0), h=torch.tensor(1.0)), ValueError, r"x must be \[..., dim\]"),
])  # fmt: skip
def test_wrong_arguments(change, error, said):
    call = dict(x=X, h=X, gate=GATE) | change
    for op in (gated_residual, gated_residual_norm):
        with pytest.raises(error, match=said):
            op(**call)


@pytest.mark.parametrize(("change", "error", "said"), [
    (dict(norm="batch"), ValueError, "norm must be one of .*got 'batch'"),
    (dict(weight=torch.ones(3)), ValueError, r"weight must be \[dim\] = \[8\], got shape \[3\]"),
    (dict(bias=torch.ones(8).int()), TypeError, "bias must be a floating-point tensor"),
    (dict(eps=-1.0), ValueError, "eps must be a number of at least 0, got -1.0"),
    (dict(eps="1"), TypeError, "eps must be a number of at least 0, got str"),
])  # fmt: skip
def test_wrong_norm(change, error, said):
    with pytest.raises(error, match=said):
        gated_residual_norm(X, X, GATE, **change)


def test_reasons(capsys):
    explain(gated_residual, X, X, GATE)
    explain(gated_residual_norm, X.mT, X.mT, GATE.double())
    wide = torch.zeros(1, 5000)
    explain(gated_residual_norm, wide, wide, GATE)
    said = capsys.readouterr().out
    assert "last dimension of x is not contiguous" in said and "torch.float64, is not" in said
    assert "dim 5000 > 2048" in said
