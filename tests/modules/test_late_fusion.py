"""`MidFusion` and `LateFusion` by their equations, without padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from support.fusion_cases import (
    DIM,
    LATE,
    NT,
    TEXT_LENGTHS,
    VISION_LENGTHS,
    B,
    assert_equal,
    document,
    late,
    middle,
    randomise,
    results,
    tokens,
)
from xattn_kernels import LateFusion

pytestmark = pytest.mark.usefixtures("seed")


@pytest.mark.parametrize("every, n_blocks", [(1, 3), (2, 2), (3, 1), (9, 1)])
def test_with_closed_gates_it_is_the_language_model(every, n_blocks):
    module = middle(every)
    layers = list(module.layers)
    x, media = document()
    assert len(module.blocks) == n_blocks
    expected = x
    for layer in layers:
        expected = layer(expected, shift=0.5)[0]
    assert torch.equal(module(x, media, shift=0.5), expected)


def looked(block, x, media):
    """A gated block by its equations; every token sees all media."""
    attn = block.attn
    y = F.layer_norm(x, (DIM,), attn.norm.weight, attn.norm.bias)
    q = (y @ attn.to_q.weight.T).unflatten(-1, (3, 8))
    k, v = (media.flatten(1, 2) @ attn.to_kv.weight.T).unflatten(-1, (2, 3, 8)).unbind(-3)
    p = (torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", p, v).flatten(2) @ attn.to_out.weight.T
    x = x + block.attn_gate.tanh() * out
    norm, widen, _, narrow = block.ff
    y = F.layer_norm(x, (DIM,), norm.weight, norm.bias)
    return x + block.ff_gate.tanh() * (F.gelu(y @ widen.weight.T) @ narrow.weight.T)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_mid_fusion_equals_its_twin_with_every_gradient(backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # float64
    module = middle(dtype=torch.float64, backend=backend)
    randomise(module)
    x, media, layers = *document(torch.float64), module.layers
    expected = layers[0](looked(module.blocks[0], x, media))[0]
    expected = layers[2](looked(module.blocks[1], layers[1](expected)[0], media))[0]
    leaves = dict(x=x, media=media) | dict(module.named_parameters())
    assert_equal(results([module(x, media)], leaves), results([expected], leaves))


def test_mid_fusion_masks_and_caches_media():
    module = middle()
    randomise(module)
    x, media = document()
    here = torch.zeros(B, NT, dtype=torch.bool)
    here[:, [1, 3]] = True
    with torch.no_grad():
        out, cache = module(x, media, here), module.cache_media(media)
        assert (out - module(x, media)).abs().max() > 1e-3
        torch.testing.assert_close(module(x, cache, here), out)
        step = module(x[:, -1:], cache, here, use_cached_media=True)
    torch.testing.assert_close(step, out[:, -1:])


def late_twin(module: LateFusion, vision, text) -> list:
    """Pooled and projected one element at a time, without its padding."""
    sides = []
    for x, lengths, pool, proj in (
        (vision, VISION_LENGTHS, module.vision_pool, module.vision_proj),
        (text, TEXT_LENGTHS, module.text_pool, module.text_proj),
    ):
        rows = []
        for row, n in zip(x, lengths, strict=True):
            if pool is not None:
                rows.append(pool(row[None, :n])[0, 0])
            else:
                rows.append(row[:n].mean(0) if n else torch.zeros_like(row[0]))
        sides.append(torch.stack(rows) @ proj.weight.T)
    a, b = sides
    merged = {"concat": torch.cat(sides, dim=1), "add": a + b, "product": a * b}[module.merge]
    return [a, b, merged]


@pytest.mark.parametrize("form", LATE, ids=str)
def test_late_fusion_equals_its_twin_with_every_gradient(form, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # float64
    module = randomise(late(form, dtype=torch.float64))
    vision, text = tokens(torch.float64)
    leaves = dict(vision=vision, text=text) | dict(module.named_parameters())
    lengths = dict(vision_lengths=VISION_LENGTHS, text_lengths=TEXT_LENGTHS)
    found = results(module(vision, text, **lengths), leaves)
    assert_equal(found, results(late_twin(module, vision, text), leaves))


def test_the_mean_does_not_read_padding():
    module, (vision, text) = late(), (t.detach() for t in tokens())
    expected = module(vision, text, vision_lengths=VISION_LENGTHS)
    vision[1, 2:] = float("nan")
    found = module(vision, text, vision_lengths=VISION_LENGTHS)
    assert torch.equal(found.merged, expected.merged) and not found.vision[2].any()
