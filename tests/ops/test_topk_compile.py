"""Top-k attention under torch.compile: its custom ops, their fakes, one graph."""

from __future__ import annotations

import math

import pytest
import torch

from support.calls import build
from support.cases import Case
from support.modes import modes
from xattn_kernels import masks, topk_attention
from xattn_kernels.ops import topk_blocks as by_blocks
from xattn_kernels.reference import seen_keys

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


def parts(c: Case, mode):
    """(call, q, k, v, scale, start, stop, mask; the number for a scale)."""
    call = build(c, mode.dtypes[1], mode.device)
    x = call.inputs()
    scale = x.scale if isinstance(x.scale, torch.Tensor) else None
    tensors = [x.q, x.k, x.v, scale, *x.bounds(), x.mask]
    tensors = [None if t is None else t.detach() for t in tensors]
    return call, x, tensors, math.nan if scale is not None else x.scale


def keys_arguments(mode, flags: dict, top_k: int, with_indices: bool):
    from xattn_kernels.ops.topk_attention import backward_op, forward_op

    call, x, tensors, scale = parts(Case("ops", **BASE | flags), mode)
    options = (scale, top_k, x.return_statistics, with_indices, False)
    out, lse, entropy, _, bits, indices = forward_op(*tensors, *options)
    yield forward_op, (*tensors, *options)
    upstream = [call.upstream.get(name) for name in ("out", "lse", "entropy")]
    saved = (bits if bits.numel() else indices, out, lse, entropy)
    needs = [t is not None for t in tensors[:4]]
    yield backward_op, (*upstream, *tensors[:6], *saved, *options, needs)


def blocks_arguments(mode, flags: dict):
    from xattn_kernels.ops.topk_blocks import backward_op, forward_op, importance_op

    call, x, tensors, scale = parts(Case("ops", **BASE | flags), mode)
    y = topk_attention.check(
        x.q, x.k, x.v, topk_blocks=(16, 2), mask=call.options.get("mask"), scale=x.scale
    )
    interval, mask = by_blocks.blocked(y)
    bounds = (None, None) if interval is None else interval.expand(x.B, x.Nq)
    q, k, _, scales = tensors[:4]
    yield importance_op, (q, k, seen_keys(y), scales, *bounds, mask, scale, 16, 64, False)
    blocks = by_blocks.choose_triton(y)
    options = (scale, 16, 64, x.return_statistics, False)
    out, lse, entropy, _ = forward_op(*tensors, blocks, *options)
    yield forward_op, (*tensors, blocks, *options)
    upstream = [call.upstream.get(name) for name in ("out", "lse", "entropy")]
    needs = [t is not None for t in tensors[:4]]
    yield backward_op, (*upstream, *tensors, blocks, out, lse, entropy, *options, needs)


def check(launches) -> None:
    """opcheck, and of each result the strides: a wrong one shows only after the compiler has relied
    on it."""
    for launch, arguments in launches:
        torch.library.opcheck(launch, arguments)
        real = launch(*arguments)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as fake_mode:
            fake = launch(
                *(fake_mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
            )
        results = [(t,) if isinstance(t, torch.Tensor) else t for t in (real, fake)]
        for a, b in zip(*results, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", KEYS)
def test_custom_ops_of_keys(mode, name):
    check(keys_arguments(mode, *KEYS[name]))


@pytest.mark.parametrize("name", BLOCKS)
def test_custom_ops_of_blocks(mode, name):
    check(blocks_arguments(mode, BLOCKS[name]))


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
