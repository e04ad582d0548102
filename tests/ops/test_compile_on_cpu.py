"""torch.compile off the GPU: default backends, with graph breaks where intervals are read."""

from __future__ import annotations

import pytest
import torch

from xattn_kernels import (
    MultiheadAttention,
    cross_attention,
    gated_residual_norm,
    masks,
    topk_attention,
)

MASKS = {"none": lambda: None, "interval": lambda: masks.window(5, 7, left=3)}
each_mask = pytest.mark.parametrize("mask", MASKS)


@pytest.fixture(autouse=True)
def on_cpu(as_users_run_it):
    """Without Triton's interpreter, as on a machine without a GPU."""
    torch._dynamo.reset()
    torch.manual_seed(0)


def assert_same(model, inputs: list, parameters: list) -> None:
    """Outputs and gradients, of the model and of the compiled model, twice."""
    for _ in range(2):
        found = []
        for f in (model, torch.compile(model, backend="aot_eager")):
            outs = [t for t in f(*inputs) if t is not None]
            loss = sum(t.square().sum() for t in outs)
            found.append([*outs, *torch.autograd.grad(loss, [*inputs, *parameters])])
        for plain, compiled in zip(*found, strict=True):
            torch.testing.assert_close(compiled, plain)


def test_sizes_that_change_without_a_mask_break_no_graph():
    compiled = torch.compile(cross_attention, backend="aot_eager", fullgraph=True)
    for N in (5, 6, 9):
        q, k, v = (torch.randn(2, 2, n, 16) for n in (N, 2 * N, 2 * N))
        torch.testing.assert_close(compiled(q, k, v), cross_attention(q, k, v))


@each_mask
def test_cross_attention(mask):
    mask = MASKS[mask]()
    inputs = [torch.randn(2, 2, n, 16, requires_grad=True) for n in (5, 7, 7)]
    assert_same(lambda q, k, v: (cross_attention(q, k, v, mask=mask),), inputs, [])


ONE_GRAPH = {
    "cross_attention": (cross_attention, [(2, 2, n, 16) for n in (5, 7, 7)]),
    "topk_attention": (lambda q, k, v: topk_attention(q, k, v, 3), [(2, 2, 5, 16)] * 3),
    "gated_residual": (lambda *t: gated_residual_norm(*t, norm="rms").normed, [(3, 8), (3, 8), ()]),
}


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_choosing_a_backend_breaks_no_graph(name):
    """What the default looks at, of the CUDA extension too, can be traced."""
    op, shapes = ONE_GRAPH[name]
    inputs = [torch.randn(shape) for shape in shapes]
    torch.testing.assert_close(
        torch.compile(op, fullgraph=True, backend="aot_eager")(*inputs), op(*inputs)
    )


@pytest.mark.slow
@each_mask
@pytest.mark.parametrize("need_weights", [True, False])
def test_module(mask, need_weights):
    module, mask = MultiheadAttention(32, 4), MASKS[mask]()
    inputs = [torch.randn(n, 2, 32, requires_grad=True) for n in (5, 7, 7)]

    def model(query, key, value):
        return module(query, key, value, need_weights=need_weights, mask=mask)

    assert_same(model, inputs, list(module.parameters()))
