"""The launchers as a C++ API: docs/cpp.md is built and run, and plans what Python does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from support.checkout import ROOT
from xattn_kernels import masks
from xattn_kernels.core.tensor_arguments import check_attention
from xattn_kernels.cuda_kernels import cross_attention, launch

CSRC = ROOT / "csrc"
DOCUMENT = (ROOT / "docs" / "cpp.md").read_text()
# What the document's snippets take from their surroundings.
SNIPPETS = """
#include <cstdio>
#include "cross_attention.h"
#include "gated_residual.h"
#include "topk_attention.h"

void Check(cudaError_t);
float* Floats(int64_t n);

void Snippets(int B, int Hq, int Hkv, int Nq, int Nk, int D, int Dv, int rows, int dim,
              int multiprocessors, cudaStream_t stream, void* q, void* k, void* v, void* out,
              float* lse, int32_t* start, int32_t* stop, void* dout, void* dq, void* dk, void* dv,
              uint32_t* bits, int32_t* indices, void* x, void* h, void* y, void* normed, void* gate,
              void* weight, void* dx, void* dh, void* dy, void* dnormed, void* dgate,
              void* dweight) {
%s}
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)


def checkout(folder: Path, *tools: str) -> Path:
    """`folder`, as far as builds see it the root of a checkout; skips the test without a tool."""
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on PATH")
    for name in ("csrc", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command: str | list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=folder, env=os.environ | environment, shell=isinstance(command, str),
        capture_output=True, text=True,
    )  # fmt: skip


def build(folder: Path, command: str) -> None:
    done = run(command, folder)
    assert done.returncode == 0, done.stderr


def assert_needs_a_device(program: str, folder: Path) -> None:
    done = run(program, folder, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (77, "")
    assert done.stderr.startswith("no CUDA device, or no driver for one: ")


def plan_of_python(monkeypatch) -> list[str]:
    """The example's call, made from Python: documents with an image every seven rows from the 20th
    on, of which there are 32."""
    plans = []

    def submit(op, params, device):
        plans.extend(getattr(launch.extension(), f"{op}_plan")(params))

    monkeypatch.setattr(launch, "submit", submit)
    q, k, v = (torch.empty(2, n, 8, 64).half().transpose(1, 2) for n in (256, 2048, 2048))
    here = torch.zeros(2, 256, dtype=torch.bool)
    here[:, 20 : 20 + 7 * 32 : 7] = True
    seen = masks.media(here, tokens_per_media=64, n_media=32)
    cross_attention.forward(check_attention(q, k, v, mask=seen, scale=0.125))
    return [
        " ".join([name, "grid", *map(str, grid), "block", *map(str, block), f"shared {shared}"])
        for name, grid, block, shared, _ in plans
    ]


@pytest.mark.compile
def test_the_example_as_the_document_builds_it(tmp_path, monkeypatch):
    """Its device is left for the test below, which has one."""
    folder = checkout(tmp_path, "nvcc")
    ((compile_it, plan_it, run_it),) = (block.splitlines() for block in blocks("sh"))
    build(folder, compile_it)
    assert_needs_a_device(run_it, folder)
    done = run(plan_it, folder, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    planned = done.stdout.splitlines()
    assert [line.partition("<")[0] for line in planned] == [
        "cross_attention_forward_kernel",
        "merge_kernel",
    ]
    if launch.extension() is None:
        pytest.skip("all but Python's plan, as the package is built without its CUDA kernels")
    assert planned == plan_of_python(monkeypatch)


@pytest.mark.compile
@pytest.mark.slow
def test_the_example_by_cmake(tmp_path):
    folder = checkout(tmp_path, "nvcc", "cmake")
    (lists,) = blocks("cmake")
    (folder / "CMakeLists.txt").write_text(lists)
    build(folder, "cmake -S . -B build && cmake --build build")
    assert_needs_a_device("build/cross_attention", folder)


@pytest.mark.gpu
def test_the_example_is_right(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = checkout(tmp_path, "nvcc")
    compile_it, _, run_it = blocks("sh")[0].splitlines()
    build(folder, compile_it.replace("-arch=sm_80", "-arch=native"))
    done = run(run_it, folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.compile
def test_the_snippets_compile(tmp_path):
    folder = checkout(tmp_path, "nvcc")
    (folder / "snippets.cpp").write_text(SNIPPETS % "".join(blocks("cpp")))
    build(folder, "nvcc -std=c++17 -Icsrc -c snippets.cpp -o snippets.o")


def test_the_document_names_each_launcher_where_it_is():
    table = re.findall(r"^\| `(\w+\.h)` \| (.*) \| `(\w+\.cu)` \|$", DOCUMENT, re.MULTILINE)
    named = set()
    for header, names, source in table:
        for name in re.findall(r"`(\w+)`", names):
            assert f" {name}(" in (CSRC / source).read_text()
            named.add((header, name))
    declared = re.compile(r"^(?:cudaError_t|int64_t|int32_t|int|void) (\w+)\(", re.MULTILINE)
    headers = {header for header, *_ in table}
    assert headers == {"cross_attention.h", "gated_residual.h", "topk_attention.h"}
    assert named == {
        (h, name) for h in headers for name in declared.findall((CSRC / h).read_text())
    }
