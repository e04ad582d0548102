"""Peak extra memory of one call and of its preparation, beyond the inputs.

On a GPU the allocator reports it. On a CPU it is the growth of the resident set of a fresh process:
a call of a few rows loads code and starts threads, then the peak is reset and the preparation and
the call are measured (a provider that compiles is measured in a second call only). Processes are
forked from a server that has only imported the suites.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .steps import Step, step

PROC = Path("/proc/self")
WARM_ROWS = 16
# With these, large tensors come from the system and return to it at once, so that the resident set
# is that of live tensors.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def allocated(device: torch.device) -> int:
    """The bytes that live tensors hold on a GPU; 0 on a CPU, which does not count them."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def device_peak(call: Step, before: int, device: torch.device) -> int | None:
    """The bytes that `call` allocates beyond `before`, those allocated before its preparation; None
    on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def resident_peak(suite: str, name: str, path: Path, mode: str, seconds: float) -> int | None:
    """The bytes of resident growth for the CPU case that a suite saved at `path`, computed by its
    provider `name`; None if it cannot be measured.

    `suite` is "module:name": the new process imports it, as a suite cannot be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([suite.partition(":")[0]])
    receiver, sender = context.Pipe(duplex=False)
    threads = torch.get_num_threads()
    process = context.Process(target=_child, args=(sender, suite, name, path, mode, threads))
    saved = {name: os.environ.get(name) for name in MALLOC}
    os.environ.update(MALLOC)
    try:
        process.start()
    finally:
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    sender.close()
    try:
        return receiver.recv() if receiver.poll(max(seconds, 0.0)) else None
    except EOFError:
        return None
    finally:
        process.join(5.0)
        process.kill()
        process.join()


def _child(sender: Connection, suite: str, name: str, path: Path, mode: str, threads: int) -> None:
    torch.set_num_threads(threads)
    module, _, key = suite.partition(":")
    chosen = import_module(module).SUITES[key]
    case, provider = chosen.load(path), chosen.providers[name]
    call = step(provider, case if provider.compiles else case.first_rows(WARM_ROWS), mode)
    call()
    before = _reset_peak()
    if not provider.compiles:
        call = step(provider, case, mode)
    call()
    sender.send(None if before is None else max(_status("VmHWM") - before, 0))


def _reset_peak() -> int | None:
    """The resident bytes after the peak was reset to them; None where the system cannot do that."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROC / "clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", (PROC / "status").read_text())[1])
