"""What `conftest.py` promises: turns are fair, and emulation leaves Triton as it was."""

from __future__ import annotations

import os
from itertools import product
from types import SimpleNamespace

import pytest

from conftest import has_its_turn
from support.modes import without_assembler


def test_turns_reach_both_architectures_with_every_value():
    flags = [dict(a=1), dict(b=2), dict(c=3)]
    lengths, splits = ["short", "long"], [(1, None), (3, "mask")]
    marks = [
        pytest.mark.parametrize("mode", ["sm_80", "sm_90"]).mark,
        pytest.mark.parametrize("length", [pytest.param(n, id=n) for n in lengths]).mark,
        pytest.mark.parametrize(("splits", "mask"), splits).mark,
        pytest.mark.parametrize("flag", flags).mark,
    ]
    reached = set()
    for length, (n, mask), flag in product(lengths, splits, flags):
        params = dict(length=length, splits=n, mask=mask, flag=flag)
        places = [
            mode
            for mode in ("sm_80", "sm_90")
            if has_its_turn(
                SimpleNamespace(
                    get_closest_marker=lambda name: name,
                    iter_markers=lambda name: marks,
                    callspec=SimpleNamespace(params=params | dict(mode=mode)),
                )
            )
        ]
        assert len(places) == 1
        reached |= {(*places, length), (*places, n), (*places, flags.index(flag), "flag")}
    assert len(reached) == 2 * (len(lengths) + len(splits) + len(flags))


def test_a_kernel_without_a_binary_stays_in_the_emulators_cache():
    knobs = pytest.importorskip("triton").knobs

    def state():
        hook = knobs.runtime.add_stages_inspection_hook
        return hook, knobs.cache.dir, os.environ.get("TRITON_CACHE_DIR")

    before = state()
    with without_assembler():
        assert state()[0] is not None and state()[1] != before[1]
    assert state() == before
