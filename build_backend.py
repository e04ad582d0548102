"""setuptools as the build backend, with a compiler from PyPI where there is no other."""

from __future__ import annotations

import os
import re
import shlex
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
OLDEST_CUDA = (12, 8)  # the first that knows compute capabilities 10.0 and 12.0


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """Nothing where the kernels are not wanted, or need nothing more, or lack more than nvcc."""
    if cuda_wanted() == "0" or os.environ.get("CUDA_HOME") or find_toolkit() or not find_cxx():
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


def find_cxx() -> list[str] | None:
    """The words of CXX, which may be a compiler's name and flags, or None without the program."""
    words = shlex.split(os.environ.get("CXX") or "c++")
    return words if shutil.which(words[0]) else None


def host_compiler() -> list[str]:
    """What tells nvcc of CXX; its own default is gcc."""
    words = find_cxx()
    return [f"-ccbin={words[0]}"] if words else []


def find_nvcc() -> list[Path]:
    """Each nvcc that may compile, the first choice first; CUDA_HOME leaves none other."""
    if home := os.environ.get("CUDA_HOME"):
        if not Path(home, "bin", "nvcc").is_file():
            raise SystemExit(f"CUDA_HOME is {home}, where there is no bin/nvcc")
        return [Path(home, "bin", "nvcc")]
    on_path = shutil.which("nvcc")
    from_pypi = (Path(folder, "nvidia", "cu13", "bin", "nvcc") for folder in sys.path)
    return [Path(p) for p in [on_path] if p] + [nvcc for nvcc in from_pypi if nvcc.is_file()]


def cuda_version(nvcc: Path) -> tuple[int, int]:
    """(major, minor), or zeros for what does not say it."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def find_toolkit() -> Path | None:
    """The folder whose bin/nvcc compiles, or None."""
    for nvcc in find_nvcc():
        if cuda_version(nvcc) >= OLDEST_CUDA:
            return toolkit_of(nvcc)
    return None


def toolkit_of(nvcc: Path) -> Path:
    """Where nvcc itself says that it stands: what is on PATH may be a script that calls it."""
    question = [nvcc, *host_compiler(), "--dryrun", "-c", "x.cu"]
    said = subprocess.run(question, capture_output=True, text=True).stderr
    top = [line.split("TOP=", 1)[1] for line in said.splitlines() if "TOP=" in line]
    return Path(top[0]).resolve() if top else nvcc.resolve().parents[1]


def find_cudart(toolkit: Path) -> Path | None:
    """The folder of the static libcudart, or None."""
    folders = (toolkit / "lib64", toolkit / "lib", *sorted(toolkit.glob("targets/*/lib")))
    return next((f for f in folders if (f / "libcudart_static.a").is_file()), None)
