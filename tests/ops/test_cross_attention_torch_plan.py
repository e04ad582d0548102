"""The calls of PyTorch's kernel that the `torch` backend plans for intervals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("hypothesis", reason="intervals are drawn by hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from xattn_kernels import KeyInterval, cross_attention, masks
from xattn_kernels.torch_kernels import cross_attention as torch_attention


def qkv(B: int, H: int, Nq: int, Nk: int, D: int = 16) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=g).requires_grad_() for N in (Nq, Nk, Nk)]


INTERVALS = st.tuples(st.integers(0, 12), st.integers(0, 12))
ROWS = st.lists(st.tuples(INTERVALS, st.integers(1, 200)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=200)
@given(st.lists(ROWS, min_size=1, max_size=3))
def test_plan_covers_each_row_once_and_no_key_in_a_gap(batches):
    Nq = max(sum(n for _, n in rows) for rows in batches)
    bounds = torch.zeros(len(batches), Nq, 2, dtype=torch.int32)
    for b, rows in enumerate(batches):
        spread = torch.tensor([bound for bound, n in rows for _ in range(n)], dtype=torch.int32)
        bounds[b, : len(spread)] = spread
    mask = KeyInterval(*bounds.unbind(-1))
    q, k, v = qkv(len(batches), 1, Nq, 12, D=1)
    seen = mask.dense(12)
    covered = torch.zeros(seen.shape, dtype=torch.int32)
    visits = torch.zeros(seen.shape[:2], dtype=torch.int32)
    for call in torch_attention.plan(cross_attention.check(q, k, v, mask=mask)):
        part = seen[call.batch, call.rows, call.keys]
        visits[call.batch, call.rows] += 1
        covered[call.batch, call.rows, call.keys] += 1
        assert part.all() if call.exact else part.any(2).all()
        assert call.exact or call.rows.stop - call.rows.start <= torch_attention.BLOCK_ROWS
        assert seen[call.batch].any(1)[:, call.keys].all()
    assert (visits == 1).all() and not (seen & (covered == 0)).any()


def test_plan_shares_calls_among_equal_batch_elements():
    q, k, v = qkv(4, 1, 300, 128)
    flags = torch.zeros(4, 300, dtype=torch.bool)
    flags[:, 100] = flags[:2, 200] = flags[2:, 250] = True

    def calls(mask):
        return len(torch_attention.plan(cross_attention.check(q, k, v, mask=mask)))

    assert calls(None) == calls(masks.padding(torch.tensor([90] * 4))) == 1
    assert calls(masks.padding(torch.tensor([90, 90, 70, 90]))) == 3
    assert calls(KeyInterval(*masks.media(flags[:1], 64, 2).expand(4, 300))) == 3
    assert calls(masks.media(flags, 64, 2)) == 6
