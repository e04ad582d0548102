"""Packages of the distribution, and its CUDA extension; everything else is in pyproject.toml.

``triton_kernels/`` lies at the top of the repository but is installed inside ``xattn_kernels``,
because a top-level package of that name belongs to another project that inference servers look for.

The extension links neither torch nor a dynamic libcudart, so one binary serves every torch:

    XATTN_BUILD_CUDA   1: an error without nvcc; 0: no extension; unset: one where nvcc is found
    XATTN_CUDA_ARCHS   compute capabilities, "80;90"; by default those of ARCHS
    MAX_JOBS           compilers that run at once, each for as many architectures at once
    CUDA_HOME          a toolkit; else nvcc on PATH where it is new enough, else that of the
                       nvidia-cuda-nvcc wheel, which build_backend.py asks for
    CXX                the C++ compiler, also that which nvcc calls; flags may follow its name
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

from build_backend import (
    OLDEST_CUDA,
    PARTS,
    cuda_version,
    cuda_wanted,
    find_cudart,
    find_cxx,
    find_nvcc,
    find_toolkit,
    host_compiler,
)

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
ARCHS = ("80", "89", "90", "100", "120")
CXX_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas")
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-Xfatbin=-compress-all",
)


def gencode(archs: tuple[str, ...]) -> list[str]:
    """Machine code for each, and PTX of the oldest, which runs on all that come after it."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    oldest = min(archs, key=int)
    return [*flags, f"-gencode=arch=compute_{oldest},code=compute_{oldest}"]


def wanted_archs() -> tuple[str, ...]:
    archs = tuple((os.environ.get("XATTN_CUDA_ARCHS") or ";".join(ARCHS)).split(";"))
    if not all(a.isdigit() and int(a) >= 80 for a in archs):
        raise SystemExit(f"XATTN_CUDA_ARCHS must be like '80;90', each from 80 on, got {archs}")
    return archs


def max_jobs() -> int:
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not jobs.isdigit() or int(jobs) < 1:
        raise SystemExit(f"MAX_JOBS must be a positive number, got {jobs!r}")
    return int(jobs)


class BuildCuda(build_ext):
    """Compiles csrc/ with nvcc and the host's compiler, several files at once, through ninja."""

    def build_extension(self, ext: Extension) -> None:
        import ninja

        folder = Path(self.build_temp).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        for made in (folder, target.parent):
            made.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(folder, target))
        jobs = str(max_jobs())
        # One file takes half of the time. Not in its command: another MAX_JOBS is no other build.
        flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --threads={jobs}"
        arguments = [Path(ninja.BIN_DIR, "ninja"), "-C", folder, "-j", jobs]
        subprocess.run(arguments, check=True, env=os.environ | {"NVCC_APPEND_FLAGS": flags})


def ninja_file(folder: Path, target: Path) -> str:
    """The rules that make `target`, with objects in `folder`."""
    import pybind11

    toolkit, cxx, archs = find_toolkit(), find_cxx(), wanted_archs()
    include = (toolkit / "include", pybind11.get_include(), sysconfig.get_path("include"))
    includes = [f"-I{path}" for path in include]
    oldest = f"-DXATTN_OLDEST_ARCH={min(map(int, archs))}"
    nvcc = command(f"{toolkit}/bin/nvcc", *host_compiler(), *NVCC_FLAGS, *gencode(archs))
    libraries = ("-lcudart_static", "-ldl", "-lrt", "-lpthread")
    exports = CSRC / "exports.map"
    link = (f"-L{find_cudart(toolkit)}", *libraries, f"-Wl,--version-script={exports}", "-s")
    depends = "-MD -MF $out.d -c $in -o $out"
    lines = [
        *("rule nvcc", f"  command = {nvcc} {depends}", "  depfile = $out.d"),
        *("rule cxx", f"  command = {command(*cxx, *CXX_FLAGS, oldest, *includes)} {depends}"),
        *("  depfile = $out.d", "rule link"),
        f"  command = {command(*cxx)} -shared $in -o $out {command(*link)}",
    ]
    objects = []
    for source in sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cpp")]):
        objects.append(folder / f"{source.name}.o")
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {as_path(objects[-1])}: {rule} {as_path(source)}")
    inputs = " ".join(map(as_path, objects))
    lines.append(f"build {as_path(target)}: link {inputs} | {as_path(exports)}")
    return "\n".join(lines) + "\n"


def command(*words: str) -> str:
    """Of a rule, for the shell that ninja calls."""
    return shlex.join(words).replace("$", "$$")


def as_path(path: Path) -> str:
    """Of a build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def missing() -> list[str]:
    """What a build of the extension needs and is not here."""
    found, toolkit = [], find_toolkit()
    if toolkit is None:
        older = [f"; {nvcc} is of {{}}.{{}}".format(*cuda_version(nvcc)) for nvcc in find_nvcc()]
        packages = " ".join(f"nvidia-{part}" for part in PARTS)
        text = "nvcc of CUDA {}.{} or later (CUDA_HOME, PATH, or the packages {}{})"
        found.append(text.format(*OLDEST_CUDA, packages, "".join(older)))
    elif find_cudart(toolkit) is None:
        found.append(f"libcudart_static.a in lib64 or lib of {toolkit}")
    if find_cxx() is None:
        found.append("C++ compiler (CXX)")
    return found + [f"package {name}" for name in ("pybind11", "ninja") if not find_spec(name)]


def extensions() -> list[Extension]:
    wanted = cuda_wanted()
    if wanted == "0":
        return []
    if lacks := missing():
        text = "there is no " + " and no ".join(lacks)
        if wanted == "1":
            raise SystemExit(f"XATTN_BUILD_CUDA=1, but {text}")
        print(f"xattn-kernels is built without its CUDA kernels: {text}", file=sys.stderr)
        return []
    return [Extension("xattn_kernels._cuda", [])]


setup(
    # Not in pyproject.toml, where setuptools before 77 and after it want different spellings.
    license="Apache-2.0",
    packages=[*find_packages(include=["xattn_kernels*"]), "xattn_kernels.triton_kernels"],
    package_dir={"xattn_kernels.triton_kernels": "triton_kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCuda},
)
