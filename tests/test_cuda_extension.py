"""The extension of the package: what it is linked with, how it fails, what ptxas says of it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from benchmarks import cuda_grid
from benchmarks.commands import RESULTS
from benchmarks.compile_grid import ARCHS
from xattn_kernels.cuda_kernels import launch

built = pytest.mark.skipif(
    launch.extension() is None, reason="the package is built without its CUDA kernels"
)
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
# A call of two rows; its tensors are addresses that nobody reads.
CALL = """
import importlib.util, sys
for name in ("torch", "triton", "numpy"):
    sys.modules[name] = None
spec = importlib.util.spec_from_file_location("_cuda", {path!r})
m = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m)
none, nothing = m.RowTensor(), m.Numbers()
rows = [m.RowTensor(64 * n, [24, 0, 0, 0]) for n in (1, 2, 3)]
shape = m.GatedResidualShape(2, [2, 1, 1, 1], 24, m.DType.{dtype}, m.DType.{h_dtype}, m.Norm.none,
                             1e-5, False)
params = m.GatedResidualForwardParams(rows[0], none, rows[1], rows[2], none, m.Numbers(64),
                                      nothing, nothing, shape)
{last}
"""


def run_without_torch(last: str, dtype: str = "float32", h_dtype: str = "float16"):
    path = launch.extension().__file__
    code = CALL.format(path=path, dtype=dtype, h_dtype=h_dtype, last=last)
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hidden)


@built
def test_it_loads_and_plans_where_torch_cannot_be_imported():
    done = run_without_torch("print(m.gated_residual_forward_plan(params)[0][:4])")
    assert done.returncode == 0, done.stderr
    name = "gated_forward_kernel<float, __half, 4, xattn::Norm::kNone>"
    assert done.stdout.strip() == repr((name, (1, 1, 1), (32, 16, 1), 0))


@built
def test_a_launch_without_a_device_says_so():
    done = run_without_torch("m.gated_residual_forward(params, 0, 0)")
    assert done.returncode == 1
    assert "RuntimeError: gated_residual_forward: " in done.stderr
    assert "there is no CUDA device here, or no driver for one" in done.stderr


@built
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


@built
def test_types_without_a_kernel_are_an_error():
    done = run_without_torch("m.gated_residual_forward_plan(params)", "float16", "bfloat16")
    assert "RuntimeError: gated_residual_forward: invalid argument" in done.stderr


@built
def test_it_needs_neither_torch_nor_cudart_and_shows_one_symbol():
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not here")
    path = launch.extension().__file__
    read = {"capture_output": True, "text": True, "check": True}
    needed = re.findall(r"\[(.*?)\]", subprocess.run(["readelf", "-d", path], **read).stdout)
    allowed = {"libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "libdl.so", "librt.so"}
    allowed |= {"libpthread.so", "ld-linux-x86-64.so", "ld-linux-aarch64.so"}
    assert {name.partition(".so")[0] + ".so" for name in needed} <= allowed
    table = subprocess.run(["readelf", "--dyn-syms", "-W", path], **read).stdout
    shown = [line.split() for line in table.splitlines() if re.match(r"\s*\d+:", line)]
    shown = {row[7].partition("@")[0] for row in shown if row[6] != "UND" and row[4] != "LOCAL"}
    assert shown == {"PyInit__cuda"}


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", cuda_grid.SOURCES, ids=lambda path: path.name)
def test_no_kernel_spills_and_the_table_has_each(source, arch):
    """In any shipped configuration, of which the assembler says what it took."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    rows = cuda_grid.compile_source(source, arch)
    assert rows and all(row.registers for row in rows)
    assert not [(row.symbol, row.faults) for row in rows if row.faults]
    committed = cuda_grid.load(RESULTS / "static")
    known = {row.symbol for row in committed if (row.source, row.arch) == (source.name, arch)}
    assert known == {row.symbol for row in rows}, "run `python -m benchmarks.cuda_grid` again"


@pytest.mark.compile
def test_a_spill_is_reported(tmp_path):
    """More sums than 32 registers hold, or the test above gates nothing."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    (row,) = cuda_grid.compile_source(source, 80)
    assert row.kernel == "spilling_kernel" and row.spills and row.faults
