"""Machine code: how it is counted, on small texts, and that no kernel's main loop has grown."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="the report needs Triton, not a GPU")

import triton

from tools.machine_code import cuda_report, sass
from tools.machine_code import triton_report as static_report
from tools.machine_code.ceilings import blocks_per_multiprocessor, bound, cycles
from tools.machine_code.triton_grid import (
    ALSO,
    ALWAYS,
    ARCHS,
    Case,
    cases,
    faults,
)
from tools.machine_code.triton_report import (
    PRODUCTS,
    RESULTS,
    KernelReport,
    all_regressions,
    regressions,
)
from xattn_kernels.cuda_kernels import launch

# the first of these calls on every architecture, the others on each second one
SAMPLE = [
    (arch, case)
    for n, case in enumerate(c for c in cases() if c.name in ALWAYS)
    for at, arch in enumerate(ARCHS)
    if n == 0 or (n + at) % 2 == 0
]
SAMPLE += [(ALSO[case.name], case) for case in cases() if case.name in ALSO]
COMMITTED = static_report.read(static_report.report_file(RESULTS, triton.__version__))


@pytest.mark.compile
@pytest.mark.parametrize(
    ("arch", "case"), [pytest.param(a, c, id=f"sm_{a}-{c.name}") for a, c in SAMPLE]
)
def test_no_kernel_has_become_worse(arch: int, case: Case):
    rows, reports = static_report.report_case((arch, case))
    found = [f"sm_{arch} {case.name} {row.kernel}: {why}" for row in rows for why in faults(row)]
    with_pairs = {report.kernel for report in reports if report.kernel in PRODUCTS}
    if case.name in ALWAYS:
        assert "forward" in with_pairs and with_pairs & {"dq", "fused"}, found
    assert reports and any(report.always for report in reports)
    for report in reports:
        loop = {**report.always, **report.one_warp, **report.sometimes}
        if report.kernel in PRODUCTS and "tensor" not in loop:
            found.append(f"sm_{arch} {case.name} {report.kernel}: no tensor cores in the main loop")
    found += all_regressions(COMMITTED, reports)
    new = {report.key for report in reports} - {report.key for report in COMMITTED}
    assert not (COMMITTED and new), f"{new} are new: run make static-report"
    assert not found, "\n".join(found)
    if not COMMITTED:
        pytest.skip(f"no committed report of Triton {triton.__version__} to compare with")


@pytest.mark.compile
@pytest.mark.parametrize("arch", [80, 100])
def test_no_cuda_kernel_has_become_worse(arch):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    if launch.extension() is None:
        pytest.skip("the package is built without its CUDA kernels")
    committed = static_report.read(cuda_report.path_of(RESULTS))
    if not committed:
        pytest.skip("no committed report of this nvcc to compare with")
    reports = [cuda_report.report(arch, name, *plan) for name, plan in cuda_report.plans().items()]
    assert {r.kernel for r in reports} == cuda_report.PRODUCTS.keys()
    assert all("tensor" in r.always for r in reports)
    assert not [(r.kernel, r.spills, r.stack) for r in reports if r.spills or r.stack]
    assert not all_regressions(committed, reports)


def sass_text(*lines: str) -> str:
    """A disassembly of these lines: labels end with a colon, the rest are instructions."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * n:04x}*/                   {line} ;"
        for n, line in enumerate(lines)
    )


NESTED = sass_text(
    "HMMA.16816.F32.BF16 R0, R4, R8, R0",
    ".L_x_0:",
    "FFMA R1, R1, R1, R1", "FFMA R1, R1, R1, R1", "FFMA R1, R1, R1, R1",
    ".L_x_1:",
    "HMMA.16816.F32.BF16 R0, R4, R8, R0", "MUFU.EX2 R2, R2", "@!PT LDS RZ, [RZ]",
    "@!P0 BRA P1, `(.L_x_2)",
    "ISETP.GE.AND P3, PT, R1, R2, PT", "FSEL R1, R1, -INF, P3",
    ".L_x_2:",
    "IMAD.MOV.U32 R5, RZ, RZ, R6", "@P2 CALL.REL.NOINC `(.L_x_3)", "BRA `(.L_x_1)",
    ".L_x_3:",
    "@P4 BRA `(.L_x_0)",
    "EXIT",
    ".L_x_4:",
    "BRA `(.L_x_4)",
)  # fmt: skip


def test_nested_loops_and_a_block_that_is_jumped_over():
    loop = sass.main_loop(sass.parse_sass(NESTED))
    assert sass.count_units(loop.always) == {
        "tensor": 1, "exp": 1, "move": 1, "branch": 3, "other": 1
    }  # fmt: skip
    assert sass.count_units(loop.sometimes) == {"integer": 1, "select": 1}
    assert not loop.one_warp


def test_of_two_loops_with_the_same_products_the_shorter_is_the_main_loop():
    text = sass_text(
        ".L_x_0:",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0", "FSEL R1, R1, -INF, P3", "@P4 BRA `(.L_x_0)",
        ".L_x_1:",
        "HMMA.16816.F32.BF16 R0, R4, R8, R0", "@P4 BRA `(.L_x_1)",
        ".L_x_2:",
        "FADD R1, R1, R1", "FADD R1, R1, R1", "@P4 BRA `(.L_x_2)",
        "EXIT",
    )  # fmt: skip
    loop = sass.main_loop(sass.parse_sass(text))
    assert sass.count_units(loop.always) == {"tensor": 1, "branch": 1}
    assert sass.count_units(loop.cut) == {"tensor": 1, "select": 1, "branch": 1}
    fields = static_report.loop_fields(80, loop, (64, 32, 2048, False), 4, PTX_OF_TWO_LOOPS)
    assert (fields["per_1000"], fields["per_1000_cut"]) == (3.9, 5.9)


PTX_OF_TWO_LOOPS = """
$L__BB0_1:
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
    @%p1 bra $L__BB0_1;
$L__BB0_2:
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
    @%p1 bra $L__BB0_2;
    ret;
"""


def test_loops_know_what_is_inside_another():
    outer, inner = sorted(sass.loops(sass.parse_sass(NESTED)), key=lambda loop: -len(loop.body))
    assert inner.body < outer.body and not inner.body & outer.exclusive
    # what comes after EXIT is reached by nothing, so it is no loop
    assert len(sass.loops(sass.parse_sass(NESTED))) == 2


def test_a_wait_outside_the_text_of_the_loop_and_products_of_one_warp():
    text = sass_text(
        ".L_x_0:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4", "@!P0 BRA `(.L_x_2)",
        ".L_x_1:",
        "FADD R1, R1, R1", "BRA.U UP0, `(.L_x_3)",
        "UMOV UR4, URZ", "UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12], idesc[UR15], UPT",
        ".L_x_3:",
        "@P6 BRA `(.L_x_0)",
        "EXIT",
        ".L_x_2:",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4", "@!P0 BRA `(.L_x_2)", "BRA `(.L_x_1)",
    )  # fmt: skip
    loop = sass.main_loop(sass.parse_sass(text))
    assert sass.count_units(loop.always) == {"float": 1, "barrier": 1, "branch": 3}
    assert sass.count_units(loop.one_warp) == {"tensor": 1, "move": 1}
    # the branch back to the wait is no repetition of it
    assert sass.count_units(loop.sometimes) == {"branch": 1}


def test_of_two_arms_the_shorter_is_always():
    text = sass_text(
        ".L_x_0:",
        "FADD R1, R1, R1", "@P0 BRA `(.L_x_1)",
        "FSEL R1, R1, R2, P1", "FSEL R1, R1, R2, P1", "FSEL R1, R1, R2, P1", "BRA `(.L_x_2)",
        ".L_x_1:",
        "SEL R1, R1, R2, P1",
        ".L_x_2:",
        "@P6 BRA `(.L_x_0)",
        "EXIT",
    )  # fmt: skip
    loop = sass.main_loop(sass.parse_sass(text))
    assert sass.count_units(loop.always) == {"float": 1, "select": 1, "branch": 2}
    assert sass.count_units(loop.sometimes) == {"select": 3, "branch": 1}


def test_a_kernel_without_a_loop():
    assert sass.main_loop(sass.parse_sass(sass_text("FADD R1, R1, R1", "EXIT"))) is None


def test_an_unrolled_loop_counts_its_tiles():
    line = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};"
    ptx = f"$L__BB0_1:\n\t{line}\n\t@%p1 bra $L__BB0_1;\n\tret;\n"
    product = "HMMA.16816.F32.BF16 R0, R4, R8, R0"
    for n in (1, 2, 4):
        text = sass_text(".L_x_0:", *[product] * n, "@P6 BRA `(.L_x_0)", "EXIT")
        loop = sass.main_loop(sass.parse_sass(text))
        assert static_report.tiles_per_iteration(loop, ptx) == n


def test_multiply_adds_of_an_instruction():
    macs = {
        "HMMA.16816.F32.BF16": 16 * 8 * 16,
        "HMMA.1688.F32.TF32": 16 * 8 * 8,
        "HGMMA.64x128x16.F32.BF16": 16 * 128 * 16,
        "UTCHMMA": 0,
        "FFMA": 0,
    }
    assert {opcode: sass.Instruction(opcode).macs for opcode in macs} == macs


def test_occupancy():
    # 255 registers take 8 of a multiprocessor's warps, 2 blocks of four
    assert blocks_per_multiprocessor(80, 4, 255, 0) == 2
    assert blocks_per_multiprocessor(80, 8, 255, 0) == 1
    assert blocks_per_multiprocessor(90, 4, 32, 65536) == 3
    assert blocks_per_multiprocessor(89, 1, 16, 0) == 24
    assert blocks_per_multiprocessor(100, 4, 32, 0, tensor_memory=256) == 2


def test_the_bound_is_the_busiest_unit():
    product = sass.Instruction("HMMA.16816.F32.BF16")
    exp = sass.Instruction("MUFU.EX2")
    needed = 4 * product.macs
    alone = cycles(80, sass.MainLoop((product,), (), ()), 4, needed, False)
    assert bound(80, alone, needed, False) == (1.0, "tensor")
    # 8 cycles of a scheduler's tensor core against 3 * 8 of its exponentials
    busy = cycles(80, sass.MainLoop((product, exp, exp, exp), (), ()), 4, needed, False)
    assert bound(80, busy, needed, False) == (8 / 24, "exp")
    # integer multiply-adds have half of the float pipe where it is 128 wide
    for arch, name in ((80, "fma"), (90, "imad")):
        many = cycles(
            arch, sass.MainLoop((sass.Instruction("IMAD.WIDE"),) * 9, (), ()), 4, 0, False
        )
        assert max(many, key=many.__getitem__) == name and many["imad"] == 9 * 4 * 32 / 64


OLD = KernelReport(
    90, "case", "forward", registers=168, spills=0, stack=0, shared=0, blocks_per_sm=1,
    num_warps=8, num_stages=2, block_q=64, block_k=64, tiles=1, per_1000=100.0, per_1000_cut=150.0,
    always={"tensor": 8, "float": 20}, cut={"tensor": 8, "select": 9},
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(spills=8), "0 spilled bytes became 8"),
        (
            dict(per_1000=104.0),
            "case forward: 100 instructions per 1,000 pairs of a whole tile bec",
        ),
        (dict(per_1000_cut=156.0), "150 instructions per 1,000 pairs of a cut tile became 156"),
        (dict(always={"float": 500}), "lost its 8 tensor-core instructions"),
        (dict(cut={}), "the loop over whole tiles is gone"),
    ],
)
def test_a_regression_is_named(change: dict, words: str):
    (found,) = regressions(OLD, replace(OLD, **change))
    assert words in found
    assert not regressions(OLD, replace(OLD, per_1000=102.9, registers=200))


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "report.json"
    static_report.write([OLD, replace(OLD, arch=80, limiter="issue")], path)
    assert static_report.read(path) == [replace(OLD, arch=80, limiter="issue"), OLD]
    assert len(path.read_text().splitlines()) == 4


def test_rows_of_cases_that_were_not_compiled_stay():
    name = cases()[0].name
    old = [replace(OLD, case=name), replace(OLD, case=name, arch=80), replace(OLD, case="gone")]
    old.append(replace(old[1], registers=7))  # the second dq of attention weights
    new = [replace(OLD, case=name, registers=99)]
    assert static_report.merge(old, new) == [old[1], old[3], *new]


def test_kernels_of_one_name_are_compared_in_order():
    old = [OLD, replace(OLD, per_1000=50.0)]
    assert not all_regressions(old, old)
    assert not all_regressions(old, [replace(OLD, arch=80)])
    (found,) = all_regressions(old, [OLD, replace(OLD, per_1000=60.0)])
    assert "50 instructions per 1,000 pairs of a whole tile became 60" in found


def test_a_loop_without_pairs_is_held_too():
    old = replace(OLD, kernel="dbias", always={"float": 20}, sometimes={"tensor": 8}, cut={})
    assert not regressions(old, replace(old, per_1000=200.0))
    (found,) = regressions(old, replace(old, sometimes={"tensor": 9}))
    assert "28 instructions per turn of the main loop became 29" in found
