"""Under autocast every backend computes what it computes without, from the dtypes it is given."""

from __future__ import annotations

import pytest
import torch

from support.calls import Call, build, run
from support.cases import Case
from support.modes import modes
from xattn_kernels import MultiheadAttention, cross_attention, masks

FLAGS = {
    "plain": {},
    "interval": dict(mask="causal"),
    "joined": dict(mask="causal", Nq=80, Nk=80),
    "bool": dict(mask="bool_BHQK"),
    "bias": dict(bias="1HQK"),
    "scale": dict(scale=(0.3, -0.2)),
    "widths": dict(Dv=24),
}
OPS = ["cross_attention", "attention_weights"]


def results(call: Call, backend: str, autocast: bool) -> dict[str, torch.Tensor]:
    """Of a forward under autocast, with the backward after it, as PyTorch asks for."""
    device = call.leaves["q"].device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        out = call.op(**call.leaves, **call.options, backend=backend)
    upstream = next(iter(call.upstream.values()))
    grads = torch.autograd.grad(out, list(call.leaves.values()), upstream)
    return dict(out=out) | {f"d{n}": g for n, g in zip(call.leaves, grads, strict=True)}


def assert_equal(found: dict, expected: dict) -> None:
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name], t), name


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forward_under_autocast(backend, op, flags, dtype):
    call = build(Case("autocast", op=op, returns="out", **flags), dtype)
    assert_equal(results(call, backend, True), results(call, backend, False))


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("flags", [{}, dict(bias="1HQK", mask="causal")], ids=["plain", "bias"])
@pytest.mark.parametrize("op", OPS)
def test_kernels_under_autocast(mode, op, flags):
    """Forward and backward."""
    call = build(Case("autocast", op=op, **mode.sizes | flags), torch.float32, mode.device)
    plain = run(call, "triton")
    with torch.autocast(mode.device, dtype=torch.bfloat16):
        cast = run(call, "triton")
    assert_equal(cast, plain)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_backward_of_torch_under_autocast(flags):
    """PyTorch casts the products of a backward that runs under autocast; this one has none."""
    call = build(Case("autocast", returns="out", **flags), torch.float32)
    plain = run(call, "torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(call, "torch")
    assert_equal(cast, plain)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("need_weights", [True, False])
def test_module_under_autocast(need_weights, dropout):
    """Autocast has its way with the projections, and with nothing between them."""
    module = MultiheadAttention(32, 4, bias=False, dropout=dropout)
    with torch.no_grad():
        for weight in (*module.in_proj_weight.split(32), module.out_proj.weight):
            weight.copy_(torch.eye(32))
    x = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    mask = masks.causal(5, 5)

    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x, x, x, mask=mask, need_weights=need_weights)
    torch.manual_seed(0)
    half = x.bfloat16()
    expected = module.bfloat16()(half, half, half, mask=mask, need_weights=need_weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs is None or torch.equal(ours, theirs)


def test_compiled_and_exported_under_autocast():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return cross_attention(q, k, v, backend="torch")

    q, k, v = torch.randn(3, 1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    plain = Model()(q, k, v)
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)(q, k, v)
        exported = torch.export.export(Model(), (q, k, v)).module()(q, k, v)
    assert torch.equal(compiled, plain) and torch.equal(exported, plain)


def test_a_meta_device_has_no_autocast():
    q = torch.zeros(1, 2, 3, 16, device="meta")
    assert cross_attention(q, q, q, backend="torch").shape == q.shape
