"""Workloads of the gated residual in the shapes of real models, and cases with their tensors."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

# The number of operations that take as long as one element's way through memory.
OPERATIONS = 1000


@dataclass(frozen=True)
class GatedWorkload:
    """The gated residual of `rows` tokens of width `dim`.

    `form` is "plain", the norm that follows ("layer", "rms"), or "projection", of a linear layer
    with `width` inputs. With `vector` there is a gate for each channel, else a single one.
    """

    name: str
    rows: int
    dim: int
    form: str = "plain"
    vector: bool = False
    width: int = 0
    mask = "none"
    regime = "bandwidth"

    @property
    def shape(self) -> str:
        return f"rows={self.rows} dim={self.dim} width={self.width}"

    @property
    def elements(self) -> int:
        return self.rows * self.dim

    def label(self, original: GatedWorkload) -> str:
        """The name, with the rows if they were reduced: `flamingo-9b[rows=16384->2048]`."""
        fewer = f"[rows={original.rows}->{self.rows}]" if self.rows < original.rows else ""
        return self.name + fewer


# Most have 8 sequences of 2048 tokens; the widths are those of the models.
WORKLOADS = (
    GatedWorkload("flamingo-9b", 16384, 4096),
    GatedWorkload("flamingo-9b-norm", 16384, 4096, "layer"),
    GatedWorkload("flamingo-9b-out", 16384, 4096, "projection", width=512),
    GatedWorkload("flamingo-3b-norm", 2048, 2048, "layer"),
    GatedWorkload("mllama-11b-norm", 16384, 4096, "rms"),
    GatedWorkload("mllama-90b-norm", 8192, 8192, "rms"),
    GatedWorkload("idefics-9b", 16384, 4096, vector=True),
    GatedWorkload("idefics-9b-norm", 16384, 4096, "rms", vector=True),
    GatedWorkload("flamingo-9b-decode", 8, 4096, "layer"),
)
BY_NAME = {w.name: w for w in WORKLOADS}


def fit(w: GatedWorkload, flops: float = float("inf"), elements: float = float("inf")):
    """The workload with few enough rows for this many operations and elements of a tensor."""
    while w.rows > 1 and w.elements > min(flops / OPERATIONS, elements):
        w = replace(w, rows=w.rows // 2)
    return w


@dataclass(frozen=True, eq=False)
class GatedCase:
    """A workload with its tensors.

    `leaves` holds x [rows, dim], h like it (or a [rows, width] of a projection), gate [1] or [dim],
    and for forms that have them weight and bias; `upstream` the gradients of y and of its norm.
    """

    workload: GatedWorkload
    original: GatedWorkload
    leaves: dict[str, Tensor]
    upstream: tuple[Tensor, ...]
    suite = "benchmarks.suites:gated"

    label = property(lambda self: self.workload.label(self.original))
    device = property(lambda self: self.leaves["x"].device)
    dtype = property(lambda self: self.leaves["x"].dtype)

    def inputs(self, requires_grad: bool) -> tuple[Tensor, ...]:
        """The leaves of a fresh graph, without a copy."""
        return tuple(t.detach().requires_grad_(requires_grad) for t in self.leaves.values())

    def flops(self, mode: str) -> int | None:
        """The operations of a projection's products; None for other forms, which memory limits."""
        w = self.workload
        if w.form != "projection":
            return None
        product = 2 * w.elements * w.width
        return product * {"forward": 1, "backward": 2, "both": 3}[mode]

    def min_bytes(self, mode: str) -> int:
        """The fewest bytes that must move: each input is read once, each output written once.

        Without a norm dx is dy and is not written.
        """
        w, itemsize = self.workload, self.dtype.itemsize
        inputs = sum(t.numel() for t in self.leaves.values())
        results, x = sum(t.numel() for t in self.upstream), w.elements
        forward = inputs + results
        # the gradients, all inputs but x, and with a norm y are read; the inputs' are written
        backward = results + (inputs - x) + inputs
        backward += x if len(self.upstream) > 1 else -x
        return itemsize * {
            "forward": forward, "backward": backward, "both": forward + backward,
        }[mode]  # fmt: skip

    def visible_fraction(self) -> None:
        """None, as nothing is masked."""

    def first_rows(self, rows: int) -> GatedCase:
        """The case of the first `rows` rows."""
        by_row = ("x", "h", "a")
        leaves = {n: t[:rows] if n in by_row else t for n, t in self.leaves.items()}
        upstream = tuple(t[:rows] for t in self.upstream)
        return replace(self, leaves=leaves, upstream=upstream)

    def save(self, path: Path) -> None:
        torch.save((vars(self.workload), vars(self.original), self.leaves, self.upstream), path)

    @staticmethod
    def load(path: Path) -> GatedCase:
        workload, original, leaves, upstream = torch.load(path)
        return GatedCase(GatedWorkload(**workload), GatedWorkload(**original), leaves, upstream)


def build(
    w: GatedWorkload, original: GatedWorkload, device, dtype: torch.dtype, seed: int = 0
) -> GatedCase:
    """A case of random normal tensors and gates near 0.5, fixed by workload, seed and dtype."""
    generator = torch.Generator(device).manual_seed(seed + zlib.crc32(w.name.encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).to(dtype)

    leaves = {"x": normal(w.rows, w.dim)}
    projects = w.form == "projection"
    leaves |= {"a": normal(w.rows, w.width)} if projects else {"h": normal(w.rows, w.dim)}
    leaves["gate"] = 0.5 * normal(w.dim if w.vector else 1)
    if projects:
        leaves["weight"] = normal(w.dim, w.width) / w.width**0.5
    elif w.form != "plain":
        leaves["weight"] = 1 + 0.1 * normal(w.dim)
    if w.form == "layer":
        leaves["bias"] = normal(w.dim)
    results = 2 if w.form in ("layer", "rms") else 1
    return GatedCase(w, original, leaves, tuple(normal(w.rows, w.dim) for _ in range(results)))
