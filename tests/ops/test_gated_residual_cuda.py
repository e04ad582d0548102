"""The gated residual's CUDA kernels: the cases of the Triton kernels, emulated or on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support.gated_cases import BY_NAME, CASES, GatedCase, assert_right, build
from support.modes import modes, needs_extension
from support.numerics import assert_as_accurate
from xattn_kernels import explain, gated_projection, gated_residual, gated_residual_norm

pytestmark = needs_extension

each_case = pytest.mark.parametrize("case", CASES, ids=str)
every_mode = pytest.mark.parametrize(
    "mode", modes("cuda_sm_80", "cuda_sm_90", "cuda_gpu"), indirect=True
)
any_mode = pytest.mark.parametrize("mode", modes("cuda_sm_80", "cuda_gpu"), indirect=True)


@pytest.mark.taking_turns
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_case
def test_cuda(mode, case, dtype):
    assert_right(case, "cuda", dtype, mode.device)


@every_mode
@pytest.mark.parametrize("name", ["plain_one_masked", "layer_vector_masked", "rms_one_ragged"])
def test_float16(mode, name):
    assert_right(BY_NAME[name], "cuda", torch.float16, mode.device)


@any_mode
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_the_widest_row(mode, norm):
    """8192 columns of 16 bits, all of a block; of an odd width half as many."""
    for dim in (8192, 4095):
        case = GatedCase("widest", (3, dim), norm=norm, vector=True)
        assert_right(case, "cuda", torch.bfloat16, mode.device)


@any_mode
def test_gradients_of_the_widest_row_may_lie_anywhere(mode):
    """A part of a wider row, at an odd place: where it is no wider than such rows fit, unlike x."""
    x, h = (torch.randn(2, 8192, device=mode.device).bfloat16() for _ in range(2))
    gate = torch.full((1,), 0.3, device=mode.device)
    weight = torch.ones(8192, device=mode.device).bfloat16()
    upstream = torch.randn(2, 2 * 8192 + 3, device=mode.device).bfloat16()
    dy, dnormed = upstream[:, 1:8193], upstream[:, 8194:16386]
    results = []
    for gradients in ((dy, dnormed), (dy.contiguous(), dnormed.contiguous())):
        leaves = [t.clone().requires_grad_() for t in (x, h, gate, weight)]
        pair = gated_residual_norm(*leaves, backend="cuda")
        results.append(torch.autograd.grad(pair, leaves, gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@any_mode
def test_gradients_are_the_same_bits_in_every_run(mode):
    call = build(replace(BY_NAME["many_rows"], vector=False), torch.bfloat16, mode.device)
    first = call.run("cuda")
    for name, t in call.run("cuda").items():
        assert torch.equal(t, first[name]), name


@any_mode
def test_a_closed_gate_is_the_identity(mode):
    call = build(GatedCase("closed", gate=0.0), torch.bfloat16, mode.device)
    found = call.run("cuda")
    assert torch.equal(found["y"], call.leaves["x"]) and not found["dh"].any()
    assert torch.equal(found["dx"], call.upstream["y"])


@any_mode
def test_the_norm_is_of_the_y_that_is_returned(mode):
    """Rounded: beside 1000 float16 keeps halves, of which a norm of the sum knows nothing."""
    x = torch.full((3, 64), 1000.0, device=mode.device).half()
    h = torch.randn(3, 64, device=mode.device).half()
    y, normed = gated_residual_norm(x, h, torch.ones(1, device=mode.device), backend="cuda")
    eager, truth = (torch.nn.functional.layer_norm(t, (64,)) for t in (y, y.double()))
    assert_as_accurate(normed, eager, truth)


@any_mode
def test_nan_stays_out_of_rows_that_do_not_count(mode):
    case = replace(BY_NAME["plain_one_masked"], gate=float("nan"))
    call = build(case, torch.float32, mode.device)
    out = ~call.row_mask
    assert torch.equal(call.run("cuda")["y"][out], call.leaves["x"][out])
    call = build(BY_NAME["plain_vector_masked"], torch.float32, mode.device)
    out = ~call.row_mask
    call.upstream["y"][out] = torch.nan
    found = call.run("cuda")
    assert not found["dh"][out].any() and found["dgate"].isfinite().all()


@any_mode
def test_dimensions_that_cannot_be_walked_as_one(mode):
    """Four of them; a fifth is a reason, and in a gradient a copy."""
    shape = (3, 2, 2, 3, 2, 24)
    x = torch.randn(shape, device=mode.device)
    apart = torch.randn(5, 4, 4, 5, 4, 24, device=mode.device)[:3, :2, :2, :3, :2]
    gate = torch.full((1,), 0.3, device=mode.device, requires_grad=True)
    four = gated_residual(x[0], apart[0], gate, backend="cuda")
    torch.testing.assert_close(four, x[0] + gate.tanh() * apart[0])
    with pytest.raises(RuntimeError, match="5 walks, at most 4 fit"):
        gated_residual(x, apart, gate, backend="cuda")
    h = torch.randn(shape, device=mode.device)
    gated_residual(x, h, gate, backend="cuda").backward(apart)
    expected = (apart * h).sum() * (1 - gate.detach().tanh() ** 2)
    torch.testing.assert_close(gate.grad, expected.view(1))


@any_mode
def test_projection(mode):
    x, a = torch.randn(5, 24, device=mode.device), torch.randn(5, 16, device=mode.device)
    weight, gate = torch.randn(24, 16, device=mode.device), torch.ones(1, device=mode.device)
    found = gated_projection(x, a, gate, weight, backend="cuda")
    torch.testing.assert_close(found, x + gate.tanh() * (a @ weight.mT))


def test_reasons(capsys):
    x = torch.randn(2, 24)
    explain(gated_residual, x, x, torch.ones(1))
    assert "cuda     tensors are on cpu, CUDA kernels need a GPU" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="CUDA kernels need a GPU"):
        gated_residual(x, x, torch.ones(1), backend="cuda")


@any_mode
def test_a_row_wider_than_a_block_is_a_reason(mode):
    for dim, dtype in ((8200, torch.bfloat16), (4104, torch.float32), (4097, torch.float16)):
        x = torch.randn(2, dim, dtype=dtype, device=mode.device)
        with pytest.raises(RuntimeError, match=f"dim {dim} > "):
            gated_residual_norm(x, x, torch.ones(1, device=mode.device), backend="cuda")
