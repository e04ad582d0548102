"""The distance of top-k attention from dense attention as k grows: kept mass and relative error.

    python -m benchmarks.topk.error [--device cuda] [--out folder]

Nothing is timed: any backend gives these numbers up to rounding. There are three kinds of inputs:

- "normal": all tensors are random normal, so that every key gets a little attention;
- "peaked": each query is the sum of 8 random keys, at a length of 2 sqrt(D), and attends mostly to
  those, which lie in many blocks, as each query has others;
- "regions": as in an image, each key and value resembles the 64 around it, and the queries, which
  share their blocks, look at the same 8 places.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from xattn_kernels import cross_attention, kept_mass, topk_attention
from xattn_kernels.reference import QUERIES_PER_CHOICE

from ..harness import machine
from .workloads import KEYS, TOP_K

KINDS = ("normal", "peaked", "regions")
HEADS, Nq, D = 4, QUERIES_PER_CHOICE, 64
BLOCK = 64
PLACES, REGION = 8, 64


@dataclass(frozen=True)
class ErrorRow:
    """One measurement: `kept` is the number of keys of a query, `mass` the mean of `kept_mass`, and
    `error` is ||out - dense|| / ||dense||."""

    inputs: str
    way: str
    Nk: int
    kept: int
    mass: float
    error: float


def inputs(kind: str, Nk: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, HEADS, Nq, D], k and v [1, HEADS, Nk, D], each element of variance 1."""
    g = torch.Generator(device).manual_seed(Nk)

    def normal(n: int) -> Tensor:
        return torch.randn((1, HEADS, n, D), generator=g, device=device)

    q, k, v = normal(Nq), normal(Nk), normal(Nk)
    if kind == "normal":
        return q, k, v
    shared = kind == "regions"
    if shared:
        k, v = (0.9 * region_means(t) + 0.19**0.5 * normal(Nk) for t in (k, v))
    seen = (1, HEADS, 1 if shared else Nq, PLACES)
    places = torch.randint(0, Nk, seen, generator=g, device=device).expand(-1, -1, Nq, -1)
    indices = places.flatten(2)[..., None].expand(-1, -1, -1, D)
    q = k.gather(2, indices).unflatten(2, (Nq, PLACES)).sum(3) + (normal(Nq) if shared else 0.0)
    return q * (2 * D**0.5 / q.norm(dim=-1, keepdim=True)), k, v


def region_means(t: Tensor) -> Tensor:
    """The means of REGION consecutive elements of [1, HEADS, N, D], scaled to the same variance."""
    ends = torch.cat((t, t[:, :, : REGION - 1]), 2)
    return ends.unfold(2, REGION, 1).mean(-1) * REGION**0.5


@torch.no_grad()
def rows(kind: str, Nk: int, device: torch.device) -> list[ErrorRow]:
    """A row for each number of kept keys, by keys and by blocks."""
    q, k, v = inputs(kind, Nk, device)
    dense = cross_attention(q, k, v)
    measured = []
    for kept in (n for n in TOP_K if n < Nk):
        ways = {"keys": dict(top_k=kept)}
        if kept >= BLOCK:
            ways["blocks"] = dict(topk_blocks=(BLOCK, kept // BLOCK))
        for way, choice in ways.items():
            error = (topk_attention(q, k, v, **choice) - dense).norm() / dense.norm()
            mass = kept_mass(q, k, **choice).mean()
            measured.append(ErrorRow(kind, way, Nk, kept, mass.item(), error.item()))
    return measured


def draw(measured: list[ErrorRow], path: Path, title: str) -> None:
    """Writes a picture of the error over the number of kept keys, a panel for each kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(KINDS), figsize=(14, 4.5), layout="constrained", sharey=True)
    for axis, kind in zip(axes, KINDS, strict=True):
        for colour, Nk in enumerate(KEYS):
            for way, style in (("keys", "o-"), ("blocks", "s--")):
                line = [r for r in measured if (r.inputs, r.way, r.Nk) == (kind, way, Nk)]
                label = f"Nk = {Nk}, {way}"
                kept, errors = [r.kept for r in line], [r.error for r in line]
                axis.plot(kept, errors, style, color=f"C{colour}", label=label)
        axis.set(xscale="log", yscale="log", xlabel="keys of a query", title=kind)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("||out - dense|| / ||dense||")
    axes[-1].legend(fontsize=7)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device = torch.device(options.device)
    folder = options.out or machine.RESULTS / machine.slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine.provenance(device)
    measured = [row for kind in KINDS for Nk in KEYS for row in rows(kind, Nk, device)]
    text = json.dumps({**facts, "rows": [asdict(row) for row in measured]}, indent=1)
    (folder / "topk-error.json").write_text(text + "\n")
    draw(measured, folder / "topk-error.png", ", ".join(facts.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
