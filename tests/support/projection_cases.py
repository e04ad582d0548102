"""Calls of `gated_projection`, and their comparison with eager."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from support.numerics import assert_as_accurate
from xattn_kernels import gated_projection

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class ProjectionCase:
    """`shape` of the rows; `gate` a number for every gate, None: random; `scalar`: one gate is a
    tensor without dimensions; `frozen` names the inputs without a gradient; `turned`: the leading
    dimensions in the opposite order of memory."""

    shape: tuple[int, ...] = (3, 7)
    dim: int = 24
    width: int = 40
    vector: bool = False
    scalar: bool = False
    bias: bool = True
    gate: float | None = None
    mask: bool = False
    frozen: str = ""
    turned: bool = False
    seed: int = 0

    def build(self, dtype: torch.dtype, device: str = "cpu") -> ProjectionCall:
        g = torch.Generator().manual_seed(self.seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=g, dtype=torch.float64).to(device, dtype)

        leaves = {"x": normal(*self.shape, self.dim), "a": normal(*self.shape, self.width)}
        leaves["gate"] = 0.5 * normal(self.dim if self.vector else 1)
        if self.scalar:
            leaves["gate"] = leaves["gate"][0]
        if self.gate is not None:
            leaves["gate"] = torch.full_like(leaves["gate"], self.gate)
        leaves["weight"] = normal(self.dim, self.width) / self.width**0.5
        if self.bias:
            leaves["bias"] = normal(self.dim)
        row_mask = torch.rand(self.shape, generator=g).to(device) < 0.5 if self.mask else None
        if row_mask is not None:  # what a row that does not count holds does not matter
            leaves["a"].masked_fill_(~row_mask[..., None], torch.nan)
        dy = normal(*self.shape, self.dim)
        if self.turned:
            leaves |= {n: leaves[n].transpose(0, 1).contiguous().transpose(0, 1) for n in "xa"}
            dy = dy.transpose(0, 1).contiguous().transpose(0, 1)
        for name, t in leaves.items():
            t.requires_grad_(name not in self.frozen.split())
        return ProjectionCall(leaves, row_mask, dy)


@dataclass(frozen=True)
class ProjectionCall:
    """The arguments that may require grad, and the gradient of y."""

    leaves: Tensors
    row_mask: Tensor | None
    dy: Tensor

    def run(self, backend: str) -> Tensors:
        """y, then "d" + name of each leaf that wants a gradient."""
        y = gated_projection(**self.leaves, row_mask=self.row_mask, backend=backend)
        wanted = {n: t for n, t in self.leaves.items() if t.requires_grad}
        grads = torch.autograd.grad(y, list(wanted.values()), self.dy) if wanted else ()
        return {"y": y} | {f"d{n}": t for n, t in zip(wanted, grads, strict=True)}

    def in_double(self) -> ProjectionCall:
        doubled = {
            n: t.detach().double().requires_grad_(t.requires_grad) for n, t in self.leaves.items()
        }
        return ProjectionCall(doubled, self.row_mask, self.dy.double())


@torch.no_grad()
def magnitudes(call: ProjectionCall) -> dict[str, float]:
    """The size of what is summed in each gradient, of a call in float64: independent terms."""
    gate, (dim, width) = call.leaves["gate"], call.leaves["weight"].shape
    dy = call.dy if call.row_mask is None else call.dy * call.row_mask[..., None]
    dy = dy.reshape(-1, dim).square()
    a = call.leaves["a"].nan_to_num(0.0).reshape(len(dy), width).square()
    weight, t = call.leaves["weight"].square(), torch.tanh(gate).square()
    h = a @ weight.mT + call.leaves.get("bias", torch.zeros(())).square()
    of_gate = (dy * h).sum(0)
    squares = {
        "da": (t * dy) @ weight,
        "dweight": (t * dy).mT @ a,
        "dbias": (t * dy).sum(0),
        "dgate": of_gate if gate.numel() == dim else of_gate.sum(),
    }
    return {n: s.max().sqrt().item() if s.numel() else 0.0 for n, s in squares.items()}


def assert_right(c: ProjectionCase, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Each result and gradient is as accurate as eager's in the same dtype."""
    call = c.build(dtype, device)
    exact = call.in_double()
    truth, size = exact.run("eager"), magnitudes(exact)
    ours, eager = call.run(backend), call.run("eager")
    assert ours.keys() == truth.keys()
    for name, t in ours.items():
        assert_as_accurate(t, eager[name], truth[name], f"{c}: {name}", size=size.get(name, 0.0))
