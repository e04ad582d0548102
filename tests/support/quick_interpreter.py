"""Triton's interpreter without the third of its time that repeats one piece of work.

It remaps `triton.language` at each launch and again at each call of one jit function by another.
Once per launch, for both modules that jit functions see, is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch


@contextmanager
def quick_interpreter() -> Iterator[None]:
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def call(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    with (
        patch.object(interpreter, "_patch_lang", lambda fn: original(everything)),
        patch.object(interpreter.InterpretedFunction, "__call__", call),
    ):
        yield
