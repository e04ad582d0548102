"""The kernels as compiled: executed by ptxsim with every check on, and on a GPU where there is one.

ptxsim reports each access out of bounds, race, read of unwritten memory and missing wait as an
error. Compiling takes most of the time, so sizes repeat: Triton compiles one kernel for all
integers that are neither 1 nor divisible by 16.
"""

from __future__ import annotations

import pytest
import torch

from support.calls import (
    assert_agrees,
    build,
    expected,
    run,
    written_out,
)
from support.cases import Case
from support.mask_kinds import MASKS
from support.modes import each_compiled_mode, modes, tf32_allowed
from support.numerics import assert_as_accurate

SHORT, LONG = dict(Nq=6, Nk=75), dict(Nq=70, Nk=75)
LENGTHS = {"short": SHORT, "long": LONG}
FLAGS = {
    "plain": dict(returns="out"),
    "lse": dict(returns="lse"),
    "statistics": dict(returns="statistics"),
    "bool": dict(mask="bool_BHQK"),
    "bool_keys": dict(mask="bool_B11K"),
    "bias": dict(bias="BHQK"),
    "bias_keys": dict(bias="1H1K"),
    "bias_one": dict(bias="1111"),
    "scale": dict(scale=(0.3, -0.2)),
    # 0 in float32, which Triton's interpreter does not take
    "scale_tiny": dict(scale=2.0**-150, mask="empty_rows", returns="lse"),
    "softcap": dict(softcap=1.5),
    "softcap_nan": dict(softcap=1.5, values="nan_q"),
    "dropout": dict(dropout_p=0.4),
    "group_2": dict(Hq=2, Hkv=1),
    "group_3": dict(Hq=6, Hkv=2),
    "width_40": dict(D=40, Dv=96),
    "width_80": dict(D=80),
    "width_odd": dict(D=23, Dv=9),
    "BNHD": dict(layout="BNHD"),
    "sliced": dict(layout="sliced"),
    "padded": dict(layout="padded"),
    "expanded_batch": dict(layout="expanded_batch"),
    "far_apart": dict(layout="far_apart"),
    "one_start": dict(mask="padding"),
    "one_row": dict(mask="causal"),
    "float32_bias": dict(bias="B1QK", bias_dtype=torch.float32),
    "everything": dict(
        Hq=4, mask="empty_rows", bias="BHQK", softcap=3.0, dropout_p=0.2, D=24, Dv=40,
        scale=(0.3, 0.2, 0.5, -0.1),
    ),
}  # fmt: skip
# only with nothing but out are there two loops; whole tiles in both walks
WHOLE = {
    "whole_tiles": {},
    "whole_tiles_padding": dict(mask="padding"),
    "whole_tiles_causal": dict(mask="causal"),
    "whole_tiles_nonempty": dict(mask="nonempty"),  # rows without a key in the first tile
    "whole_tiles_ragged": dict(mask="ragged", scale=(0.3, -0.2)),
    "whole_tiles_group": dict(mask="causal", Hq=6, Hkv=2),
    "whole_tiles_fused": dict(Nq=50),  # one tile of rows, whose dq, dk and dv are one kernel's
}
BASE = dict(B=2, Hq=2, Hkv=2, D=32, returns="statistics")


def whole_cases() -> list[Case]:
    size = dict(B=1, Nq=90, Nk=150, returns="out")
    return [Case(name, **BASE | size | flags) for name, flags in WHOLE.items()]


def assert_right(case: Case, mode, dtype: torch.dtype) -> None:
    ours = run(written_out(build(case, dtype, mode.device)), "triton")
    assert_agrees(ours, case, dtype, mode.device)


@each_compiled_mode
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("mask", MASKS)
def test_mask(mode, mask, length):
    case = Case(f"mask_{mask}_{length}", mask=mask, **BASE | LENGTHS[length])
    assert_right(case, mode, mode.dtypes[0])


@each_compiled_mode
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("flag", FLAGS)
def test_flag(mode, flag, length):
    """sm_80 has float16 in the long cases, sm_90 in the short ones; bfloat16 in the others."""
    case = Case(f"{flag}_{length}", **BASE | LENGTHS[length] | FLAGS[flag])
    assert_right(case, mode, mode.dtypes[(length == "long") == (mode.name == "sm_80")])


@pytest.mark.parametrize("mode", modes("sm_80", "sm_90", "gpu"), indirect=True)
@pytest.mark.parametrize("case", whole_cases(), ids=str)
def test_whole_tiles(mode, case):
    assert_right(case, mode, mode.dtypes[mode.name == "sm_80"])


@pytest.mark.parametrize("mode", modes("sm_80", "sm_90", "gpu"), indirect=True)
@pytest.mark.parametrize("length", LENGTHS)
def test_tf32(mode, length):
    """Where the user allows it; TF32 has float16's ten bits, so eager's error there is allowed."""
    case = Case(f"tf32_{length}", mask="empty_rows", **BASE | LENGTHS[length])
    call = written_out(build(case, torch.float32, mode.device))
    ieee = run(call, "triton")
    with tf32_allowed():
        ours = run(call, "triton")
    _, truth, sizes = expected(case, torch.float32, mode.device)
    half, half_truth, _ = expected(case, torch.float16, mode.device)
    for name, t in ours.items():
        assert not torch.equal(t, ieee[name]), f"{name}: the product is not TF32"
        rival = truth[name] + (half[name].double() - half_truth[name]).nan_to_num(0, 0, 0)
        assert_as_accurate(
            t, rival.to(t.dtype), truth[name], name, size=sizes.get(name, 0.0),
            rounded_to=torch.float16,
        )  # fmt: skip
