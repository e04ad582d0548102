"""setuptools as the build backend, with a compiler from PyPI where there is no other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

# nvcc, what it runs, and what it and csrc/ include and link, all in the folder nvidia/cu13
PARTS = ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime", "cuda-cccl")
PLATFORMS = ("linux-x86_64", "linux-aarch64")


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """Nothing where the kernels are not wanted, or need nothing more, or lack more than nvcc."""
    if cuda_wanted() == "0" or find_toolkit() or not find_cxx():
        return []
    here = sysconfig.get_platform() in PLATFORMS
    return [f"nvidia-{part}==13.0.*" for part in PARTS] if here else []


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None) -> list[str]:
    return []


def build_sdist(sdist_directory, config_settings=None) -> str:
    """Holds the sources of the kernels, so that no compiler is missed."""
    os.environ["XATTN_BUILD_CUDA"] = "0"
    return build_meta.build_sdist(sdist_directory, config_settings)


def cuda_wanted() -> str:
    wanted = os.environ.get("XATTN_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"XATTN_BUILD_CUDA must be 0 or 1, got {wanted!r}")
    return wanted


def find_cxx() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def find_toolkit() -> Path | None:
    """The folder whose bin/nvcc compiles, or None."""
    if home := os.environ.get("CUDA_HOME"):
        if not Path(home, "bin", "nvcc").is_file():
            raise SystemExit(f"CUDA_HOME is {home}, where there is no bin/nvcc")
        return Path(home)
    if found := shutil.which("nvcc"):
        return toolkit_of(Path(found))
    for folder in map(Path, sys.path):
        if (folder / "nvidia" / "cu13" / "bin" / "nvcc").is_file():
            return folder / "nvidia" / "cu13"
    return None


def toolkit_of(nvcc: Path) -> Path:
    """Where nvcc itself says that it stands: what is on PATH may be a script that calls it."""
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = [line.split("TOP=", 1)[1] for line in said.splitlines() if "TOP=" in line]
    return Path(top[0]).resolve() if top else nvcc.resolve().parents[1]
