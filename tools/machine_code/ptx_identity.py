"""Whether a change left every compiled Triton kernel as it was: the PTX of the whole grid, hashed.

Every case of the grid is compiled to PTX for each architecture, without a GPU and without the
assembler. Names, comments, debug lines and the numbers of parameters are taken out first, so that
a kernel may be renamed and its arguments may be grouped otherwise; every instruction and every
virtual register counts. Kernels that have the same instructions in another order are told apart
from those that changed. With --stage ttir the compiler stops at its first representation, from
which the same compiler makes the same PTX, in a third of the time.

    python -m tools.machine_code.ptx_identity write before.json
    python -m tools.machine_code.ptx_identity write after.json       (on the changed tree)
    python -m tools.machine_code.ptx_identity compare before.json after.json
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import multiprocessing
import re
import sys
from pathlib import Path

from .triton_grid import (
    ARCHS,
    Case,
    cases,
    compile_only,
    launch,
)

DEBUG = re.compile(r"//.*|^\s*\.(?:loc|file)\b.*", re.MULTILINE)
PARAMETER = re.compile(r"\w+_param_\d+")


def body_of(ptx: str, kernel: str) -> str:
    """The text of a kernel without what may change while its code does not."""
    text = DEBUG.sub("", ptx)
    text = text[text.index(".entry") :].partition(".section")[0]
    text = text[text.index("{") :].replace(kernel, "kernel")
    numbers: dict[str, str] = {}
    text = PARAMETER.sub(lambda m: numbers.setdefault(m[0], f"param{len(numbers)}"), text)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def body_of_ttir(ttir: str, kernel: str) -> str:
    """The same of the first representation: values are numbered in the order of their definition,
    as some have names of the source, and arguments that nothing reads are left out."""
    text = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", ttir)
    text = re.sub(r"^#loc.*\n", "", text, flags=re.MULTILINE).replace(kernel, "kernel")
    head, signature, body = re.split(
        r"(^ *tt\.func public @kernel\(.*\n)", text, flags=re.MULTILINE
    )
    arguments = dict(re.findall(r"(%\w+): ([^{},]+(?:\{[^{}]*\})?)", signature))
    numbers: dict[str, str] = {}
    read: list[str] = []
    count = itertools.count()

    def number(match: re.Match) -> str:
        name, defines = match[1], match[2]
        if not defines and name not in numbers and name not in arguments:
            return match[0]  # a register in a line of assembler
        if defines or name not in numbers:
            numbers[name] = f"%{next(count)}" if defines else f"%argument{len(read)}"
            if not defines:
                read.append(f"{numbers[name]}: {arguments[name]}")
        return numbers[name] + defines

    lines = []
    for line in body.splitlines():
        in_block = line.lstrip().startswith("^")
        defines = r"(?::\d+)? =|: " if in_block else r"(?::\d+)? ="
        lines.append(re.sub(rf"(%\w+)((?:{defines})?)", number, line))
    return "\n".join([head, *read, *lines])


def digest(text: str) -> str:
    """Sixteen hexadecimal digits by which a text is recognised."""
    return hashlib.sha1(text.encode()).hexdigest()[:16]


def digest_of_any_order(body: str) -> str:
    """The digest of the instructions without the names of their values, in whatever order."""
    return digest("\n".join(sorted(re.sub(r"%[\w.#]+", "%", body).splitlines())))


def stop_after(last: str):
    """A hook of Triton that leaves out what comes after the stage `last`."""

    def hook(backend=None, stages=None, *_):
        if stages is None:  # Triton 3.9 asks for a part of the key
            return f"only {last}", f"only {last}"
        names = list(stages)
        for name in names[names.index(last) + 1 :]:
            stages[name] = leave_out

    return hook


def leave_out(source, metadata):
    """In place of a stage."""
    for name in ("shared", "tmem_size", "global_scratch_size"):
        metadata.setdefault(name, 0)
    metadata.setdefault("name", "kernel")
    return b""


def hashes(task: tuple[int, Case, str]) -> dict[str, list[str]]:
    """For each "arch case kernel" a line for every kernel that the case launches, in order."""
    from triton import knobs

    arch, case, stage = task
    lines: dict[str, list[str]] = {}
    with knobs.runtime.scope(), compile_only(arch, dump_log=False) as compiled:
        knobs.runtime.add_stages_inspection_hook = stop_after(stage)
        launch(case)
    for name, kernel, _, _ in compiled:
        body = (body_of_ttir if stage == "ttir" else body_of)(kernel.asm[stage], name)
        meta = kernel.metadata
        line = f"{digest(body)} {digest_of_any_order(body)} "
        line += f"{meta.num_warps} warps, {meta.num_stages} stages, {meta.shared} bytes"
        lines.setdefault(f"{arch} {case.name} {name}", []).append(line)
    return lines


def write(file: Path, tasks: list[tuple[int, Case, str]], jobs: int) -> None:
    import triton

    table: dict[str, list[str]] = {}
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for n, lines in enumerate(pool.imap_unordered(hashes, tasks), 1):
            table |= lines
            print(f"\r{n}/{len(tasks)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    content = {"triton": triton.__version__, "kernels": dict(sorted(table.items()))}
    file.write_text(json.dumps(content, indent=0) + "\n")
    print(f"{sum(map(len, table.values()))} kernels of {len(tasks)} calls in {file}")


def compare(before: Path, after: Path) -> int:
    """How many kernels are not identical in both tables, each of them printed.

    One in another order has the same instructions when the names of values are left out. That does
    not prove it: operands of an instruction may have changed places.
    """
    old, new = (json.loads(file.read_text()) for file in (before, after))
    if old["triton"] != new["triton"]:
        raise SystemExit(f"one table is of Triton {old['triton']}, the other of {new['triton']}")
    old, new = old["kernels"], new["kernels"]
    both = [name for name in new if name in old]
    changed, reordered = [], []
    for name in both:
        before, after = ([line.split(" ", 2) for line in t[name]] for t in (old, new))
        if before == after:
            continue
        same = [line[1:] for line in before] == [line[1:] for line in after]
        (reordered if same else changed).append(name)
    for word, names in (("reordered", reordered), ("changed", changed)):
        for name in names:
            print(f"{word}: {name}")
    alone = sorted(old.keys() ^ new.keys())
    for name in alone:
        print(f"only {'before' if name in old else 'after'}: {name}")
    n_same = len(both) - len(changed) - len(reordered)
    print(f"{len(both)} in both: {n_same} identical, {len(reordered)} in another order")
    return len(changed) + len(reordered) + len(alone)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("file", type=Path)
    writing.add_argument("--arch", type=int, nargs="*", default=list(ARCHS))
    writing.add_argument("--match", default="", help="only cases whose name contains this")
    writing.add_argument("--every", type=int, default=1, help="only each n-th task: a sample")
    writing.add_argument("--stage", default="ptx", choices=("ptx", "ttir"))
    writing.add_argument("--jobs", type=int, default=2)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "compare":
        return 1 if compare(args.before, args.after) else 0
    tasks = [(arch, c, args.stage) for c in cases() if args.match in c.name for arch in args.arch]
    write(args.file, tasks[:: args.every], args.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
