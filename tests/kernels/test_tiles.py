"""Helpers of the kernels whose borders lie beyond what a test of a whole kernel can afford."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from xattn_kernels.triton_kernels.tiles import (
    ALL,
    CUT,
    WHOLE,
    next_run,
)


@triton.jit
def runs_kernel(runs, bounds, begin, end, n_tiles, key_begin, key_end, PART: tl.constexpr):
    """The runs of row tiles from `begin` to `end`, in the loop of the dk, dv kernel."""
    at, n = begin, begin * 0
    while at < end:
        first, at = next_run(bounds, at, end, n_tiles, key_begin, key_end, PART)
        tl.store(runs + 2 * n, first)
        tl.store(runs + 2 * n + 1, at)
        n += 1


# smallest and largest start, smallest and largest stop of a row tile, of which rows see of the keys
# 30 to 39: none, all of them all, some of them none, one of them not the first, one not the last
TILES = torch.tensor(
    [[0, 0, 30, 30], [0, 30, 40, 99], [0, 40, 40, 99], [0, 31, 40, 40], [30, 30, 39, 50]],
    dtype=torch.int32,
)
PARTS = {ALL: [1, 2, 3, 4], WHOLE: [1], CUT: [2, 3, 4]}


@pytest.mark.slow
@pytest.mark.parametrize("n_tiles", [2, 255, 256, 257, 700])
@pytest.mark.parametrize("share", [0.01, 0.97])
@pytest.mark.parametrize("part", PARTS, ids=["all", "whole", "cut"])
def test_runs_hold_every_row_tile_of_their_part(mode, n_tiles, share, part):
    """Each once and in order, also beyond the 256 tiles that are looked at together."""
    g = torch.Generator().manual_seed(n_tiles)
    begin, end = n_tiles // 5, n_tiles - n_tiles // 7
    kinds = torch.arange(n_tiles) % len(TILES) * (torch.rand(n_tiles, generator=g) < share)
    kinds[-1] = kinds[end - 1] = PARTS[part][0]
    members = [t for t in range(n_tiles) if kinds[t] in PARTS[part]]
    for first, last in ((begin, end), (n_tiles - 1, n_tiles)):
        runs = torch.full((n_tiles + 1, 2), -1, dtype=torch.int32, device=mode.device)
        bounds = TILES[kinds].to(mode.device)
        runs_kernel[(1,)](runs, bounds, first, last, n_tiles, 30, 40, PART=part)
        found = [range(*run) for run in runs.tolist() if run != [-1, -1]]
        assert [t for run in found for t in run] == [t for t in members if first <= t < last]
        assert all(a.stop < b.start or not b for a, b in zip(found, found[1:], strict=False))
