"""Fixtures and hooks of the suite: the modes in which kernels run, and which tests run here."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from support import launches
from support.modes import CHOICES, Mode, enter, modes


@pytest.fixture(params=modes("interpreter", "sm_80", "sm_90", "gpu"))
def mode(request) -> Iterator[Mode]:
    """Runs the test once in each mode that this process, this machine and its markers allow."""
    with enter(request.param) as found:
        yield found


@pytest.fixture
def seed() -> None:
    """The same random numbers in each test, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def as_users_run_it(monkeypatch) -> None:
    """On a CPU with its backends, without Triton's interpreter and without emulation."""
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)


def pytest_addoption(parser):
    parser.addoption("--share", help="n/m: each m-th test from the n-th on, counted from 0")


def position(mark: pytest.Mark, params: dict[str, Any]) -> int:
    """Of the set of values among those of its `parametrize`."""
    names = mark.args[0] if isinstance(mark.args[0], tuple) else (mark.args[0],)
    for n, values in enumerate(mark.args[1]):
        if hasattr(values, "marks"):  # pytest.param(...)
            values = values.values
        elif len(names) == 1:
            values = (values,)
        if all(params[name] is value for name, value in zip(names, values, strict=True)):
            return n
    raise ValueError(f"{params} has no value of {mark}")


def has_its_turn(item: pytest.Item) -> bool:
    """Whether a test runs here: marked `taking_turns`, each set of parameters is emulated on one
    architecture only, and whatever one parameter is, both are reached through the others."""
    if item.get_closest_marker("taking_turns") is None:
        return True
    params = item.callspec.params
    marks = [m for m in item.iter_markers("parametrize") if m.args[0] != "mode"]
    n = sum(position(mark, params) for mark in marks)
    return params["mode"].removeprefix("cuda_") != ("sm_90", "sm_80")[n % 2]


def pytest_collection_modifyitems(config, items):
    found = items
    if not any("[" in str(wanted) for wanted in config.args):  # whoever names one test gets it
        found = [item for item in items if has_its_turn(item)]
    if share := config.getoption("share"):
        n, m = map(int, share.split("/"))
        found = found[n::m]
    if len(found) < len(items):
        kept = set(found)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        launches.settle(report.passed)
    return report


def pytest_sessionfinish(session):
    launches.write()


@pytest.fixture
def force_splits(monkeypatch):
    """A function that sets how many programs share each loop, whatever the device would choose."""

    def force(n: int) -> None:
        module = importlib.import_module("xattn_kernels.triton_kernels.launch")
        monkeypatch.setattr(module, "split_count", lambda programs, steps, device: n)

    return force
