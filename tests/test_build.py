"""What a build of the package does with and without a CUDA compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[1] / "setup.py"


def setup(tmp_path, *commands: str, **environment: str) -> subprocess.CompletedProcess:
    """setup.py beside no package, where PATH has no nvcc."""
    shutil.copy(SETUP, tmp_path)
    (tmp_path / "csrc").mkdir(exist_ok=True)
    (tmp_path / "bin").mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XATTN_", "CUDA_"))}
    env["PATH"] = str(tmp_path / "bin")
    command = [sys.executable, "setup.py", *commands]
    return subprocess.run(
        command, cwd=tmp_path, env=env | environment, capture_output=True, text=True
    )


def test_without_a_compiler_it_is_built_without_the_kernels_and_says_so(tmp_path):
    done = setup(tmp_path, "--version")
    assert done.returncode == 0, done.stderr
    assert "is built without its CUDA kernels: there is no nvcc" in done.stderr
    assert setup(tmp_path, "--version", XATTN_BUILD_CUDA="0").stderr == ""


def test_asked_for_they_are_an_error(tmp_path):
    done = setup(tmp_path, "--version", XATTN_BUILD_CUDA="1")
    assert done.returncode and "XATTN_BUILD_CUDA=1, but there is no nvcc" in done.stderr


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        (dict(XATTN_BUILD_CUDA="yes"), "XATTN_BUILD_CUDA must be 0 or 1, got 'yes'"),
        (dict(CUDA_HOME="/nowhere"), "CUDA_HOME is /nowhere, where there is no bin/nvcc"),
    ],
    ids=["choice", "home"],
)
def test_settings_that_mean_nothing_are_errors(tmp_path, variables, error):
    done = setup(tmp_path, "--version", **variables)
    assert done.returncode and error in done.stderr


@pytest.mark.parametrize("archs", ["sm_90", "75", "80,90", "80;"])
def test_architectures_are_numbers_from_80_on(tmp_path, archs):
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("nvcc is not on PATH")
    (tmp_path / "bin").mkdir()
    for tool in (nvcc, shutil.which("c++") or "", shutil.which("sh")):
        if tool:
            (tmp_path / "bin" / Path(tool).name).symlink_to(tool)
    done = setup(tmp_path, "build_ext", XATTN_CUDA_ARCHS=archs)
    assert done.returncode and "XATTN_CUDA_ARCHS must be like '80;90'" in done.stderr, done.stderr
