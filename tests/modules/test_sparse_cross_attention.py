"""`SparseCrossAttention`: weights of `MultiheadAttention`, keys of `topk_attention`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from support.modes import modes
from support.numerics import assert_as_accurate
from xattn_kernels import (
    KeyInterval,
    MultiheadAttention,
    SparseCrossAttention,
    topk_attention,
)

E, H, B, NQ, NK = 32, 4, 2, 5, 21


def module(top_k=6, **kwargs) -> SparseCrossAttention:
    torch.manual_seed(0)
    return SparseCrossAttention(E, H, top_k=top_k, **dict(batch_first=True) | kwargs)


def inputs(dtype=torch.float32, width=E):
    g = torch.Generator().manual_seed(1)
    return [
        torch.randn(B, n, w, generator=g, dtype=torch.float64).to(dtype)
        for n, w in ((NQ, E), (NK, width))
    ]


def by_hand(m: SparseCrossAttention, x, y, allowed=None):
    """Projections, `topk_attention` by its equations, projection."""
    q, k, v = (
        t.unflatten(-1, (H, E // H)).transpose(1, 2)
        for t in nn.functional._in_projection_packed(x, y, y, m.in_proj_weight, m.in_proj_bias)
    )
    chosen = dict(top_k=m.top_k, topk_blocks=m.topk_blocks)
    out = topk_attention(q, k, v, **chosen, mask=allowed, backend="eager")
    return m.out_proj(out.transpose(1, 2).flatten(-2))


def forbidden(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.5


MASKS = {
    "none": ({}, None),
    "padding": (dict(key_padding_mask=forbidden(B, NK)), lambda p: ~p[:, None, None]),
    "attn": (dict(attn_mask=forbidden(NQ, NK)), lambda a: ~a),
    "both": (
        dict(key_padding_mask=forbidden(B, NK), attn_mask=forbidden(B * H, NQ, NK)),
        lambda p, a: ~p[:, None, None] & ~a.unflatten(0, (B, H)),
    ),
}


CHOSEN = {"keys": {}, "blocks": dict(top_k=None, topk_blocks=(16, 1))}


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("masks", MASKS)
def test_output_and_gradients(masks, chosen, backend):
    options, allow = MASKS[masks]
    allowed = allow(*options.values()) if allow else None
    m, exact = module(backend=backend, **CHOSEN[chosen]), module(**CHOSEN[chosen]).double()
    x, y = inputs()
    found = run(m, lambda: m(x, y, y, **options)[0])
    eager = run(m, lambda: by_hand(m, x, y, allowed))
    x, y = x.double(), y.double()
    truth = run(exact, lambda: by_hand(exact, x, y, allowed))
    for name, t in found.items():
        assert_as_accurate(t, eager[name], truth[name], name, size=1.0)


def run(m: nn.Module, call) -> dict[str, torch.Tensor]:
    out = call()
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    grads = torch.autograd.grad(out, list(m.parameters()), upstream)
    return {"out": out} | {n: g for (n, _), g in zip(m.named_parameters(), grads, strict=True)}


def test_a_mask_of_intervals_with_a_padding_mask():
    m, (x, y) = module(), inputs()
    stop = torch.arange(3, 3 + NQ, dtype=torch.int32)
    mask = KeyInterval(torch.zeros_like(stop), stop)
    padding = forbidden(B, NK)
    found = m(x, y, y, key_padding_mask=padding, mask=mask)[0]
    allowed = mask.dense(NK) & ~padding[:, None, None]
    torch.testing.assert_close(found, by_hand(m, x, y, allowed))


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
def test_from_the_kernels(mode):
    m, exact = (module(top_k=3, backend="triton").to(mode.device) for _ in range(2))
    x, y = (t.to(mode.device) for t in inputs())
    truth = by_hand(exact.double(), x.double(), y.double())
    assert_as_accurate(m(x, y, y)[0], by_hand(m, x, y), truth)


def test_state_dicts_load_both_ways():
    sparse, dense = module(), MultiheadAttention(E, H, batch_first=True)
    dense.load_state_dict(sparse.state_dict())
    theirs = nn.MultiheadAttention(E, H, batch_first=True)
    theirs.load_state_dict(sparse.state_dict())
    sparse.load_state_dict(theirs.state_dict())
    x, y = inputs()
    everything = module(top_k=NK)
    everything.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(everything(x, y, y)[0], theirs(x, y, y, need_weights=False)[0])


def test_without_top_k_it_is_dense():
    m, (x, y) = module(top_k=None, dropout=0.1).eval(), inputs()
    dense = MultiheadAttention(E, H, batch_first=True).eval()
    dense.load_state_dict(m.state_dict())
    for a, b in zip(m(x, y, y, need_weights=True), dense(x, y, y), strict=True):
        assert torch.equal(a, b)


def test_in_a_decoder_layer():
    layer = nn.TransformerDecoderLayer(E, H, batch_first=True, dropout=0.0)
    x, y = inputs()
    expected = layer(x, y)
    layer.multihead_attn = SparseCrossAttention.from_torch(layer.multihead_attn, top_k=NK)
    torch.testing.assert_close(layer(x, y), expected)
    blocks = SparseCrossAttention.from_torch(nn.MultiheadAttention(E, H), topk_blocks=(16, 2))
    assert blocks.topk_blocks == (16, 2) and blocks.in_proj_weight.shape == (3 * E, E)
    layer.multihead_attn.top_k = 2
    assert not torch.allclose(layer(x, y), expected)


def test_what_has_no_top_k():
    m, (x, y) = module(), inputs()
    with pytest.raises(ValueError, match="need_weights must be False"):
        m(x, y, y, need_weights=True)
    with pytest.raises(TypeError, match="attn_mask must be bool"):
        m(x, y, y, attn_mask=torch.zeros(NQ, NK))
    for chosen in CHOSEN.values():
        with pytest.raises(ValueError, match="dropout must be 0 beside a top_k .*, got 0.1"):
            module(dropout=0.1, **chosen)
    with pytest.raises(ValueError, match="exactly one of top_k and topk_blocks"):
        module(top_k=3, topk_blocks=(16, 1))
    with pytest.raises(ValueError, match="top_k must be an int >= 1, got 0"):
        module(top_k=0)


def test_explain(capsys):
    m, (x, y) = module(), inputs()
    m.explain(x, y, y)
    assert "SparseCrossAttention takes" in capsys.readouterr().out


@pytest.mark.slow
def test_torch_compile_and_autocast():
    m, (x, y) = module(), inputs()
    compiled = torch.compile(m, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, y)[0], m(x, y, y)[0])
    with torch.autocast("cpu", torch.bfloat16):
        out = m(x, y, y)[0]
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_a_choice_that_is_set_later_is_checked_too():
    module, x = SparseCrossAttention(32, 4, dropout=0.5), torch.randn(1, 3, 32)
    module.top_k = 2
    with pytest.raises(ValueError, match="dropout must be 0"):
        module(x, x, x)
    module.dropout, module.topk_blocks = 0.0, (16, 1)
    with pytest.raises(ValueError, match="exactly one of top_k and topk_blocks"):
        module(x, x, x)
