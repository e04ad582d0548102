"""The command line: `python -m benchmarks run | main | gated | topk | warm`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import __doc__ as about
from . import commands
from .attention import document, workloads


def main(arguments: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(
        "python -m benchmarks", description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    tasks = top.add_subparsers(dest="task", required=True)
    run = tasks.add_parser("run", help="random tensors in the shapes of workloads.json")
    add_options(run, workload="all", budget=600.0)
    run.set_defaults(call=commands.run)
    job = tasks.add_parser("main", help="real photographs and real text, within five minutes")
    add_options(job, workload=",".join(document.WORKLOADS), budget=240.0)
    job.set_defaults(call=commands.main)
    gates = tasks.add_parser("gated", help="the gated residual in real models' shapes")
    add_options(gates, workload="all", budget=240.0)
    gates.set_defaults(call=commands.gated)
    chosen_keys = tasks.add_parser("topk", help="top-k attention beside rivals and dense attention")
    add_options(chosen_keys, workload="all", budget=360.0)
    chosen_keys.set_defaults(call=commands.topk)
    warm = tasks.add_parser("warm", help="compile in parallel, so that a later run need not")
    add_options(warm, workload="all", budget=120.0)
    warm.add_argument("--jobs", type=int, default=4, help="processes (%(default)s)")
    warm.set_defaults(call=commands.warm)
    chosen = top.parse_args(arguments)
    return chosen.call(chosen)


def add_options(parser: argparse.ArgumentParser, workload: str, budget: float) -> None:
    add = parser.add_argument
    add("--workload", default=workload, help=f'comma-separated, or "all" ({workload})')
    add("--provider", default="all", help='comma-separated, or "all"')
    add("--mode", default="forward,both", help=f"of {', '.join(workloads.MODES)} (%(default)s)")
    add("--device", default=None, help="cuda where there is one, else cpu")
    add("--dtype", default=None, help="float32, float16, bfloat16 (bfloat16 on cuda, else float32)")
    add("--budget-seconds", type=float, default=budget, help="for everything (%(default)s)")
    first_call = "most for the compilation and check of one provider (%(default)s)"
    add("--first-call-seconds", type=float, default=60.0, help=first_call)
    scaling = "scale down to this much in a forward pass over all pairs (10 on a cpu)"
    add("--dense-gflop", type=float, default=None, help=scaling)
    add("--no-memory", action="store_true", help="do not measure the memory on a cpu")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=None, help="folder (benchmarks/results/<device>)")
    add("--name", default=None, help="name of the files (the workloads and the dtype)")


if __name__ == "__main__":
    raise SystemExit(main())
