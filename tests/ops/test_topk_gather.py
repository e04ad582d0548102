"""Top-k attention of gathered keys, which longer rows take, on the cases of the dense way."""

from __future__ import annotations

import pytest
import torch

from support.largest_tensor import LargestTensor
from support.modes import each_compiled_mode, modes
from support.topk_cases import assert_right, case
from xattn_kernels import topk_attention

NAMES = (
    "plain", "one", "group", "group_long", "scale_heads", "scale_group", "mask_empty_rows",
    "mask_bool_BHQK", "mask_all_empty", "width_96", "many_keys", "far_apart", "everything",
    "lse_only",
    "out_only", "sliced", "equal_keys", "no_queries", "more_than_a_block",
)  # fmt: skip


@pytest.fixture
def always(monkeypatch):
    """Keys are gathered in both directions, however few there are."""
    pytest.importorskip("triton")
    from xattn_kernels.triton_kernels import configs
    from xattn_kernels.triton_kernels import topk_attention as kernels

    monkeypatch.setattr(configs, "GATHERED_BEYOND", {"forward": 0, "backward": 0})
    monkeypatch.setattr(kernels, "saves_indices", lambda Nk, top_k: top_k < Nk)


@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_triton(mode, name, always):
    assert_right(*case(name), "triton", mode.dtypes[0], mode.device)


@each_compiled_mode
@pytest.mark.parametrize("name", NAMES)
def test_compiled(mode, name, always):
    assert_right(*case(name, D=32), "triton", mode.dtypes[0], mode.device)


@each_compiled_mode
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_compiled_in_float32(mode, name, always):
    assert_right(*case(name, D=32), "triton", torch.float32, mode.device)


@pytest.mark.parametrize("mode", modes("interpreter", "sm_80", "gpu"), indirect=True)
def test_long_rows_take_it_by_themselves(mode, monkeypatch):
    """From the ratio of the table on; what is launched then, and no memory that grows with Nk."""
    from xattn_kernels.triton_kernels import configs, topk_gather

    launched = []
    for name in ("gather_forward_kernel", "gather_dq_kernel", "gather_dkdv_kernel"):
        kernel = getattr(topk_gather, name)
        monkeypatch.setattr(topk_gather, name, Noted(kernel, name, launched))
    for Nk, gathered in (
        (93, []),
        (94, ["forward"]),
        (128, ["forward"]),
        (129, ["forward", "dq", "dkdv"]),
    ):
        assert configs.gathers("backward", Nk, 1) == (len(gathered) == 3)
        launched.clear()
        q, k, v = (
            torch.randn(1, 1, n, 16, device=mode.device, dtype=mode.dtypes[0], requires_grad=True)
            for n in (3, Nk, Nk)
        )
        topk_attention(q, k, v, 1, backend="triton").sum().backward()
        assert launched == [f"gather_{name}_kernel" for name in gathered]


class Noted:
    """A kernel that says when it is launched."""

    def __init__(self, kernel, name: str, launched: list[str]):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


@pytest.mark.slow
@pytest.mark.parametrize("mode", modes("interpreter", "gpu"), indirect=True)
def test_memory_does_not_grow_with_rows_times_keys(mode, always):
    """Neither bits nor scores: of 320 rows and 600 keys the bits are 24,000 bytes."""
    q, k, v = (
        torch.randn(1, 1, n, 16, device=mode.device, dtype=torch.float16, requires_grad=True)
        for n in (320, 600, 600)
    )
    with LargestTensor() as largest:
        topk_attention(q, k, v, 2, backend="triton").sum().backward()
    assert largest.nbytes < 320 * 600 // 8
