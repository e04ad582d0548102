"""Every backend against eager on every case: results and all gradients, by the tolerance rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support.calls import assert_right, build
from support.cases import CASES, PAIRS, Case
from support.cases import FLAGS as PAIRED
from support.modes import case_params
from xattn_kernels.ops.cross_attention import cross_attention, triton_reasons
from xattn_kernels.torch_kernels import cross_attention as torch_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def compiled_for(c: Case) -> tuple:
    """What kernels are compiled for: cases that agree in it share most of theirs."""
    regime = sum(c.Nq * c.Hq // c.Hkv > rows for rows in (16, 32, 64))
    mask = "interval" if c.mask and "bool" not in c.mask else c.mask
    scale = len(c.scale) if isinstance(c.scale, tuple) else 0
    sizes = [1 if n == 1 else n % 16 == 0 for n in (c.B, c.Hkv, c.Nq, c.Nk)]
    return (
        c.D, c.Dv, c.Hq // c.Hkv, regime, mask, c.bias, c.bias_dtype, scale,
        c.softcap is None, c.dropout_p > 0, c.returns, c.layout, *sizes,
    )  # fmt: skip


def emulated() -> dict[str, tuple[str, torch.dtype]]:
    """The architecture and dtype of each case. Emulation is slow by the compilation, so cases that
    share kernels take one dtype and, where only their values differ, two architectures; of pairs of
    flags those with a bool mask are there, as the case with all flags has an interval."""
    found, kinds = {}, {}
    for case in CASES:
        if case in PAIRS and case.mask != PAIRED["bool"]["mask"]:
            continue
        n, members = kinds.setdefault(compiled_for(case), (len(kinds), []))
        other = len(members) % 2 if case.mask is None else 0
        members.append(case)
        arch = "sm_89" if n % 8 == 7 else ("sm_80", "sm_90")[(n + other) % 2]
        found[case.name] = arch, DTYPES[1 + n // 2 % 2]
    return found


def everywhere() -> list:
    """(mode, case, dtype): interpreted in two dtypes, emulated where `emulated` says, on a GPU in
    all. Many row tiles, pairs of flags and float16 are left out of a fast run: the interpreter is
    slow by the tile."""
    found, once = [], emulated()
    for case in CASES:
        for dtype in DTYPES[:2]:
            slow = dtype == torch.float16 or case.Nq > 35 or case in PAIRS
            found.append(("interpreter", case, dtype, [pytest.mark.slow] * slow))
        if case.name in once:
            arch, dtype = once[case.name]
            found.append((arch, case, dtype, [pytest.mark.emulated]))
        found += [("gpu", case, dtype, [pytest.mark.gpu]) for dtype in DTYPES]
    return case_params(found)


@pytest.mark.parametrize(("mode", "case", "dtype"), everywhere(), indirect=["mode"])
def test_triton(mode, case, dtype):
    assert triton_reasons(build(case, dtype, mode.device).inputs()) == []
    assert_right(case, "triton", dtype, mode.device)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch(case, dtype, device):
    """Without lse and statistics, which torch's kernels do not return; what else is a reason."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if case.values == "infinite_k":
        pytest.skip("torch's kernel makes NaN of an infinite key at other positions than eager")
    if case.name == "layout_far_tiles" and (device, dtype) == ("cpu", torch.bfloat16):
        pytest.skip("torch's kernel copies keys together with the memory between them")
    case = replace(case, returns="out")
    call = build(case, dtype, device)
    if reasons := torch_attention.reasons(call.inputs()):
        with pytest.raises(RuntimeError) as refusal:
            cross_attention(**call.leaves, **call.options, backend="torch")
        assert all(reason in str(refusal.value) for reason in reasons)
        pytest.skip("; ".join(reasons))
    assert_right(case, "torch", dtype, device)
