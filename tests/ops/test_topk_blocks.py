"""`topk_attention` by blocks of keys: the choice, values and gradients of every backend."""

from __future__ import annotations

import math

import pytest
import torch

from support.block_cases import CASES, assert_right, blocks_call, case
from support.calls import run
from support.cases import Case
from support.largest_tensor import LargestTensor
from support.modes import each_compiled_mode, enter_backend, modes
from support.topk_cases import dense_bool
from xattn_kernels import KeyInterval, cross_attention, kept_mass, reference, topk_attention
from xattn_kernels.ops.topk_blocks import importance_triton

QUICK = ("plain", "long", "mask_padding", "mask_causal_long", "everything")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_kernels(name, backend, dtype):
    assert_right(*case(name), backend, dtype)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_triton(mode, name):
    assert_right(*case(name), "triton", torch.float32, mode.device)


@each_compiled_mode
@pytest.mark.parametrize("name", CASES)
def test_compiled(mode, name):
    assert_right(*case(name, D=32), "triton", mode.dtypes[0], mode.device)


@each_compiled_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", QUICK)
def test_compiled_of_other_dtypes(mode, name, dtype):
    assert_right(*case(name, D=32), "triton", dtype, mode.device)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_80", "gpu"), indirect=True)
@pytest.mark.parametrize("name", ["long", "group_long", "mask_padding", "mask_bool_BHQK"])
def test_importance(mode, name):
    c, blocks = case(name)
    call = blocks_call(c, blocks, torch.float32, mode.device)
    x = topk_attention.check(**call.leaves, **call.options, topk_blocks=blocks)
    with torch.no_grad():
        found, expected = importance_triton(x), reference.importance(reference.pooled_call(x))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", ["long", "everything", "mask_padding"])
def test_splits(mode, name, splits, force_splits):
    force_splits(splits)
    assert_right(*case(name), "triton", mode.dtypes[1], mode.device)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_90", "gpu"), indirect=True)
@pytest.mark.parametrize("name", ["plain", "long", "mask_all_empty", "mask_unsorted"])
def test_every_output_is_written(mode, name):
    from fuzz.judge import poisoned

    with poisoned():
        assert_right(*case(name), "triton", torch.float16, mode.device)


@pytest.fixture(params=["torch", "eager", *modes("interpreter", "sm_90", "gpu")])
def backend(request):
    """(backend, device)."""
    with enter_backend(request.param) as found:
        yield found


def test_lower_blocks_win_ties(backend):
    """Keys of which blocks 1 and 3 are alike, and most important; and queries of zeros."""
    name, device = backend
    q, k, v = (torch.ones(1, 1, n, 16, device=device) for n in (70, 80, 80))
    k[:, :, 16:32], k[:, :, 48:64] = 2.0, 2.0
    q[:, :, 64:] = 0.0
    options = dict(return_indices=True, backend=name)
    found = topk_attention(q, k, v, topk_blocks=(16, 1), **options).indices
    assert found.flatten().tolist() == [1, 0]
    found = topk_attention(q, k, v, topk_blocks=(16, 3), **options).indices
    assert found.flatten(0, 2).tolist() == [[0, 1, 3], [0, 1, 2]]


def test_all_blocks_are_cross_attention(backend):
    name, device = backend
    q, k, v = (torch.randn(2, 2, n, 16, device=device) for n in (5, 40, 40))
    mask = KeyInterval(*torch.tensor([3, 30], dtype=torch.int32, device=device))
    found = topk_attention(q, k, v, topk_blocks=(16, 9), mask=mask, backend=name)
    dense = cross_attention(q, k, v, mask=mask, backend="triton" if name == "triton" else "eager")
    if name == "torch":
        torch.testing.assert_close(found, dense)
    else:
        assert torch.equal(found, dense)


@pytest.mark.parametrize("mask", ["padding", "padding_left"])
def test_padding_may_hold_anything(backend, mask):
    """Keys and values that no query sees: results are those beside zeros, bit for bit."""
    name, device = backend
    c = Case("blocks_garbage", B=2, Hq=1, Hkv=1, Nq=70, Nk=75, D=32, mask=mask)
    found = []
    for fill in (0.0, math.nan):
        call = blocks_call(c, (16, 2), torch.float16, device)
        unseen = ~call.options["mask"].dense(c.Nk).any(1)
        assert unseen.any()
        with torch.no_grad():
            for n in "kv":
                call.leaves[n].transpose(0, 1)[:, unseen.expand(c.B, -1)] = fill
        found.append(run(call, name))
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_query_that_is_not_finite_is_nan_alone(backend, bad):
    name, device = backend
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn((1, 1, n, 16), generator=g).to(device) for n in (70, 80, 80))
    q[:, :, 66, 3] = bad
    found = topk_attention(q, k, v, topk_blocks=(16, 2), return_indices=True, backend=name)
    assert torch.equal(found.out[0, 0].isnan().any(-1), torch.arange(70, device=device) == 66)
    assert ((found.indices >= 0) & (found.indices < 5)).all()


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_memory_does_not_grow_with_rows_times_keys(mode):
    q, k, v = (
        torch.randn(1, 1, n, 16, device=mode.device, dtype=torch.float16, requires_grad=True)
        for n in (256, 600, 600)
    )
    with LargestTensor() as largest:
        topk_attention(q, k, v, topk_blocks=(16, 2), backend="triton").sum().backward()
    assert largest.nbytes <= 4 * k.nbytes < 256 * 600 * 2


def test_kept_mass(backend):
    """The sum of the dense weights of what is chosen; 1 without any key."""
    name, device = backend
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn((2, 2, n, 16), generator=g).to(device) for n in (70, 100))
    stop = torch.full((1, 70), 90, dtype=torch.int32, device=device)
    stop[:, 5] = 0
    mask = KeyInterval(torch.zeros_like(stop), stop)
    x = topk_attention.check(q.double(), k.double(), k.double(), topk_blocks=(16, 2), mask=mask)
    p = reference.softmax(reference.scores(x))[0]
    options = dict(mask=mask, backend=name)
    chosen = topk_attention(q, k, k, topk_blocks=(16, 2), return_indices=True, **options).indices
    keys = reference.keys_of_blocks(dense_bool(chosen, 7), x)
    for given, expected in (
        (dict(topk_blocks=(16, 2)), (p * keys).sum(-1)),
        (dict(top_k=9), p.topk(9).values.sum(-1)),
        (dict(topk_blocks=(16, 7)), torch.ones(2, 2, 70, device=device)),
    ):
        expected = expected.to(torch.float32)
        expected[:, :, 5] = 1.0
        torch.testing.assert_close(kept_mass(q, k, **given, **options), expected)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({}, ValueError, "one of top_k and topk_blocks must be given"),
        (dict(top_k=3, topk_blocks=(16, 2)), ValueError, "one of top_k and topk_blocks"),
        (dict(topk_blocks=16), TypeError, "must be \\(block_size, n_blocks\\), got 16"),
        (dict(topk_blocks=(16.0, 2)), TypeError, "two ints, got block_size=16.0"),
        (dict(topk_blocks=(16, True)), TypeError, "two ints, got n_blocks=True"),
        (dict(topk_blocks=(24, 2)), ValueError, "a power of two >= 16 for block_size, got 24"),
        (dict(topk_blocks=(8, 2)), ValueError, "a power of two >= 16 for block_size, got 8"),
        (dict(topk_blocks=(16, 0)), ValueError, "n_blocks >= 1, got 0"),
    ],
)
def test_wrong_blocks(given, error, message):
    q = torch.randn(1, 1, 3, 16)
    with pytest.raises(error, match=message):
        topk_attention(q, q, q, **given)
