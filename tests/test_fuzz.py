"""Random calls for as long as $FUZZ_SECONDS says, see `fuzz.py` and `judge.py`.

`make fuzz SECONDS=n` runs this alone and prints what it did; SEED repeats a run.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from conftest import modes
from fuzz import INTERPRETED, SDPA, Drawn, Reach, calls
from fuzz_compiled import family_of
from judge import check_compiled, first_seed, rounds

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("FUZZ_SECONDS", 30))  # of each process
SEED = os.environ.get("FUZZ_SEED")


def any_op(reach: Reach) -> SearchStrategy[Drawn]:
    kinds = calls(reach), calls(reach, "attention_weights")
    return st.integers(0, 3).flatmap(lambda n: kinds[n == 3])


def test_sdpa():
    assert rounds(lambda seed: any_op(SDPA), SECONDS / 3, first_seed(SEED))


@pytest.mark.parametrize("mode", modes("interpreter"), indirect=True)
def test_triton(mode):
    assert rounds(lambda seed: any_op(INTERPRETED), SECONDS * 2 / 3, first_seed(SEED))


@pytest.mark.parametrize("mode", modes("sm_80", "sm_90"), indirect=True)
def test_compiled(mode):
    assert rounds(family_of, SECONDS / 2, first_seed(SEED), check_compiled)
