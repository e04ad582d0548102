"""What the tests of the benchmarks share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import memory, rows, runner
from benchmarks.harness.provider import Provider


def run_one(truth_of: Callable, provider: Provider, case: Any, modes=("both",)) -> list[rows.Row]:
    """The rows of one provider on one case, each measured once and without its memory."""
    settings = runner.Settings(modes=modes, budget=120.0, memory=False)
    found = runner.run([case], 1, [provider], settings, truth_of)
    return [row for group in found for row in group]


def resident_peak(case: Any, provider: str, folder: Path) -> float:
    """The peak of memory in a forward by the provider; skips the test where it is not known."""
    case.save(folder / "case.pt")
    peak = memory.resident_peak(case.suite, provider, folder / "case.pt", "forward", 60.0)
    if peak is None:
        pytest.skip("this system cannot reset the peak of a process")
    return peak
