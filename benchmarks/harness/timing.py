"""Clocks for interleaved repeats of several calls, and the ceilings to compare them with."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from statistics import median

import torch

FEWEST, MOST = 3, 100
FLUSH_BYTES = 2**28


def measure(
    calls: dict[str, Callable], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """The milliseconds of each repeat of each call, measured in about `seconds` altogether.

    Repeats alternate between all calls, so that all of them have the same clocks and neighbours.
    Each call is repeated at least FEWEST times, then until its share of the time or MOST is
    reached. The caller makes each call once before, as the first one may compile or allocate.
    """
    once = _clock(device)
    times = {name: [] for name in calls}
    share = 1e3 * seconds / max(len(calls), 1)
    going = set(calls)
    while going:
        for name in [n for n in calls if n in going]:
            times[name].append(once(calls[name]))
            enough = len(times[name]) >= FEWEST and sum(times[name]) + median(times[name]) > share
            if enough or len(times[name]) >= MOST:
                going.discard(name)
    return times


def _clock(device: torch.device) -> Callable[[Callable], float]:
    if device.type != "cuda":
        return _wall_milliseconds
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def device_milliseconds(call: Callable) -> float:
        flush.zero_()  # evicts the inputs of the call from the second-level cache
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    return device_milliseconds


def _wall_milliseconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


@lru_cache(None)
def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s of a large copy, read and written).

    Each is that of the best repeat, and is measured once per process.
    """
    cuda = device.type == "cuda"
    n, elements = (8192, 2**30) if cuda else (2048, 2**26)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(elements, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    best = {name: min(ms) / 1e3 for name, ms in measure(calls, device, 1.0).items()}
    return 2 * n**3 / best["product"], 2 * elements / best["copy"]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """A context that raises TimeoutError after `seconds`, as soon as Python runs; it has no limit
    outside the main thread."""

    def stop(signum, frame):
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
