"""The kernels of csrc/ on CPU tensors: what the launchers would launch, run by ptxsim.

Each kernel of a plan is compiled to PTX by its name alone, and the addresses of tensors in its
parameters become those of the emulator, which knows how far each tensor reaches.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from support import launches
from tools.machine_code import cuda_grid
from xattn_kernels.cuda_kernels import launch

launch_pointer = launch.pointer
KERNELS: dict[tuple[str, str], Any] = {}  # (arch, name) -> ptxsim's kernel


def reach(t: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


class Session:
    """Stands in for `launch.pointer` and `launch.submit`."""

    def __init__(self, ptxsim, arch: str):
        self.ptxsim, self.arch = ptxsim, arch
        self.tensors: dict[int, Tensor] = {}
        self.launched: list[tuple[str, Any]] = []  # kernel names and ptxsim's counts

    def pointer(self, t: Tensor | None) -> int:
        address = launch_pointer(t)
        if address:  # without elements there is none, as there is for None
            before = self.tensors.setdefault(address, t)
            if reach(t) > reach(before):  # one may be a part of the other
                self.tensors[address] = t
        return address

    def submit(self, op: str, params: Any, device) -> None:
        for name, grid, block, shared, content in getattr(launch.extension(), op + "_plan")(params):
            stats = self.kernel(name).launch(
                grid, block, [lambda register, content=content: self.moved(content, register)],
                dynamic_shared=shared,
            )  # fmt: skip
            self.launched.append((name, stats))
            launches.note_cuda(name, self.arch)
        self.tensors.clear()

    def moved(self, content: bytes, register) -> bytes:
        """The parameters with the emulator's addresses."""
        words = list(struct.unpack(f"<{len(content) // 8}Q", content))
        new = {}
        for n, word in enumerate(words):
            if (start := self.tensor_at(word)) is not None:
                if start not in new:
                    t = self.tensors[start]
                    new[start] = register(t, f"tensor of shape {list(t.shape)}")
                words[n] = new[start] + word - start
        return struct.pack(f"<{len(words)}Q", *words)

    def tensor_at(self, address: int) -> int | None:
        """Where the tensor begins that holds `address`, which may be inside of a buffer."""
        if address in self.tensors:
            return address
        for start, t in self.tensors.items():
            if t.dim() == 1 and start < address < start + t.numel() * t.element_size():
                return start
        return None

    def kernel(self, name: str):
        if (self.arch, name) not in KERNELS:
            KERNELS[self.arch, name] = self.compiled(name)
        return KERNELS[self.arch, name]

    def compiled(self, name: str):
        """The kernel that the C++ expression `name` stands for."""
        function = cuda_grid.function_of(name)
        module = self.ptxsim.compile_cuda(
            source=cuda_grid.source_of(name), arch=self.arch, includes=[str(cuda_grid.CSRC)]
        )
        return module.kernel(f"{len(function)}{function}")  # as C++ spells it in symbols


def splits_of(n: int) -> Callable:
    """In place of `launch.splits`: n blocks share each loop."""

    def splits(choose, call, device):
        if hasattr(call, "dq_splits"):
            call.dq_splits = call.dkdv_splits = call.dbias_splits = n
        return n

    return splits


@contextmanager
def cuda_on_cpu(ptxsim, arch: str) -> Iterator[Session]:
    if launch.extension() is None:
        pytest.skip("the package is built without its CUDA kernels")
    session = Session(ptxsim, arch)
    with (
        mock.patch.dict(os.environ, XATTN_CUDA_ON_CPU="1"),
        mock.patch.object(launch, "pointer", session.pointer),
        mock.patch.object(launch, "submit", session.submit),
    ):
        yield session
