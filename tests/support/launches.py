"""Which kernels the passing tests launched, where, and on which dtypes: for docs/evidence.md.

With XATTN_EVIDENCE naming a folder, each test process leaves one JSON file there;
`python -m tools.evidence collect FOLDER` makes the table of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

FOLDER = os.environ.get("XATTN_EVIDENCE")
of_this_test: set[tuple[str, str, str]] = set()  # (kernel, mode, dtype)
of_passed_tests: set[tuple[str, str, str]] = set()


@contextmanager
def noted(mode: str) -> Iterator[None]:
    """Notes each launch and the dtype of its rows."""
    from triton.runtime.jit import KernelInterface

    launcher = KernelInterface.__getitem__

    def noting(kernel, grid):
        launch = launcher(kernel, grid)

        def noted_launch(*args, **kwargs):
            name = kernel.__name__
            of_this_test.add((name, mode, row_dtype(args, name.startswith("gated"))))
            return launch(*args, **kwargs)

        return noted_launch

    KernelInterface.__getitem__ = noting
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launcher


def row_dtype(args: tuple, gated: bool) -> str:
    """The dtype of the first float tensor with four strides, those of [B, H, N, width]: parts of a
    split, which are float32, have five, and lse has none. A gated residual has rows of any strides,
    and where its parts are summed none."""
    for t, stride in strided_in(args):
        if t.is_floating_point() and (gated or len(stride) == 4):
            return str(t.dtype)[6:]
    floats = [t for t in tensors_in(args) if t.is_floating_point()]
    return str(floats[0].dtype)[6:] if gated and floats else "int32"


def strided_in(argument) -> Iterator[tuple[torch.Tensor, tuple]]:
    """The tensors with strides among the arguments of a launch."""
    if isinstance(argument, tuple):
        if getattr(argument, "_fields", ()) == ("ptr", "stride"):
            if argument.ptr is not None:
                yield argument
        else:
            for part in argument:
                yield from strided_in(part)


def tensors_in(argument) -> list[torch.Tensor]:
    """The tensors among the arguments of a launch, also those in structs."""
    if isinstance(argument, tuple):
        return [t for part in argument for t in tensors_in(part)]
    return [argument] if isinstance(argument, torch.Tensor) else []


DTYPES = {"float": "float32", "__half": "float16", "__nv_bfloat16": "bfloat16"}


def note_cuda(name: str, mode: str) -> None:
    """Notes the launch of a kernel of csrc/ by its C++ name, whose first argument is the type of
    its rows, or a number where it walks bounds; sums of parts have none and are float32."""
    function, _, arguments = name.partition("<")
    dtype = DTYPES.get(arguments.partition(",")[0].rstrip(">"), "int32") if arguments else "float32"
    of_this_test.add((f"cuda {function}", mode, dtype))


def settle(passed: bool) -> None:
    """At the end of a test."""
    if passed:
        of_passed_tests.update(of_this_test)
    of_this_test.clear()


def write() -> None:
    """At the end of a process."""
    if FOLDER and of_passed_tests:
        folder = Path(FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{os.getpid()}.json"
        path.write_text(json.dumps(sorted(of_passed_tests), indent=0))
