"""The CUDA kernels under torch.compile and torch.export: one graph, launches as its nodes."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export

from support.modes import modes, needs_extension
from xattn_kernels import cross_attention, gated_residual, gated_residual_norm, topk_attention
from xattn_kernels.cuda_kernels import launch

pytestmark = needs_extension
CUDA = dict(backend="cuda")
ATTENTION = [(2, 2, n, 16) for n in (5, 7, 7)]
ROWS = [(2, 5, 32), (2, 5, 32), (1,), (32,)]
OPS = {
    "cross_attention": (lambda *t: cross_attention(*t, **CUDA), ATTENTION),
    "topk_attention": (lambda *t: topk_attention(*t, 3, **CUDA), ATTENTION),
    "gated_residual": (lambda x, h, gate: gated_residual(x, h, gate, **CUDA), ROWS[:3]),
    "gated_residual_norm": (
        lambda x, h, gate, w: gated_residual_norm(x, h, gate, weight=w, **CUDA).normed,
        ROWS,
    ),
}
each_op = pytest.mark.parametrize("name", OPS)


@pytest.mark.parametrize("mode", modes("cuda_sm_80", "cuda_gpu"), indirect=True)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@each_op
def test_torch_compile_takes_it_whole(mode, name, dynamic):
    torch.manual_seed(0)
    torch._dynamo.reset()
    op, shapes = OPS[name]
    leaves = [torch.randn(s, device=mode.device, requires_grad=True) for s in shapes]
    found = []
    for f in (op, torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
        out = f(*leaves)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=0)


@each_op
def test_an_export_is_for_any_number_of_rows(name, monkeypatch):
    """Up to the numbers that top_k keeps in one form, bits or indices of keys."""
    monkeypatch.setenv("XATTN_CUDA_ON_CPU", "1")
    torch._dynamo.reset()
    op, shapes = OPS[name]
    queries, keys, rows = {2: Dim("Nq", min=2)}, {2: Dim("Nk", min=4)}, {1: Dim("N", min=2)}
    if name == "topk_attention":
        keys = {2: Dim("Nk", min=4, max=103)}
    sizes = (queries, keys, keys) if shapes is ATTENTION else (rows, rows, None, None)

    class Model(torch.nn.Module):
        def forward(self, *leaves):
            return op(*leaves)

    leaves = tuple(torch.randn(s) for s in shapes)
    program = export(Model(), leaves, dynamic_shapes=(sizes[: len(shapes)],), strict=True)
    assert any(f"{name[:12]}" in str(node.target) for node in program.graph.nodes)


def test_reasons_of_a_device_are_constants_of_a_graph(monkeypatch):
    """A trace asks neither the extension nor the driver."""
    torch._dynamo.reset()
    monkeypatch.setattr(launch, "driver_version", lambda: 13000)
    graph = torch.compile(
        lambda x: x + len(launch.build_reasons(7, 5)), fullgraph=True, backend="eager"
    )
    assert graph(torch.zeros(1)).item() == len(launch.build_reasons(7, 5)) >= 1
