"""The cost of `StabilityMonitor` in a training: of each kind of step, and as a share of all steps.

    python -m benchmarks.stability.monitor_overhead [--device cuda] [--seconds 60]
        [--dim 512] [--text 256] [--out FOLDER]

A step is forward, backward and AdamW of a small Flamingo: `layers` decoder layers of PyTorch, each
after a gated block, over 4 images of 64 features. "plain" has no monitor and "look" is a step that
the monitor looks at, 1 of 100. In 9 it checks gradients, in 90 it does nothing: these steps have no
hooks, so that they differ from a plain one by the call `monitor.step` alone. That call is timed as
"finite" and "between", as the difference of two long steps would be noise. With --out a file of
that folder gets the medians, as ratios to the median of a plain step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from xattn_kernels import GatedCrossAttentionBlock, StabilityMonitor, gates_

from ..harness import machine
from ..harness.timing import measure

EVERY, NAN_EVERY = 100, 10
STEPS = {"look": 1, "finite": EVERY // NAN_EVERY - 1, "between": EVERY - EVERY // NAN_EVERY}
FIRST = {"look": 0, "finite": NAN_EVERY, "between": 1}  # the number of the first such step
IMAGES, FEATURES, WORDS = 4, 64, 1000


class Model(nn.Module):
    """Decoder layers with a gated block before each, and the loss of the next token."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        heads = max(1, dim // 64)
        self.embed, self.head = nn.Embedding(WORDS, dim), nn.Linear(dim, WORDS)
        self.blocks = nn.ModuleList(GatedCrossAttentionBlock(dim=dim) for _ in range(layers))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, batch_first=True)
            for _ in range(layers)
        )

    def forward(self, tokens: Tensor, media: Tensor) -> Tensor:
        x, locations = self.embed(tokens), tokens < WORDS // 50
        locations[:, 0] = True
        for block, layer in zip(self.blocks, self.layers, strict=True):
            x = layer(block(x, media, media_locations=locations))
        return nn.functional.cross_entropy(
            self.head(x[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )


def steps_of(device: torch.device, dim: int, text: int, layers: int) -> dict[str, Callable]:
    """A call for each kind of step of one model."""
    torch.manual_seed(0)
    model = Model(dim, layers).to(device)
    gates_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tokens = torch.randint(WORDS, (2, text), device=device)
    media = torch.randn(2, IMAGES, FEATURES, dim, device=device)
    monitor = StabilityMonitor(model, every=EVERY, nan_every=NAN_EVERY)
    monitor.close()

    def step(kind: str) -> None:
        optimizer.zero_grad()
        if kind == "look":
            monitor.attention.start()
        loss = model(tokens, media)
        loss.backward()
        if kind == "look":
            monitor_step(kind, loss)
        optimizer.step()

    def monitor_step(kind: str, loss: Tensor = torch.ones((), device=device)) -> None:  # noqa: B008
        monitor.steps = FIRST[kind]
        monitor.step(loss)

    whole = {kind: lambda kind=kind: step(kind) for kind in ("plain", "look")}
    return whole | {k: lambda k=k: monitor_step(k) for k in ("finite", "between")}


def share(milliseconds: dict[str, float]) -> float:
    """The time of EVERY steps beyond that of plain ones, as a share of the latter."""
    plain = milliseconds["plain"]
    beyond = milliseconds | {"look": milliseconds["look"] - plain}
    return sum(n * beyond[kind] for kind, n in STEPS.items()) / (EVERY * plain)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0)
    for name, default in dict(dim=512, text=256, layers=4).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    calls = steps_of(device, options.dim, options.text, options.layers)
    for call in calls.values():
        call()
    times_of = measure(calls, device, options.seconds)
    medians = {kind: median(times) for kind, times in times_of.items()}
    facts = machine.provenance(device)
    print(", ".join(facts.values()))
    for kind, times in times_of.items():
        print(f"{kind:<8} {medians[kind]:11.4f} ms, median of {len(times)}")
    print(f"share of every={EVERY}, nan_every={NAN_EVERY}: {share(medians):.2%}")
    if options.out is not None:
        sizes = {name: getattr(options, name) for name in ("dim", "text", "layers")}
        ratios = {kind: time / medians["plain"] for kind, time in medians.items()}
        repeats = {kind: len(times) for kind, times in times_of.items()}
        record = facts | dict(model=sizes, plain_ms=medians["plain"], of_plain=ratios)
        record |= dict(calls=repeats, every=EVERY, nan_every=NAN_EVERY, share=share(medians))
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"monitor-overhead-dim{options.dim}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
