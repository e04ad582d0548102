"""What the gated residual's kernels move, counted from what they are launched on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from xattn_kernels.core.call import GatedResidualCall
from xattn_kernels.core.layout import GatedResults
from xattn_kernels.triton_kernels import gated_residual as kernels

KERNELS = ("gated_forward_kernel", "gated_backward_kernel", "gated_sums_kernel")


class Recorder:
    """Stands in for a kernel: keeps the tensors of each launch."""

    def __init__(self) -> None:
        self.launches: list[list[Tensor]] = []

    def __getitem__(self, grid):
        def launch(*args, **constants) -> None:
            self.launches.append(tensors_in(args))

        return launch


def tensors_in(argument) -> list[Tensor]:
    """The tensors of arguments, also those in structs."""
    if isinstance(argument, tuple):
        return [t for part in argument for t in tensors_in(part)]
    return [argument] if isinstance(argument, Tensor) else []


def size(tensors) -> int:
    """Bytes of tensors that are there, each once."""
    there = {id(t): t for t in tensors if t is not None}
    return sum(t.numel() * t.element_size() for t in there.values())


@pytest.fixture
def moved(monkeypatch):
    """A function: the bytes that a call's launches read and wrote."""
    recorder = Recorder()
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, recorder)

    def of(call, *args) -> int:
        recorder.launches.clear()
        of.results = call(*args)
        return sum(map(size, recorder.launches))

    return of


@pytest.mark.parametrize("vector", [False, True], ids=["one", "vector"])
@pytest.mark.parametrize("norm", [None, "layer", "rms"], ids=["plain", "layer", "rms"])
def test_each_input_is_read_once_and_each_output_written_once(moved, norm, vector):
    """At 32 sequences of 2048 tokens; sums over rows may take 1 % more."""
    shape, dim, dtype = (32, 2048, 4096), 4096, torch.bfloat16
    x, h, y, dy, dnormed = (torch.empty(shape, dtype=dtype, device="meta") for _ in range(5))
    gate = torch.empty(dim if vector else 1, device="meta")
    weight = torch.empty(dim, dtype=dtype, device="meta") if norm else None
    bias = torch.empty(dim, dtype=dtype, device="meta") if norm == "layer" else None
    row_mask = torch.empty(shape[:-1], dtype=torch.bool, device="meta")
    call = GatedResidualCall(
        x=x, h=h, gate=gate, weight=weight, bias=bias, row_mask=row_mask, norm=norm, eps=1e-5
    )
    forward = moved(kernels.forward, call)
    assert forward == size((x, h, gate, weight, bias, row_mask, *moved.results))
    dnormed = dnormed if norm else None
    needs = ["h", "gate", *(["x", "weight"] if norm else []), *(["bias"] * (norm == "layer"))]
    results = GatedResults(y if norm else None, None)
    backward = moved(kernels.backward, GatedResults(dy, dnormed), call, results, needs)
    read = (dy, dnormed, h, gate, weight, row_mask, y if norm else None)
    least = size((*read, *moved.results.values()))
    assert least <= backward <= 1.01 * least


def test_a_gradient_nobody_wants_costs_nothing(moved):
    x, h, dy = (torch.empty(8, 64, device="meta") for _ in range(3))
    call = GatedResidualCall(x=None, h=h, gate=torch.empty(1, device="meta"))
    given = GatedResults(dy, None), call, GatedResults(None, None)
    assert moved(kernels.backward, *given, []) == 0
    only_h = moved(kernels.backward, *given, ["h"])
    assert only_h == size((dy, call.gate, moved.results["h"]))
