"""Top-k attention in CUDA C++, emulated or on a GPU: the cases of the Triton kernels."""

from __future__ import annotations

import math

import pytest
import torch

from ops.test_topk_attention import quantised
from support.modes import modes, needs_extension
from support.topk_cases import CASES, assert_right, case
from xattn_kernels import KeyInterval, reference, topk_attention

pytestmark = needs_extension
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
emulated = pytest.mark.parametrize("mode", modes("cuda_sm_80", "cuda_gpu"), indirect=True)


def everywhere() -> list:
    """(mode, case, dtype): each case emulated in one dtype, on a GPU in all."""
    found = []
    for n, name in enumerate(CASES):
        arch = "cuda_sm_90" if n % 3 == 0 else "cuda_sm_80"
        found.append(pytest.param(arch, name, DTYPES[n % 3], marks=pytest.mark.emulated))
        found += [pytest.param("cuda_gpu", name, t, marks=pytest.mark.gpu) for t in DTYPES]
    return found


@pytest.mark.parametrize(("mode", "name", "dtype"), everywhere(), indirect=["mode"])
def test_cuda(mode, name, dtype):
    assert_right(*case(name), "cuda", dtype, mode.device)


@emulated
@pytest.mark.parametrize("name", ["few_of_many_keys", "plain", "mask_all_empty", "mask_padding"])
def test_every_output_is_written(mode, name):
    from fuzz.judge import poisoned

    with poisoned():
        assert_right(*case(name), "cuda", torch.float16, mode.device)


@emulated
@pytest.mark.parametrize("D", [128, 256])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float16", "float32"])
def test_widths(mode, D, dtype):
    assert_right(*case("group_long", D=D, Nk=150), "cuda", dtype, mode.device)


@emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("top_k", [1, 8, 33])
def test_lower_keys_win_ties(mode, top_k, dtype):
    q, k, v = (t.to(dtype) for t in quantised(mode.device))
    q[:, :, 0], k[:, :, 40:] = 0, k[:, :, :30].clone()
    mask = KeyInterval(*torch.tensor([3, 69], dtype=torch.int32, device=mode.device))
    options = dict(mask=mask, scale=0.5, return_indices=True, backend="cuda")
    found = topk_attention(q, k, v, top_k, **options).indices
    s = 0.5 * q.double() @ k.double().mT
    s[..., :3], s[..., 69:] = -math.inf, -math.inf
    assert torch.equal(found, reference.top_indices(s, top_k).int())


@emulated
@pytest.mark.parametrize("factor", [2.0**61, 2.0**-60])
def test_scores_at_the_limits_of_float32(mode, factor):
    q, k, v = (t.float() for t in quantised(mode.device))
    options = dict(scale=1.0, return_indices=True, backend="cuda")
    found = topk_attention(q * factor, k * factor, v, 9, **options).indices
    assert torch.equal(found, reference.top_indices(q.double() @ k.double().mT, 9).int())


@emulated
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(mode, bad):
    """NaN comes first; of infinite scores the positive one is highest and the other is none."""
    q, k, v = (torch.ones(1, 1, n, 16, device=mode.device).half() for n in (3, 50, 50))
    k *= torch.arange(50, device=mode.device)[:, None] / 64
    k[0, 0, 7] = bad
    found = topk_attention(q, k, v, 4, return_indices=True, backend="cuda").indices
    expected = [46, 47, 48, 49] if bad == -math.inf else [7, 47, 48, 49]
    assert (found == torch.tensor(expected, device=mode.device)).all()


@emulated
def test_the_first_and_the_last_key_are_kept_as_indices(mode):
    """Few of many keys, which the backward turns into bits again."""
    q, k, v = (torch.ones(1, 1, n, 16, device=mode.device).half() for n in (2, 300, 300))
    k[0, 0, 1:-1] = 0
    v.requires_grad_()
    found = topk_attention(q, k, v, 2, return_indices=True, backend="cuda")
    assert found.indices.tolist() == [[[[0, 299]] * 2]]
    found.out.sum().backward()
    expected = torch.zeros_like(v)
    expected[0, 0, [0, -1]] = 1.0
    assert torch.equal(v.grad, expected)


@emulated
def test_top_k_of_the_whole_range(mode):
    """Scores of every exponent and both signs: each of the four steps decides some row."""
    g = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (1, 1, 300, 1), generator=g, dtype=torch.int64).int()
    k = bits.view(torch.float32).nan_to_num(1.0, 2.0, 3.0)
    k = torch.where(k.abs() < 2.0**-100, 0.0, k).to(mode.device)  # no products below the normal
    k = (k.view(torch.int32) & ~0x1FFF).view(torch.float32)  # of TF32, so products are exact
    q, v = torch.ones(1, 1, 1, 1, device=mode.device), torch.ones_like(k)
    for top_k in (1, 10, 100, 299):
        options = dict(scale=1.0, return_indices=True, backend="cuda")
        found = topk_attention(q, k, v, top_k, **options).indices
        assert torch.equal(found, reference.top_indices(k.mT.double(), top_k).int()), top_k


def test_blocks_of_keys_are_a_reason():
    q, k, v = (torch.zeros(1, 1, n, 16) for n in (3, 64, 64))
    with pytest.raises(RuntimeError, match="blocks of keys have no CUDA kernel"):
        topk_attention(q, k, v, topk_blocks=(16, 2), backend="cuda")
