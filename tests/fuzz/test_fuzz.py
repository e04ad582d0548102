"""Random calls for as long as $FUZZ_SECONDS says, see `fuzz.py` and `judge.py`.

`make fuzz SECONDS=n` runs this alone and prints what it did; SEED repeats a run.
"""

from __future__ import annotations

import os
from functools import partial

import pytest

pytest.importorskip("hypothesis", reason="random calls are drawn by hypothesis")

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from fuzz.compiled import family_of
from fuzz.draws import (
    CUDA,
    INTERPRETED,
    TORCH,
    Reach,
    calls,
)
from fuzz.gated import gated_calls
from fuzz.judge import (
    Judged,
    check,
    first_seed,
    rounds,
)
from fuzz.module import module_calls
from fuzz.topk import topk_calls
from support.calls import written_out
from support.modes import modes
from xattn_kernels.torch_kernels import cross_attention as torch_attention

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("FUZZ_SECONDS", 30))  # of each process
SEED = os.environ.get("FUZZ_SEED", "1")  # empty: a new one each time, as `make fuzz` wants


def anything(reach: Reach) -> SearchStrategy[Judged]:
    """Calls of attention most of all, then of its weights and of what is the kernels' alone."""
    kinds = [calls(reach)] * 4 + [topk_calls(reach)] * 2
    if reach.backend != "cuda":
        kinds += [calls(reach, "attention_weights")] * 2 + [module_calls(reach)]
        kinds += [calls(reach, "received_mass")]
    if reach.backend != "torch":
        kinds += [gated_calls(reach)] * 2
    return st.sampled_from(kinds).flatmap(lambda kind: kind)


def test_torch():
    rounds("torch", lambda seed: anything(TORCH), SECONDS / 3, first_seed(SEED))


@pytest.mark.parametrize("mode", modes("interpreter"), indirect=True)
def test_triton(mode):
    rounds("interpreter", lambda seed: anything(INTERPRETED), SECONDS * 2 / 3, first_seed(SEED))


@pytest.mark.parametrize("mode", modes("sm_80", "sm_90", "gpu"), indirect=True)
def test_compiled(mode):
    judge = partial(check, prepare=written_out, device=mode.device)
    rounds(mode.name, family_of, SECONDS / 2, first_seed(SEED), judge)


@pytest.mark.parametrize("mode", modes("cuda_sm_80", "cuda_gpu"), indirect=True)
def test_cuda(mode):
    judge = partial(check, prepare=written_out, device=mode.device)
    rounds(mode.name, lambda seed: anything(CUDA), SECONDS / 2, first_seed(SEED), judge)


def test_what_is_wrong_is_found_and_said(monkeypatch, capsys):
    """The last key of a call with 17 keys or more is dropped: found, and shrunk to 17 keys."""
    attend = torch_attention.attend

    def forgetful(scale, tensors, *first_key):
        k, v = tensors.k, tensors.v
        if k.shape[2] > 16 and tensors.mask is None and tensors.bias is None:
            tensors = tensors._replace(k=k[:, :, :-1], v=v[:, :, :-1])
        return attend(scale, tensors, *first_key)

    monkeypatch.setattr(torch_attention, "attend", forgetful)
    with pytest.raises(AssertionError) as failure:
        rounds("torch", lambda seed: calls(TORCH), 60, 1)
    said = capsys.readouterr().out + "".join(getattr(failure.value, "__notes__", []))
    assert "make fuzz SEED=" in said and 'Case("fuzz_' in said and "Nk=17" in said
