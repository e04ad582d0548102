"""Masked cross-attention in CUDA C++: the forward kernel, emulated or on a GPU, against eager."""

from __future__ import annotations

import math

import pytest
import torch

from conftest import modes
from numerics import assert_as_accurate
from xattn_kernels import KeyInterval, cross_attention, masks
from xattn_kernels.cuda_kernels import launch
from xattn_kernels.cuda_kernels.cross_attention import forward

pytestmark = pytest.mark.skipif(
    launch.extension() is None, reason="the package is built without its CUDA kernels"
)
every_mode = pytest.mark.parametrize(
    "mode", modes("cuda_sm_80", "cuda_sm_90", "cuda_gpu"), indirect=True
)


def unsorted(B: int, Nq: int, Nk: int) -> KeyInterval:
    g = torch.Generator().manual_seed(3)
    ends = torch.randint(-2, Nk + 2, (2, B, Nq), generator=g).clamp(0, Nk).int()
    return KeyInterval(*ends.sort(0).values)


def all_empty(B: int, Nq: int, Nk: int) -> KeyInterval:
    return KeyInterval(*torch.zeros(2, B, Nq, dtype=torch.int32))


def padding(B: int, Nq: int, Nk: int) -> KeyInterval:
    return masks.padding(torch.tensor([Nk - 3, Nk // 2][:B]))


def causal(B: int, Nq: int, Nk: int) -> KeyInterval:
    return masks.causal(Nq, Nk)


SHAPES = {  # B, Hq, Hkv, Nq, Nk, D, Dv
    "plain": (2, 2, 2, 70, 150, 64, 64),
    "group": (2, 6, 2, 25, 130, 64, 64),
    "decode": (1, 8, 2, 1, 200, 128, 128),
    "narrow": (1, 2, 1, 20, 70, 40, 24),
    "wide": (1, 2, 1, 30, 65, 128, 96),
    "one": (1, 1, 1, 1, 1, 8, 8),
    "no_keys": (1, 2, 2, 3, 0, 16, 16),
}


def judge(q, k, v, mask, scale=None) -> None:
    """out and lse beside those of eager in the same dtype, against float64."""
    start, stop = (
        (None, None)
        if mask is None
        else (t.expand(q.shape[0], q.shape[2]).to(q.device) for t in (mask.start, mask.stop))
    )
    number = q.shape[3] ** -0.5 if scale is None else scale
    found = forward(q, k, v, start, stop, number)
    call = dict(mask=mask, scale=number, return_lse=True, backend="eager")
    eager = cross_attention(q, k, v, **call)
    exact = cross_attention(q.double(), k.double(), v.double(), **call)
    assert_as_accurate(found[0], eager.out, exact.out, "out")
    assert_as_accurate(found[1], eager.lse, exact.lse, "lse")


def tensors(shape, dtype, device):
    B, Hq, Hkv, Nq, Nk, D, Dv = shape
    sizes = ((B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv))
    return [torch.randn(size, device=device).to(dtype) for size in sizes]


@every_mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_forward(mode, name, dtype):
    judge(*tensors(SHAPES[name], dtype, mode.device), None)


@every_mode
@pytest.mark.parametrize("kind", [unsorted, all_empty, padding, causal])
@pytest.mark.parametrize("name", ["plain", "group"])
def test_masks(mode, name, kind):
    q, k, v = tensors(SHAPES[name], torch.bfloat16, mode.device)
    mask = kind(q.shape[0], q.shape[2], k.shape[2])
    judge(q, k, v, mask.to(mode.device) if mode.device != "cpu" else mask)


@every_mode
@pytest.mark.parametrize("scale", [0.0, -0.7, 40.0])
def test_scales(mode, scale):
    judge(*tensors(SHAPES["plain"], torch.float16, mode.device), None, scale)


@every_mode
def test_strides_and_what_padding_holds(mode):
    """Heads next to each other in memory; NaN behind the last key that anybody sees."""
    q, k, v = (
        t.transpose(1, 2).contiguous().transpose(1, 2)
        for t in tensors(SHAPES["group"], torch.bfloat16, mode.device)
    )
    stop = torch.full((2, q.shape[2]), 100, dtype=torch.int32, device=mode.device)
    start = torch.full_like(stop, 64)
    expected = forward(q, k, v, start, stop, 0.125)
    k[:, :, 100:], v[:, :, 100:] = math.nan, math.nan
    k[:, :, :64], v[:, :, :64] = math.inf, math.nan
    for found, t in zip(forward(q, k, v, start, stop, 0.125), expected, strict=True):
        assert torch.equal(found, t) and t.isfinite().all()


@every_mode
def test_nan_makes_its_row_nan(mode):
    q, k, v = tensors(SHAPES["plain"], torch.bfloat16, mode.device)
    q[0, 0, 3, 5] = math.nan
    out, lse = forward(q, k, v, None, None, 0.125)
    rows = torch.zeros(q.shape[:3], dtype=torch.bool, device=mode.device)
    rows[0, 0, 3] = True
    assert torch.equal(out.isnan().all(-1), rows) and torch.equal(lse.isnan(), rows)
    assert torch.equal(out.isnan().any(-1), rows)


@pytest.mark.parametrize("mode", modes("cuda_sm_80"), indirect=True)
@pytest.mark.parametrize("name", ["plain", "decode"])
def test_no_bank_conflicts(mode, name):
    q, k, v = tensors(SHAPES[name], torch.bfloat16, mode.device)
    forward(q, k, v, None, None, 0.125)
    ((_, stats),) = mode.session.launched
    loads, ideal_loads, stores, ideal_stores = stats.shared_wavefronts
    assert (loads, stores) == (ideal_loads, ideal_stores)
