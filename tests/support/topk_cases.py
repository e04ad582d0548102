"""Named calls of `topk_attention`, and how they are judged.

The chosen keys are compared with those of float64 wherever scores differ by more than rounding;
results and gradients are then those of dense attention under exactly the chosen keys.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from support.calls import Call, Tensors, assert_as_expected, build, compute_expected, run
from support.cases import Case
from xattn_kernels import reference, topk_attention

LONG = dict(B=1, Hq=1, Hkv=1, Nq=40)
# name: (flags of a Case, top_k)
CASES: dict[str, tuple[dict, int]] = {
    "plain": ({}, 5),
    "one": ({}, 1),
    "all_but_one": ({}, 39),
    "all": ({}, 40),
    "more_than_there_are": ({}, 100),
    "one_query": (dict(Nq=1, Nk=75), 9),
    "one_key": (dict(Nk=1), 1),
    "two_keys": (dict(Nk=2), 1),
    "no_queries": (dict(Nq=0), 3),
    "no_keys": (dict(Nk=0), 3),
    "no_keys_wide": (dict(Nk=0, D=80), 3),  # whose scores float32 cannot keep
    "no_batch": (dict(B=0), 3),
    "long": (LONG, 7),
    "many_keys": (dict(Nk=300, B=1, Hq=1, Hkv=1), 17),
    "more_than_a_block": (dict(Nk=150, B=1, Hq=1, Hkv=1, Nq=3), 100),
    "few_of_many_keys": (dict(Nk=300, B=1, Hq=1, Hkv=1), 2),  # saved as indices
    "group": (dict(Hq=6, Hkv=2), 6),
    "group_long": (dict(Hq=3, Hkv=1, B=1, Nq=25), 6),
    "widths": (dict(D=20, Dv=40), 6),
    "width_96": (dict(D=96, B=1, Hq=1, Hkv=1), 6),
    "BNHD": (dict(layout="BNHD"), 5),
    "sliced": (dict(layout="sliced", Nq=20), 5),
    "expanded_batch": (dict(layout="expanded_batch"), 5),
    "scale": (dict(scale=0.7), 5),
    "scale_negative": (dict(scale=-0.3), 5),
    "scale_zero": (dict(scale=0.0), 5),
    "scale_heads": (dict(scale=(0.4, -0.2)), 5),
    "scale_group": (dict(scale=(0.4, -0.2, 0.1), Hq=3, Hkv=1), 5),
    "out_only": (dict(returns="out"), 5),
    "lse_only": (dict(returns="lse"), 5),
    "ties": (dict(values="ties", Nk=70), 9),
    "equal_keys": (dict(values="equal_keys", Nk=70), 9),
    "peaked": (dict(values="peaked"), 5),
    "tiny": (dict(values="tiny"), 5),
    **{
        f"mask_{m}": (dict(mask=m, Nq=16, Hkv=1), 6)
        for m in (
            "padding", "padding_left", "causal", "window", "media_last", "unsorted", "empty_rows",
            "all_empty", "both_ends", "one_key", "mixed", "bool_BHQK", "bool_B11K", "bool_1H1K",
            "bool_B1Q1", "bool_empty_rows", "bool_none", "bool_expanded",
        )
    },
    "far_apart": (dict(layout="far_apart", Hq=4), 6),
    "mask_causal_long": (LONG | dict(mask="causal", Nk=150, Nq=90), 20),
    "mask_blocks_long": (LONG | dict(mask="blocks", Nk=150, Nq=90), 60),
    "everything": (
        dict(mask="unsorted", Hq=4, Nq=20, D=24, Dv=40, scale=(0.3, 0.2, 0.5, -0.1), layout="BNHD"),
        4,
    ),
}  # fmt: skip


def case(name: str, **sizes) -> tuple[Case, int]:
    flags, top_k = CASES[name]
    return Case(f"topk_{name}", **dict(B=2, Hq=2, Hkv=2, Nk=40, D=16) | sizes | flags), top_k


def topk_call(c: Case, top_k: int, dtype: torch.dtype, device: str = "cpu") -> Call:
    """The case as a call of `topk_attention` that returns its indices."""
    return sparse_call(c, dtype, device, top_k=top_k)


def sparse_call(c: Case, dtype: torch.dtype, device: str, **choice) -> Call:
    """The case with `choice`, which is top_k or topk_blocks, and with what is chosen returned."""
    call = build(c, dtype, device)
    taken = ("mask", "scale", "return_lse", "return_statistics")
    options = {name: t for name, t in call.options.items() if name in taken}
    return replace(call, options=options, op=partial(topk_attention, return_indices=True, **choice))


def dense_bool(indices: Tensor, Nk: int) -> Tensor:
    """bool [B, Hq, Nq, Nk]: the keys that `indices` names, in order and then -1."""
    there = indices >= 0
    assert (indices < Nk).all() and (indices >= -1).all()
    assert (there[..., 1:] <= there[..., :-1]).all(), "an index behind a -1"
    both = there[..., 1:]
    assert (indices[..., 1:] > indices[..., :-1])[both].all(), "indices are not in order"
    chosen = torch.zeros((*indices.shape[:3], Nk + 1), dtype=torch.bool, device=indices.device)
    chosen.scatter_(-1, indices.long().masked_fill(~there, Nk), True)
    return chosen[..., :Nk]


@torch.no_grad()
def assert_highest(call: Call, chosen: Tensor, top_k: int, products: torch.dtype) -> None:
    """No score that is left out is above one that is chosen, by more than what rounds them: their
    products have the precision of `products`, and as many are chosen as there are, up to top_k."""
    exact = call.in_double()
    x = topk_attention.check(**exact.leaves, **exact.options, top_k=top_k)
    s = reference.scores(x)
    there = s > -torch.inf
    assert not (chosen & ~there).any(), "a key that is not allowed"
    assert torch.equal(chosen.sum(-1), there.sum(-1).clamp(max=top_k)), "too many or too few keys"
    scale = x.scale_of_heads(x.q.dtype)
    k = x.k.nan_to_num(0, 0, 0).repeat_interleave(x.Hq // x.Hkv, 1)
    size = (scale * x.q).abs() @ k.abs().mT
    slack = 8 * torch.finfo(products).eps * size
    least = (s + slack).masked_fill(~chosen, torch.inf).amin(-1) if x.Nk else s.sum(-1)
    most = (s - slack).masked_fill(chosen, -torch.inf).amax(-1) if x.Nk else s.sum(-1)
    assert (most <= least).all(), "a higher score was left out"


def judge(call: Call, c: Case, top_k: int, backend: str, dtype: torch.dtype) -> Tensors:
    """Runs the call and compares all of it; returns what it gave, indices among it."""
    ours = run(call, backend)
    indices = ours.pop("indices")
    assert indices.shape == (c.B, c.Hq, c.Nq, top_k) and indices.dtype == torch.int32
    chosen = dense_bool(indices, c.Nk)
    assert_highest(call, chosen, top_k, torch.float32)
    dense = build(c, dtype, call.leaves["q"].device.type)
    expected = compute_expected(replace(dense, options=dense.options | {"mask": chosen}))
    assert_as_expected(ours, expected, c, dtype)
    return ours | {"indices": indices}


def assert_right(c: Case, top_k: int, backend: str, dtype: torch.dtype, device: str = "cpu"):
    return judge(topk_call(c, top_k, dtype, device), c, top_k, backend, dtype)
