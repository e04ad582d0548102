"""`make gpu`: the tests and benchmarks that need a GPU, unattended and offline, in ten minutes.

Each phase is a process with a time limit, and all share one deadline; a phase that fails or runs
out of time is reported, and the next one starts. The summary at the end fits a screen; the full
outputs are in `logs/` beside the results.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.harness import machine, rows

from .. import evidence

PYTHON = sys.executable
MINUTES = 9.5
CASES = "tests/ops/test_cross_attention.py"  # all named cases, of most kernel variants
PROBE = Path(__file__).with_name("sanitizer_probe.py")


@dataclass(frozen=True)
class Phase:
    """A command that may take `seconds`; `missing` says why it cannot run, if it cannot."""

    name: str
    command: list[str]
    seconds: float
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    phase: Phase
    verdict: str
    seconds: float
    last_line: str

    @property
    def line(self) -> str:
        text = f"{self.phase.name:<12} {self.verdict:<8} {self.seconds:5.0f} s  {self.last_line}"
        return text[:100]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="cuda", help="cpu rehearses the phases without a GPU (%(default)s)")
    add("--minutes", type=float, default=MINUTES, help="the time for everything (%(default)s)")
    add("--workload", default="all")
    add("--provider", default="all")
    add("--dense-gflop", type=float, default=None)
    add("--tests", default="tests", help="what pytest is given (%(default)s)")
    add("--out", type=Path, default=None, help="folder (benchmarks/results/<device>)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.gpu", description=__doc__.split("\n")[0])
    add_options(parser)
    return prove(parser.parse_args(arguments))


def prove(chosen: argparse.Namespace) -> int:
    """Runs every phase in turn; the exit status is 1 if one failed."""
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible to torch; --device cpu rehearses the phases")
        return 2
    out = chosen.out or machine.RESULTS / machine.slug(chosen.device)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    began, end = time.time(), time.monotonic() + 60 * chosen.minutes
    launches = out / "logs" / "launches"
    shutil.rmtree(launches, ignore_errors=True)
    os.environ["XATTN_EVIDENCE"] = str(launches)  # where the tests record their launches
    outcomes = []
    for phase in phases(chosen, out):
        print(f"--- {phase.name}: {' '.join(phase.command)}", flush=True)
        outcomes.append(perform(phase, out / "logs", end - time.monotonic()))
        print(outcomes[-1].line, flush=True)
    if any(launches.glob("*.json")) and chosen.device == "cuda":
        evidence.collect(launches, chosen.device)
    print(report(outcomes, out, chosen.device, began))
    return 1 if any(outcome.verdict == "failed" for outcome in outcomes) else 0


def phases(chosen: argparse.Namespace, out: Path) -> list[Phase]:
    """The phases, the most valuable first, as the last ones get the time that is left."""
    minute = 60 * chosen.minutes / MINUTES
    jobs = str(max(1, min((os.cpu_count() or 2) // 2, 8)))
    tests = [PYTHON, "-m", "tools.gpu.sharded_tests", jobs, chosen.tests, "-q", "--tb=short"]
    no_photographs = "" if find_spec("sklearn") else "scikit-learn is not installed"
    no_sanitizer = "" if shutil.which("compute-sanitizer") else "compute-sanitizer is not on PATH"
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    probe = [PYTHON, str(PROBE), chosen.device]

    def bench(name: str, task: str, minutes: float, options: list[str], missing: str = "") -> Phase:
        shared = ["--device", chosen.device, "--provider", chosen.provider, "--out", str(out)]
        if chosen.dense_gflop is not None:
            shared += ["--dense-gflop", str(chosen.dense_gflop)]
        budget = ["--budget-seconds", f"{0.85 * minutes * minute:.0f}"]
        command = [PYTHON, "-m", "benchmarks", task, *shared, *budget, *options]
        return Phase(name, command, minutes * minute, missing)

    real = ["--dtype", "bfloat16", "--workload", chosen.workload]
    gated = ["--dtype", "bfloat16", "--provider", "all"]
    gated += ["--workload", "flamingo-9b,flamingo-9b-norm,mllama-11b-norm,flamingo-9b-out"]
    # bfloat16 rounds scores so coarsely that few rows would have a certain choice
    topk = ["--dtype", "float16", "--provider", "all", "--first-call-seconds", "15"]
    topk += ["--workload", "Nk4096-k64,Nk16384-k64,Nk65536-k512,Nk16384-blocks64x16"]
    return [
        Phase("environment", [PYTHON, "-m", "xattn_kernels"], 0.5 * minute),
        Phase("gpu tests", [*tests, "-m", "gpu", "--deselect", CASES], 1.4 * minute),
        bench("compile", "warm", 1.3, [*real, "--jobs", jobs]),
        bench("benchmarks", "run", 2.2, [*real, "--name", "workloads-bfloat16"]),
        bench("gated", "gated", 0.7, gated),
        bench("topk", "topk", 0.6, topk),
        bench("main job", "main", 0.8, [], no_photographs),
        Phase("probe", probe, 0.5 * minute),
        Phase("memcheck", [*sanitizer, "memcheck", *probe], 0.7 * minute, no_sanitizer),
        Phase("racecheck", [*sanitizer, "racecheck", *probe], 0.7 * minute, no_sanitizer),
        Phase("all tests", [*tests, "-m", "gpu"], 3.0 * minute),
    ]


def perform(phase: Phase, logs: Path, left: float) -> Outcome:
    """The outcome of one phase, run within its limit and the seconds `left`; all of its output goes
    into a log file."""
    if phase.missing:
        return Outcome(phase, "missing", 0.0, phase.missing)
    if left < 1.0:
        return Outcome(phase, "no time", 0.0, "the time for everything is spent")
    log, began = logs / f"{phase.name.replace(' ', '-')}.txt", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            phase.command,
            cwd=machine.ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        status = wait(process, min(phase.seconds, left))
    text = log.read_text(errors="replace")
    return Outcome(phase, verdict(phase, status, text), time.monotonic() - began, last_line(text))


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit status, or None if the process took longer than `seconds` and was stopped.

    It is interrupted before it is killed, so that pytest can print its summary.
    """
    for limit, sent in ((seconds, signal.SIGINT), (5.0, signal.SIGKILL), (5.0, None)):
        try:
            status = process.wait(limit)
            return status if limit == seconds else None
        except subprocess.TimeoutExpired:
            if sent is not None:
                os.killpg(process.pid, sent)
    return None


def verdict(phase: Phase, status: int | None, text: str) -> str:
    """One or two words on a phase with this exit status and this output."""
    if status is None:
        return "time up"
    if status == 5 and "tools.gpu.sharded_tests" in phase.command:
        return "no tests"
    if status != 0 and "compute-sanitizer" in phase.command and "not supported" in text:
        return "missing"
    return "passed" if status == 0 else "failed"


def last_line(text: str) -> str:
    """The last line that is not blank, without progress bars and decoration."""
    lines = [line.rsplit("\r", 1)[-1].strip(" =\n") for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "")


def report(outcomes: list[Outcome], out: Path, device: str, began: float) -> str:
    """The summary: a line for each phase, then one for each workload that this run measured."""
    facts = machine.provenance(device)
    lines = ["", ", ".join(f"{name} {value}" for name, value in facts.items())]
    lines += [outcome.line for outcome in outcomes]
    for path in sorted(out.glob("*.json")):
        if path.stat().st_mtime >= began:
            lines += ["", path.stem, rows.summary(rows.load(path))]
    return "\n".join(lines)
