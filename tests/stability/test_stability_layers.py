"""Statistics of a model's layers while it runs, and which layers count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.numerics import assert_as_accurate
from xattn_kernels import (
    MultiheadAttention,
    PerceiverResampler,
    SparseCrossAttention,
    StabilityMonitor,
    attention_statistics,
    cross_attention,
    entropy_loss,
)
from xattn_kernels.core.dispatch import OBSERVERS
from xattn_kernels.stability.layers import ObservedCall, sides

DIM = 32


class Model(nn.Module):
    def __init__(self, **made):
        super().__init__()
        self.self_attn = MultiheadAttention(DIM, 2, batch_first=True, **made)
        self.cross_attn = MultiheadAttention(DIM, 2, batch_first=True, **made)
        self.sparse = SparseCrossAttention(DIM, 2, top_k=3, batch_first=True, **made)

    def forward(self, x, media):
        x = x + self.self_attn(x, x, x, need_weights=False)[0]
        x = x + self.cross_attn(x, media, media, need_weights=False)[0]
        return x + self.sparse(x, media, media, need_weights=False)[0]


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(2, 5, DIM, dtype=dtype), torch.randn(2, 9, DIM, dtype=dtype)


def test_which_layers_count():
    model = Model()
    with attention_statistics(model) as found:
        model(*inputs())
    assert list(found) == ["cross_attn", "sparse"]
    assert found["sparse"].entropy.max() <= torch.tensor(3.0).log() + 1e-6
    chosen = lambda name, module: name == "self_attn" and module is model.self_attn  # noqa: E731
    with attention_statistics(model, layers=chosen) as found:
        model(*inputs())
    assert list(found) == ["self_attn"] and found["self_attn"].entropy.shape == (2, 2, 5)
    with attention_statistics(model.cross_attn) as found:
        cross_attention(*torch.randn(3, 1, 2, 3, 16))  # of nobody in the model
    assert not found


def test_statistics_by_definition_with_their_gradient():
    model = Model(dtype=torch.float64, backend="eager")
    x, media = inputs(torch.float64)
    weight = model.cross_attn.in_proj_weight
    with attention_statistics(model) as found:
        model(x, media)
    x = x + model.self_attn(x, x, x, need_weights=False)[0]
    q, k = (
        (t @ w.T).view(2, -1, 2, 16).transpose(1, 2)
        for t, w in zip((x, media), weight.chunk(3)[:2], strict=True)
    )
    p = (q @ k.mT / 4).softmax(-1)
    truth, ours = -(p * p.log()).sum(-1), found["cross_attn"].entropy
    assert_as_accurate(ours, truth, truth)
    weights = torch.randn_like(truth)
    grads = [torch.autograd.grad((t * weights).sum(), weight)[0] for t in (ours, truth)]
    assert_as_accurate(grads[0], grads[1], grads[1])


def test_under_autocast():
    """bfloat16 queries and keys, statistics in float32, on the way of the call and by equations."""
    found = []
    for dtype, backend in ((torch.float64, "eager"), (None, "eager"), (None, None)):
        torch.manual_seed(1)
        model = Model(backend=backend)
        if dtype is not None:
            model = model.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            with attention_statistics(model, layers=lambda name, _: name == "cross_attn") as seen:
                model(*inputs(dtype or torch.float32))
            entropy = seen["cross_attn"].entropy
            loss = entropy_loss(seen["cross_attn"])
        (grad,) = torch.autograd.grad(loss, model.cross_attn.in_proj_weight)
        found.append((entropy, grad))
    assert found[2][0].dtype == found[2][1].dtype == torch.float32
    for truth, eager, ours in zip(*found, strict=True):
        assert_as_accurate(ours, eager, truth)


def test_entropy_of_a_collapsed_layer_rises():
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.cross_attn.in_proj_weight[: 2 * DIM] *= 3.0
    optimizer, entropies = torch.optim.Adam(model.parameters(), lr=0.02), []
    for _ in range(60):
        with attention_statistics(model, layers=lambda name, _: name == "cross_attn") as found:
            model(*inputs())
        entropies.append(found["cross_attn"].entropy.mean().item())
        optimizer.zero_grad()
        entropy_loss(found["cross_attn"], 2.0).backward()
        optimizer.step()
    assert entropies[0] < 0.9 < 1.5 < entropies[-1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_and_errors_leave_nobody_watching(use_reentrant):
    """Also where the second run of a checkpoint is stopped early; what the monitor sees of both
    runs has the means of one."""

    class Checkpointed(Model):
        def forward(self, x, media):
            return checkpoint(super().forward, x, media, use_reentrant=use_reentrant)

    found = []
    for kind in (Model, Checkpointed):
        torch.manual_seed(1)
        model = kind()
        x, media = inputs()
        with StabilityMonitor(model) as monitor:
            loss = model(x.requires_grad_(), media).sum()
            loss.backward()
            assert not OBSERVERS.get()
            with pytest.raises(RuntimeError, match="batch of query"):
                model(x, media[:1])
            assert not OBSERVERS.get()
            found.append(monitor.step(loss).values)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    plain, twice = ({n: v for n, v in f.items() if not n.endswith("rows")} for f in found)
    assert twice == pytest.approx(plain)


def test_left_within_a_forward():
    """An error of the caller's, in the middle."""
    model = Model()
    with pytest.raises(KeyboardInterrupt), attention_statistics(model):
        model.cross_attn.register_forward_hook(interrupt)
        model(*inputs())
    assert not OBSERVERS.get()


def interrupt(*_):
    raise KeyboardInterrupt


def test_sides_of_a_resampler():
    """Its attention takes the media first; latents are the queries."""
    resampler, calls = PerceiverResampler(dim=DIM, num_latents=4, depth=1, dim_head=16, heads=2), {}
    with attention_statistics(resampler) as found:
        resampler(torch.randn(2, 1, 1, 9, DIM))
    (name,) = found
    assert found[name].entropy.shape[-1] == 4
    module = resampler.get_submodule(name)
    media, latents = torch.randn(2, 9, DIM), torch.randn(2, 4, DIM)
    queries, keys = sides(ObservedCall(name, module, (media, latents), calls, "eager"))
    assert queries is latents and keys is media


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="model must be an nn.Module, got int"):
        with attention_statistics(3):
            pass
