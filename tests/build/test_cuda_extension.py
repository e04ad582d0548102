"""The extension of the package: what it is linked with, how it fails, what ptxas says of it."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.harness.machine import RESULTS
from support.modes import needs_extension
from support.standalone import (
    assert_a_launch_says_that_there_is_no_device,
    assert_needs_neither_torch_nor_cudart_and_shows_one_symbol,
    installed,
    run_without_torch,
)
from tools.machine_code import cuda_grid
from tools.machine_code.triton_grid import ARCHS
from xattn_kernels.cuda_kernels import launch

SPILLS = """
__global__ void __launch_bounds__(1024, 2) spilling_kernel(float* x, int n) {
  float sums[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) sums[i] = x[i * n + threadIdx.x];
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] = sums[i] * sums[(i + 1) % 64] + x[k];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * n + threadIdx.x] = sums[i];
}
"""


@needs_extension
def test_it_loads_and_plans_where_torch_cannot_be_imported():
    done = run_without_torch(installed(), "print(m.gated_residual_forward_plan(params)[0][:4])")
    assert done.returncode == 0, done.stderr
    name = "gated_forward_kernel<float, __half, 4, xattn::Norm::kNone>"
    assert done.stdout.strip() == repr((name, (1, 1, 1), (32, 16, 1), 0))


@needs_extension
def test_a_launch_without_a_device_says_so():
    assert_a_launch_says_that_there_is_no_device(installed())


@needs_extension
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (100, "no CUDA-capable device is detected .*: there is no CUDA device here"),
        (
            209,
            r"cudaErrorNoKernelImageForDevice.*: this build has no code for the device",
        ),
        (701, "too many resources requested.*: a block needs more shared memory than the device"),
        (719, "unspecified launch failure.*: of this launch or of what the device did before"),
        (9, r"op: invalid configuration argument \(cudaErrorInvalidConfiguration\)$"),
    ],
    ids=["no_device", "architecture", "shared_memory", "failed", "other"],
)
def test_each_failure_is_one_clear_error(error, said):
    launch.extension().check(0, "op")
    with pytest.raises(RuntimeError, match=f"^op: .*{said.removeprefix('op: ')}"):
        launch.extension().check(error, "op")


@needs_extension
def test_types_without_a_kernel_are_an_error():
    last = "m.gated_residual_forward_plan(params)"
    done = run_without_torch(installed(), last, "float16", "bfloat16")
    assert "RuntimeError: gated_residual_forward: invalid argument" in done.stderr


@needs_extension
def test_it_needs_neither_torch_nor_cudart_and_shows_one_symbol():
    assert_needs_neither_torch_nor_cudart_and_shows_one_symbol(installed())


def test_the_table_is_of_these_kernels_and_none_spills():
    """In any shipped configuration; the assembler said what each took."""
    rows = cuda_grid.load(RESULTS / "static")
    assert {row.code for row in rows} == {cuda_grid.code()}, (
        "run tools.machine_code.cuda_grid again"
    )
    made = {(path.name, arch) for path in cuda_grid.SOURCES for arch in ARCHS}
    assert {(row.source, row.arch) for row in rows} == made
    assert all(row.registers for row in rows)
    assert not [(row.symbol, row.faults) for row in rows if row.faults]


@pytest.mark.compile
@pytest.mark.parametrize("source", cuda_grid.SOURCES, ids=lambda path: path.name)
def test_the_table_is_what_the_compiler_makes(source):
    """On one architecture, or this would take as long as the wheel."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    rows = {row.symbol: row for row in cuda_grid.compile_source(source, 80)}
    table = cuda_grid.load(RESULTS / "static")
    known = {row.symbol: row for row in table if (row.source, row.arch) == (source.name, 80)}
    assert known.keys() == rows.keys()
    if next(iter(known.values())).nvcc == cuda_grid.nvcc_version():
        assert known == rows


@pytest.mark.compile
def test_a_spill_is_reported(tmp_path):
    """More sums than 32 registers hold, or the test above gates nothing."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    (row,) = cuda_grid.compile_source(source, 80)
    assert row.kernel == "spilling_kernel" and row.spills and row.faults
