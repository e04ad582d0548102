"""Compiles every row of the configuration table ahead of time and reports what the compiler made.

No GPU is needed: the launchers run on meta tensors with a driver that only names the target, so
what is compiled is what a user's call would compile. Per kernel and architecture: registers,
spilled bytes, shared memory, tensor-core instructions.

    python -m tools.machine_code.triton_grid --jobs 2 --out benchmarks/results/static
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

ARCHS = (80, 89, 90, 100, 120)
# largest dynamic shared memory of one block, in bytes (CUDA programming guide, table of limits)
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# cases of the workloads that every change should keep fast
ALWAYS = ("many2048-D64-Dv64", "few64-D96-Dv96", "prefill-gqa-D128")
# and of what else has main loops, each on one architecture
ALSO = {
    "many2048-D64-dropout": 80, "many2048-D64-bias": 90, "many2048-D64-weights": 90,
    "topk-D64-Nk4096": 90, "topk-D64-Nk16384": 80, "topk-few16-D64-Nk65536": 80,
    "blocks-many2048-D64": 90,
    "gated-layer-dim4096-bfloat16": 90, "gated-vector-mask-dim4096-float32": 80,
}  # fmt: skip
FLAGS = ("mask", "bias", "scale", "softcap", "dropout", "statistics")
# what the assembler said of a kernel: Triton compiles it once in a process, for whichever case
LOGS: dict[str, str] = {}
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)")


@dataclass(frozen=True)
class Case:
    """One call whose kernels are compiled."""

    name: str
    D: int
    Dv: int
    dtype: str
    rows: int  # Nq
    Nk: int = 4096
    group: int = 1
    interval: bool = True
    # any of: mask bias scale softcap dropout statistics; weights or mass with some of them; topk or
    # blocks with mask and scale; or gated with any of: layer or rms, vector, mask
    flags: str = ""
    tf32: bool = False


@dataclass(frozen=True)
class Row:
    """What was compiled; the order of the fields is that of the table's columns."""

    triton: str
    arch: int
    case: str
    kernel: str
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int
    spills: int  # bytes stored and loaded
    shared: int
    tensor_core: int
    error: str = ""


def cases() -> list[Case]:
    """Every row of the table, widths of one to three chunks, and the flags alone and together."""
    regimes = (("decode", 1), ("few", 32), ("few", 64), ("many", 2048))
    found = []
    for D, Dv in ((40, 40), (64, 64), (96, 96), (128, 128), (32, 160), (256, 256)):
        for regime, rows in regimes:
            found.append(Case(f"{regime}{rows}-D{D}-Dv{Dv}", D, Dv, "bfloat16", rows))
    for D, (regime, rows) in itertools.product((40, 64, 96, 128, 160, 256), regimes[::3]):
        found.append(Case(f"{regime}{rows}-D{D}-float32", D, D, "float32", rows))
    for flag in FLAGS:
        found.append(Case(f"many2048-D64-{flag}", 64, 64, "bfloat16", 2048, flags=flag))
    for D, dtype in itertools.product((64, 96, 256), ("bfloat16", "float32")):
        for regime, rows in regimes[::3]:
            name = f"{regime}{rows}-D{D}-all-flags-{dtype}"
            found.append(Case(name, D, D, dtype, rows, flags=" ".join(FLAGS)))
    for D, (regime, rows) in itertools.product((64, 128, 256), regimes):
        name = f"{regime}{rows}-D{D}-weights"
        found.append(Case(name, D, D, "bfloat16", rows, flags="weights"))
    flagged = "weights mask bias scale softcap dropout"
    for D, (regime, rows) in itertools.product((64, 256), regimes[::3]):
        found.append(
            Case(f"{regime}{rows}-D{D}-weights-flags", D, D, "bfloat16", rows, flags=flagged)
        )
    for D in (64, 128, 256):
        found.append(Case(f"many2048-D{D}-weights-float32", D, D, "float32", 2048, flags=flagged))
    for D in (64, 128):
        found.append(Case(f"many2048-D{D}-dense", D, D, "bfloat16", 2048, interval=False))
    for D, (regime, rows) in itertools.product((40, 64, 128, 256), regimes[::3]):
        found.append(Case(f"{regime}{rows}-D{D}-tf32", D, D, "float32", rows, tf32=True))
    for D in (56, 72, 112, 160, 192):  # padding in one load, in the last of two; rounded up
        found.append(Case(f"many2048-D{D}-Dv{D}", D, D, "bfloat16", 2048))
    found.append(Case("many2048-D96-Dv256", 96, 256, "bfloat16", 2048))
    found.append(Case("many2048-D64-float16", 64, 64, "float16", 2048))
    found.append(Case("many2048-gqa-D64-scale", 64, 64, "bfloat16", 2048, group=4, flags="scale"))
    found.append(Case("decode-gqa-D128", 128, 128, "bfloat16", 1, group=4))
    found.append(Case("prefill-gqa-D128", 128, 128, "bfloat16", 512, group=4))
    return found + mass_cases() + topk_cases() + block_cases() + gated_cases()


def mass_cases() -> list[Case]:
    """The received mass of few rows and many, widths of one and two chunks, with flags."""
    flagged = "mass mask bias scale softcap"
    found = []
    for D, rows in itertools.product((64, 96, 128, 160, 256), (1, 2048)):
        found.append(Case(f"mass{rows}-D{D}", D, D, "bfloat16", rows, flags="mass"))
    for D, dtype in itertools.product((64, 160, 256), ("bfloat16", "float32")):
        found.append(Case(f"mass-flags-D{D}-{dtype}", D, D, dtype, 2048, flags=flagged))
    found.append(Case("mass-gqa-D128", 128, 128, "bfloat16", 512, group=4, flags="mass"))
    found.append(Case("mass-dense-D64", 64, 64, "bfloat16", 2048, interval=False, flags="mass"))
    return [*found, Case("mass-D128-tf32", 128, 128, "float32", 2048, flags="mass", tf32=True)]


def topk_cases() -> list[Case]:
    """64 keys of rows whose scores are kept, of longer ones, and of so many that they are gathered;
    few rows and many, widths of one and two chunks."""
    sizes = [(64, 512), (64, 1024), (64, 4096), (128, 512), (128, 4096), (256, 256), (256, 4096)]
    sizes += [(96, 1024), (40, 257), (64, 16384), (96, 16384), (128, 16384), (256, 16384)]
    found = [Case(f"topk-D{D}-Nk{Nk}", D, D, "bfloat16", 2048, Nk, flags="topk") for D, Nk in sizes]
    # keys in parts, whose scores are kept or, of 65536, computed again
    for D, Nk in ((64, 1024), (64, 4096), (256, 4096), (128, 16384), (64, 65536), (128, 65536)):
        found.append(Case(f"topk-few16-D{D}-Nk{Nk}", D, D, "bfloat16", 16, Nk, flags="topk"))
    for D, rows in itertools.product((64, 96, 128), (32, 64)):
        name = f"topk-few{rows}-D{D}-Nk1024"
        found.append(Case(name, D, D, "bfloat16", rows, 1024, flags="topk"))
    for D, Nk in ((64, 1024), (128, 512), (64, 4096), (256, 4096), (64, 16384), (256, 16384)):
        name, flags = f"topk-mask-scale-D{D}-Nk{Nk}", "topk mask scale"
        found.append(Case(name, D, D, "bfloat16", 2048, Nk, group=2, flags=flags))
    for D, Nk in ((64, 64), (64, 4096), (256, 4096), (64, 16384), (256, 16384)):
        found.append(Case(f"topk-D{D}-Nk{Nk}-float32", D, D, "float32", 2048, Nk, flags="topk"))
    name = "topk-few16-D64-Nk16384-float32"
    return [*found, Case(name, 64, 64, "float32", 16, 16384, flags="topk")]


def block_cases() -> list[Case]:
    """Eight blocks of 64 keys: few rows and many, widths of one and two chunks, each dtype."""
    found = []
    for D, (regime, rows) in itertools.product((64, 96, 128, 256), (("few", 16), ("many", 2048))):
        found.append(Case(f"blocks-{regime}{rows}-D{D}", D, D, "bfloat16", rows, flags="blocks"))
    for D in (64, 128):
        name = f"blocks-dense-D{D}"
        found.append(Case(name, D, D, "bfloat16", 2048, flags="blocks", interval=False))
        name, flags = f"blocks-mask-scale-D{D}", "blocks mask scale"
        found.append(Case(name, D, D, "bfloat16", 2048, group=3, flags=flags))
        found.append(Case(f"blocks-D{D}-float32", D, D, "float32", 2048, flags="blocks"))
    return found


def gated_cases() -> list[Case]:
    """The gated residual in each form at the widths that registers hold, and ragged ones."""
    widths = [(1024, "bfloat16"), (4096, "bfloat16"), (8192, "bfloat16"), (4096, "float32")]
    found = []
    for (dim, dtype), norm in itertools.product(widths, ("", "layer", "rms")):
        for more in ("", "vector mask"):
            if dim < 8192 or not (norm and more):  # a reason against the kernel
                name = "-".join(["gated", *f"{norm} {more}".split(), f"dim{dim}", dtype])
                found.append(Case(name, dim, dim, dtype, 2048, flags=f"gated {norm} {more}"))
    edges = [("layer", 2560), ("rms", 5120), ("layer mask", 7168), ("layer mask", 8192)]
    edges += [("layer vector mask", dim) for dim in (64, 1000, 2047)] + [("layer mask", 2047)]
    for form, dim in edges:
        name = f"gated-{form.replace(' ', '-')}-dim{dim}-bfloat16"
        found.append(Case(name, dim, dim, "bfloat16", 2048, flags=f"gated {form}"))
    return found


class CompileOnlyDriver:
    """Stands where Triton looks for a device: names the target and nothing else."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return f"sm_{self.target.arch}"

    def get_current_stream(self, device=None):
        return 0


def constants_of(options: dict) -> dict:
    """The options of a launch and, by their own names, the constants of its structs."""
    structs = [options[name]._asdict() for name in ("T", "W") if name in options]
    return {key: value for part in (options, *structs) for key, value in part.items()}


@contextlib.contextmanager
def compile_only(arch: int, dump_log: bool = True) -> Iterator[list]:
    """Inside, a launch compiles for `arch` and runs nothing; yields each kernel launched."""
    from triton import knobs
    from triton.runtime import jit
    from triton.runtime.driver import driver

    compiled, run, active = [], jit.JITFunction.run, driver._active
    dump, cache = knobs.nvidia.dump_ptxas_log, knobs.cache.dir

    def compile_instead(self, *args, grid, warmup, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        said = LOGS.setdefault(kernel.hash, log.getvalue())
        if all(kernel is not other for _, other, _, _ in compiled):
            compiled.append((self.fn.__name__, kernel, constants_of(kwargs), said))
        return kernel

    jit.JITFunction.run, driver._active = compile_instead, CompileOnlyDriver(arch)
    knobs.nvidia.dump_ptxas_log = dump_log
    try:
        # an empty cache, so that the assembler runs and says what it did
        with tempfile.TemporaryDirectory() as knobs.cache.dir:
            yield compiled
    finally:
        jit.JITFunction.run, driver._active = run, active
        knobs.nvidia.dump_ptxas_log, knobs.cache.dir = dump, cache


def launch_gated(case: Case) -> None:
    """Forward and backward of a gated residual on meta tensors."""
    import torch

    from xattn_kernels.core.call import GatedResidualCall
    from xattn_kernels.core.layout import GatedResults
    from xattn_kernels.triton_kernels import gated_residual

    dtype, flags = getattr(torch, case.dtype), case.flags.split()
    x, h, dnormed = torch.empty(3, 8, case.rows, case.D, dtype=dtype, device="meta")
    norm = next((f for f in flags if f in ("layer", "rms")), None)
    weight = torch.empty(case.D, dtype=dtype, device="meta") if norm else None
    mask = torch.empty(x.shape[:2], dtype=torch.bool, device="meta")
    call = GatedResidualCall(
        x=x,
        h=h,
        gate=torch.empty(case.D if "vector" in flags else 1, device="meta"),
        weight=weight,
        bias=weight if norm == "layer" else None,
        row_mask=mask if "mask" in flags else None,
        norm=norm,
        eps=1e-5,
    )
    results = gated_residual.forward(call)
    needs = ["h", "gate", *(["x", "weight"] if norm else []), *(["bias"] * (norm == "layer"))]
    upstream = GatedResults(x, dnormed if norm else None)
    gated_residual.backward(upstream, call, results, needs)


def attention_fields(case: Case) -> dict:
    """The fields that every call of attention has, with meta tensors."""
    import torch

    dtype, flags = getattr(torch, case.dtype), case.flags.split()
    B, Hkv, Hq = 2, 4, 4 * case.group

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    start, stop = (
        empty(B, case.rows, dtype=torch.int32) if case.interval else None for _ in range(2)
    )
    return dict(
        q=empty(B, Hq, case.rows, case.D),
        k=empty(B, Hkv, case.Nk, case.D),
        bias=empty(1, Hq, case.rows, case.Nk) if "bias" in flags else None,
        scale_tensor=empty(Hq, dtype=torch.float32) if "scale" in flags else None,
        start=start,
        stop=stop,
        mask=empty(B, 1, 1, case.Nk, dtype=torch.bool) if "mask" in flags else None,
        seed=empty(1, dtype=torch.int64) if "dropout" in flags else None,
        scale=None if "scale" in flags else 0.125,
        softcap=30.0 if "softcap" in flags else None,
        dropout_p=0.1 if "dropout" in flags else 0.0,
        allow_tf32=case.tf32,
    )


def value_fields(case: Case, **flags: bool) -> dict:
    """The fields that a call of attention to values has beside those."""
    import torch

    shape, dtype = (2, 4, case.Nk, case.Dv), getattr(torch, case.dtype)
    v = torch.empty(shape, dtype=dtype, device="meta")
    plain = dict(return_lse=False, return_statistics=False, deterministic=True)
    return dict(v=v) | plain | flags


def gradients_of(call, *names: str) -> list[str]:
    """Those of the names whose field is there."""
    return [name for name in names if getattr(call, name) is not None]


def launch_topk(case: Case) -> None:
    """Forward and backward of top-k attention on meta tensors, 64 keys a row."""
    import torch

    from xattn_kernels.core.call import TopKAttentionCall
    from xattn_kernels.triton_kernels import topk_attention, topk_selection

    choice = dict(top_k=64, topk_blocks=None, return_indices=True)
    call = TopKAttentionCall(**attention_fields(case), **value_fields(case), **choice)
    results = topk_attention.forward(call)
    # both directions between bits and indices, whichever of them are saved
    indices = call.q.new_empty((*call.q.shape[:3], 64), dtype=torch.int32)
    topk_selection.to_bits(indices, call.Nk)
    if results.bits is not None:
        results = results._replace(indices=None)
    upstream = type(results)(results.out, *[None] * 6)
    needs = gradients_of(call, "q", "k", "v", "scale_tensor")
    topk_attention.backward(upstream, call, results, needs)


def launch_blocks(case: Case) -> None:
    """Choice, forward and backward of 8 blocks of 64 keys for tiles of 64 queries."""
    import torch

    from xattn_kernels.core.call import TopKBlocksCall, TopKImportanceCall
    from xattn_kernels.triton_kernels import topk_blocks

    choice = dict(top_k=None, topk_blocks=(64, 8), return_indices=False)
    fields = attention_fields(case) | value_fields(case) | choice
    seen = torch.empty((2, case.Nk), dtype=torch.bool, device="meta")
    mask = fields["mask"]
    of_blocks = dict(mask=None if mask is None else mask[..., : case.Nk // 64])
    weights, *_ = topk_blocks.importance(TopKImportanceCall(**fields | of_blocks, seen=seen))
    chosen = torch.empty((*weights.shape[:3], 8), dtype=torch.int32, device="meta")
    call = TopKBlocksCall(**fields, chosen=chosen)
    results = topk_blocks.forward(call)
    upstream = type(results)(results.out, None, None, None, None)
    needs = gradients_of(call, "q", "k", "v", "scale_tensor")
    topk_blocks.backward(upstream, call, results, needs)


def launch_mass(case: Case) -> None:
    """Forward of received mass on meta tensors."""
    import torch

    from xattn_kernels.core.call import ReceivedMassCall
    from xattn_kernels.triton_kernels import received_mass

    fields = attention_fields(case)
    lse = fields["q"].new_empty(fields["q"].shape[:3], dtype=torch.float32)
    lse_low = lse if fields["bias"] is not None else None
    weight = lse.new_empty((2, case.rows))
    rows = dict(lse=lse, lse_low=lse_low, row_weight=weight, average_heads=True)
    received_mass.forward(ReceivedMassCall(**fields, **rows))


def launch_weights(case: Case) -> None:
    """Forward and backward of attention weights on meta tensors."""
    import torch

    from xattn_kernels.core.call import AttentionWeightsCall
    from xattn_kernels.triton_kernels import attention_weights

    fields = attention_fields(case)
    lse = fields["q"].new_empty(fields["q"].shape[:3], dtype=torch.float32)
    lse_low = lse if fields["bias"] is not None else None
    rows = dict(lse=lse, lse_low=lse_low, lse_is_own=True, average_heads=True)
    call = AttentionWeightsCall(**fields, **rows)
    results = attention_weights.forward(call)
    needs = gradients_of(call, "q", "k", "bias", "scale_tensor")
    attention_weights.backward(results, call, results, needs)


def launch_attention(case: Case) -> None:
    """Forward and backward of attention on meta tensors."""
    from xattn_kernels.core.call import CrossAttentionCall
    from xattn_kernels.triton_kernels import cross_attention

    statistics = "statistics" in case.flags.split()
    values = value_fields(case, return_statistics=statistics)
    call = CrossAttentionCall(**attention_fields(case), **values)
    results = cross_attention.forward(call)
    dentropy = results.lse if statistics else None
    upstream = type(results)(results.out, None, None, dentropy, None)
    needs = gradients_of(call, "q", "k", "v", "bias", "scale_tensor")
    cross_attention.backward(upstream, call, results, needs)


LAUNCHES = {
    "gated": launch_gated,
    "topk": launch_topk,
    "blocks": launch_blocks,
    "mass": launch_mass,
    "weights": launch_weights,
}


def launch(case: Case) -> None:
    """Forward and backward of `case` on meta tensors."""
    family = next((flag for flag in case.flags.split() if flag in LAUNCHES), None)
    LAUNCHES.get(family, launch_attention)(case)


def resources(log: str) -> dict[str, int]:
    """Registers and spilled bytes, from what the assembler says of a kernel."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.search(r"Used (\d+) registers", log).group(1)
    return {"registers": int(registers), "spills": sum(map(int, spills))}


def compile_kernels(task: tuple[int, Case]) -> tuple[list[Row], list[tuple]]:
    """The rows of one case on one architecture, one per distinct kernel, and what they describe:
    (name, kernel, options, the assembler's log)."""
    import triton

    arch, case = task
    common = {"triton": triton.__version__, "arch": arch, "case": case.name}
    nothing = dict.fromkeys([f.name for f in fields(Row)[4:-1]], 0)
    with compile_only(arch) as compiled:
        try:
            launch(case)
        except Exception as error:  # reported as a row: one failure must not hide the others
            message = f"{type(error).__name__}: {error}"[:300]
            return [Row(**common, kernel="", **nothing, error=message)], []
    rows = []
    for name, kernel, options, log in compiled:
        rows.append(Row(
            **common, kernel=name,
            block_q=options.get("BLOCK_Q", options.get("BLOCK", options.get("ROWS", 0))),
            block_k=options.get("BLOCK_K", options.get("COLUMNS", 0)),
            num_warps=kernel.metadata.num_warps, num_stages=kernel.metadata.num_stages,
            **resources(log), shared=kernel.metadata.shared,
            tensor_core=len(TENSOR_CORE.findall(kernel.asm["ptx"])),
        ))  # fmt: skip
    return rows, compiled


def compile_case(task: tuple[int, Case]) -> list[Row]:
    """The rows of one case on one architecture, one per distinct kernel."""
    return compile_kernels(task)[0]


def faults(row: Row) -> list[str]:
    """Why a row fails the gate."""
    found = [row.error] if row.error else []
    if row.spills:
        found.append(f"spills {row.spills} bytes of registers")
    if row.shared > SHARED_LIMIT[row.arch]:
        found.append(f"{row.shared} bytes of shared memory > {SHARED_LIMIT[row.arch]}")
    if wants_tensor_cores(row) and not row.tensor_core:
        found.append("no tensor-core instruction")
    return found


def wants_tensor_cores(row: Row) -> bool:
    from xattn_kernels.triton_kernels.configs import tf32_fits

    with_products = {
        f"{name}_kernel"
        for name in ("forward", "dq", "dkdv", "dbias", "mass", "select", "gather_dkdv")
    }
    if row.kernel not in with_products:
        return False
    width = max((int(D) for D in re.findall(r"-Dv?(\d+)", row.case)), default=0)
    return tf32_fits(row.arch, width, width) if "tf32" in row.case else "float32" not in row.case


def compile_all(tasks: list, jobs: int) -> Iterator[list[Row]]:
    """The rows of each task as they come, compiled in `jobs` processes."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(compile_case, tasks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHS))
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--every", type=int, default=1, help="only each n-th task: a sample")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for compile_grid_triton<version>.csv")
    args = parser.parse_args()
    tasks = [(arch, c) for c in cases() if args.match in c.name for arch in args.arch][
        :: args.every
    ]
    rows, n_faults = [], 0
    for n, found in enumerate(compile_all(tasks, args.jobs), 1):
        for row in found:
            rows.append(row)
            if why := faults(row):
                n_faults += 1
                tile = (
                    f"{row.block_q}x{row.block_k}, {row.num_warps} warps, {row.num_stages} stages"
                )
                print(
                    f"sm_{row.arch} {row.case} {row.kernel} ({tile}): {'; '.join(why)}", flush=True
                )
        print(f"\r{n}/{len(tasks)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if args.out:
        write(rows, args.out)
    print(f"{len(rows)} rows, kernels of {len(tasks)} calls, {n_faults} with faults")
    return 1 if n_faults else 0


def write(rows: list[Row], folder: Path) -> None:
    rows = sorted(rows, key=lambda row: (row.arch, row.case, row.kernel, row.block_q, row.block_k))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"compile_grid_triton{rows[0].triton}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
