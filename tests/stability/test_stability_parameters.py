"""Which parameters are those of cross-attention; optimiser groups; freezing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xattn_kernels import (
    GatedCrossAttentionBlock,
    MultiheadAttention,
    PerceiverResampler,
    VisualGPTBlock,
    cross_attention_layers,
    freeze,
    gate_parameters,
    optimizer_groups,
    xattn_parameters,
)


class GatedFeedForward(nn.Module):
    """Llama's names, and a router's: gates that are no gates of cross-attention."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.down_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.gate = nn.Linear(8, 2)
        self.post_norm = nn.RMSNorm(8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.resampler = PerceiverResampler(dim=8, num_latents=2, depth=1, dim_head=4, heads=2)
        self.layers = nn.ModuleList([self.layer() for _ in range(2)])
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.norm = nn.LayerNorm((2, 8))  # of two dimensions, and no matrix

    @staticmethod
    def layer() -> nn.ModuleDict:
        return nn.ModuleDict(
            dict(
                self_attn=MultiheadAttention(8, 2, dropout=0.1),
                block=GatedCrossAttentionBlock(dim=8, dim_head=4, heads=2),
                mlp=GatedFeedForward(),
                dropout=nn.Dropout(0.1),
            )
        )


def test_names_of_cross_attention():
    model = Model()
    found = xattn_parameters(model)
    expected = [n for n, _ in model.named_parameters() if "resampler" in n or "block" in n]
    assert list(found) == expected and all(found[n] is model.get_parameter(n) for n in expected)
    assert list(xattn_parameters(model, lambda name, p: p.dim() == 1 and "mlp" in name)) == [
        f"layers.{i}.mlp.{n}" for i in range(2) for n in ("gate.bias", "post_norm.weight")
    ]


def test_names_of_other_models():
    torchs = nn.TransformerDecoderLayer(8, 2)
    assert list(xattn_parameters(torchs)) == [
        n for n, _ in torchs.named_parameters() if n.startswith("multihead_attn")
    ]
    visual = xattn_parameters(VisualGPTBlock(dim=8, heads=2, n_levels=2))
    assert {n.split(".")[0] for n in visual} == {"enc_dec_attn", "fc_alpha1", "fc_alpha2"}
    idefics = nn.Module()
    idefics.alpha_cross_attn, idefics.alpha_dense = (nn.Parameter(torch.zeros(8)) for _ in "ab")
    idefics.gate = nn.Parameter(torch.zeros(8, 8))  # a matrix is no gate
    assert list(gate_parameters(idefics)) == ["alpha_cross_attn", "alpha_dense"]
    assert list(xattn_parameters(idefics)) == ["alpha_cross_attn", "alpha_dense"]


def test_gates_and_layers():
    model = Model()
    assert list(gate_parameters(model)) == [
        f"layers.{i}.block.{gate}" for i in range(2) for gate in ("attn_gate", "ff_gate")
    ]
    layers = cross_attention_layers(model)
    assert list(layers) == ["resampler", "layers.0.block", "layers.1.block"]
    assert layers["resampler"] is model.resampler


def test_groups():
    """Each trainable parameter once, by its name's rules."""
    model = Model()
    model.layers[0].self_attn.requires_grad_(False)
    options = dict(lr=1e-5, xattn_lr=1e-4, weight_decay=0.1, rates={"resampler": 3e-4, "late": 1.0})
    groups = {g["name"]: g for g in optimizer_groups(model, **options)}
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)]: g for g in groups.values() for p in g["params"]}
    assert sum(len(g["params"]) for g in groups.values()) == len(taken)
    assert taken.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, group in taken.items():
        rate = 3e-4 if "resampler" in name else 1e-4 if "block" in name else 1e-5
        plain = any(w in name for w in ("norm", "bias", "_gate", "block.ff.0", "layers.0.1.0"))
        assert group["lr"] == rate, name
        assert group["weight_decay"] == (0.0 if plain else 0.1), name
    assert set(groups) == {
        f"{kind}{end}" for kind in ("resampler", "cross_attention", "other")
        for end in ("", "/no_decay")
    }  # fmt: skip
    optimizer = torch.optim.AdamW(groups.values(), betas=(0.9, 0.98))
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in groups.values()]


def test_freeze_all_but_the_new_layers_and_back():
    model = Model()
    model.embed.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    new = xattn_parameters(model)
    frozen = freeze(model, but=lambda name, p: name in new)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(new)
    for _ in range(2):
        for i in range(2):
            assert not model.layers[i].self_attn.training and not model.layers[i].mlp.training
            assert model.layers[i].block.training and model.layers[i].block.ff.training
        assert model.training and model.resampler.training and not model.embed.training
        model.train()
        assert model.layers[0].self_attn.training  # what frozen.train() is for
        assert frozen.train() is model
    model.eval()
    frozen.undo()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    whole = freeze(Model())
    assert not any(m.training for m in whole.train().modules())
    whole.undo()
    assert {n: m.training for n, m in whole.model.named_modules()} == modes


M = nn.Linear(2, 2)
WRONG = {
    "model must be an nn.Module, got dict": lambda: xattn_parameters({}),
    "model must be an nn.Module, got list": lambda: freeze([M]),
    "but must be a function or None, got list": lambda: freeze(M, but=[M]),
    "match must be a function or None, got str": lambda: xattn_parameters(M, "attn"),
    "xattn_lr must be at least 0 and finite, got -1": lambda: optimizer_groups(M, xattn_lr=-1),
    "weight_decay must be a number, got str": lambda: optimizer_groups(M, weight_decay="no"),
    "head must be at least 0": lambda: optimizer_groups(M, rates={"head": float("inf")}),
    "rates must be a mapping of regular": lambda: optimizer_groups(M, rates=[("head", 1.0)]),
    "rates must be by regular expressions, got int": lambda: optimizer_groups(M, rates={1: 1.0}),
    r"rates must be by regular expressions, got '\('": lambda: optimizer_groups(
        M, rates={"(": 1.0}
    ),
    "model must have a parameter that requires grad": lambda: optimizer_groups(nn.ReLU()),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()
