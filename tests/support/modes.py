"""Where Triton kernels run in a test: interpreted, emulated for an architecture, or on a GPU."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support import launches
from support.checkout import ROOT
from support.cuda_emulation import cuda_on_cpu
from support.quick_interpreter import quick_interpreter
from xattn_kernels.cuda_kernels import launch

CHOICES = ("TRITON_INTERPRET", "XATTN_TRITON_ON_CPU")  # of the tests, not of users
EMULATED = {"sm_80": 80, "sm_89": 89, "sm_90": 90}
# decoded kernels, shared by the tests of a process
COMPILED: dict[str, dict] = {name: {} for name in EMULATED}


@dataclass(frozen=True)
class Mode:
    """How kernels run: `name` is "interpreter", "sm_80", "sm_89", "sm_90" or "gpu"; of those of
    csrc/ "cuda_sm_80" and so on."""

    name: str
    device: str
    session: Any = None  # ptxsim's, with its launches

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """A coarse dtype and a finer one; the interpreter has no bfloat16 product."""
        if self.name == "interpreter":
            return torch.float16, torch.float32
        return torch.bfloat16, torch.float16

    @property
    def sizes(self) -> dict[str, int]:
        """For a `Case`. The interpreter is slow by the tile, compiled kernels by the variant."""
        if self.name == "interpreter":
            return dict(B=1, Hq=1, Hkv=1, Nk=40, D=16)
        return dict(B=2, Hq=2, Hkv=2, Nk=75, D=32)


def modes(*names: str) -> list:
    """Parameters for the fixture `mode`: `parametrize("mode", modes(...), indirect=True)`."""
    marks = dict.fromkeys(EMULATED, pytest.mark.emulated) | {"gpu": pytest.mark.gpu}
    marks |= {f"cuda_{name}": mark for name, mark in marks.items()}
    return [pytest.param(n, marks=marks[n]) if n in marks else n for n in names]


def case_params(found: list[tuple]) -> list:
    """(mode, case, dtype, marks) as parameters of a test."""
    return [
        pytest.param(mode, case, dtype, id=f"{mode}-{case}-{str(dtype)[6:]}", marks=marks)
        for mode, case, dtype, marks in found
    ]


def each_compiled_mode(test):
    """A test of compiled kernels: on a GPU, and emulated on two architectures that take turns."""
    compiled = modes("sm_80", "sm_90", "gpu")
    return pytest.mark.taking_turns(pytest.mark.parametrize("mode", compiled, indirect=True)(test))


needs_extension = pytest.mark.skipif(
    launch.extension() is None, reason="the package is built without its CUDA kernels"
)


def find_ptxsim() -> ModuleType:
    """The emulator, from sys.path, $PTXSIM_PATH or ../shared/ptxsim; skips the test without it."""
    places = [os.environ.get("PTXSIM_PATH"), str(ROOT.parent / "shared" / "ptxsim")]
    for place in [None, *places]:
        if place is not None and Path(place, "ptxsim").is_dir() and place not in sys.path:
            sys.path.append(place)
        try:
            return importlib.import_module("ptxsim")
        except ModuleNotFoundError as error:
            if error.name != "ptxsim":
                raise
    pytest.skip("ptxsim is not on sys.path, in $PTXSIM_PATH or in ../shared/ptxsim")


@contextmanager
def without_assembler() -> Iterator[None]:
    """Triton stops at the PTX, which is what ptxsim executes: the assembler is a fifth of the time
    of compiling. It sees what the compile grid has, not each shape that is emulated. The cache is a
    folder of its own, as Triton 3.6 does not tell these kernels by their key from whole ones."""
    from triton import knobs

    def stop_at_ptx(backend=None, stages=None, *_):
        if stages is None:  # Triton 3.9 asks for a part of the key
            return "only PTX", "only PTX"
        stages["cubin"] = lambda ptx, metadata: b""

    with knobs.runtime.scope(), knobs.cache.scope():
        knobs.runtime.add_stages_inspection_hook = stop_at_ptx
        knobs.cache.dir = str(Path(knobs.cache.dir, "only_ptx"))
        yield


@contextmanager
def enter(name: str) -> Iterator[Mode]:
    """The mode, for as long as its emulator is in charge; skips the test where it cannot be."""
    if name.startswith("cuda_sm"):
        if os.environ.get("XATTN_TRITON_ON_CPU") != "1":  # the process of all that is emulated
            pytest.skip("emulation needs XATTN_TRITON_ON_CPU=1")
        with (
            cuda_on_cpu(find_ptxsim(), name.removeprefix("cuda_")) as session,
            launches.noted(name),
        ):
            yield Mode(name, "cpu", session)
        return
    if name.removeprefix("cuda_") == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        with launches.noted(torch.cuda.get_device_name()):
            yield Mode(name, "cuda")
        if torch.cuda.memory_reserved() > 2**32:  # a case with tensors far apart: others need it
            torch.cuda.empty_cache()
        return
    pytest.importorskip("triton")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "interpreter":
        if not interpreting:
            pytest.skip("TRITON_INTERPRET=1 is not set, and Triton reads it when imported")
        with quick_interpreter(), launches.noted(name):
            yield Mode(name, "cpu")
        return
    if interpreting or os.environ.get("XATTN_TRITON_ON_CPU") != "1":
        pytest.skip("emulation needs XATTN_TRITON_ON_CPU=1 and no TRITON_INTERPRET")
    with find_ptxsim().triton_on_cpu(arch=EMULATED[name]) as session, without_assembler():
        session.kernels = COMPILED[name]
        with launches.noted(name):
            yield Mode(name, "cpu", session)


@contextmanager
def enter_backend(name: str) -> Iterator[tuple[str, str]]:
    """(backend, device) of "torch" or "eager", or of the Triton kernels in the mode `name`."""
    if name in ("torch", "eager"):
        yield name, "cpu"
        return
    with enter(name) as mode:
        yield "triton", mode.device


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """torch's setting lets float32 products use TF32."""
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")  # torch 2.9
    name = "fp32_precision" if new else "allow_tf32"
    before = getattr(matmul, name)
    setattr(matmul, name, "tf32" if new else True)
    try:
        yield
    finally:
        setattr(matmul, name, before)
