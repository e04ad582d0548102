"""A sample of the compile grid: every kernel and architecture, no spills, tensor cores in use."""

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="the compile grid needs Triton, not a GPU")

from tools.machine_code.triton_grid import (
    ALSO,
    ALWAYS,
    ARCHS,
    Case,
    CompileOnlyDriver,
    cases,
    compile_case,
    faults,
)
from tools.machine_code.triton_grid import launch as launch_case

# One case in six, spread over the architectures; test_static_report.py has those of its own.
SAMPLE = [
    (ARCHS[n % len(ARCHS)], c)
    for n, c in enumerate(c for c in cases() if c.name not in (*ALWAYS, *ALSO))
    if n % 6 == 0
]

pytestmark = pytest.mark.compile


@pytest.mark.parametrize(
    ("arch", "case"),
    [pytest.param(arch, c, id=f"sm_{arch}-{c.name}") for arch, c in SAMPLE],
)
def test_no_spills_and_tensor_cores(arch: int, case: Case):
    rows = compile_case((arch, case))
    assert rows
    found = [f"{row.kernel}: {why}" for row in rows for why in faults(row)]
    assert not found, "\n".join(found)
    expected = {"forward_kernel", "dq_kernel"}
    if "weights" in case.flags:
        expected = {"weights_kernel", "dq_kernel"}
    elif "mass" in case.flags:
        expected = {"mass_kernel"}
    elif "topk" in case.flags:
        expected = {"select_kernel"}
    elif "blocks" in case.flags:
        expected |= {"pool_kernel", "importance_kernel"}
        if case.rows > 64:  # of fewer dq_kernel writes dk and dv as well
            expected.add("dkdv_kernel")
    elif "gated" in case.flags:
        expected = {"gated_forward_kernel", "gated_backward_kernel", "gated_sums_kernel"}
    assert expected <= {row.kernel for row in rows}


def test_the_grid_takes_every_row_of_the_table(monkeypatch):
    """What no case of the grid reaches, `make compile-grid` proves nothing of."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    import xattn_kernels.triton_kernels.launch as launch
    from xattn_kernels.triton_kernels import configs

    taken = set()

    def record(kernel, arch, *key, **bits):
        row = configs.find_row(kernel, arch, *key, **bits)
        taken.add((kernel, configs.FAMILIES.get(arch, "small"), id(row)))
        return row.config

    monkeypatch.setattr(launch, "lookup", record)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: None)
    for arch in ARCHS:
        monkeypatch.setattr(driver, "_active", CompileOnlyDriver(arch))
        for case in cases():
            launch_case(case)
    assert not [
        (kernel, family, row)
        for kernel, table in configs.TABLE.items()
        for row in table
        for family in row.families
        if (kernel, family, id(row)) not in taken
    ]


def test_the_grid_reports_a_spill():
    """More than the registers hold must be reported, or the gate gates nothing."""
    import xattn_kernels.triton_kernels.launch as launch
    from xattn_kernels.triton_kernels.configs import Config

    lookup, launch.lookup = launch.lookup, lambda *args, **kwargs: Config(16, 32, 1, 1, 32)
    try:
        rows = compile_case((80, Case("too-few-registers", 64, 64, "bfloat16", 16)))
    finally:
        launch.lookup = lookup
    assert any("spill" in why for row in rows for why in faults(row))


def test_a_kernel_of_two_cases_is_in_the_rows_of_both():
    """Triton compiles it once in a process, whose rows must not depend on what came before."""
    case = next(c for c in cases() if c.name == "decode1-D64-Dv64")
    first, again = (compile_case((90, replace(case, name=name))) for name in ("first", "again"))
    assert [replace(row, case="again") for row in first] == again
