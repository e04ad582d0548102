"""Helpers of the kernels whose borders lie beyond what a test of a whole kernel can afford."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from xattn_kernels.triton_kernels.tiles import next_run


@triton.jit
def runs_kernel(runs, bounds, begin, end, n_tiles, key_begin, key_end):
    """The runs of row tiles from `begin` to `end`, in the loop of the dk, dv kernel."""
    at, n = begin, begin * 0
    while at < end:
        first, at = next_run(bounds, at, end, n_tiles, key_begin, key_end)
        tl.store(runs + 2 * n, first)
        tl.store(runs + 2 * n + 1, at)
        n += 1


@pytest.mark.parametrize("n_tiles", [2, 255, 256, 257, 700])
@pytest.mark.parametrize("share", [0.01, 0.97])
def test_runs_hold_every_row_tile_that_meets_the_keys(mode, n_tiles, share):
    """Each once and in order, also beyond the 256 tiles that are looked at together."""
    g = torch.Generator().manual_seed(n_tiles)
    keys, begin, end = (30, 40), n_tiles // 5, n_tiles - n_tiles // 7
    meets = torch.rand(n_tiles, generator=g) < share
    meets[-1] = meets[end - 1] = True
    bounds = torch.tensor([[0, 0, 0, 30], [39, 0, 0, 50]], dtype=torch.int32)[meets.int()]
    for first, last in ((begin, end), (n_tiles - 1, n_tiles)):
        runs = torch.full((n_tiles + 1, 2), -1, dtype=torch.int32, device=mode.device)
        runs_kernel[(1,)](runs, bounds.to(mode.device), first, last, n_tiles, *keys)
        found = [range(*run) for run in runs.tolist() if run != [-1, -1]]
        visited = [t for run in found for t in run]
        assert visited == [t for t in range(first, last) if meets[t]]
        assert all(a.stop < b.start or not b for a, b in zip(found, found[1:], strict=False))
