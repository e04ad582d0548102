"""Each wrapper of csrc/ptx.cuh on its own, compiled and emulated."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

from support.modes import find_ptxsim
from tools.machine_code.cuda_grid import CSRC

SOURCE = Path(__file__).with_name("ptx_wrappers.cu")
pytestmark = pytest.mark.emulated


@cache
def module(arch: str):
    return find_ptxsim().compile_cuda(str(SOURCE), arch=arch, includes=[str(CSRC)])


@pytest.fixture(params=["sm_80", "sm_90"])
def run(request):
    """Launches one warp of the kernel of a name."""
    if os.environ.get("XATTN_TRITON_ON_CPU") != "1":
        pytest.skip("emulation needs XATTN_TRITON_ON_CPU=1")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")

    def launch(name: str, *arguments):
        module(request.param).kernel(name).launch(1, 32, list(arguments))

    return launch


@pytest.mark.parametrize(
    ("name", "dtype"), [("mma_half", torch.float16), ("mma_bfloat16", torch.bfloat16)]
)
def test_mma(run, name, dtype):
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.empty(16, 8)
    run(name, a, b, c)
    torch.testing.assert_close(c, a.float() @ b.float().mT)


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """10 bits of mantissa, ties away from zero."""
    bits = x.view(torch.int32)
    return (((bits & 0x7FFFFFFF) + 0x1000 & ~0x1FFF) | (bits & -0x80000000)).view(torch.float32)


def test_tf32(run):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.empty(16, 8)
    run("mma_tf32", a, b, c)
    torch.testing.assert_close(c, rounded_to_tf32(a) @ rounded_to_tf32(b))
    assert not torch.allclose(c, a @ b, rtol=1e-6, atol=1e-7)
    x = torch.randn(32)
    x[0] = 1 + 2**-11  # a tie
    y = torch.empty(32)
    run("to_tf32", x, y)
    assert torch.equal(y, rounded_to_tf32(x)) and y[0] == 1 + 2**-10


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(run, transposed):
    matrices, found = torch.arange(256).half().view(4, 8, 8), torch.empty(4, 8, 8).half()
    run("load_matrices", matrices, found, int(transposed))
    assert torch.equal(found, matrices.mT if transposed else matrices)


@pytest.mark.parametrize("n", [0, 3, 8])
def test_copies_land_by_their_group_and_end_in_zeros(run, n):
    rows, found = torch.randn(2, 32, 8).half(), torch.empty(2, 32, 8).half()
    run("copy_async", rows, found, 2 * n)
    expected = rows.clone()
    expected[..., n:] = 0
    assert torch.equal(found, expected)


def test_exp2(run):
    x = torch.cat((torch.linspace(-126, 127, 29), torch.tensor([-150.0, -torch.inf, torch.inf])))
    y = torch.empty(32)
    run("exp2_of", x, y)
    torch.testing.assert_close(y, x.exp2().masked_fill(x < -126, 0.0), rtol=2**-22, atol=0)


def test_shared_words(run):
    words, found = torch.arange(128, dtype=torch.int32), torch.empty(128, dtype=torch.int32)
    run("shared_words", words, found)
    assert torch.equal(found, words)
