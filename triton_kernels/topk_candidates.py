"""Which keys are a row's `top_k` highest where few rows have many keys: two searches.

One program for all keys of a row tile would leave most of the device idle. Several search a part of
the keys each, and the highest of all are among the highest of the parts: what they found, a few
keys of a row alone, is searched once more, with scores that are computed again.
"""

import triton
import triton.language as tl
from torch import Tensor

from .configs import candidates, parts_to_search
from .launch import Call
from .scores import row_scale
from .tiles import LOG2E
from .topk_gather import one_row
from .topk_selection import (
    reaches,
    search,
    select,
    to_bits,
)


@triton.jit
def candidates_kernel(
    selected,  # int32 [B, Hq, Nq, top_k]: the chosen keys in ascending order, then -1
    found, n_found,  # int32 [B, Hq, Nq, n_found]: the candidates in ascending order, -1 between
    q, stride_q, k, stride_k, v, stride_v,
    bias, stride_bias, mask, stride_mask, start, stride_start, stop, stride_stop,
    scale, scale_tensor, stride_scale, softcap, seed, threshold, p_factor,
    B, Hkv, Nq, Nk, top_k,
    D: tl.constexpr, DV: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One row and all of its candidates, BLOCK_Q columns at a time."""
    n = tl.program_id(0)
    b, h, hkv, i = one_row(n, Nq, Hkv * GROUP, GROUP)
    n = n.to(tl.int64)
    # [BLOCK_K]
    place = tl.arange(0, BLOCK_K)
    j = tl.load(found + n * n_found + place, place < n_found, -1)
    there = j >= 0
    rows = b * stride_k[0] + hkv * stride_k[1] + j.to(tl.int64) * stride_k[2]
    q += b * stride_q[0] + h * stride_q[1] + i * stride_q[2]
    s = tl.full([BLOCK_K], 0.0, tl.float32)
    for d0 in range(0, D, BLOCK_Q):
        # [BLOCK_Q], [BLOCK_K, BLOCK_Q]
        d = d0 + tl.arange(0, BLOCK_Q)
        q_part = tl.load(q + d, d < D, 0.0).to(tl.float32)
        at = tl.multiple_of(rows[:, None] + d[None, :], [1, ALIGN])
        k_part = tl.load(k + at, there[:, None] & (d < D)[None, :], 0.0).to(tl.float32)
        s += tl.sum(k_part * q_part[None, :], 1)
    s *= row_scale(scale, scale_tensor, stride_scale, h) * LOG2E
    s = tl.where(there, s, float("-inf"))
    t, n_reach, n_above = search(
        (s[None, :],), None, 0, 0, Nk, tl.full([1], 1, tl.int1), top_k, D, CHUNKS, 1, BLOCK_K,
        ALIGN, PRECISION,
    )  # fmt: skip
    # of those equal to the threshold the first ones only, as many as are wanted
    wanted = tl.where(n_reach > top_k, top_k - n_above, n_reach)
    equal = (s == t).to(tl.int32)
    chosen = (reaches(s, t) & (s != t)) | ((equal != 0) & (tl.cumsum(equal, 0) <= wanted))
    chosen_before = tl.cumsum(chosen.to(tl.int32), 0)
    selected += n * top_k
    tl.store(selected + chosen_before - 1, j, chosen & (chosen_before <= top_k))
    for first in range(tl.sum(chosen.to(tl.int32), 0), top_k, BLOCK_K):
        tl.store(selected + first + place, tl.full([BLOCK_K], -1, tl.int32), first + place < top_k)


def choose(call: Call, top_k: int, indexed: bool) -> Tensor:
    """int32 [B, Hq, Nq, ceil(Nk / 32)] or, indexed, [B, Hq, Nq, top_k], see `select_kernel`."""
    n_parts = parts(call, top_k)
    found = select(call, top_k, indexed or n_parts > 1, n_parts)
    if n_parts == 1 or not found.numel():
        return found
    selected = found.new_empty((*found.shape[:3], top_k))
    config = candidates(found.shape[3], call.q.element_size())
    call.launch(
        candidates_kernel, config, selected.numel() // top_k, (selected, found, found.shape[3]),
        top_k,
    )  # fmt: skip
    return selected if indexed else to_bits(selected, call.Nk)


def parts(call: Call, top_k: int) -> int:
    """How many programs share the keys of a row tile."""
    config, tiles = call.selection_config()
    if tiles or not top_k:
        return 1
    programs = call.row_tiles(config) * call.B * call.Hkv
    n_splits = call.splits(programs, call.key_tiles(config))
    return parts_to_search(n_splits, call.D, call.q.element_size(), call.Nk, top_k)
