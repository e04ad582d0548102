"""Choosing a backend: an ordered tuple, and for each backend the reasons why it cannot run."""

from __future__ import annotations

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
    """Why no device can run Triton kernels: without an import of Triton, which takes seconds."""
    if find_spec("triton") is None:
        return ["triton is not installed (pip install triton)"]
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TRITON:
            return [f"Triton {found} is older than {'.'.join(map(str, OLDEST_TRITON))}"]
        break
    return []


MISSING_TRITON = missing_triton()  # once: a trace of torch.compile cannot look


class Backend(NamedTuple):
    """reasons(inputs) is empty when run(inputs) will work; `by_name` keeps it out of defaults;
    `note` is what `explain` adds."""

    name: str
    reasons: Callable[[Any], list[str]]
    run: Callable[[Any], Any]
    by_name: bool = False
    note: str = ""


def choose(op: str, backends: Sequence[Backend], inputs: Any, name: str | None) -> Backend:
    """The backend called `name`, or the first that can run; raises with every reason otherwise."""
    if name is not None:
        named = [b for b in backends if b.name == name]
        if name == "sdpa":
            raise ValueError(f"{op}: the backend 'sdpa' is called 'torch'")
        if not named:
            known = ", ".join(repr(b.name) for b in backends)
            raise ValueError(f"{op}: unknown backend {name!r}; there are {known}")
        found = named[0].reasons(inputs)
        if found:
            raise RuntimeError(f"{op}: backend {name!r} cannot run this call: {'; '.join(found)}")
        return named[0]
    for backend in backends:
        if not backend.by_name and not backend.reasons(inputs):
            return backend
    raise RuntimeError(f"{op}: no backend can run this call\n{report(backends, inputs)}")


def run(op: str, backends: Sequence[Backend], inputs: Any, name: str | None) -> Any:
    """What the chosen backend makes of `inputs`, in the dtypes that they have."""
    backend = choose(op, backends, inputs, name)
    tell(inputs, backend.name)
    with without_autocast(inputs.device):
        return backend.run(inputs)


Observer = Callable[[Any, str], None]
OBSERVERS: ContextVar[tuple[Observer, ...]] = ContextVar("xattn_kernels_observers", default=())


def tell(inputs: Any, backend: str) -> None:
    """Each of OBSERVERS is called with this, before the op runs; who chooses a backend without
    `run` says so here. What an observer calls is told to nobody, nor what torch.compile traces."""
    if torch.compiler.is_compiling() or not (observers := OBSERVERS.get()):
        return
    token = OBSERVERS.set(())
    try:
        for observer in observers:
            observer(inputs, backend)
    finally:
        OBSERVERS.reset(token)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for `device`; a meta device knows none."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast is off inside, where it is on for `device`; a meta device knows no autocast."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def report(backends: Sequence[Backend], inputs: Any) -> str:
    """One line per backend: its reasons, or that it can run."""
    lines = []
    for b in backends:
        can = "can run" + (f" when asked for: backend={b.name!r}" if b.by_name else "")
        can += f" ({b.note})" if b.note else ""
        lines.append(f"  {b.name:<8} {'; '.join(b.reasons(inputs)) or can}")
    return "\n".join(lines)


def explain(op: Callable, *args, **kwargs) -> None:
    """Prints which backend `op(*args, **kwargs)` would take and why the others cannot run it."""
    print(explanation(op, *args, **kwargs))


def explanation(op: Callable, *args, **kwargs) -> str:
    """What `explain` prints; nothing is run, but the arguments are checked."""
    if not hasattr(op, "backends"):
        own = f"; {type(op).__name__} has explain() of its own" if hasattr(op, "explain") else ""
        raise TypeError(f"explain needs one of the package's ops, got {op!r}{own}")
    kwargs = dict(kwargs)
    name = kwargs.pop("backend", None)
    if kwargs.get("dropout_p") and kwargs.get("seed") is None:
        kwargs["seed"] = 0  # drawing one would move torch's generator
    return choice(op.__name__, op.backends, op.check(*args, **kwargs), name)


def choice(op: str, backends: Sequence[Backend], inputs: Any, name: str | None) -> str:
    """What `choose` does with the same arguments, in words, and the report."""
    try:
        chosen = f"takes {choose(op, backends, inputs, name).name!r}"
    except RuntimeError:
        chosen = f"cannot run with backend={name!r}"
    return f"{op} {chosen}\n{report(backends, inputs)}"


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


@torch.compiler.assume_constant_result  # the settings are not tensors; a trace keeps today's
def allow_tf32() -> bool:
    """Whether the user lets float32 products use TF32, by either of torch's two settings."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; reading the older one may raise there
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
