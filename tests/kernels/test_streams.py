"""Streams, devices and CUDA graphs, which only a GPU has; and what launchers are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from xattn_kernels import (
    KeyInterval,
    cross_attention,
    gated_residual_norm,
    topk_attention,
)
from xattn_kernels.cuda_kernels import launch

Call = Callable[[list[Tensor], str], list[Tensor]]
HALF = dict(dtype=torch.float16, requires_grad=True)


def with_gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum(t.float().square().sum() for t in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def attention(Nq: int, Nk: int, device: str = "cuda") -> list[Tensor]:
    return [torch.randn(2, 4, n, 64, device=device, **HALF) for n in (Nq, Nk, Nk)]


def masked(leaves: list[Tensor], backend: str) -> list[Tensor]:
    device = leaves[0].device
    start = torch.arange(100, dtype=torch.int32, device=device)
    out, lse, *_ = cross_attention(
        *leaves, mask=KeyInterval(start, start + 60), dropout_p=0.1, return_lse=True,
        seed=torch.full((1,), 5, dtype=torch.int64, device=device), backend=backend,
    )  # fmt: skip
    return with_gradients((out, lse), leaves)


def split(leaves: list[Tensor], backend: str) -> list[Tensor]:
    return with_gradients((cross_attention(*leaves, backend=backend),), leaves)


def chosen(leaves: list[Tensor], backend: str) -> list[Tensor]:
    return with_gradients((topk_attention(*leaves, 7, backend=backend),), leaves)


def gated(leaves: list[Tensor], backend: str) -> list[Tensor]:
    x, h, gate, weight = leaves
    return with_gradients(gated_residual_norm(x, h, gate, weight=weight, backend=backend), leaves)


def gated_leaves(device: str = "cuda") -> list[Tensor]:
    shapes = ((500, 256), (500, 256), (1,), (256,))
    return [torch.randn(s, device=device, **HALF) for s in shapes]


CALLS: dict[str, tuple[Call, Callable[..., list[Tensor]]]] = {
    "masked": (masked, lambda device="cuda": attention(100, 160, device)),
    "split": (split, lambda device="cuda": attention(3, 4000, device)),
    "topk": (chosen, lambda device="cuda": attention(40, 600, device)),
    "gated": (gated, gated_leaves),
}


def each_call_on_a_gpu(test):
    each_backend = pytest.mark.parametrize("backend", ["triton", "cuda"])
    return pytest.mark.gpu(each_backend(pytest.mark.parametrize("name", CALLS)(test)))


def needs(n_devices: int, backend: str) -> None:
    if torch.cuda.device_count() < n_devices:
        pytest.skip(f"fewer than {n_devices} CUDA devices")
    if backend == "cuda" and launch.extension() is None:
        pytest.skip("the package is built without its CUDA kernels")


@contextmanager
def another_stream() -> Iterator[None]:
    """A stream that begins after the current one, which goes on after it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(found, expected, strict=True))


def assign(leaves: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for t, value in zip(leaves, values, strict=True):
            t.copy_(value)


@each_call_on_a_gpu
def test_the_current_stream_is_the_one_that_works(name, backend):
    """The inputs are right only after what the stream did before."""
    needs(1, backend)
    call, new_leaves = CALLS[name]
    values = new_leaves()
    expected = call(values, backend)
    leaves = [torch.full_like(t, float("nan")).requires_grad_() for t in values]
    with another_stream():
        torch.cuda._sleep(100_000_000)
        assign(leaves, values)
        found = call(leaves, backend)
    assert_same(found, expected)


@each_call_on_a_gpu
def test_a_graph_is_captured_and_replayed_on_other_numbers(name, backend):
    needs(1, backend)
    call, new_leaves = CALLS[name]
    leaves, values = new_leaves(), new_leaves()
    with another_stream():  # kernels are compiled and loaded before the capture
        call(leaves, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(leaves, backend)
    assign(leaves, values)
    graph.replay()
    assert_same(found, call(values, backend))


@each_call_on_a_gpu
def test_the_tensors_device_is_the_one_that_works(name, backend):
    """Whichever is current, and it stays current."""
    needs(2, backend)
    call, new_leaves = CALLS[name]
    values = new_leaves("cuda:0")
    leaves = [t.detach().to("cuda:1").requires_grad_() for t in values]
    with torch.cuda.device(0):
        found = call(leaves, backend)
        assert torch.cuda.current_device() == 0
    assert_same(found, call(values, backend))


def test_launchers_are_given_the_current_stream_and_its_device(monkeypatch):
    given = []

    class Stream:
        device_index, cuda_stream = 3, 12345

    class Extension:
        op = staticmethod(lambda *arguments: given.append(arguments))

    monkeypatch.setattr(launch, "extension", lambda: Extension)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream)
    launch.submit("op", "params", torch.device("cuda", 3))
    assert given == [("params", 3, 12345)]
