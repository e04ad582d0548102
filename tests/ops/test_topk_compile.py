"""Top-k attention under torch.compile: its custom ops, their fakes, one graph."""

from __future__ import annotations

import pytest
import torch

from support import custom_ops
from support.calls import build
from support.cases import Case
from support.modes import modes
from xattn_kernels import masks, topk_attention
from xattn_kernels.core.call import (
    TopKBlocksCall,
    TopKImportanceCall,
    shared_fields,
)
from xattn_kernels.ops import topk_blocks as by_blocks
from xattn_kernels.ops.topk_attention import topk_op
from xattn_kernels.reference import blocked, seen_keys

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True),
]

# what is saved: bits; bits beside indices that are returned; indices; and of gathered keys
KEYS = {
    "bits": ({}, 5, False),
    "bits_and_indices": (dict(mask="causal", layout="BNHD"), 5, True),
    "indices": (dict(Nk=300, scale=(0.3, 0.2)), 8, False),
    "gathered": (dict(Nk=300, mask="bool_B11K"), 2, True),
}
BLOCKS = {
    "plain": {},
    "interval": dict(mask="causal", layout="BNHD"),
    "bool": dict(mask="bool_B11K", scale=(0.3, 0.2)),
    "out": dict(returns="out"),
}
BASE = dict(B=2, Nq=5, Nk=40)


def leaves_of(case: Case, mode) -> tuple:
    """(call, q, k and v, options of a call with the mask and scale of the case)."""
    call = build(case, mode.dtypes[1], mode.device)
    names = ("mask", "scale", "return_statistics")
    options = {name: call.options[name] for name in names if name in call.options}
    if "scale" in call.leaves:
        options["scale"] = call.leaves["scale"].requires_grad_()
    return call, [call.leaves[n] for n in "qkv"], options


@pytest.mark.parametrize("name", KEYS)
def test_custom_ops_of_keys(mode, name):
    flags, top_k, with_indices = KEYS[name]
    call, qkv, options = leaves_of(Case("ops", **BASE | flags), mode)
    checked = topk_attention.check(*qkv, top_k, return_indices=with_indices, **options)
    for backend in ("triton", "torch"):
        custom_ops.check(custom_ops.launches(topk_op, checked, backend, call.upstream))


@pytest.mark.parametrize("name", BLOCKS)
def test_custom_ops_of_blocks(mode, name):
    call, qkv, options = leaves_of(Case("ops", **BASE | BLOCKS[name]), mode)
    checked = topk_attention.check(*qkv, topk_blocks=(16, 2), **options)
    with custom_ops.Recorder() as recorder, torch.no_grad():
        fields = shared_fields(blocked(checked), "TopKAttentionCall")
        importance = TopKImportanceCall(**fields, seen=seen_keys(checked))
        by_blocks.importance_op.forward_op(
            *(getattr(importance, n) for n in by_blocks.importance_op.names), "triton"
        )
    custom_ops.check(recorder.calls)
    chosen = by_blocks.choose_triton(checked)
    with_blocks = TopKBlocksCall(**shared_fields(checked, "TopKAttentionCall"), chosen=chosen)
    for backend in ("triton", "torch"):
        custom_ops.check(
            custom_ops.launches(by_blocks.blocks_op, with_blocks, backend, call.upstream)
        )


@pytest.mark.parametrize(
    "chosen",
    [dict(top_k=5), dict(top_k=2), dict(top_k=400), dict(topk_blocks=(16, 2))],
    ids=["bits", "gathered", "all", "blocks"],
)
def test_torch_compile(mode, chosen):
    """One graph, with the mask built inside it; results and gradients as without the compiler."""

    def model(q, k, v, lengths):
        mask = masks.padding(lengths) & masks.causal(q.shape[2], k.shape[2], device=q.device)
        options = dict(mask=mask, return_statistics=True, return_indices=True, backend="triton")
        result = topk_attention(q * 2, k, v, **chosen, **options)
        return result.out.relu(), result.entropy, result.indices

    call = build(Case("compile", B=2, Nq=5, Nk=300), mode.dtypes[1], mode.device)
    leaves = [call.leaves[n] for n in "qkv"]
    lengths = torch.tensor([30, 290], device=mode.device)
    upstream = [call.upstream["out"], call.upstream["entropy"]]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = [f(*leaves, lengths) for f in (model, compiled)]
    grads = [torch.autograd.grad(o[:2], leaves, upstream) for o in found]
    for plain, traced in (*zip(*found, strict=True), *zip(*grads, strict=True)):
        torch.testing.assert_close(traced, plain)
