"""Statistics of the rows of a call without its output, on every path; who is told of a call."""

from __future__ import annotations

import pytest
import torch

from support.calls import build
from support.cases import CASES, Case
from support.numerics import assert_as_accurate
from xattn_kernels import (
    cross_attention,
    gated_residual,
    reference,
    topk_attention,
)
from xattn_kernels.core.dispatch import OBSERVERS
from xattn_kernels.ops.topk_attention import check
from xattn_kernels.stability import row_statistics as chunked
from xattn_kernels.stability.row_statistics import row_statistics
from xattn_kernels.torch_kernels import topk_attention as torch_topk

pytestmark = pytest.mark.usefixtures("as_users_run_it")
NAMES = ("lse", "entropy", "max_probability")
CHOSEN = [c for c in CASES if c.op == "cross_attention" and c.values == "normal" and c.Nq < 40]


def leaves_of(x) -> list[torch.Tensor]:
    return [
        t
        for t in (x.q, x.k, x.bias, x.scale_tensor)
        if isinstance(t, torch.Tensor) and t.requires_grad
    ]


@pytest.mark.parametrize("most", [1, 100, 2**22])
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_chunks_are_the_whole(case, most, monkeypatch):
    """The reference of the whole call, dropout apart, and its gradients."""
    x = build(case, torch.float64).inputs()
    monkeypatch.setattr(torch_topk, "CHUNK", most)
    expected, found = reference.softmax(reference.scores(x))[1:], row_statistics(x, "torch")
    leaves = leaves_of(x)
    for name, truth in zip(NAMES, expected, strict=True):
        ours = getattr(found, name)
        assert_as_accurate(ours, truth, truth, name)
    if not leaves or not expected[1].requires_grad:
        return
    grads = [
        torch.autograd.grad(
            t[1].sum() + t[0].clamp(min=-1e3).sin().sum(), leaves, allow_unused=True
        )
        for t in (expected, found[1:])  # after out
    ]
    for truth, ours in zip(*grads, strict=True):
        assert (truth is None) == (ours is None)
        if truth is not None:
            assert_as_accurate(ours, truth, truth)


def test_memory_is_bounded(monkeypatch):
    """No tensor of scores beyond CHUNK, forward or backward, where no row alone is."""
    sizes = []
    scores = chunked.reference.scores
    monkeypatch.setattr(torch_topk, "CHUNK", 500)
    monkeypatch.setattr(
        chunked.reference, "scores", lambda x: sizes.append(scores(x).numel()) or scores(x)
    )
    x = build(Case("many", B=3, Nq=30, Nk=40), torch.float32).inputs()
    row_statistics(x).entropy.sum().backward()
    assert max(sizes) <= 500 and sum(sizes) == 2 * 3 * 2 * 30 * 40


@pytest.mark.parametrize("choice", [dict(top_k=3), dict(topk_blocks=(16, 2))])
def test_of_top_keys(choice):
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 50, 16)
    expected = topk_attention(q, k, k, **choice, return_statistics=True, backend="eager")
    found = row_statistics(check(q, k, k, **choice), "torch")
    for name in NAMES:
        assert_as_accurate(*[getattr(t, name) for t in (found, expected, expected)], name)
    assert expected.entropy.max() < 3.5


def test_observers_are_told_and_observers_themselves_are_not():
    told = []
    q, gate = torch.randn(1, 2, 3, 16), torch.zeros(1)

    def observer(inputs, backend):
        told.append((type(inputs).__name__, backend))
        cross_attention(q, q, q)

    token = OBSERVERS.set((observer,))
    try:
        cross_attention(q, q, q)
        topk_attention(q, q, q, 2, backend="eager")
        gated_residual(q, q, gate, backend="eager")
        torch.compile(lambda t: cross_attention(t, t, t), backend="eager")(q)
    finally:
        OBSERVERS.reset(token)
    cross_attention(q, q, q)
    assert told == [
        ("CrossAttentionCall", "torch"),
        ("TopKAttentionCall", "eager"),
        ("GatedResidualCall", "eager"),
    ]


def test_an_observer_that_raises_leaves_no_trace():
    q = torch.randn(1, 2, 3, 16)

    def observer(*_):
        raise RuntimeError("mine")

    token = OBSERVERS.set((observer,))
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="mine"):
                cross_attention(q, q, q)
    finally:
        OBSERVERS.reset(token)
