"""The choice of a backend from an ordered tuple, by the reasons why each cannot run."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from importlib import metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

OLDEST_TRITON = (3, 6)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def missing_triton() -> list[str]:
    """Why no device can run Triton kernels; Triton is not imported, as that takes seconds."""
    if find_spec("triton") is None:
        return ["triton is not installed (pip install triton)"]
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if tuple(map(int, re.findall(r"\d+", installed)[:2])) < OLDEST_TRITON:
            return [f"Triton {installed} is older than {'.'.join(map(str, OLDEST_TRITON))}"]
        break
    return []


MISSING_TRITON = missing_triton()  # looked up once, as a trace of torch.compile cannot do it


class Backend(NamedTuple):
    """One implementation of an op: `reasons(call)` is empty if `run(call)` will work.

    A backend with `by_name` runs only if asked for; `note` is what `explain` adds to its line.
    """

    name: str
    reasons: Callable[[Any], list[str]]
    run: Callable[[Any], Any]
    by_name: bool = False
    note: str = ""


def choose(op: str, backends: Sequence[Backend], call: Any, name: str | None) -> Backend:
    """The backend called `name`, or without a name the first that can run.

    Raises ValueError for an unknown name, else RuntimeError with the reasons of every backend.
    """
    if name is not None:
        named = [b for b in backends if b.name == name]
        if name == "sdpa" and any(b.name == "torch" for b in backends):
            raise ValueError(f"{op}: the backend 'sdpa' is called 'torch'")
        if not named:
            names = ", ".join(repr(b.name) for b in backends)
            raise ValueError(f"{op}: unknown backend {name!r}; there are {names}")
        reasons = named[0].reasons(call)
        if reasons:
            raise RuntimeError(f"{op}: backend {name!r} cannot run this call: {'; '.join(reasons)}")
        return named[0]
    for backend in backends:
        if not backend.by_name and not backend.reasons(call):
            return backend
    raise RuntimeError(f"{op}: no backend can run this call\n{report(backends, call)}")


def run(op: str, backends: Sequence[Backend], call: Any, name: str | None) -> Any:
    """The result of the chosen backend, computed in the dtypes of `call`."""
    backend = choose(op, backends, call, name)
    tell(call, backend.name)
    with without_autocast(call.device):
        return backend.run(call)


Observer = Callable[[Any, str], None]
OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("xattn_kernels_observers", default=())


def tell(call: Any, backend: str) -> None:
    """Calls each of OBSERVERS with `call` and the backend's name, before the op runs.

    Code that chooses a backend without `run` calls this itself. Calls by an observer are not
    observed, nor is anything that torch.compile traces.
    """
    if torch.compiler.is_compiling() or not (observers := OBSERVERS.get()):
        return
    token = OBSERVERS.set(())
    try:
        for observer in observers:
            observer(call, backend)
    finally:
        OBSERVERS.reset(token)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for `device`; a meta device has none."""
    name = device.type
    return torch.amp.is_autocast_available(name) and torch.is_autocast_enabled(name)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which autocast is off for `device`."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def report(backends: Sequence[Backend], call: Any) -> str:
    """One line per backend: its reasons, or that it can run."""
    lines = []
    for b in backends:
        can_run = "can run" + (f" when asked for: backend={b.name!r}" if b.by_name else "")
        can_run += f" ({b.note})" if b.note else ""
        lines.append(f"  {b.name:<8} {'; '.join(b.reasons(call)) or can_run}")
    return "\n".join(lines)


def explain(op: Callable, *args, **kwargs) -> None:
    """Prints which backend `op(*args, **kwargs)` would take and why the others cannot run it."""
    print(explanation(op, *args, **kwargs))


def explanation(op: Callable, *args, **kwargs) -> str:
    """The text that `explain` prints; the arguments are checked, but nothing is run."""
    if not hasattr(op, "backends"):
        hint = f"; {type(op).__name__} has explain() of its own" if hasattr(op, "explain") else ""
        raise TypeError(f"explain needs one of the package's ops, got {op!r}{hint}")
    kwargs = dict(kwargs)
    name = kwargs.pop("backend", None)
    try:
        inspect.signature(op).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{op.__name__}: {error}") from None
    if kwargs.get("dropout_p") and kwargs.get("seed") is None:
        kwargs["seed"] = 0  # drawing one would move torch's generator
    return choice(op.__name__, op.backends, op.check(*args, **kwargs), name)


def choice(op: str, backends: Sequence[Backend], call: Any, name: str | None) -> str:
    """The result of `choose` in words, and below it the report."""
    try:
        chosen = f"takes {choose(op, backends, call, name).name!r}"
    except RuntimeError:
        chosen = f"cannot run with backend={name!r}"
    return f"{op} {chosen}\n{report(backends, call)}"


def triton_on_cpu() -> bool:
    """Whether CPU tensors go to Triton: under its interpreter, or with an emulator in charge."""
    return os.environ.get("TRITON_INTERPRET") == "1" or os.environ.get("XATTN_TRITON_ON_CPU") == "1"


def triton_device_reasons(device: torch.device) -> list[str]:
    """Why Triton kernels cannot run on tensors of `device`."""
    if MISSING_TRITON:
        return list(MISSING_TRITON)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and major < 8:
            return [f"compute capability {major}.{minor} < 8.0"]
        return []
    if device.type == "cpu" and triton_on_cpu():
        return []
    return [f"tensors are on {device.type}, Triton needs a GPU (or TRITON_INTERPRET=1 to debug)"]


@torch.compiler.assume_constant_result  # a trace keeps the settings of its time
def allow_tf32() -> bool:
    """Whether the user lets float32 products use TF32, by either of torch's two settings."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; reading the older one may raise there
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
