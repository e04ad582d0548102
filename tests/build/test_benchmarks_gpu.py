"""`make gpu` without a GPU: its phases, its shards of the tests, its probe for the sanitizer."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import pytest

from benchmarks.harness import machine
from tools.gpu import phases as gpu
from tools.gpu import sanitizer_probe as probe
from tools.gpu import sharded_tests


def test_gpu_phases_end_by_themselves_or_at_their_limit(tmp_path):
    sleep = "import time; time.sleep(60)"
    code = {"passed": "print('2 passed')", "failed": "raise ValueError", "time up": sleep}
    for expected, text in code.items():
        seconds = 0.5 if text == sleep else 5.0
        phase = gpu.Phase("a phase", [sys.executable, "-c", text], seconds)
        outcome = gpu.perform(phase, tmp_path, 60.0)
        assert outcome.verdict == expected and outcome.seconds < 10
    assert gpu.perform(replace(phase, missing="no tool"), tmp_path, 60.0).verdict == "missing"
    assert gpu.perform(phase, tmp_path, 0.0).verdict == "no time"


def test_gpu_phases_fit_ten_minutes_with_the_tests_last():
    parser = argparse.ArgumentParser()
    gpu.add_options(parser)
    chosen = parser.parse_args([])
    phases = gpu.phases(chosen, machine.RESULTS)
    assert 60 * chosen.minutes <= 570 and sum(p.seconds for p in phases[:-1]) < 60 * chosen.minutes
    assert phases[-1].command[2] == "tools.gpu.sharded_tests" and "tests" in phases[-1].command


@pytest.mark.slow
def test_sharded_tests_run_each_test_once_and_sum_up(capsys):
    chosen = [
        "tests/ops/test_dispatch.py",
        "-q",
        "-k",
        "unknown_backend or by_name_only or nothing",
    ]
    assert sharded_tests.run(2, chosen) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 passed")
    assert sharded_tests.run(1, [*chosen, "-k", "nothing_at_all"]) == sharded_tests.NO_TESTS


def test_the_sanitizer_probe_runs_through(capsys):
    assert probe.main("cpu") == 0
    assert capsys.readouterr().out.count(": ran") == len(probe.calls("cpu")) + 2
