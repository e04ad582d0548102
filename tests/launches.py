"""Which kernels the passing tests launched, where, and on which dtypes: the README's evidence.

With XATTN_EVIDENCE naming a folder, each test process leaves one JSON file there;
`python -m benchmarks.evidence` makes the table of them.
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
            of_this_test.add((kernel.__name__, mode, row_dtype(args)))
            return launch(*args, **kwargs)

        return noted_launch

    KernelInterface.__getitem__ = noting
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launcher


def row_dtype(args: tuple) -> str:
    """That of the first float tensor with the four strides of [B, H, N, width] behind it: parts of
    a split, which are float32, have five, and lse has none."""
    for t, strides in zip(args, args[1:], strict=False):
        if isinstance(t, torch.Tensor) and isinstance(strides, tuple) and len(strides) == 4:
            if t.is_floating_point():
                return str(t.dtype)[6:]
    return "int32"


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
