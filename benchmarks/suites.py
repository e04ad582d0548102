"""The suites: their workloads, the providers that compute them, and functions that build cases.

Cases name their suite as "benchmarks.suites:<name>", by which a new process finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .attention import case, providers, truth, workloads
from .gated import providers as gated_providers
from .gated import workloads as gated
from .harness.provider import Provider
from .topk import providers as topk_providers
from .topk import workloads as topk


@dataclass(frozen=True)
class Suite:
    """Workloads and providers by name, and functions with the signatures of those of attention."""

    workloads: dict[str, Any]
    providers: dict[str, Provider]
    fit: Callable
    build: Callable
    load: Callable  # reads a case that its `save` wrote
    truth_of: Callable

    def chosen(self, names: Iterable[str]) -> list[Provider]:
        return [self.providers[name] for name in names]


SUITES = {
    "attention": Suite(
        workloads.load(), providers.BY_NAME, workloads.fit, case.build, case.Case.load,
        truth.truth_of,
    ),
    "gated": Suite(
        gated.BY_NAME, gated_providers.BY_NAME, gated.fit, gated.build, gated.GatedCase.load,
        gated_providers.truth_of,
    ),
    "topk": Suite(
        topk.BY_NAME, topk_providers.BY_NAME, topk.fit, topk.build, topk.TopKCase.load,
        topk_providers.truth_of,
    ),
}  # fmt: skip
