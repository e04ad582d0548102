"""Initialisers know queries, keys, values and outputs apart, and no gate is left unlearnable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from xattn_kernels import (
    GatedCrossAttentionBlock,
    MultiheadAttention,
    VisualGPTBlock,
    gates_,
    small_queries_,
    xavier_,
    zero_outputs_,
)
from xattn_kernels.modules.visualgpt import Conv1D

DIM = 96


class Model(nn.Module):
    """Projections in every form, and a feed-forward that is none of attention."""

    def __init__(self, dim_visual=2 * DIM):
        super().__init__()
        torch.manual_seed(0)
        self.packed = MultiheadAttention(DIM, 2)
        self.apart = MultiheadAttention(DIM, 2, kdim=dim_visual, vdim=dim_visual)
        self.block = GatedCrossAttentionBlock(
            dim=DIM, dim_visual=dim_visual, dim_head=DIM // 2, heads=2
        )
        self.bert = nn.ModuleDict(dict.fromkeys(("query", "key", "value")))
        for name in self.bert:
            self.bert[name] = nn.Linear(DIM, DIM)
        self.diffusers = nn.ModuleDict(
            dict(to_q=nn.Linear(DIM, DIM), to_out=nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout()))
        )
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(DIM, DIM), c_proj=nn.Linear(DIM, DIM)))


def weights(model) -> dict[str, torch.Tensor]:
    """Every projection by hand."""
    packed, apart = model.packed.in_proj_weight, model.apart
    kv = model.block.attn.to_kv.weight
    found = dict(zip(("packed.q", "packed.k", "packed.v"), packed.split(DIM), strict=True))
    found |= {f"apart.{r}": getattr(apart, f"{r}_proj_weight") for r in "qkv"}
    found |= {"block.attn.to_q.q": model.block.attn.to_q.weight}
    found |= {"block.attn.to_kv.k": kv[: len(kv) // 2], "block.attn.to_kv.v": kv[len(kv) // 2 :]}
    found |= {f"bert.{name}.{name[0]}": model.bert[name].weight for name in model.bert}
    found |= {"diffusers.to_q.q": model.diffusers["to_q"].weight}
    return found | {
        "packed.out_proj.out": model.packed.out_proj.weight,
        "apart.out_proj.out": model.apart.out_proj.weight,
        "block.attn.to_out.out": model.block.attn.to_out.weight,
        "diffusers.to_out.out": model.diffusers["to_out"][0].weight,
    }


def changed(model, f):
    """(what f returned, names of the parameters that it changed)."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = f(model)
    return found, {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def of_projections(model) -> set[str]:
    parts = ("packed", "apart", "block.attn.to_", "bert", "diffusers")
    return {n for n, _ in model.named_parameters() if n.startswith(parts)}


def test_xavier_has_the_fans_of_each_projection():
    model = Model()
    for module in (model.packed, model.apart):
        nn.init.ones_(module.in_proj_bias)
    found, touched = changed(model, lambda m: xavier_(m, gain=0.5))
    assert set(found) == weights(model).keys() and len(found) == len(set(found))
    assert touched <= of_projections(model)
    assert not model.packed.in_proj_bias.any() and not model.apart.in_proj_bias.any()
    for name, w in weights(model).items():
        bound = 0.5 * math.sqrt(6 / sum(w.shape))
        assert 0.98 * bound < w.abs().max() <= bound, name
        # the standard deviation of the variance of n uniform numbers is sqrt(0.8 / n) of it
        assert abs(w.var() / (bound**2 / 3) - 1) < 5 * math.sqrt(0.8 / w.numel()), name
    packed = model.packed.in_proj_weight.detach().clone()
    nn.init.xavier_uniform_(packed, gain=0.5)
    assert packed.var() < 0.6 * model.packed.in_proj_weight.var()


def test_gpt2_stores_its_weights_the_other_way_round():
    block = VisualGPTBlock(dim=DIM, heads=2, n_levels=1)
    found, touched = changed(block, xavier_)
    linears = {"attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v", "attn.c_proj.out"}
    linears |= {f"enc_dec_attn.{n}" for n in ("fc_q.q", "fc_k.k", "fc_v.v", "c_proj.out")}
    assert set(found) == linears and len(found) == len(linears)
    assert all(name.startswith(("attn", "enc_dec_attn")) for name in touched)
    bound = math.sqrt(6 / (2 * DIM))
    for w in (*block.attn.c_attn.weight.chunk(3, dim=1), block.attn.c_proj.weight):
        assert 0.98 * bound < w.abs().max() <= bound
    values = block.attn.c_attn.weight[:, DIM:].clone()
    small_queries_(block, std=1e-3)
    assert torch.equal(block.attn.c_attn.weight[:, DIM:], values)
    assert block.attn.c_attn.weight[:, :DIM].abs().max() < 0.01
    zero_outputs_(block)
    assert not block.attn.c_proj.weight.any() and not block.enc_dec_attn.c_proj.weight.any()
    assert block.mlp["c_proj"].weight.any()


def test_gpt2_has_its_queries_apart_in_cross_attention():
    sizes = dict(q_attn=DIM, c_attn=2 * DIM, c_proj=DIM)
    attention = nn.ModuleDict({name: Conv1D(DIM, n) for name, n in sizes.items()})
    assert xavier_(attention) == ["q_attn.q", "c_attn.k", "c_attn.v", "c_proj.out"]


def test_small_queries_and_nothing_else():
    model = Model()
    nn.init.ones_(model.packed.in_proj_bias)
    found, touched = changed(model, lambda m: small_queries_(m, std=0.01))
    assert set(found) == {n for n in weights(model) if n.endswith(".q")}
    assert touched == {
        "packed.in_proj_weight", "packed.in_proj_bias", "apart.q_proj_weight",
        "block.attn.to_q.weight", "bert.query.weight", "bert.query.bias", "diffusers.to_q.weight",
        "diffusers.to_q.bias",
    }  # fmt: skip
    for name in found:
        w = weights(model)[name]
        assert abs(w.var() / 1e-4 - 1) < 5 * math.sqrt(2 / w.numel()), name
    assert model.packed.in_proj_bias.tolist() == [0.0] * DIM + [1.0] * 2 * DIM
    x = torch.randn(4, 2, DIM)
    p = model.packed(x, x, x)[1]
    assert (p - 0.25).abs().max() < 0.05  # attention begins almost even


def test_zero_outputs_are_the_identity_and_learn():
    model = Model()
    gates_(model, value=0.1)
    found, touched = changed(model, zero_outputs_)
    outs = [n for n in weights(model) if n.endswith(".out")]
    assert {f"{n}.out" for n in found} == set(outs)
    assert not any(weights(model)[n].any() for n in outs) and touched <= of_projections(model)
    x, media = torch.randn(2, 3, DIM), torch.randn(2, 1, 4, 2 * DIM)
    nn.init.zeros_(model.block.ff_gate)
    assert torch.equal(model.block(x, media), x)
    model.block(x, media).square().sum().backward()
    assert model.block.attn.to_out.weight.grad.any()


def test_closed_gates_and_zero_outputs_are_refused():
    """Together they have no gradient."""
    model = Model()
    with pytest.raises(ValueError, match=r"block.attn.to_out must not be 0 behind .*attn_gate"):
        zero_outputs_(model)
    assert all(w.any() for n, w in weights(model).items() if n.endswith("out"))  # none was touched
    gates_(model, value=0.2)
    zero_outputs_(model)
    with pytest.raises(ValueError, match=r"value must not be 0 for block.attn_gate while block.at"):
        gates_(model, value=0.0)
    found, touched = changed(model, lambda m: gates_(m, value=-0.3))
    assert set(found) == touched == {"block.attn_gate", "block.ff_gate"}
    torch.testing.assert_close(model.block.attn_gate.tanh(), torch.full((1,), -0.3))
    fresh = Model()
    assert len(gates_(fresh, value=0.0)) == 2 and not fresh.block.attn_gate.any()


L = nn.Linear(2, 2)
WRONG = {
    "model must have projections to q or k or v or out": lambda: xavier_(L),
    "model must have projections to q, found none": lambda: small_queries_(L),
    "model must have projections to out": lambda: zero_outputs_(Model().mlp),
    "model must have a gate": lambda: gates_(L),
    "model must be an nn.Module, got int": lambda: xavier_(3),
    "gain must be a positive number, got -1": lambda: xavier_(L, gain=-1),
    "std must be a number, got str": lambda: small_queries_(L, std="a"),
    "value must be between -1 and 1, got 1": lambda: gates_(Model(), value=1),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
