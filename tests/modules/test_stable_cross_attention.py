"""Normed, tempered and gated cross-attention against einsum, and that it learns from its start."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from support.modes import modes
from support.numerics import assert_as_accurate
from xattn_kernels import (
    NormalizedCrossAttention,
    StableCrossAttention,
    cross_attention,
    masks,
)

pytestmark = pytest.mark.usefixtures("seed")

B, N, NK, DIM, VISUAL, HEADS = 2, 5, 9, 24, 14, 3
LENGTHS = [4, 9]


def layer(cls=StableCrossAttention, **options):
    return cls(**dict(dim=DIM, dim_visual=VISUAL, heads=HEADS, dropout=0.0) | options)


def trained(cls, **options):
    """A layer whose parameters are none of those of the start."""
    module = layer(cls, **options)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1 or not p.any():
                p.add_(torch.randn_like(p) * 0.3)
    assert all(p.any() for p in module.parameters())
    return module


def call(dtype=torch.float32, device="cpu", batch=B, n=N, keys=NK):
    x = torch.randn(batch, n, DIM, dtype=dtype, device=device)
    media = torch.randn(batch, keys, VISUAL, dtype=dtype, device=device)
    return x.requires_grad_(), media.requires_grad_()


def twin(module, x, media, lengths):
    """(y, entropy) in PyTorch's operations, the scale on the keys and the logits divided by the
    temperature, as they are written down; one batch element at a time, without its padding."""
    attn = module if isinstance(module, NormalizedCrossAttention) else module.attn
    found = []
    for row, tokens, n in zip(x, media, lengths, strict=True):
        m = F.layer_norm(tokens[:n], (VISUAL,), attn.key_norm.weight, attn.key_norm.bias)
        normed = F.layer_norm(row, (DIM,), attn.query_norm.weight, attn.query_norm.bias)
        k, v = (m * attn.key_scale) @ attn.to_k.weight.T, m @ attn.to_v.weight.T
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (normed @ attn.to_q.weight.T, k, v))
        s = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
        p = (s / attn.log_temperature.exp()[:, None, None]).softmax(-1)
        out = torch.einsum("hij,jhd->ihd", p, v).flatten(1) @ attn.to_out.weight.T
        y = out if attn is module else row + torch.tanh(module.gate) * out
        found.append((y, -(p * p.log()).sum(-1)))
    return [torch.stack(t) for t in zip(*found, strict=True)]


def results(outs, module, x, media) -> dict:
    """Outputs and every gradient of a weighted sum of them, by name."""
    weights = (torch.linspace(-1, 1, o.numel(), dtype=o.dtype, device=o.device) for o in outs)
    total = sum((o * w.view_as(o)).sum() for o, w in zip(outs, weights, strict=True))
    leaves = {"x": x, "media": media} | dict(module.named_parameters())
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = {f"out{i}": o.detach() for i, o in enumerate(outs)}
    return found | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def with_statistics(module, x, media):
    mask = masks.padding(torch.tensor(LENGTHS)).to(x.device)
    out, statistics = module(x, media, mask=mask, return_statistics=True)
    return out, statistics.entropy


@pytest.mark.parametrize("cls", [NormalizedCrossAttention, StableCrossAttention])
@pytest.mark.parametrize("dim_head", [None, 4])
def test_equals_its_twin_with_every_gradient(cls, dim_head):
    module = trained(cls, dim_head=dim_head, temperature=1.7, dtype=torch.float64)
    x, media = call(torch.float64)
    found = results(with_statistics(module, x, media), module, x, media)
    truth = results(twin(module, x, media, LENGTHS), module, x, media)
    size = max(t.abs().max().item() for t in truth.values())
    for name, expected in truth.items():
        assert_as_accurate(found[name], expected, expected, name, size=size)
    mask = masks.padding(torch.tensor(LENGTHS))
    assert_as_accurate(module(x, media, mask=mask), truth["out0"], truth["out0"])


def assert_accurate(backend, device="cpu", statistics=True):
    exact = trained(StableCrossAttention, dtype=torch.float64, backend="eager")
    x, media = call(torch.float64)
    mask = masks.padding(torch.tensor(LENGTHS))
    runs = []
    for name, dtype, place in (
        ("eager", torch.float64, "cpu"), ("eager", torch.float32, "cpu"),
        (backend, torch.float32, device),
    ):  # fmt: skip
        module = copy.deepcopy(exact).to(place, dtype)
        module.attn.backend = name
        leaves = [t.detach().to(place, dtype).requires_grad_() for t in (x, media)]
        outs = (module(*leaves, mask=mask.to(place)),)
        outs = with_statistics(module, *leaves) if statistics else outs
        runs.append(results(outs, module, *leaves))
    truth, eager, ours = runs
    for name, expected in truth.items():
        size = max(t.abs().max().item() for t in truth.values())
        assert_as_accurate(ours[name].cpu(), eager[name], expected, name, size=size)


def test_default_off_the_gpu(as_users_run_it):
    assert_accurate(None, statistics=False)
    assert_accurate("torch", statistics=False)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_80", "gpu"), indirect=True)
def test_from_the_kernels(mode):
    assert_accurate("triton", mode.device)


def test_starts_without_effect_and_learns():
    x, media = call()
    goal = torch.randn_like(x)
    for options in ({}, dict(zero_output=False, gate_init=0.0)):
        module = layer(**options)
        assert torch.equal(module(x, media), x)
        before = copy.deepcopy(module.state_dict())
        optimizer, losses = torch.optim.Adam(module.parameters(), lr=1e-2), []
        for _ in range(40):
            losses.append(F.mse_loss(module(x.detach(), media.detach()), goal))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0]
        assert not [n for n, t in module.state_dict().items() if torch.equal(t, before[n])]


def test_scale_of_media_does_not_matter_to_the_logits():
    module, (x, media) = trained(NormalizedCrossAttention, norm_eps=1e-12), call()
    _, near = module(x, media, return_statistics=True)
    _, far = module(x, 50 * media, return_statistics=True)
    torch.testing.assert_close(near.entropy, far.entropy)


def test_temperature_flattens():
    x, media = call()
    flat, sharp = (layer(NormalizedCrossAttention, temperature=t) for t in (4.0, 0.25))
    sharp.load_state_dict(flat.state_dict() | {"log_temperature": sharp.log_temperature.detach()})
    torch.testing.assert_close(sharp.temperature(), torch.full((HEADS,), 0.25))
    entropies = [m(x, media, return_statistics=True)[1].entropy.mean() for m in (flat, sharp)]
    assert entropies[0] > entropies[1]


def test_dropout_is_that_of_the_op_in_training_only():
    module, (x, media) = trained(NormalizedCrossAttention, dropout=0.4), call()
    torch.manual_seed(5)
    seed = torch.randint(2**62, (1,))
    media_ = module.key_norm(media)
    projected = module.to_q(module.query_norm(x)), module.to_k(media_), module.to_v(media_)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in projected)
    options = dict(scale=module.scale(), dropout_p=0.4, seed=seed, backend="eager")
    expected = module.to_out(cross_attention(q, k, v, **options).transpose(1, 2).flatten(2))
    torch.manual_seed(5)
    found = module(x, media)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(module(x, media), found)
    module.eval()
    assert torch.equal(module(x, media), module(x, media))
    found.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("shape", [dict(batch=1), dict(n=1), dict(keys=0), dict(batch=0)], ids=str)
def test_sizes_at_the_edge(shape):
    module, (x, media) = trained(StableCrossAttention), call(**shape)
    y = module(x, media)
    y.sum().backward()
    assert y.shape == x.shape and y.isfinite().all() and x.grad.isfinite().all()
    assert shape != dict(keys=0) or torch.equal(y, x)


def test_rows_that_see_no_key_are_unchanged():
    module, (x, media) = trained(StableCrossAttention), call()
    y = module(x, media, mask=masks.padding(torch.tensor([0, 9])))
    assert torch.equal(y[0], x[0]) and not torch.equal(y[1], x[1])


def test_state_dict_and_autocast():
    module, other, (x, media) = trained(StableCrossAttention), layer(), call()
    other.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
    expected = module(x, media)
    assert torch.equal(other(x, media), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, media)
    y.sum().backward()
    assert y.dtype == torch.float32 and 0 < (y - expected).abs().max() < 0.1
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("cls", [NormalizedCrossAttention, StableCrossAttention])
def test_compiles_in_one_graph(cls):
    module, (x, media) = trained(cls), call()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, media), module(x, media))


X, M = torch.zeros(B, N, DIM), torch.zeros(B, NK, VISUAL)
WRONG = {
    "heads must divide dim = 24 without a dim_head, got 5": lambda: layer(heads=5),
    "dim_head must be at least 1, got 0": lambda: layer(dim_head=0),
    "dropout must be at least 0 and below 1, got 1": lambda: layer(dropout=1),
    "temperature must be a positive number, got 0": lambda: layer(temperature=0),
    "gate_init must not be 0 with zero_output=True": lambda: layer(gate_init=0.0),
    "gate_init must be finite, got inf": lambda: layer(gate_init=float("inf")),
    "gate_init must be a number, got str": lambda: layer(gate_init="small"),
    "zero_output must be a bool, got int": lambda: layer(zero_output=0),
    "norm must be one of 'layer', 'rms'": lambda: layer(norm="batch"),
    "backend must be one of None, 'triton'": lambda: layer(backend="flash"),
    r"x must be \[B, N, dim\] with dim = 24": lambda: layer()(M, M),
    r"media must be \[B, Nk, dim_visual\] with dim_visual = 14": lambda: layer()(X, X),
    "the batch of x, 1, must be that of media, 2": lambda: layer()(X[:1], M),
    "x must have the dtype of the weights": lambda: layer()(X.double(), M.double()),
    "mask must be a KeyInterval, a bool tensor or None": lambda: layer()(X, M, mask=3),
    "return_statistics must be a bool, got int": lambda: layer()(X, M, return_statistics=1),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
