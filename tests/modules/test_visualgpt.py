"""SRAU and the VisualGPT layer: against recordings of the published one, and by its equations."""

from __future__ import annotations

import copy

import pytest
import torch

from support.modes import modes
from support.numerics import assert_as_accurate
from support.recordings import assert_is_original, load, recorded, results
from xattn_kernels import SRAU, VisualGPTBlock, masks

pytestmark = pytest.mark.usefixtures("seed")

CASES = load("visualgpt_block")
DIM = 24

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


def block(backend=None, **options) -> VisualGPTBlock:
    return VisualGPTBlock(**dict(dim=DIM, heads=3, backend=backend) | options)


def run(case: dict, dtype: torch.dtype, backend: str | None, device="cpu") -> dict:
    options = dict(backend=backend, device=device, dtype=dtype)
    forbidden, rows = case["other"]["mask_encoder"], case["other"]["mask_queries"]
    other = dict(
        media_mask=masks.padding((~forbidden).sum(-1).flatten()).to(device),
        row_mask=rows[..., 0].bool().to(device),
    )
    return results(case, block(tau=case["config"]["tau"], **options), other, prefix="block.")


@each_case
def test_eager_in_float64_is_the_original(case):
    # the same for all keys of a row, so its gradient is 0
    shift = "dblock.enc_dec_attn.fc_k.bias"
    assert_is_original(case, run(case, torch.float64, "eager"), zero=[shift])


@pytest.mark.parametrize("mode", modes("interpreter", "sm_80", "gpu"), indirect=True)
def test_from_the_kernels(mode):
    assert_accurate(run(CASES[1], torch.float32, "triton", mode.device))


def test_default_off_the_gpu(as_users_run_it):
    assert_accurate(run(CASES[1], torch.float32, None))


def assert_accurate(found: dict) -> None:
    truth, eager = recorded(CASES[1]), run(CASES[1], torch.float32, "eager")
    # a gradient sums terms of either sign, one for each number of a stream
    size = max(t.abs().max().item() for t in truth.values())
    for name, expected in truth.items():
        assert_as_accurate(found[name].cpu(), eager[name], expected, name, size=size)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.5])
def test_srau_by_its_equation(tau):
    unit = SRAU(dim=5, tau=tau, dtype=torch.float64)
    a, e = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = unit(a, e)
    W, b = unit.fc_alpha.weight, unit.fc_alpha.bias
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        n, i, c = at
        z = b[c] + (W[c, :5] * a[n, i]).sum() + (W[c, 5:] * e[n, i]).sum()
        alpha = 1 / (1 + torch.exp(-z))
        kept = alpha * a[n, i, c] if alpha > tau else 0.0
        seen = (1 - alpha) * e[n, i, c] if 1 - alpha > tau else 0.0
        torch.testing.assert_close(out[n, i, c], kept + seen, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(unit, (a, e))


def test_a_closed_gate_has_no_gradient_and_its_complement_has():
    unit = SRAU(dim=1, tau=0.3, dtype=torch.float64)
    with torch.no_grad():
        unit.fc_alpha.weight.zero_()
        unit.fc_alpha.bias.fill_(-3.0)  # alpha = 0.047
    a, e = (torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    unit(a, e).sum().backward()
    alpha = torch.sigmoid(torch.tensor(-3.0, dtype=torch.float64))
    assert a.grad == 0 and e.grad == 1 - alpha
    torch.testing.assert_close(unit.fc_alpha.bias.grad[0], -alpha * (1 - alpha))


def call(B=2, N=6, Nk=9, dtype=torch.float32):
    return torch.randn(B, N, DIM, dtype=dtype), torch.randn(B, 3, Nk, DIM, dtype=dtype)


def test_padding_is_not_read():
    module, (x, media) = block(), call()
    mask = masks.padding(torch.tensor([4, 9]))
    expected = module(x, media, media_mask=mask)
    media[0, :, 4:] = torch.nan
    found = module(x, media.nan_to_num(1e3), media_mask=mask)
    torch.testing.assert_close(found, expected)


def test_text_is_causal_and_padded_rows_are_zero():
    module, (x, media) = block(), call()
    rows = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    first = module(x, media, row_mask=rows)
    x[:, 3:] += 1.0
    second = module(x, media, row_mask=rows)
    assert torch.equal(first[:, :3], second[:, :3]) and not torch.equal(first[:, 3:], second[:, 3:])
    assert not first[1, 4:].any()


@pytest.mark.parametrize("shape", [dict(B=1), dict(N=1), dict(Nk=0), dict(B=0)], ids=str)
def test_sizes_at_the_edge(shape):
    module, (x, media) = block(), call(**shape)
    out = module(x.requires_grad_(), media)
    out.sum().backward()
    assert out.shape == x.shape and out.isfinite().all() and x.grad.isfinite().all()


def test_state_dict_goes_there_and_back():
    module, (x, media) = block(), call()
    other = block()
    other.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
    assert torch.equal(other(x, media), module(x, media))


def test_autocast():
    module, (x, media) = block(), call()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, media)
    out.float().sum().backward()
    error = (out - module(x, media)).abs().max()
    assert 0 < error < 0.1 and all(p.grad.isfinite().all() for p in module.parameters())


def test_compiles_in_one_graph():
    module, (x, media) = block(backend="eager"), call()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    rows = torch.ones(2, 6, dtype=torch.bool)
    torch.testing.assert_close(compiled(x, media, row_mask=rows), module(x, media, row_mask=rows))


WRONG_OPTIONS = {
    "dim must be at least 1, got 0": dict(dim=0),
    "heads must divide dim = 24, got 5": dict(heads=5),
    "tau must be between 0 and 1, got 1.5": dict(tau=1.5),
    "tau must be a number, got str": dict(tau="a"),
    "norm_eps must be a positive number, got 0": dict(norm_eps=0),
    "backend must be one of None, 'triton'": dict(backend="flash"),
}


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_wrong_options(message):
    with pytest.raises((TypeError, ValueError), match=message):
        block(**WRONG_OPTIONS[message])


X, MEDIA = torch.zeros(2, 6, DIM), torch.zeros(2, 3, 9, DIM)
WRONG_CALLS = {
    "x must be a floating-point tensor": (None, MEDIA, None),
    r"x must be \[B, N, dim\] with dim = 24": (X[..., 1:], MEDIA, None),
    r"encoder_output must be \[B, n_levels, Nk, dim\]": (X, MEDIA[:, 0], None),
    r"encoder_output must begin with \[B, n_levels\] = \[2, 3\]": (X, MEDIA[:, :2], None),
    "x must have the dtype of the weights": (X.double(), MEDIA.double(), None),
    "row_mask must be a bool tensor, got a torch.float32 tensor": (X, MEDIA, X[..., 0]),
    r"row_mask must be \[B, N\] = \[2, 6\]": (X, MEDIA, X[..., 0].bool()[:, 1:]),
}


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_wrong_arguments(message):
    x, media, rows = WRONG_CALLS[message]
    with pytest.raises((TypeError, ValueError), match=message):
        block()(x, media, row_mask=rows)


@pytest.mark.parametrize("name", ["mask", "media_mask"])
def test_a_wrong_mask_is_named(name):
    with pytest.raises(ValueError, match=rf"^{name} must broadcast to \[B, Hq, Nq, Nk\]"):
        block()(X, MEDIA, **{name: torch.ones(5, 5, dtype=torch.bool)})


def test_srau_refuses_streams_of_two_shapes():
    with pytest.raises(ValueError, match=r"a and e must share a shape, got \[2, 6, 24\]"):
        SRAU(dim=DIM)(X, X[:1])
