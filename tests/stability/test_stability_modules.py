"""The training tools know the cross-attention of every module of the package."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from xattn_kernels import (
    AttentionDropout,
    AttentionPooler,
    CoCaCrossAttention,
    GatedCrossAttentionBlock,
    LateFusion,
    MidFusion,
    MultiheadAttention,
    NormalizedCrossAttention,
    PerceiverResampler,
    QFormer,
    SparseCrossAttention,
    StabilityMonitor,
    StableCrossAttention,
    VisualGPTBlock,
    attention_statistics,
)
from xattn_kernels.stability.initialisers import projections

B, N, NK, DIM, HEADS = 2, 5, 9, 32, 2
SIZES = dict(dim=DIM, heads=HEADS)
X, MEDIA = torch.randn(B, N, DIM), torch.randn(B, NK, DIM)
PACKED = dict(embed_dim=DIM, num_heads=HEADS, batch_first=True)

# name: (module, its arguments, {layer: (queries, keys)} of what must be seen)
CASES = {
    "multihead": (MultiheadAttention(**PACKED), (X, MEDIA, MEDIA), {"MultiheadAttention": (N, NK)}),
    "sparse": (
        SparseCrossAttention(**PACKED, top_k=3), (X, MEDIA, MEDIA),
        {"SparseCrossAttention": (N, 3)},
    ),
    "gated": (GatedCrossAttentionBlock(**SIZES), (X, MEDIA[:, None]), {"attn": (N, NK)}),
    "resampler": (
        PerceiverResampler(**SIZES, depth=1, num_latents=4), (MEDIA[:, None, None],),
        {"layers.0.0": (4, NK + 4)},
    ),
    "normalized": (
        NormalizedCrossAttention(**SIZES), (X, MEDIA), {"NormalizedCrossAttention": (N, NK)},
    ),
    "stable": (StableCrossAttention(**SIZES), (X, MEDIA), {"attn": (N, NK)}),
    "qformer": (
        QFormer(**SIZES, depth=3, num_queries=4), (MEDIA,),
        {f"encoder.layer.{i}.crossattention": (4, NK) for i in (0, 2)},
    ),
    "coca": (CoCaCrossAttention(**SIZES), (X, MEDIA), {"CoCaCrossAttention": (N, NK)}),
    "pooler": (AttentionPooler(**SIZES, n_queries=4), (MEDIA,), {"attn": (4, NK)}),
    "pooler of one head": (
        AttentionPooler(**SIZES, n_queries=4, one_kv_head=True), (MEDIA,),
        {"AttentionPooler": (4, NK)},
    ),
    "visualgpt": (
        VisualGPTBlock(**SIZES, n_levels=1), (X, MEDIA[:, None]), {"enc_dec_attn": (N, NK)},
    ),
    "mid": (
        MidFusion([nn.Linear(DIM, DIM) for _ in range(3)], **SIZES, every=2), (X, MEDIA[:, None]),
        {f"blocks.{i}.attn": (N, NK) for i in (0, 1)},
    ),
    "late": (
        LateFusion(dim=DIM, pool="attention", heads=HEADS), (MEDIA, X),
        {"vision_pool.attn": (1, NK), "text_pool.attn": (1, N)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_its_projections_are_found(name):
    """Of every layer that is seen: one initialiser for all of them."""
    module, _, layers = CASES[name]
    found = {}
    for p in projections(module):
        found.setdefault(p.role, set()).add(p.name)
    assert found.keys() == {"q", "k", "v", "out"}
    for layer in layers:
        inside = (f"{layer}.",) if layer in dict(module.named_modules()) else ("",)
        assert all(any(f"{n}.".startswith(inside) for n in names) for names in found.values()), (
            layer
        )


def test_the_schedule_of_attention_dropout_leaves_other_dropout_alone():
    module = QFormer(**SIZES, depth=1, num_queries=4, dropout=0.2)
    AttentionDropout(module, total_steps=2, start=0.5)
    for part in (layer := module.encoder["layer"][0]).attention, layer.crossattention:
        assert (part.dropout, part.hidden_dropout) == (0.5, 0.2)
    assert layer.hidden_dropout == module.hidden_dropout == 0.2


@pytest.mark.parametrize("name", CASES)
def test_its_layers_are_seen(name):
    module, arguments, layers = CASES[name]
    with StabilityMonitor(module) as monitor:
        result = module(*arguments)
        outs = result if isinstance(result, tuple) else (result,)
        sum(out.square().sum() for out in outs if out is not None).backward()
        monitor.step()
    values = monitor.last.values
    seen = {name.rpartition("/")[0] for name in values if name.startswith("attention/")}
    assert seen == {f"attention/{layer}" for layer in layers}
    for layer, (queries, keys) in layers.items():
        assert values[f"attention/{layer}/rows"] == B * HEADS * queries
        assert 0 < values[f"attention/{layer}/entropy"] <= math.log(keys) + 1e-5
    with attention_statistics(module) as found:
        module(*arguments)
    assert found.keys() == layers.keys()
    for layer, statistics in found.items():
        assert statistics.entropy.shape == (B, HEADS, layers[layer][0])
