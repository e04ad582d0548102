"""Named calls of `topk_attention` by blocks of keys, and how they are judged.

The chosen blocks are compared with those of float64 wherever weights differ by more than rounding;
results and gradients are then those of dense attention under exactly the chosen blocks.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from support.calls import Call, Tensors, assert_as_expected, build, compute_expected, run
from support.cases import Case
from support.topk_cases import dense_bool, sparse_call
from xattn_kernels import reference, topk_attention
from xattn_kernels.reference import QUERIES_PER_CHOICE

LONG = dict(B=1, Hq=1, Hkv=1, Nq=150, Nk=200)
# name: (flags of a Case, (block_size, n_blocks))
CASES: dict[str, tuple[dict, tuple[int, int]]] = {
    "plain": ({}, (32, 2)),
    "one_block": ({}, (16, 1)),
    "small_blocks": ({}, (16, 3)),
    "large_blocks": (dict(Nk=300), (128, 2)),
    "all_blocks": ({}, (64, 2)),
    "more_than_there_are": ({}, (16, 100)),
    "block_beyond_the_keys": (dict(Nk=10), (64, 1)),
    "long": (LONG, (16, 5)),
    "one_query": (dict(Nq=1), (16, 2)),
    "one_key": (dict(Nk=1), (16, 1)),
    "no_queries": (dict(Nq=0), (16, 1)),
    "no_keys": (dict(Nk=0), (16, 1)),
    "no_batch": (dict(B=0), (16, 1)),
    "group": (dict(Hq=6, Hkv=2), (16, 2)),
    "group_long": (dict(Hq=3, Hkv=1, B=1, Nq=70), (16, 2)),
    "group_out": (dict(Hq=3, Hkv=1, B=1, Nq=70, Nk=200, returns="out"), (32, 2)),
    "widths": (dict(D=20, Dv=40), (16, 2)),
    "width_96": (dict(D=96, B=1, Hq=1, Hkv=1), (16, 2)),
    "BNHD": (dict(layout="BNHD"), (16, 2)),
    "sliced": (dict(layout="sliced", Nq=20), (16, 2)),
    "expanded_batch": (dict(layout="expanded_batch"), (16, 2)),
    "scale_negative": (dict(scale=-0.3), (16, 2)),
    "scale_zero": (dict(scale=0.0), (16, 2)),
    "scale_heads": (dict(scale=(0.4, -0.2)), (16, 2)),
    "scale_group": (dict(scale=(0.4, -0.2, 0.1), Hq=3, Hkv=1), (16, 2)),
    "out_only": (dict(returns="out"), (16, 2)),
    "lse_only": (dict(returns="lse"), (16, 2)),
    "peaked": (dict(values="peaked"), (16, 2)),
    **{
        f"mask_{m}": (dict(mask=m, Nq=16, Hkv=1), (16, 2))
        for m in (
            "padding", "padding_left", "causal", "window", "media_last", "unsorted", "empty_rows",
            "all_empty", "both_ends", "one_key", "mixed", "bool_BHQK", "bool_B11K", "bool_1H1K",
            "bool_B1Q1", "bool_empty_rows", "bool_none", "bool_expanded",
        )
    },
    "mask_causal_long": (LONG | dict(mask="causal", Nq=130), (16, 4)),
    "mask_blocks_long": (LONG | dict(mask="blocks", Nq=130), (32, 2)),
    "everything": (
        dict(mask="unsorted", Hq=4, Nq=70, Hkv=2, D=24, Dv=40, scale=(0.3, 0.2, 0.5, -0.1),
             layout="BNHD"),
        (16, 2),
    ),
}  # fmt: skip


def case(name: str, **sizes) -> tuple[Case, tuple[int, int]]:
    flags, blocks = CASES[name]
    return Case(f"blocks_{name}", **dict(B=2, Hq=2, Hkv=2, Nk=75, D=16) | sizes | flags), blocks


def blocks_call(c: Case, blocks: tuple[int, int], dtype: torch.dtype, device: str = "cpu") -> Call:
    """The case as a call by blocks that returns them."""
    return sparse_call(c, dtype, device, topk_blocks=blocks)


@torch.no_grad()
def assert_most_important(call: Call, chosen: Tensor, blocks: tuple[int, int], dtype) -> None:
    """No block that is left out has more weight than one that is chosen, by more than what rounding
    of the pooled keys to `dtype` makes of weights; and as many are chosen as there are."""
    exact = call.in_double()
    x = topk_attention.check(**exact.leaves, **exact.options, topk_blocks=blocks)
    if not chosen.numel():
        return
    y = reference.pooled_call(x)
    weights = reference.importance(y)
    there = weights > -math.inf
    assert not (chosen & ~there).any(), "a block that is not allowed"
    assert torch.equal(chosen.sum(-1), there.sum(-1).clamp(max=blocks[1])), "too many or too few"
    scale = abs(y.scale_of_heads(y.q.dtype))
    k = x.k.nan_to_num(0, 0, 0).abs()
    largest = k.amax(2, keepdim=True).repeat_interleave(x.Hq // x.Hkv, 1)
    error = 4 * torch.finfo(dtype).eps * (scale * (x.q.abs() @ largest.mT)).amax((1, 2, 3))
    factor = torch.expm1(2 * error).view(-1, 1, 1, 1)
    least = (weights * (1 + factor)).masked_fill(~chosen, math.inf).amin(-1)
    most = (weights * (1 - factor)).masked_fill(chosen | ~there, -math.inf).amax(-1)
    assert (most <= least).all(), "a more important block was left out"


def judge(
    call: Call, c: Case, blocks: tuple[int, int], backend: str, dtype: torch.dtype
) -> Tensors:
    """Runs the call and compares all of it; returns what it gave, blocks among it."""
    ours = run(call, backend)
    indices = ours.pop("indices")
    tiles = -(-c.Nq // QUERIES_PER_CHOICE)
    assert indices.shape == (c.B, c.Hkv, tiles, blocks[1]) and indices.dtype == torch.int32
    x = topk_attention.check(**call.leaves, **call.options, topk_blocks=blocks)
    chosen = dense_bool(indices, reference.n_blocks(x))
    assert_most_important(call, chosen, blocks, dtype)
    keys = reference.keys_of_blocks(chosen, x)
    allowed = reference.allowed_keys(x)
    dense = build(c, dtype, call.leaves["q"].device.type)
    mask = keys if allowed is None else keys & allowed
    expected = compute_expected(replace(dense, options=dense.options | {"mask": mask}))
    assert_as_expected(ours, expected, c, dtype)
    return ours | {"indices": indices}


def assert_right(
    c: Case, blocks: tuple[int, int], backend: str, dtype: torch.dtype, device: str = "cpu"
) -> Tensors:
    return judge(blocks_call(c, blocks, dtype, device), c, blocks, backend, dtype)
