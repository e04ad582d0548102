"""`entropy_loss` by its definition; its gradient through the kernels, of an op and of a model."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from support.modes import modes
from support.numerics import assert_as_accurate
from xattn_kernels import (
    CrossAttentionResult,
    GatedCrossAttentionBlock,
    KeyInterval,
    MultiheadAttention,
    attention_statistics,
    cross_attention,
    entropy_loss,
    topk_attention,
)


def attention(dtype, backend, device="cpu", **options):
    """(result, leaves); the second row of the first batch element has no key."""
    torch.manual_seed(1)
    shapes = (2, 2, 5, 16), (2, 1, 40, 16), (2, 1, 40, 16)
    leaves = [torch.randn(s, dtype=torch.float64).to(torch.bfloat16) for s in shapes]
    leaves = [t.to(device, dtype).requires_grad_() for t in leaves]
    start = torch.tensor([[0, 9, 3, 0, 30], [0, 0, 5, 5, 5]], dtype=torch.int32, device=device)
    stop = torch.tensor([[7, 9, 40, 33, 31], [40] * 5], dtype=torch.int32, device=device)
    mask = KeyInterval(start, stop)
    return cross_attention(*leaves, mask=mask, return_statistics=True, backend=backend), leaves


FORMS = {
    "mean": {}, "per_row": dict(per_row=True), "one_sided": dict(per_row=True, one_sided=True),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_entropy_by_definition(form):
    result, (q, k, _) = attention(torch.float64, "eager")
    options, rows = FORMS[form], []
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (2, 2, 5))).tolist():
        start, stop = [[(0, 7), (9, 9), (3, 40), (0, 33), (30, 31)], [(0, 40)] * 2 + [(5, 40)] * 3][
            b
        ][i]
        if start < stop:
            p = (k[b, 0, start:stop] @ q[b, h, i] / 4).softmax(0)
            rows.append(-(p * p.log()).sum())
    distance = 2.5 - torch.stack(rows)
    distance = distance if options.get("per_row") else distance.mean()
    distance = distance.clamp(min=0) if options.get("one_sided") else distance
    expected = distance.square().mean()
    loss = entropy_loss(result, 2.5, **options)
    assert_as_accurate(loss, expected, expected)
    found, exact = (torch.autograd.grad(t, (q, k)) for t in (loss, expected))
    for ours, truth in zip(found, exact, strict=True):
        assert_as_accurate(ours, truth, truth)


@pytest.mark.parametrize("form", FORMS)
def test_entropy_gradient_through_the_kernels(mode, form):
    found = []
    coarse = mode.dtypes[form == "mean"]
    for dtype, backend in ((torch.float64, "eager"), (coarse, "eager"), (coarse, "triton")):
        result, leaves = attention(dtype, backend, mode.device)
        loss = entropy_loss(result, 2.5, **FORMS[form])
        found.append([loss.to(dtype), *torch.autograd.grad(loss, leaves[:2])])
    assert found[0][1][0, :, 1].abs().max() == 0 < found[0][1][0, :, 0].abs().min()
    for name, truth, eager, ours in zip(("loss", "dq", "dk"), *found, strict=True):
        assert_as_accurate(ours, eager, truth, name)


def test_entropy_of_tensors_masks_and_nothing():
    entropy = torch.tensor([[1, math.nan], [3, 2]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    for form in FORMS.values():
        loss = entropy_loss(entropy, 1.0, row_mask=mask, **form)
        assert loss.item() == (
            1.0 if not form else (4.0 + 1.0) / 3 if "one_sided" not in form else 0.0
        )
        (grad,) = torch.autograd.grad(loss, entropy)
        assert grad.isfinite().all() and grad[0, 1] == 0
        assert entropy_loss(entropy, 1.0, row_mask=mask & False, **form).item() == 0.0
    q = torch.randn(1, 2, 3, 16)
    nothing = cross_attention(q, q[:, :, :0], q[:, :, :0], return_statistics=True, backend="eager")
    assert entropy_loss(nothing).item() == 0.0
    sparse = topk_attention(q, q, q, 2, return_statistics=True)
    assert entropy_loss(sparse, 0.0).item() == sparse.entropy.mean().square()


class Model(torch.nn.Module):
    """A block, self-attention and cross-attention of text."""

    def __init__(self, backend, dtype):
        super().__init__()
        made = dict(backend=backend, dtype=dtype)
        self.block = GatedCrossAttentionBlock(dim=32, dim_head=16, heads=2, **made)
        self.self_attn = MultiheadAttention(32, 2, batch_first=True, **made)
        self.cross_attn = MultiheadAttention(32, 2, batch_first=True, **made)

    def forward(self, x, media, locations):
        x = self.block(x, media, locations)
        x = x + self.self_attn(x, x, x, need_weights=False)[0]
        flat = media.flatten(1, 2)
        return x + self.cross_attn(x, flat, flat, need_weights=False)[0]


def of_model(model, call):
    with attention_statistics(model) as found:
        out = model(*call)
    assert list(found) == ["block.attn", "cross_attn"] and found["cross_attn"].out is None
    loss = sum(entropy_loss(s, 1.5, per_row=True) for s in found.values()).to(out.dtype)
    names = ["block.attn.norm.weight", "block.attn.to_q.weight", "cross_attn.in_proj_weight"]
    return [loss, *torch.autograd.grad(loss, [model.get_parameter(n) for n in names])]


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
def test_gradient_of_a_model_through_the_kernels(mode):
    torch.manual_seed(0)
    exact = Model("eager", torch.float64).to(mode.device)
    locations = torch.zeros(2, 5, dtype=torch.bool, device=mode.device)
    locations[:, 1] = locations[:, 3] = True
    inputs = [torch.randn(2, 5, 32), torch.randn(2, 2, 9, 32)]
    found = []
    for dtype, backend in (
        (torch.float64, "eager"),
        (torch.float32, "eager"),
        (torch.float32, "triton"),
    ):
        model = copy.deepcopy(exact).to(dtype)
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        call = [t.to(mode.device, dtype) for t in inputs]
        found.append(of_model(model, (*call, locations)))
    for truth, eager, ours in zip(*found, strict=True):
        assert truth.abs().max() > 0
        assert_as_accurate(ours, eager, truth)


I, T = torch.zeros(5, 3, 8), torch.zeros(5, 8)
RESULT = CrossAttentionResult(I, lse=T)
WRONG = {
    "statistics must be of a call with return_statistics=True": lambda: entropy_loss(RESULT),
    "statistics must be a CrossAttentionResult, .*, got NoneType": lambda: entropy_loss(None),
    "target must be a finite number, got inf": lambda: entropy_loss(T, math.inf),
    "row_mask must be a bool tensor, got torch.float32": lambda: entropy_loss(T, row_mask=T),
    r"row_mask must broadcast to the entropy, \[5, 8\] on cpu, got \[4\]": lambda: entropy_loss(
        T, row_mask=T[0, :4] > 0
    ),
    "got .* on meta": lambda: entropy_loss(T, row_mask=(T > 0).to("meta")),
    "per_row must be a bool, got int": lambda: entropy_loss(T, per_row=1),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()


def test_statistics_are_of_a_module():
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        with attention_statistics(of_model):
            pass
