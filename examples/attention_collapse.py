"""A collapse of attention that the monitor reports, and entropy regularisation that repairs it.

A picture is a mosaic of 16 handwritten digits, each a token, and the question is how many of them
are, for instance, a seven: from none to four. To count, a model has to look at many tokens at once.

The pixels enter the cross-attention as scikit-learn has them, as numbers from 0 to 16, and nothing
normalises them. Keys are therefore tens of times as long as queries, scores are large, and the
softmax hardens during training, until each head looks at one digit. There are four runs:

    collapsed   has 500 steps, in which `StabilityMonitor` begins to warn
    unchanged   continues it as before
    repaired    continues it with `entropy_loss` of the statistics of each layer in the loss
    normed      starts again with pixels from 0 to 1, which removes the cause

The program prints entropy, the largest probability, the warnings, and how often held-out mosaics of
held-out digits are counted right. It writes two pictures: the history of the monitors, and where
the heads of the last block look in one mosaic.

    python examples/attention_collapse.py --out plots

Needs scikit-learn and matplotlib: pip install 'xattn-kernels[bench]'.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xattn_kernels import (
    GatedCrossAttentionBlock,
    StabilityMonitor,
    attention_map,
    attention_statistics,
    entropy_loss,
    gates_,
)

try:
    from sklearn.datasets import load_digits

    from xattn_kernels import viz
except ImportError as error:
    sys.exit(f"{error}; this example needs: pip install 'xattn-kernels[bench]'")

GRID, PIXELS = 4, 64  # tiles along each side of a mosaic, pixels of a digit
TILES, MOST = GRID**2, 4
WORDS = "zeros ones twos threes fours fives sixes sevens eights nines".split()
EVERY = 25  # steps from one look of the monitor to the next


# Mosaics


class Mosaics(NamedTuple):
    """Mosaics: tiles [n, TILES, PIXELS] from 0 to 16, the digit asked for [n], its count [n]."""

    tiles: Tensor
    questions: Tensor
    counts: Tensor

    def some(self, rows: Tensor) -> Mosaics:
        return Mosaics(*(t[rows] for t in self))


def draw_mosaics(n: int, held_out: bool, generator: torch.Generator) -> Mosaics:
    """Mosaics of held-out digits, one in five, or of the others; counts are equally likely."""

    def draw(high: int | Tensor, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) * high).long()

    data = load_digits()
    chosen = (torch.arange(len(data.target)) % 5 == 0) == held_out
    pixels, labels = torch.from_numpy(data.data).float()[chosen], torch.tensor(data.target)[chosen]
    order = labels.argsort(stable=True)
    per_class = labels.bincount()
    first = per_class.cumsum(0) - per_class

    questions, counts = draw(10, n), draw(MOST + 1, n)
    others = (questions[:, None] + 1 + draw(9, n, TILES)) % 10
    asked_for = torch.arange(TILES) < counts[:, None]
    classes = torch.where(asked_for, questions[:, None], others)
    shuffled = torch.rand(n, TILES, generator=generator).argsort(1)
    classes = classes.gather(1, shuffled)
    tiles = pixels[order[first[classes] + draw(per_class[classes], n, TILES)]]
    return Mosaics(tiles, questions, counts)


# The model


class Counter(nn.Module):
    """A model whose question attends twice to the tiles of a mosaic, and yields a count."""

    def __init__(self, divide_by: float = 1.0, dim: int = 64) -> None:
        super().__init__()
        self.divide_by = divide_by
        self.words = nn.Embedding(len(WORDS), dim)
        sizes = dict(dim=dim, dim_visual=PIXELS, dim_head=16, heads=4)
        self.blocks = nn.ModuleList(GatedCrossAttentionBlock(**sizes) for _ in range(2))
        gates_(self, value=0.5)
        self.read = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, MOST + 1)
        )

    def forward(self, tiles: Tensor, questions: Tensor) -> Tensor:
        """tiles [B, TILES, PIXELS], questions [B] -> logits [B, MOST + 1] of the counts."""
        x = self.words(questions)[:, None]
        for block in self.blocks:
            x = block(x, self.media(tiles))
        return self.read(x[:, 0])

    def media(self, tiles: Tensor) -> Tensor:
        return (tiles / self.divide_by)[:, None]

    @torch.no_grad()
    def maps(self, tiles: Tensor, questions: Tensor) -> Tensor:
        """Where each head of the last block looks, [B, heads, GRID, GRID]."""
        x, media = self.words(questions)[:, None], self.media(tiles)
        *others, final = self.blocks
        for block in others:
            x = block(x, media)
        attn = final.attn
        q = attn.to_q(attn.norm(x)).unflatten(-1, (-1, attn.dim_head)).transpose(1, 2)
        k, grid = final.cache_media(media).k, (GRID, GRID)
        return attention_map(q, k, rows=[0], grid=grid, average_heads=False)[:, :, 0]


# Training


class Run(NamedTuple):
    """A trained model, the history and warnings of its monitor, and its held-out accuracy."""

    model: Counter
    history: dict[str, list[tuple[int, float]]]
    warnings: list
    accuracy: float


def train(
    model: Counter,
    data: Mosaics,
    held_out: Mosaics,
    steps: range,
    seed: int,
    entropy_weight: float = 0.0,
    target: float = 2.0,
) -> Run:
    """Trains the model in place; an entropy_weight draws the entropy of each layer to `target`."""
    generator = torch.Generator().manual_seed(seed + steps.start)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    warnings, history = [], {}
    silent = logging.Logger("silent", logging.CRITICAL)  # the warnings are counted below
    monitor = StabilityMonitor(model, every=EVERY, logger=silent)
    with monitor:
        for _ in steps:
            rows = torch.randint(len(data.counts), (64,), generator=generator)
            tiles, questions, counts = data.some(rows)
            with attention_statistics(model) as statistics:
                loss = F.cross_entropy(model(tiles, questions), counts)
            total = loss
            if entropy_weight:
                total = loss + entropy_weight * sum(
                    entropy_loss(s, target) for s in statistics.values()
                )
            optimizer.zero_grad()
            total.backward()
            report = monitor.step(loss)
            warnings += report.warnings if report else []
            optimizer.step()
    for name, points in monitor.history.items():
        history[name] = [(steps.start + step, value) for step, value in points]
    return Run(model, history, warnings, accuracy(model, held_out))


@torch.no_grad()
def accuracy(model: Counter, data: Mosaics) -> float:
    """The share of mosaics that are counted right."""
    return (model(data.tiles, data.questions).argmax(-1) == data.counts).float().mean().item()


def last(run: Run, statistic: str) -> list[float]:
    """The last value of the statistic in each layer."""
    return [points[-1][1] for name, points in run.history.items() if name.endswith(statistic)]


# Output


def report(runs: dict[str, Run]) -> None:
    """Prints a table with a row for each run."""
    names = "entropy of the blocks", "largest probability", "warnings", "counted right"
    print(f"{'':10} {names[0]:>22} {names[1]:>20} {names[2]:>9} {names[3]:>14}")
    for name, run in runs.items():
        entropy, peak = (
            ", ".join(f"{value:.2f}" for value in last(run, statistic))
            for statistic in ("/entropy", "/max_probability")
        )
        print(f"{name:10} {entropy:>22} {peak:>20} {len(run.warnings):9} {run.accuracy:>14.1%}")
    print(f"16 tiles looked at alike have an entropy of 2.77; chance is {1 / (MOST + 1):.0%}")


def first_warnings(run: Run) -> None:
    """Prints the first warning of each kind."""
    seen = set()
    for warning in run.warnings:
        if (warning.layer, warning.statistic) not in seen:
            seen.add((warning.layer, warning.statistic))
            print(f"  step {warning.step:4d}  {warning.message}")


def plot(runs: dict[str, Run], held_out: Mosaics, folder: Path) -> list[Path]:
    """Writes the history of entropies and gates, and the maps of heads in a mosaic of count 4."""
    files = [folder / "attention_collapse.png", folder / "attention_collapse_maps.png"]
    folder.mkdir(parents=True, exist_ok=True)
    histories = {name: run.history for name, run in runs.items()}
    thresholds = StabilityMonitor(nn.Module()).thresholds
    viz.history(histories, ("entropy", "gates"), thresholds=thresholds).savefig(files[0])
    chosen = (held_out.counts == MOST).nonzero()[0]
    tiles, questions, _ = held_out.some(chosen)
    # [TILES, PIXELS] -> [height, width], dark on light, with a border around each digit
    digits = F.pad(1 - tiles.view(GRID, GRID, 8, 8) / 16, (1, 1, 1, 1), value=1.0)
    image = digits.transpose(1, 2).flatten(2).flatten(0, 1)
    shown = {name: runs[name].model.maps(tiles, questions)[0] for name in ("unchanged", "repaired")}
    words = [f"{name}, head {n + 1}" for name, maps in shown.items() for n in range(len(maps))]
    figure = viz.attention_overlay(image, torch.cat([*shown.values()]), words, columns=3)
    figure.axes[0].set_title(f"How many {WORDS[questions.item()]}?")
    figure.savefig(files[1])
    return files


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder of the pictures")
    parser.add_argument(
        "--steps", type=int, default=500, help="until the repair; twice as many after"
    )
    parser.add_argument("--entropy-weight", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    chosen, started = options(arguments), time.perf_counter()
    seed, n = chosen.seed, chosen.steps
    generator = torch.Generator().manual_seed(seed)
    data = draw_mosaics(4096, False, generator), draw_mosaics(2048, True, generator)
    torch.manual_seed(seed)
    model = Counter()
    runs = {"collapsed": train(copy.deepcopy(model), *data, range(n), seed)}
    print(f"pixels from 0 to 16, {n} steps; the monitor's first warning of each kind:")
    first_warnings(runs["collapsed"])
    for name, weight in (("unchanged", 0.0), ("repaired", chosen.entropy_weight)):
        again = copy.deepcopy(runs["collapsed"].model)
        runs[name] = train(again, *data, range(n, 3 * n), seed, entropy_weight=weight)
    model.divide_by = 16.0
    runs["normed"] = train(model, *data, range(3 * n), seed)
    report(runs)
    files = plot(runs, data[1], chosen.out)
    print(f"pictures: {', '.join(map(str, files))}; {time.perf_counter() - started:.0f} s")
    return runs


if __name__ == "__main__":
    main()
