"""Providers, which compute cases behind one small interface.

`reasons(case, mode)` lists why a provider cannot compute a case, and is empty if it can;
`prepare(case)` builds what a model builds once per batch (dense mask, BlockMask, cumulative
lengths, compiled function) and returns `attend(q, k, v) -> out [B, Hq, Nq, Dv]`, which is timed.
Peak memory covers both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .machine import free_memory

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Provider:
    """A named way to compute a case; with `compiles` the first call of a shape takes seconds, whose
    result a cache on disk keeps."""

    name: str
    reasons: Callable[[Any, str], list[str]]
    prepare: Callable[[Any], Attend]
    compiles: bool = False


def our_backend(reasons: Callable, prepare: Callable, name: str) -> Provider:
    """One of our backends; `reasons` and `prepare` take its name first."""
    functions = partial(reasons, name), partial(prepare, name)
    return Provider(f"xattn-{name}", *functions, compiles=name == "triton")


def no_reasons(case: Any, mode: str) -> list[str]:
    return []


def too_large(case: Any, mode: str, tensors: int) -> list[str]:
    """A reason if this many float32 [B, Hq, Nq, Nk] tensors do not fit in free memory."""
    w = case.workload
    need = 4 * tensors * (1 if mode == "forward" else 2) * w.B * w.Hq * w.Nq * w.Nk
    free = free_memory(case.device)
    if need <= free:
        return []
    return [f"needs {need / 2**30:.1f} GiB for the scores, {free / 2**30:.1f} are free"]


def needs_half_on_cuda(case: Any) -> list[str]:
    if case.device.type != "cuda":
        return ["runs on CUDA only"]
    return [] if case.dtype in HALF else [f"dtype {case.dtype} is not float16 or bfloat16"]


def needs_package(name: str) -> list[str]:
    return [] if find_spec(name) else [f"{name} is not installed"]
