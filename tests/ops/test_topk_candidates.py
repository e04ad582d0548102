"""Top-k attention whose keys are searched in parts, as those of few rows are."""

from __future__ import annotations

import pytest
import torch

from support.cases import Case
from support.modes import each_compiled_mode, modes
from support.topk_cases import assert_right, case
from xattn_kernels import reference, topk_attention

NAMES = (
    "plain", "one", "all_but_one", "long", "many_keys", "more_than_a_block", "group_long",
    "scale_heads", "scale_group", "sliced", "ties", "equal_keys", "mask_empty_rows",
    "mask_bool_BHQK", "mask_unsorted", "mask_all_empty", "width_96", "far_apart", "everything",
)  # fmt: skip


@pytest.fixture(params=["kept", "recomputed"])
def in_parts(request, monkeypatch):
    """Three parts of the keys, whose scores are in registers or computed again; the tiles that are
    kept in each launch."""
    pytest.importorskip("triton")
    from xattn_kernels.triton_kernels import configs, launch, topk_candidates

    monkeypatch.setattr(configs, "most_kept", lambda D, itemsize: 256)
    if request.param == "recomputed":
        monkeypatch.setattr(configs, "KEPT_TILES", ())
    monkeypatch.setattr(topk_candidates, "parts", lambda call, top_k: 3)
    launched, search = [], launch.selection

    def noted(*sizes):
        found = search(*sizes)
        launched.append(found[1] > 0)
        return found

    monkeypatch.setattr(launch, "selection", noted)
    yield
    assert launched and set(launched) == {request.param == "kept"}


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_triton(mode, name, in_parts):
    assert_right(*case(name, Nk=150), "triton", torch.float32, mode.device)


@each_compiled_mode
@pytest.mark.parametrize("name", NAMES)
def test_compiled(mode, name, in_parts):
    assert_right(*case(name, D=32, Nk=150), "triton", mode.dtypes[0], mode.device)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_a_part_that_keeps_more_tiles_than_it_has(mode, in_parts):
    """Five tiles of 32 keys each, where six are kept."""
    c = Case("topk_five_tiles", B=1, Hq=1, Hkv=1, Nq=5, Nk=480)
    assert_right(c, 40, "triton", torch.float32, mode.device)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_80", "gpu"), indirect=True)
def test_ties_across_parts(mode, in_parts):
    """Small integers, equal by the dozen in every part: lower keys win."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randint(-1, 2, (1, 2, n, 16), generator=g).to(mode.device, torch.float16)
        for n in (5, 150, 150)
    )
    q[:, :, 2] = 0
    for top_k in (1, 20, 149):
        found = topk_attention(q, k, v, top_k, return_indices=True, backend="triton").indices
        assert torch.equal(found, reference.top_indices(q.double() @ k.double().mT, top_k).int())


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_makes_its_rows_nan(mode, bad, in_parts):
    q, k, v = (torch.ones(1, 1, n, 16, device=mode.device) for n in (4, 150, 150))
    k[:, :, 70] = bad
    q[:, :, 1] = -1.0
    found = topk_attention(q, k, v, 5, return_indices=True, backend="triton")
    seen = torch.ones(4, dtype=torch.bool, device=mode.device)
    seen[1] = bad != bad  # the score is -inf there: a key that is not allowed
    assert torch.equal(found.out[0, 0].isnan().all(-1), seen)
    assert ((found.indices >= 0) & (found.indices < 150)).all()


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("top_k", [16, 1000])
def test_as_many_parts_as_the_device_asks_for(mode, top_k):
    """Nothing patched: two rows beside keys whose scores do not fit registers."""
    q, k = (torch.randn(1, 1, n, 16, device=mode.device).round() for n in (2, 1100))
    found = topk_attention(q, k, k, top_k, return_indices=True, backend="triton").indices
    assert torch.equal(found, reference.top_indices(q.double() @ k.double().mT, top_k).int())
    from xattn_kernels.triton_kernels.launch import Launch
    from xattn_kernels.triton_kernels.topk_candidates import parts

    call = topk_attention.check(q, k, k, top_k)
    assert (parts(Launch(call), top_k) > 1) == (top_k == 16)


def test_how_many_parts():
    configs = pytest.importorskip("xattn_kernels.triton_kernels.configs")
    half = dict(D=64, itemsize=2)
    assert configs.parts_to_search(1, **half, Nk=65536, top_k=16) == 1
    # so many that each part keeps its scores, as many as fill the device, or as candidates allow,
    # which are at most a quarter of the keys
    assert configs.parts_to_search(8, **half, Nk=65536, top_k=16) == 64
    assert configs.parts_to_search(33, **half, Nk=16384, top_k=16) == 33
    assert configs.parts_to_search(33, **half, Nk=65536, top_k=64) == 32
    assert configs.parts_to_search(33, **half, Nk=65536, top_k=2048) == 1
    assert configs.parts_to_search(33, **half, Nk=4096, top_k=128) == 8
    assert configs.parts_to_search(33, **half, Nk=4096, top_k=1000) == 1
    assert configs.candidates(2048, 2).block_k == 2048
