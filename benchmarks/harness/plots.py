"""One picture per metric, with a column per mode and every provider of each workload."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .rows import Row, number


class Metric(NamedTuple):
    field: str
    name: str
    label: str
    log: bool


METRICS = (
    Metric("ms", "time", "milliseconds (median, quartiles), less is better", True),
    Metric("peak_mib", "memory", "peak extra memory in MiB, less is better", True),
    Metric("percent_of_product", "flops", "attended FLOP/s, % of a large matrix product", False),
    Metric("percent_of_copy", "bandwidth", "least bytes per second, % of a large copy", False),
)
COLOURS = {
    "xattn-triton": "#0b6e4f",
    "xattn-cuda": "#d00000",
    "xattn-torch": "#2a9d8f",
    "xattn-eager": "#a7d7c5",
    "sdpa-flash": "#5c677d",
    "sdpa-efficient": "#7d8597",
    "sdpa-cudnn": "#979dac",
    "sdpa-math": "#c0c4cf",
    "torch-varlen": "#8a5a44",
    "flash-attn": "#b08968",
    "xformers": "#ddb892",
    "flex": "#b56576",
    "eager": "#ced4da",
    "compiled": "#b56576",
    "eager-topk": "#8a5a44",
    "sdpa-mask": "#7d8597",
    "dense": "#e9c46a",
    "addmm": "#8a5a44",
    "liger": "#ddb892",
    "xattn-mha": "#52b788",
    "torch-mha": "#e5989b",
}


def draw(rows: list[Row], folder: Path, name: str) -> list[Path]:
    """Writes `name`-<metric>.png for each metric that has numbers; returns the paths."""
    rows = [r for r in rows if r.status == "ok"]
    paths = []
    for metric in METRICS:
        shown = [r for r in rows if getattr(r, metric.field) is not None]
        if shown:
            paths.append(folder / f"{name}-{metric.name}.png")
            picture(shown, metric, paths[-1])
    return paths


def picture(rows: list[Row], metric: Metric, path: Path) -> None:
    """Writes the picture of one metric."""
    modes = list(dict.fromkeys(r.mode for r in rows))
    heights = [sum(r.mode == mode for r in rows) for mode in modes]
    size = (6.5 * len(modes), 1.6 + 0.24 * max(heights))
    figure, axes = plt.subplots(1, len(modes), figsize=size, squeeze=False, layout="constrained")
    for axis, mode in zip(axes[0], modes, strict=True):
        panel(axis, [r for r in rows if r.mode == mode], metric)
        axis.set_title(mode)
    first = rows[0]
    figure.suptitle(
        f"{metric.label}\n{first.device}, {first.dtype}, torch {first.torch}, "
        f"triton {first.triton}, commit {first.commit}, {first.date}",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panel(axis, rows: list[Row], metric: Metric) -> None:
    """Draws the rows downwards, a group per workload under its name, the best row first."""
    place, ticks = 0.0, []
    heading = {"transform": axis.get_yaxis_transform(), "va": "center", "weight": "bold"}
    for workload in dict.fromkeys(r.workload for r in rows):
        group = [r for r in rows if r.workload == workload]
        axis.text(0.0, place, f" {workload}", **heading)
        for row in sorted(group, key=lambda r: getattr(r, metric.field), reverse=not metric.log):
            place += 1
            mark(axis, place, row, metric)
            ticks.append((place, row.provider))
        place += 1.5
    axis.set_yticks(*zip(*ticks, strict=True), fontsize=8)
    axis.set_ylim(place - 0.8, -0.8)
    if metric.log:
        axis.set_xscale("log")
        steps = (1, 2, 5) if decades(rows, metric) < 3 else (1,)
        axis.xaxis.set_major_locator(LogLocator(subs=steps))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_xlim(left=0)
    axis.margins(x=0.15)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def mark(axis, place: float, row: Row, metric: Metric) -> None:
    """Draws a value as a bar, or on a logarithmic axis, where length has no meaning, as a dot."""
    value = end = max(getattr(row, metric.field), 1e-3)
    colour = COLOURS.get(row.provider, "black")
    if not metric.log:
        axis.barh(place, value, color=colour)
    else:
        axis.plot(value, place, "o", color=colour, markersize=7)
    if metric.field == "ms":
        end = row.ms_75
        axis.hlines(place, row.ms_25, row.ms_75, color=colour, linewidth=2)
    look = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
    axis.annotate(number(value), (end, place), **look)


def decades(rows: list[Row], metric: Metric) -> float:
    """How many powers of ten the values span."""
    values = [max(getattr(r, metric.field), 1e-3) for r in rows]
    return math.log10(max(values) / min(values))
