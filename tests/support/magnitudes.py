"""How large the terms are of which a gradient is the sum: what its rounding is relative to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from support.numerics import FLOOR
from xattn_kernels import reference
from xattn_kernels.core.call import CrossAttentionCall

if TYPE_CHECKING:
    from support.calls import Call


@torch.no_grad()
def magnitudes(call: Call, dtype: torch.dtype) -> dict[str, float]:
    """For each gradient of a call in float64 the size of what is summed in it, given in `dtype`.

    Rounding is relative to the terms, not to their sum, which may cancel to nothing: terms of one
    row of scores share an error and add up, errors of different rows are independent.
    """
    x = call.inputs()
    s = reference.scores(x)
    p, lse, entropy, _ = reference.softmax(s)
    if call.leaves.get("lse") is not None:
        p = (s - x.lse.masked_fill(x.lse == -torch.inf, torch.inf)[..., None]).exp()
    # padding may hold NaN, which 0 does not undo
    v, k = (
        t.nan_to_num(0, 0, 0).repeat_interleave(x.group, 1) for t in (getattr(x, "v", x.k), x.k)
    )
    scale = x.scale_of_heads(x.q.dtype)
    rounding = score_rounding(scale * x.q, k, dtype).nan_to_num(0, 0, 0)
    kept = reference.drop(p * (1 + rounding), x)
    if "weights" in call.upstream:
        dp, dout = call.upstream["weights"].abs(), torch.zeros_like(x.q)
        dp = dp[:, None] / x.Hq if x.average_heads else dp
    elif "mass" in call.upstream:
        dmass, dout = call.upstream["mass"].abs(), torch.zeros_like(x.q)
        dmass = dmass[:, None].expand(-1, x.Hkv, -1) / x.Hkv if x.average_heads else dmass
        dp = dmass.repeat_interleave(x.Hq // x.Hkv, 1)[:, :, None] * x.Hkv / x.Hq
        if x.row_weight is not None:
            kept = kept * x.row_weight.abs()[:, None, :, None]
    else:
        dout = call.upstream.get("out", x.q.new_zeros(*x.q.shape[:3], x.Dv))
        # below its smallest normal number a dtype rounds by a fixed amount, here each number of out
        fixed = torch.finfo(dtype).tiny * dout.norm(dim=-1, keepdim=True)
        dp = (dout @ v.mT).abs() + fixed
    sums = (kept * dp).sum(-1, keepdim=True)
    rows = 0 if "lse" in call.leaves else sums  # what a row has beside dp
    for name, row in (
        ("lse", torch.ones_like(s)),
        ("entropy", (s - lse[..., None]).abs() + entropy[..., None] + rounding),
    ):
        if name in call.upstream:
            rows = rows + (row * call.upstream[name].abs()[..., None]).nan_to_num(0, 0, 0)
    terms = kept * dp + p * (1 + rounding) * rows
    found = sizes(x, scale, terms, kept, dout, k) | {"dlse": largest(sums)}
    if "mass" in call.upstream:  # sums over rows, in which weights of both signs may cancel
        found |= {"mass": largest(kept.sum(2)), "drow_weight": largest((p * dp).sum((1, 3)))}
    return found


def score_rounding(q: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounds a score, of which a probability has as much relative to itself, over the floor.

    A backward may compute its scores by another sum than the forward did (PyTorch's kernels do).
    """
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return 2 * eps / FLOOR[dtype] * (q.abs() @ k.abs().mT)


def sizes(
    x: CrossAttentionCall, scale, terms: Tensor, kept: Tensor, dout: Tensor, k: Tensor
) -> dict[str, float]:
    """The sums over rows or keys of the terms of ds, and of dv."""

    def of_group(t: Tensor) -> Tensor:
        return t.unflatten(1, (x.Hkv, -1)).sum(2)

    over = [d for d in range(4) if x.bias is not None and x.bias.shape[d] == 1]
    found = {
        "dq": (scale * terms) @ k.abs(),
        "dk": of_group((scale * terms).square().mT @ x.q.square()).sqrt(),
        "dv": of_group(kept.square().mT @ dout.square()).sqrt(),
        "dbias": terms.square().sum(over).sqrt(),
        "dscale": (terms * (x.q @ k.mT).abs()).sum(-1).square().sum((0, 2)).sqrt(),
    }
    return {name: largest(t) for name, t in found.items()}


def largest(t: Tensor) -> float:
    t = t[t.isfinite()].abs()
    return t.max().item() if t.numel() else 0.0
