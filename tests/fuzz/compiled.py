"""Random calls of compiled kernels: few kernels, as each takes seconds to compile, many inputs.

What a kernel is compiled for stays fixed in a family: options, widths, dtype, memory layout, and of
each integer whether it is 1 or divisible by 16. Batch, heads, lengths, masks and numbers vary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from fuzz.draws import (
    BIAS_VALUES,
    INTERVALS,
    NOT_FINITE,
    QKV_VALUES,
    SEEDS,
    Drawn,
    pick,
    sometimes,
)
from fuzz.gated import DrawnGated, compiled_gated_calls
from fuzz.topk import (
    DrawnBlocks,
    DrawnTopK,
    compiled_block_calls,
    compiled_topk_calls,
)
from support.cases import Case
from support.mask_kinds import possible


@dataclass(frozen=True)
class Family:
    """`fixed` are fields of a `Case`; `masks` the masks to choose from."""

    fixed: dict[str, Any]
    masks: Sequence[str | None] = tuple(INTERVALS)
    group: int = 1
    not_finite: Sequence[str] = ()


DENSE = [f"dense {name}" for name in INTERVALS]
FAMILIES = {
    "plain": Family(dict(D=32, returns="out"), [None], not_finite=NOT_FINITE),
    "interval": Family(dict(D=32, returns="out")),
    "statistics": Family(dict(D=32, returns="statistics")),
    "group": Family(dict(D=40, Dv=24, returns="lse"), group=3),
    "bool": Family(dict(D=24, returns="out", layout="BNHD"), [*DENSE, "bool_B1QK"]),
    "bias": Family(dict(D=32, bias="BHQK", returns="statistics")),
    "bias_keys": Family(dict(D=16, Dv=80, bias="B11K", bias_dtype=torch.float32), [None]),
    "options": Family(
        dict(D=32, bias="1HQK", scale=(), softcap=1.0, dropout_p=0.5, returns="lse"), group=2
    ),
    "weights": Family(dict(D=32, op="attention_weights")),
    "weights_lse": Family(
        dict(D=24, op="attention_weights", given_lse=True, average_heads=False, dropout_p=0.5)
    ),
    "mass": Family(dict(D=32, op="received_mass", weighted=True, average_heads=False), group=2),
}
DTYPES = (torch.bfloat16, torch.float16)


def odd(least: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(least // 2, (most - 1) // 2).map(lambda n: 2 * n + 1)


@st.composite
def compiled_calls(draw, family: Family, dtype: torch.dtype, long: bool) -> Drawn:
    g = family.group
    # all rows of a key head in the smallest tile, or more of them than in the largest
    Nq = draw(odd(-(-65 // g), 140 // g) if long else odd(3, 16 // g))
    Hkv = draw(pick(2, 3))
    c = Case(
        f"fuzz_{draw(st.integers(0, 9999))}", B=draw(pick(2, 3)), Hq=g * Hkv, Hkv=Hkv, Nq=Nq,
        Nk=draw(st.one_of(odd(3, 140), st.sampled_from([15, 17, 31, 33, 63, 65, 127, 129]))),
        **family.fixed,
    )  # fmt: skip
    possible_masks = [m for m in family.masks if m is None or possible(m.removeprefix("dense "), c)]
    c = replace(c, mask=draw(st.sampled_from(possible_masks)))
    if "scale" in family.fixed:
        c = replace(c, scale=tuple(draw(pick(0.7, 0.0, -0.3, 1.0, 0.05)) for _ in range(c.Hq)))
        c = replace(c, softcap=draw(pick(2.0, 0.2, 50.0)))
    if c.dropout_p:
        c = replace(c, dropout_p=draw(pick(0.3, 0.9, 1e-3, 0.5)), seed=draw(pick(*SEEDS)))
    values = [n for n in QKV_VALUES if n != "overflow" and (n != "peaked" or c.scale is None)]
    names = [draw(sometimes("normal", st.sampled_from(values)))]
    if c.bias is not None:
        others = [n for n in BIAS_VALUES if n != "bias_by_key"]  # which is a layout
        names.append(draw(sometimes("normal", st.sampled_from(others))))
    if family.not_finite:
        wild = [n for n in family.not_finite if n != "nan_bias"]
        names.append(draw(sometimes("normal", st.sampled_from(wild))))
    c = replace(c, values=" ".join(n for n in names if n != "normal") or "normal")
    twists = [None, None, *["garbage"] * (c.mask in INTERVALS), *["flipped"] * (not c.dropout_p)]
    return Drawn(c, "triton", dtype, None, draw(st.sampled_from(twists)))


def family_of(seed: int) -> st.SearchStrategy[Drawn | DrawnGated | DrawnTopK | DrawnBlocks]:
    """The calls of the family that belongs to a round's seed."""
    r = random.Random(seed)
    dtype, either = r.choice(DTYPES), r.random() < 0.5
    kind = r.random()
    if kind < 0.25:
        return compiled_gated_calls(r.choice([None, "layer", "rms"]), either, dtype)
    if kind < 0.35:
        return compiled_block_calls(dtype)
    if kind < 0.5:
        return compiled_topk_calls(dtype, either, r.random() < 0.5)
    return compiled_calls(r.choice(list(FAMILIES.values())), dtype, either)
