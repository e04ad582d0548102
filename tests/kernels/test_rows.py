"""The merge of splits where its parts lie further apart than 32 bits count."""

from __future__ import annotations

import pytest
import torch

from support.modes import modes
from support.values import reserve


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90"), indirect=True)
def test_parts_beyond_32_bits(mode):
    """Three parts, the last one more than 2^31 rows and elements behind the first."""
    from xattn_kernels.triton_kernels import launch, rows
    from xattn_kernels.triton_kernels.structs import RowResults

    B, H, N, DV, n_splits, apart = 1, 2, 8, 16, 3, 2**30 + 16
    g = torch.Generator().manual_seed(0)
    lse = torch.randn(n_splits, B, H, N, generator=g)
    out = torch.randn(n_splits, B, H, N, DV, generator=g)
    strides = {"lse": (apart, H * N, N, 1), "out": (apart, H * N * DV, N * DV, DV, 1)}
    # room for two parts before the first: an offset that wraps must find zeros, not crash
    lse_parts = reserve((n_splits + 2, B, H, N), strides["lse"], lse)[2:].copy_(lse)
    out_parts = reserve((n_splits + 2, B, H, N, DV), strides["out"], out)[2:].copy_(out)
    merged, merged_lse = torch.empty(B, H, N, DV), torch.empty(B, H, N)
    rows.merge_kernel[(B * H,)](
        launch.strided(merged), RowResults(merged_lse, None, None, None),
        launch.strided(out_parts), RowResults(lse_parts, None, None, None),
        H, N, apart, n_splits,
        DV=DV, CHUNKS_V=rows.column_chunks(DV, 4), BLOCK=rows.MERGE_ROWS, ALIGN=4,
        **launch.compiler_options(rows.MAX_REGISTERS),
    )  # fmt: skip
    torch.testing.assert_close(merged_lse, lse.logsumexp(0))
    torch.testing.assert_close(merged, (lse.softmax(0)[..., None] * out).sum(0))
