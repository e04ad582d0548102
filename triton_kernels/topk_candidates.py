"""Which keys are a row's `top_k` highest where few rows have many keys: two searches.

One program for all keys of a row tile would leave most of the device idle. Several search a part of
the keys each, and the highest of all are among the highest of the parts: what they found, a few
keys of a row alone, is searched once more, with scores that are computed again.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from ..core.call import TopKAttentionCall
from .configs import candidates, parts_to_search
from .launch import Launch
from .scores import row_scale
from .tiles import LOG2E
from .topk_gather import one_row
from .topk_selection import reaches, search, select, to_bits


@triton.jit
def candidates_kernel(
    selected,  # int32 [B, Hq, Nq, top_k]: the chosen keys in ascending order, then -1
    candidates, n_candidates,  # int32 [B, Hq, Nq, n]: in ascending order, -1 between
    x,  # QueriesAndKeys
    scale,  # Scale
    n,  # Sizes
    top_k,
    T: tl.constexpr,  # Tiling of one row
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program has one row and all of its candidates, COLUMNS at a time."""
    BLOCK_K: tl.constexpr = T.BLOCK_K
    ALIGN: tl.constexpr = T.ALIGN
    r = tl.program_id(0)
    b, h, hkv, i = one_row(r, n.Nq, n.Hkv * T.GROUP, T.GROUP)
    r = r.to(tl.int64)
    # [BLOCK_K]
    place = tl.arange(0, BLOCK_K)
    j = tl.load(candidates + r * n_candidates + place, place < n_candidates, -1)
    exists = j >= 0
    rows = b * x.k.stride[0] + hkv * x.k.stride[1] + j.to(tl.int64) * x.k.stride[2]
    q = x.q.ptr + (b * x.q.stride[0] + h * x.q.stride[1] + i * x.q.stride[2])
    s = tl.full([BLOCK_K], 0.0, tl.float32)
    for d0 in range(0, T.D, COLUMNS):
        # [COLUMNS], [BLOCK_K, COLUMNS]
        d = d0 + tl.arange(0, COLUMNS)
        q_part = tl.load(q + d, d < T.D, 0.0).to(tl.float32)
        elements = tl.multiple_of(rows[:, None] + d[None, :], [1, ALIGN])
        keep = exists[:, None] & (d < T.D)[None, :]
        k_part = tl.load(x.k.ptr + elements, keep, 0.0).to(tl.float32)
        s += tl.sum(k_part * q_part[None, :], 1)
    s *= row_scale(scale, h) * LOG2E
    s = tl.where(exists, s, float("-inf"))
    always = tl.full([1], 1, tl.int1)
    t, n_reach, n_above = search((s[None, :],), None, 0, 0, n.Nk, always, top_k, T)
    # The first of the scores that equal the threshold are chosen, as many as are wanted.
    wanted = tl.where(n_reach > top_k, top_k - n_above, n_reach)
    equal = (s == t).to(tl.int32)
    chosen = (reaches(s, t) & (s != t)) | ((equal != 0) & (tl.cumsum(equal, 0) <= wanted))
    chosen_before = tl.cumsum(chosen.to(tl.int32), 0)
    selected += r * top_k
    tl.store(selected + chosen_before - 1, j, chosen & (chosen_before <= top_k))
    for first in range(tl.sum(chosen.to(tl.int32), 0), top_k, BLOCK_K):
        none = tl.full([BLOCK_K], -1, tl.int32)
        tl.store(selected + first + place, none, first + place < top_k)


def choose(call: TopKAttentionCall, top_k: int, indexed: bool) -> Tensor:
    """int32 [B, Hq, Nq, ceil(Nk / 32)] or, indexed, [B, Hq, Nq, top_k], see `select_kernel`."""
    launch = Launch(call)
    n_parts = parts(launch, top_k)
    chosen = select(call, top_k, indexed or n_parts > 1, n_parts)
    if n_parts == 1 or not chosen.numel():
        return chosen
    selected = chosen.new_empty((*chosen.shape[:3], top_k))
    config = candidates(chosen.shape[3], launch.itemsize)
    launch.run(
        candidates_kernel, selected.numel() // top_k, config,
        selected, chosen, chosen.shape[3], launch.queries_and_keys(), launch.scale(),
        launch.sizes(), top_k, T=launch.tiling(replace(config, block_q=1)),
        COLUMNS=config.block_q,
    )  # fmt: skip
    return selected if indexed else to_bits(selected, call.Nk)


def parts(launch: Launch, top_k: int) -> int:
    """How many programs share the keys of a row tile."""
    config, tiles = launch.selection_config()
    if tiles or not top_k:
        return 1
    programs = launch.row_tiles(config) * launch.B * launch.Hkv
    n_splits = launch.splits(programs, launch.key_tiles(config))
    return parts_to_search(n_splits, launch.D, launch.itemsize, launch.Nk, top_k)
