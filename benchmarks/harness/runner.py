"""Runs providers over cases within a time budget: each is refused or checked, timed, weighed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

from . import machine, memory, timing
from .progress import Progress
from .provider import Provider
from .rows import Row
from .steps import Step, step
from .truth import Truth

MOST_CLOCK_SECONDS = 8.0


@dataclass(frozen=True)
class Settings:
    """The settings of a run: `budget` is in seconds for everything, `first_call` in seconds for the
    compilation and check of one provider."""

    modes: tuple[str, ...] = ("forward", "both")
    budget: float = 240.0
    first_call: float = 60.0
    memory: bool = True
    input: str = "random normal"


class Checked(NamedTuple):
    """A call with the right result, its peak in bytes if the device counts it, and its error."""

    call: Step
    peak: int | None
    error_share: float


def run(
    cases: Iterable[Any],
    count: int,
    providers: list[Provider],
    settings: Settings,
    truth_of: Callable[[Any, bool], Truth],
) -> Iterator[list[Row]]:
    """The rows of one case and mode at a time; `count` is the number of cases."""
    end, groups, facts = time.perf_counter() + settings.budget, count * len(settings.modes), None
    with Progress(total=groups * len(providers), unit="run") as bar:
        for case in cases:
            facts = facts or ceiling_facts(case)
            truth = None
            for mode in settings.modes:
                group = Group(case, mode, providers, facts, settings, bar)
                if end > time.perf_counter():
                    truth = truth or truth_of(case, any(m != "forward" for m in settings.modes))
                    left = max(end - time.perf_counter(), 1.0)
                    yield group.rows(truth, left / groups, left)
                else:
                    yield group.failed("skipped", f"the {settings.budget:.0f} s are spent")
                groups -= 1


def ceiling_facts(case: Any) -> dict:
    """The fields of a row that describe the machine and its ceilings."""
    product, copy = timing.ceilings(case.device, case.dtype)
    facts = machine.provenance(case.device)
    return {"product_tflops": product / 1e12, "copy_gbytes_per_s": copy / 1e9, **facts}


class Group:
    """All providers on one case in one mode."""

    def __init__(
        self,
        case: Any,
        mode: str,
        providers: list[Provider],
        facts: dict,
        settings: Settings,
        bar: Progress,
    ):
        self.case, self.mode, self.providers = case, mode, providers
        self.settings, self.bar = settings, bar
        self.blank = Row(
            workload=case.label,
            provider="",
            mode=mode,
            dtype=str(case.dtype).removeprefix("torch."),
            status="",
            flops=case.flops(mode),
            min_bytes=case.min_bytes(mode),
            visible_fraction=case.visible_fraction(),
            mask=case.workload.mask,
            regime=case.workload.regime,
            original=case.original.shape,
            actual=case.workload.shape,
            input=settings.input,
            **facts,
        )

    def rows(self, truth: Truth, share: float, left: float) -> list[Row]:
        """One row per provider, in about `share` seconds; only right results are timed.

        Half of it is for checks: providers whose turn comes later are skipped.
        """
        began = time.perf_counter()
        end, checked = began + share, {}
        for provider in self.providers:
            self.bar.set_description(f"{self.case.label} {self.mode} {provider.name}")
            seconds = left if time.perf_counter() < (began + end) / 2 else 0.0
            checked[provider.name] = self.check(provider, truth, seconds)
            self.bar.update()
        right = {n: c for n, c in checked.items() if isinstance(c, Checked)}
        try:
            seconds = min(0.6 * (end - time.perf_counter()), MOST_CLOCK_SECONDS)
            calls = {name: c.call for name, c in right.items()}
            times = timing.measure(calls, self.case.device, seconds)
        except Exception as error:  # a crash of one call must not lose the other workloads
            return self.failed("error", one_line(error))
        peaks = {name: c.peak for name, c in right.items()}
        shares = {name: c.error_share for name, c in right.items()}
        del calls, right
        rows = [c for c in checked.values() if isinstance(c, Row)]
        checked.clear()
        peaks |= self.resident_peaks(list(times), end)
        return rows + [self.timed(n, times[n], peaks.get(n), shares[n]) for n in times]

    def check(self, provider: Provider, truth: Truth, left: float) -> Row | Checked:
        """The call if its result is right, else a row with the reason why it has no time."""
        case = self.case
        try:
            reasons = provider.reasons(case, self.mode)
            if reasons:
                return self.without_time(provider, "unsupported", "; ".join(reasons))
            if left <= 0:
                return self.without_time(provider, "skipped", "no time was left for it")
            with timing.time_limit(min(self.settings.first_call, left)):
                before = memory.allocated(case.device)
                call = step(provider, case, self.mode)
                wrong, share = truth.for_provider(provider.name).verdict(call())
                if wrong:
                    return self.without_time(provider, "wrong", wrong)
                return Checked(call, memory.device_peak(call, before, case.device), share)
        except Exception as error:  # a provider that raises must not stop the others
            return self.without_time(provider, "error", one_line(error))

    def resident_peaks(self, names: list[str], end: float) -> dict[str, int | None]:
        """The bytes by which a fresh process grows for each provider, on a CPU; providers that
        would begin after `end` are left out."""
        if self.case.device.type != "cpu" or not self.settings.memory:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "case.pt"
            self.case.save(path)
            seconds = self.settings.first_call
            return {
                name: memory.resident_peak(self.case.suite, name, path, self.mode, seconds)
                for name in names
                if time.perf_counter() < end
            }

    def timed(self, name: str, ms: list[float], peak: int | None, error_share: float) -> Row:
        low, median, high = quantiles(ms, n=4, method="inclusive")
        blank = self.blank
        tflops = None if blank.flops is None else blank.flops / median / 1e9
        gbytes = blank.min_bytes / median / 1e6
        return replace(
            blank,
            provider=name,
            status="ok",
            ms=median,
            ms_25=low,
            ms_75=high,
            repeats=len(ms),
            peak_mib=None if peak is None else peak / 2**20,
            tflops=tflops,
            percent_of_product=tflops and 100 * tflops / blank.product_tflops,
            gbytes_per_s=gbytes,
            percent_of_copy=100 * gbytes / blank.copy_gbytes_per_s,
            error_share=error_share,
        )

    def failed(self, status: str, reason: str) -> list[Row]:
        """Rows with the same status and reason for every provider."""
        return [self.without_time(p, status, reason) for p in self.providers]

    def without_time(self, provider: Provider, status: str, reason: str) -> Row:
        return replace(self.blank, provider=provider.name, status=status, reason=reason)


def one_line(error: Exception) -> str:
    """The type of the error and the first line of its message that is not blank."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
