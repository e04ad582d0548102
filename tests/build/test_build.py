"""What a build of the package does with and without a CUDA compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import build_backend
from support.checkout import ROOT

COMPILER = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]


def program(path: Path, cuda: str = "13.0") -> Path:
    """That says, as nvcc does, of which CUDA it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {cuda}, V{cuda}.88\n")
    path.chmod(0o755)
    return path


def setup(tmp_path, *commands: str, **environment: str) -> subprocess.CompletedProcess:
    """setup.py beside no package, where PATH has no nvcc."""
    for name in ("setup.py", "build_backend.py"):
        shutil.copy(ROOT / name, tmp_path)
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
    program(tmp_path / "bin" / "c++")
    toolkit = program(tmp_path / "bin" / "nvcc").parents[1]
    (toolkit / "lib").mkdir()
    (toolkit / "lib" / "libcudart_static.a").touch()
    done = setup(tmp_path, "build_ext", XATTN_CUDA_ARCHS=archs)
    assert done.returncode and "XATTN_CUDA_ARCHS must be like '80;90'" in done.stderr, done.stderr


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """A Linux on x86_64 with a C++ compiler in bin/, the only folder on PATH, and with no nvcc."""
    for name in ("CUDA_HOME", "CXX", "XATTN_BUILD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(program(tmp_path / "bin" / "c++").parent))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site-packages")])
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "linux-x86_64")
    return tmp_path


def asked() -> list[str]:
    wheel, editable, source = (
        getattr(build_backend, f"get_requires_for_build_{kind}")()
        for kind in ("wheel", "editable", "sdist")
    )
    assert wheel == editable and source == []
    return wheel


@pytest.mark.parametrize(("wanted", "requirements"), [(None, COMPILER), ("1", COMPILER), ("0", [])])
def test_a_compiler_is_asked_for_as_kernels_are_wanted(bare, monkeypatch, wanted, requirements):
    if wanted is not None:
        monkeypatch.setenv("XATTN_BUILD_CUDA", wanted)
    assert asked() == requirements


@pytest.mark.parametrize("wanted", [None, "1"])
@pytest.mark.parametrize("nvcc", ["bin/nvcc", "site-packages/nvidia/cu13/bin/nvcc"])
def test_no_compiler_is_asked_for_beside_another(bare, monkeypatch, nvcc, wanted):
    if wanted is not None:
        monkeypatch.setenv("XATTN_BUILD_CUDA", wanted)
    toolkit = program(bare / nvcc).parents[1]
    assert build_backend.find_toolkit() == toolkit and asked() == []


def test_the_toolkit_of_cuda_home_is_preferred(bare, monkeypatch):
    program(bare / "bin" / "nvcc")
    toolkit = program(bare / "toolkit" / "bin" / "nvcc").parents[1]
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert build_backend.find_toolkit() == toolkit and asked() == []


def test_an_old_toolkit_on_path_is_passed_over(bare):
    program(bare / "bin" / "nvcc", "12.4")
    assert build_backend.find_toolkit() is None and asked() == COMPILER
    newer = program(bare / "site-packages/nvidia/cu13/bin/nvcc").parents[1]
    assert build_backend.find_toolkit() == newer and asked() == []


def test_an_old_toolkit_of_cuda_home_is_not_replaced(bare, monkeypatch):
    program(bare / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(program(bare / "old/bin/nvcc", "12.4").parents[1]))
    assert build_backend.find_toolkit() is None and asked() == []


@pytest.mark.parametrize("wanted", ["", "1"])
def test_what_is_missing_is_said_with_the_toolkit_that_is_there(tmp_path, wanted):
    old = program(tmp_path / "old/bin/nvcc", "12.4")
    text = "there is no libcudart_static.a in lib64 or lib"
    for cuda, said in (("12.4", f"; {old} is of 12.4)"), ("12.10", text)):
        program(old, cuda)
        home = str(old.parents[1])
        done = setup(tmp_path, "--version", CUDA_HOME=home, XATTN_BUILD_CUDA=wanted)
        assert said in done.stderr
        assert bool(done.returncode) == (wanted == "1")


def test_the_static_runtime_lies_where_toolkits_put_it(tmp_path):
    assert build_backend.find_cudart(tmp_path) is None
    for place in ("targets/sbsa-linux/lib", "lib", "lib64"):
        (tmp_path / place).mkdir(parents=True)
        assert build_backend.find_cudart(tmp_path) != tmp_path / place
        (tmp_path / place / "libcudart_static.a").touch()
        assert build_backend.find_cudart(tmp_path) == tmp_path / place


@pytest.mark.parametrize(
    ("platform", "requirements"),
    [
        ("linux-aarch64", COMPILER),
        ("linux-ppc64le", []),
        ("macosx-14.0-arm64", []),
        ("win-amd64", []),
    ],
)
def test_it_is_asked_for_on_platforms_that_have_it(bare, monkeypatch, platform, requirements):
    monkeypatch.setattr(sysconfig, "get_platform", lambda: platform)
    assert asked() == requirements


def test_without_a_cxx_compiler_it_is_of_no_use(bare):
    (bare / "bin" / "c++").unlink()
    assert asked() == []
