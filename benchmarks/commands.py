"""The commands of the command line: each chooses cases and providers, runs, prints and saves."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .attention import document, workloads
from .attention.case import Case
from .harness import machine, rows, runner
from .harness.progress import Progress
from .harness.steps import step
from .suites import SUITES, Suite

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CPU_DENSE_GFLOP = 10.0
# in units of q, k, v and out: their gradients and what providers allocate come on top
TENSORS_PER_CASE = 6


def run(options: argparse.Namespace) -> int:
    """Measures attention of random tensors in real shapes; returns the exit status."""
    return measure(options, SUITES["attention"], "random normal", default_name(options))


def main(options: argparse.Namespace) -> int:
    """Measures attention of the interleaved document of photographs and text."""
    suite = replace(SUITES["attention"], build=document.build)
    return measure(options, suite, document.INPUT, "main")


def gated(options: argparse.Namespace) -> int:
    """Measures the gated residual of random tensors in real shapes."""
    return measure(options, SUITES["gated"], "random normal", "gated")


def topk(options: argparse.Namespace) -> int:
    """Measures top-k attention of random tensors."""
    return measure(options, SUITES["topk"], "random normal", "topk")


def measure(options: argparse.Namespace, suite: Suite, description: str, name: str) -> int:
    """Runs a suite, prints each table as it is ready and saves all rows after each.

    The exit status is 1 if a backend of this package gave a wrong result.
    """
    device, dtype = device_and_dtype(options)
    chosen = pick(options.workload, suite.workloads, "workload")
    providers = suite.chosen(pick(options.provider, suite.providers, "provider"))
    settings = runner.Settings(
        modes=tuple(pick(options.mode, workloads.MODES, "mode")),
        budget=options.budget_seconds,
        first_call=options.first_call_seconds,
        memory=not options.no_memory,
        input=description,
    )
    folder = options.out or machine.RESULTS / machine.slug(device)
    name = options.name or f"{name}-{str(dtype).removeprefix('torch.')}"
    began, done, written = time.perf_counter(), [], []
    built = cases(options, suite, chosen)
    for group in runner.run(built, len(chosen), providers, settings, suite.truth_of):
        done += group
        Progress.write(rows.table(group) + "\n")
        written = rows.save(done, folder, name)
    reasons = rows.without_times(done)
    print("\n".join([rows.summary(done), "", *(["without a time:"] if reasons else []), *reasons]))
    written += draw(done, folder, name)
    files = ", ".join(path.name for path in written)
    print(f"{time.perf_counter() - began:.0f} s; wrote {files} in {folder}")
    return 1 if any(r.status == "wrong" and r.provider.startswith("xattn-") for r in done) else 0


def draw(done: list[rows.Row], folder: Path, name: str) -> list[Path]:
    """Draws the plots and returns their paths, none without matplotlib."""
    try:
        from .harness import plots
    except ImportError as missing:
        print(f"no plots: {missing}")
        return []
    return plots.draw(done, folder, name)


def warm(options: argparse.Namespace) -> int:
    """Compiles every provider that compiles, a process per workload, into the caches on disk."""
    chosen = pick(options.workload, SUITES["attention"].workloads, "workload")
    end = time.perf_counter() + options.budget_seconds
    pool = ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"))
    waiting = {pool.submit(warm_one, options, name): name for name in chosen}
    ready, failed = [], []
    try:
        for future in as_completed(waiting, timeout=max(end - time.perf_counter(), 0.0)):
            (failed if future.exception() else ready).append(waiting[future])
    except TimeoutError:
        pass
    unfinished = len(chosen) - len(ready) - len(failed)
    for process in list(pool._processes.values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    failures = f"{len(failed)} failed {', '.join(failed)}".strip()
    print(f"{len(ready)} workloads compiled, {failures}, {unfinished} unfinished")
    return 1 if failed else 0


def warm_one(options: argparse.Namespace, name: str) -> None:
    """Calls the providers that compile on one workload."""
    suite = SUITES["attention"]
    (built,) = cases(options, suite, [name])
    for provider in suite.chosen(pick(options.provider, suite.providers, "provider")):
        for mode in pick(options.mode, workloads.MODES, "mode"):
            if provider.compiles and not provider.reasons(built, mode):
                step(provider, built, mode)()


def cases(options: argparse.Namespace, suite: Suite, chosen: list[str]) -> Iterator[Case]:
    """Each workload with tensors, scaled to the machine and built in its turn."""
    device, dtype = device_and_dtype(options)
    gflop = options.dense_gflop
    if gflop is None:
        gflop = CPU_DENSE_GFLOP if device.type == "cpu" else float("inf")
    elements = machine.free_memory(device) / dtype.itemsize / TENSORS_PER_CASE
    for name in chosen:
        original = suite.workloads[name]
        w = suite.fit(original, 1e9 * gflop, elements)
        yield suite.build(w, original, device, dtype, options.seed)


def device_and_dtype(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device here")
    name = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return device, DTYPES[pick(name, DTYPES, "dtype")[0]]


def pick(text: str, choices: Any, what: str) -> list[str]:
    """The comma-separated names in `text`, or all choices for "all"; exits on an unknown name."""
    chosen = list(choices) if text == "all" else text.split(",")
    unknown = [name for name in chosen if name not in choices]
    if unknown:
        raise SystemExit(f"unknown {what} {', '.join(unknown)}; there are {', '.join(choices)}")
    return chosen


def default_name(options: argparse.Namespace) -> str:
    return "+".join(options.workload.split(","))[:60]
