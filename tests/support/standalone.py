"""The compiled extension as a file: a call where nothing else can be imported, and its links."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xattn_kernels.cuda_kernels import launch

# A call of two rows; its tensors are addresses that nobody reads.
CALL = """
import importlib.util, sys
for name in ("torch", "triton", "numpy"):
    sys.modules[name] = None
spec = importlib.util.spec_from_file_location("_cuda", {path!r})
m = importlib.util.module_from_spec(spec)
spec.loader.exec_module(m)
y, x, h = (m.RowTensor(data=64 * n, strides=[24, 0, 0, 0]) for n in (1, 2, 3))
shape = m.GatedResidualShape(
    rows=m.RowSizes(rows=2, sizes=[2, 1, 1, 1]), dim=24, x_dtype=m.DType.{dtype},
    h_dtype=m.DType.{h_dtype}, norm=m.Norm.none, eps=1e-5,
)
params = m.GatedResidualForwardParams(y=y, x=x, h=h, gate=m.Numbers(data=64), shape=shape)
{last}
"""
SYSTEM = {"libc", "libm", "libstdc++", "libgcc_s", "libdl", "librt", "libpthread"}
SYSTEM |= {"ld-linux-x86-64", "ld-linux-aarch64"}


def installed() -> Path:
    return Path(launch.extension().__file__)


def run_without_torch(
    path: Path, last: str, dtype: str = "float32", h_dtype: str = "float16"
) -> subprocess.CompletedProcess:
    code = CALL.format(path=str(path), dtype=dtype, h_dtype=h_dtype, last=last)
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hidden)


def assert_a_launch_says_that_there_is_no_device(path: Path) -> None:
    done = run_without_torch(path, "m.gated_residual_forward(params, 0, 0)")
    assert done.returncode == 1
    assert "RuntimeError: gated_residual_forward: " in done.stderr
    assert "there is no CUDA device here, or no driver for one" in done.stderr


def assert_needs_neither_torch_nor_cudart_and_shows_one_symbol(path: Path) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not here")
    read = {"capture_output": True, "text": True, "check": True}
    needed = re.findall(r"\[(.*?)\]", subprocess.run(["readelf", "-d", path], **read).stdout)
    assert {name.partition(".so")[0] for name in needed} <= SYSTEM
    table = subprocess.run(["readelf", "--dyn-syms", "-W", path], **read).stdout
    shown = [line.split() for line in table.splitlines() if re.match(r"\s*\d+:", line)]
    shown = {row[7].partition("@")[0] for row in shown if row[6] != "UND" and row[4] != "LOCAL"}
    assert shown == {"PyInit__cuda"}
