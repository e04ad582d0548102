"""`EarlyFusion` against `nn.TransformerEncoder` without padding."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.fusion_cases import (
    DIM,
    EARLY,
    TEXT_LENGTHS,
    VISION_LENGTHS,
    assert_equal,
    early,
    randomise,
    results,
    tokens,
)
from support.modes import modes
from support.numerics import assert_as_accurate
from xattn_kernels import EarlyFusion

pytestmark = pytest.mark.usefixtures("seed")

each_early = pytest.mark.parametrize("form", EARLY, ids=str)


def real(outs) -> tuple:
    """The rows that are no padding, of `EarlyFusion`."""
    vision = [row[:n] for row, n in zip(outs[0], VISION_LENGTHS, strict=True)]
    text = [row[:n] for row, n in zip(outs[1], TEXT_LENGTHS, strict=True)]
    return torch.cat(vision), torch.cat(text)


def early_twin(module: EarlyFusion, vision, text):
    """nn.TransformerEncoder with the module's parameters, one pair at a time, without padding."""
    layer = nn.TransformerEncoderLayer(
        DIM, 3, 4 * DIM, 0.0, F.gelu, batch_first=True, norm_first=True, dtype=vision.dtype
    )
    norm = nn.LayerNorm(DIM, dtype=vision.dtype)
    encoder = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
    p = {n: t for n, t in module.named_parameters() if n.startswith(("layers.", "norm."))}
    assert p.keys() == encoder.state_dict().keys()
    found = [], []
    for a, b, n, m in zip(vision, text, VISION_LENGTHS, TEXT_LENGTHS, strict=True):
        a = module.vision_proj(a[:n]) + module.type_embeddings[0]
        b = module.text_proj(b[:m]) + module.type_embeddings[1]
        hidden = None
        if module.causal_text:  # True is hidden
            hidden = torch.ones(n + m, n + m, dtype=torch.bool).triu(1)
            hidden[:n, :n] = False
        out = torch.func.functional_call(encoder, p, (torch.cat((a, b))[None], hidden))[0]
        found[0].append(out[:n])
        found[1].append(out[n:])
    return torch.cat(found[0]), torch.cat(found[1])


def padded(module, vision, text):
    return real(module(vision, text, vision_lengths=VISION_LENGTHS, text_lengths=TEXT_LENGTHS))


@each_early
@pytest.mark.parametrize("backend", [None, "eager"])
def test_early_fusion_equals_its_twin_with_every_gradient(form, backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # float64
    module = randomise(early(form, backend=backend, dtype=torch.float64))
    vision, text = tokens(torch.float64)
    leaves = dict(vision=vision, text=text) | dict(module.named_parameters())
    found = results(padded(module, vision, text), leaves)
    truth = results(early_twin(module, vision, text), leaves)
    assert not found["dvision"][1, 2:].any() and not found["dtext"][1, 1:].any()
    assert_equal(found, truth)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_80", "gpu"), indirect=True)
def test_early_fusion_from_the_kernels(mode):
    exact = randomise(early(EARLY[1], dtype=torch.float64, backend="eager"))
    inputs, runs = tokens(torch.float64), []
    for backend, dtype, place in (
        ("eager", torch.float64, "cpu"), ("eager", torch.float32, "cpu"),
        ("triton", torch.float32, mode.device),
    ):  # fmt: skip
        module = copy.deepcopy(exact).to(place, dtype)
        for layer in module.layers:
            layer.self_attn.backend = backend
        leaves = {n: t.detach().to(place, dtype).requires_grad_() for n, t in zip("ab", inputs)}  # noqa: B905
        lengths = dict(vision_lengths=VISION_LENGTHS, text_lengths=TEXT_LENGTHS)
        outs = real(module(*leaves.values(), **{n: t.to(place) for n, t in lengths.items()}))
        runs.append(results(outs, leaves | dict(module.named_parameters())))
    truth, rival, ours = runs
    size = max(t.abs().max().item() for t in truth.values())
    for name, expected in truth.items():
        assert_as_accurate(ours[name].cpu(), rival[name], expected, name, size=size)


@each_early
def test_early_fusion_takes_the_weights_of_a_transformer_encoder(form):
    layer = nn.TransformerEncoderLayer(DIM, 3, 4 * DIM, norm_first=True, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(DIM), enable_nested_tensor=False)
    missing, unexpected = early(form).load_state_dict(encoder.state_dict(), strict=False)
    projections = [
        f"{side}_proj.{part}" for side in ("vision", "text") for part in ("weight", "bias")
    ]
    assert not unexpected and sorted(missing) == sorted(["type_embeddings", *projections])


def test_a_word_does_not_see_the_next_one_nor_the_image_the_text():
    module, (vision, text) = early(EARLY[1]), tokens()
    outs = module(vision, text)
    (d,) = torch.autograd.grad(outs.text[:, 2].sum(), text, retain_graph=True)
    assert d[:, :3].any() and not d[:, 3:].any()
    assert not torch.autograd.grad(outs.vision.sum(), text)[0].any()
    both = early()(vision, text)
    assert torch.autograd.grad(both.vision.square().sum(), text)[0].any()
