"""Pictures of cross-attention: each function returns a matplotlib `Figure` and shows no window.

    attention_overlay    where each word looks, on the image itself
    attention_heatmap    a matrix of weights, queries by keys
    history              the records of a `StabilityMonitor` by step, with its thresholds
    mask_picture         the keys that each query may see, as intervals
    sparsity_error       error against the share of keys that a sparse attention keeps

This module needs matplotlib (`pip install 'xattn-kernels[viz]'`), so `import xattn_kernels` does
not import it. It needs neither a display nor pyplot: `figure.savefig("map.png")` writes a picture,
and a notebook shows a figure that a cell returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .core.arguments import check_positive, check_sizes, kind
from .masks import KeyInterval
from .stability import StabilityMonitor, Thresholds
from .stability.report import place_of

try:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
except ImportError as error:
    message = f"{error}; xattn_kernels.viz needs: pip install 'xattn-kernels[viz]'"
    raise ImportError(message) from error

__all__ = ["attention_heatmap", "attention_overlay", "history", "mask_picture", "sparsity_error"]

HEAT = "inferno"
STYLES = ("-", "--", ":", "-.")
MOST_LABELS = 40  # the most names along one side of a picture; of more, only some are written
GREY = (0.299, 0.587, 0.114)  # the luma of red, green and blue, ITU-R BT.601

History = Mapping[str, Iterable[tuple[int, float]]]


def attention_overlay(
    image,
    maps,
    words: Sequence[str],
    *,
    columns: int = 4,
    shared_scale: bool = False,
    width: float = 2.6,
) -> Figure:
    """A figure of the image and, for each word, the grey image under the map of that word.

    Args:
        image: tensor, array or PIL image [H, W], [H, W, 3] or [3, H, W]; bytes, or numbers from 0
            to 1.
        maps: tensor or array [R, h, w] of weights, such as one batch element of `attention_map`.
        words: R titles, one for the query of each map.
        columns: the number of pictures side by side.
        shared_scale: whether all maps share one colour scale, which shows the word with the most
            attention. False scales each map alone, which shows its places. Each title has the
            largest weight.
        width: the width of each picture in inches.

    Raises:
        TypeError, ValueError: an argument is not among those named here.
    """
    pixels, maps = check_image(image), check_array("maps", maps, "[R, h, w]")
    check_names("words", words, len(maps), "maps")
    check_sizes(columns=columns)
    columns = min(columns, len(maps) + 1)
    rows = math.ceil((len(maps) + 1) / columns)
    check_positive("width", width)
    h, w = pixels.shape[:2]
    size = width * columns, rows * (width * min(h / w, 2) + 0.6)
    figure, panels = new_figure(rows, columns, size)
    over_image = dict(extent=(0, w, h, 0))
    panels[0].imshow(pixels, cmap="gray", vmin=0, vmax=1, **over_image)
    panels[0].set_title("image")
    grey = pixels @ np.array(GREY) if pixels.ndim == 3 else pixels
    largest = max(maps.max(initial=0.0), np.finfo(float).tiny)
    for axes, word, weights in zip(panels[1:], words, maps, strict=False):
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, **over_image)
        top = largest if shared_scale else max(weights.max(initial=0.0), np.finfo(float).tiny)
        # a patch without weight shows the image; the patches are not smoothed
        heat = axes.imshow(
            weights, cmap=HEAT, vmin=0, vmax=top, interpolation="nearest", **over_image,
            alpha=0.15 + 0.65 * np.clip(weights / top, 0, 1),
        )  # fmt: skip
        axes.set_title(f"{word}\nmax {weights.max(initial=0.0):.2g}")
    for axes in panels:
        axes.set_axis_off()
    if shared_scale:
        figure.colorbar(heat, ax=panels, label="attention", shrink=0.8)
    return figure


def attention_heatmap(
    weights, *, queries: Sequence[str] | None = None, keys: Sequence[str] | None = None
) -> Figure:
    """A figure of the weights [Nq, Nk] as colours, with a row for each query.

    Args:
        weights: tensor or array, such as one batch element of `attention_weights`.
        queries, keys: Nq and Nk names along the sides; None writes their indices.

    Raises:
        TypeError, ValueError: an argument is not among those named here.
    """
    weights = check_array("weights", weights, "[Nq, Nk]")
    Nq, Nk = weights.shape
    check_names("queries", queries, Nq, "rows of weights")
    check_names("keys", keys, Nk, "columns of weights")
    figure, (axes,) = new_figure(1, 1, (min(4 + 0.12 * Nk, 12), min(2 + 0.25 * Nq, 10)))
    heat = axes.imshow(weights, cmap=HEAT, aspect="auto", vmin=0, interpolation="nearest")
    axes.set(xlabel="key", ylabel="query")
    write_names(axes.set_xticks, keys, rotation=90)
    write_names(axes.set_yticks, queries)
    figure.colorbar(heat, ax=axes, label="attention")
    return figure


def history(
    seen: StabilityMonitor | History | Mapping[str, StabilityMonitor | History],
    statistics: str | Sequence[str] = ("entropy", "gates"),
    *,
    thresholds: Thresholds | None = None,
) -> Figure:
    """A figure of the records of a monitor: a panel per statistic, a line per layer or gate.

    Args:
        seen: a monitor; the `history` of one, {name: (step, value) pairs}; or a mapping from names
            to several of either, whose lines are drawn together.
        statistics: statistics of layers (`entropy`, `max_probability`, `max_score`, `scale_ratio`,
            `query_norm`, ...), `gates`, `grad_norm`, or any complete name in the history.
        thresholds: limits, drawn as lines in the panels of their statistics. None takes those of
            the first monitor in `seen`; a mapping of histories has none.

    Raises:
        TypeError, ValueError: an argument is not among those named here, or `seen` has no values of
            a statistic.
    """
    lines, monitor_thresholds = lines_of_runs(seen)
    thresholds = thresholds or monitor_thresholds
    if not isinstance(thresholds, Thresholds | None):
        raise TypeError(f"thresholds must be Thresholds or None, got {kind(thresholds)}")
    statistics = [statistics] if isinstance(statistics, str) else list(statistics)
    if not statistics:
        raise ValueError("statistics must name one at least, got none")
    figure, panels = new_figure(1, len(statistics), (7 * len(statistics), 4))
    for axes, statistic in zip(panels, statistics, strict=True):
        chosen = {n: t for n, t in lines.items() if statistic in groups_of(n[1])}
        if not chosen:
            names = sorted({group for _, name in lines for group in groups_of(name)})
            allowed = f"among {names}" if names else "of something seen, which is nothing"
            raise ValueError(f"statistics must be {allowed}, got {statistic!r}")
        draw_runs(axes, statistic, chosen)
        for limit in limits_of(thresholds, statistic):
            axes.axhline(limit, color="black", ls="--", lw=1, label=f"threshold {limit:g}")
        axes.set(title=statistic, xlabel="step", yscale="log" if is_ratio(statistic) else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def mask_picture(
    mask: KeyInterval,
    Nk: int,
    *,
    batch: int = 0,
    queries: Sequence[str] | None = None,
    blocks: Sequence[str] = (),
) -> Figure:
    """A figure of the keys that each query of one batch element may see, with a bar per query.

    Args:
        mask: the intervals. A padding mask, which all queries share, is a single bar.
        Nk: the number of keys.
        batch: the index of the batch element.
        queries: names of the queries, such as the words; None writes their indices.
        blocks: names of equal blocks of keys, such as the images; lines separate the blocks.

    Raises:
        TypeError, ValueError: an argument is not among those named here.
    """
    if not isinstance(mask, KeyInterval):
        raise TypeError(f"mask must be a KeyInterval, got {kind(mask)}")
    check_sizes(Nk=Nk)
    shape = (1, 1, *mask.shape)[-2:]
    if type(batch) is not int or not 0 <= batch < max(shape[0], 1):
        raise ValueError(f"batch must be from 0 to {shape[0] - 1}, got {batch!r}")
    check_names("queries", queries, shape[1], "queries of the mask")
    bounds = (t[batch].clamp(0, Nk).cpu().numpy() for t in mask.expand(*shape))
    bars = [
        [(start, i - 0.4), (stop, i - 0.4), (stop, i + 0.4), (start, i + 0.4)]
        for i, (start, stop) in enumerate(zip(*bounds, strict=True))
        if start < stop
    ]
    figure, (axes,) = new_figure(1, 1, (7, min(1.5 + 0.22 * shape[1], 10)))
    axes.add_collection(PolyCollection(bars, facecolors="#2a6f97"))
    axes.set(xlim=(0, Nk), ylim=(max(shape[1], 1) - 0.5, -0.5), xlabel="key", ylabel="query")
    write_names(axes.set_yticks, queries)
    for n, name in enumerate(blocks):
        width = Nk / len(blocks)
        axes.axvline(n * width, color="black", lw=0.6)
        axes.text((n + 0.5) * width, 1.01, name, ha="center", transform=axes.get_xaxis_transform())
    share = KeyInterval(*(t[batch] for t in mask.expand(*shape))).visible_fraction(Nk).item()
    axes.set_title(f"{share:.1%} of all pairs attended", pad=18 if blocks else 6)
    return figure


def sparsity_error(
    curves: Mapping[str, Sequence[tuple[float, float]]], *, ylabel: str = "relative error"
) -> Figure:
    """A figure of error against the share of kept keys, on logarithmic axes, a line per method.

    Args:
        curves: {method: (share of keys from 0 to 1, error) pairs}. An error of 0 has no place on
            the axis and is not drawn.
        ylabel: the name of the error.

    Raises:
        TypeError, ValueError: an argument is not among those named here.
    """
    if not isinstance(curves, Mapping):
        raise TypeError(f"curves must map methods to pairs, got {kind(curves)}")
    figure, (axes,) = new_figure(1, 1, (6, 4))
    for method, pairs in curves.items():
        points = check_points(f"curves[{method!r}]", pairs)
        if ((points[:, 0] <= 0) | (points[:, 0] > 1)).any():
            raise ValueError(f"curves[{method!r}] must have shares over 0 and at most 1")
        if (points[:, 1] < 0).any():
            raise ValueError(f"curves[{method!r}] must have errors of at least 0")
        points = points[points[:, 1] > 0]
        axes.plot(*points[points[:, 0].argsort()].T, "o-", label=method)
    axes.set(xscale="log", yscale="log", xlabel="share of keys kept", ylabel=ylabel)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    return figure


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A new figure, which pyplot does not keep, and its panels row by row."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def write_names(set_ticks, names: Sequence[str] | None, **style) -> None:
    """Writes each name at its place, or every n-th name if there are too many to read."""
    if names is not None:
        places = range(0, len(names), math.ceil(max(len(names), 1) / MOST_LABELS))
        set_ticks(places, [names[i] for i in places], **style)


def lines_of_runs(seen) -> tuple[dict[tuple[str, str], np.ndarray], Thresholds | None]:
    """The lines {(run, name): [n, 2] steps and values}, and the thresholds of the first monitor."""
    if not isinstance(seen, StabilityMonitor | Mapping):
        raise TypeError(f"seen must be a StabilityMonitor or a mapping, got {kind(seen)}")
    several = isinstance(seen, Mapping) and any(
        isinstance(run, StabilityMonitor | Mapping) for run in seen.values()
    )
    runs = seen if several else {"": seen}
    lines, thresholds = {}, None
    for run, records in runs.items():
        if isinstance(records, StabilityMonitor):
            thresholds, records = thresholds or records.thresholds, records.history
        if not isinstance(records, Mapping):
            raise TypeError(f"seen[{run!r}] must be a monitor or a history, got {kind(records)}")
        for name, pairs in records.items():
            lines[run, name] = check_points(f"seen[{name!r}]", pairs)
    return lines, thresholds


def groups_of(name: str) -> set[str]:
    """The statistics by which `history` selects a name of the monitor."""
    family = name.partition("/")[0]
    group = place_of(name)[1] if family in ("attention", "features") else family
    return {name, group}


def draw_runs(axes: Axes, statistic: str, lines: Mapping[tuple[str, str], np.ndarray]) -> None:
    """Draws each run in a colour and each of its lines in a style; one run alone in colours."""
    runs = list(dict.fromkeys(run for run, _ in lines))
    names = list(dict.fromkeys(name for _, name in lines))
    for (run, name), points in lines.items():
        n = names.index(name)
        colour, style = (runs.index(run), STYLES[n % len(STYLES)]) if len(runs) > 1 else (n, "-")
        marker = "o" if len(points) < 30 else ""
        axes.plot(
            *points.T, color=f"C{colour}", ls=style, marker=marker, ms=3, lw=1.2,
            label=": ".join(part for part in (run, short(name, statistic)) if part),
        )  # fmt: skip


def is_ratio(statistic: str) -> bool:
    """Whether the statistic grows by factors: a logarithmic axis keeps its lines apart."""
    return statistic in ("scale_ratio", "query_norm", "key_norm") or "grad_norm" in statistic


def short(name: str, statistic: str) -> str:
    """The part of a name that is not in the title of its panel."""
    layer = place_of(name)[0]
    return layer or name.removeprefix(f"{statistic}/")


def limits_of(thresholds: Thresholds | None, statistic: str) -> tuple[float, ...]:
    """The limits of a statistic: none, one, or the two ends of a range."""
    fields = {"grad_norm": "gradient_norm", "grad_norm/total": "gradient_norm"}
    limit = getattr(thresholds, fields.get(statistic, statistic), None)
    return tuple(limit) if isinstance(limit, tuple | list) else () if limit is None else (limit,)


def check_array(name: str, weights, shape: str) -> np.ndarray:
    """The weights as a float64 array; raises unless they have the rank of `shape` and are valid."""
    weights = as_array(name, weights)
    if weights.ndim != shape.count(",") + 1 or not weights.size:
        raise ValueError(f"{name} must be {shape} with none of them 0, got {list(weights.shape)}")
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"{name} must be finite and at least 0")
    return weights


def check_image(image) -> np.ndarray:
    """The image as an array [H, W] or [H, W, 3] from 0 to 1; raises for any other."""
    image = image if isinstance(image, Tensor) else np.asarray(image)
    is_bytes = str(image.dtype).endswith("uint8")
    pixels = as_array("image", image)
    if pixels.ndim == 3 and pixels.shape[0] == 3 != pixels.shape[2]:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or pixels.ndim == 3 and pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"image must be [H, W], [H, W, 3] or [3, H, W], got {list(pixels.shape)}")
    pixels = pixels / 255 if is_bytes else pixels
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(
            f"image must be bytes or from 0 to 1, got {pixels.min():.3g} to {pixels.max():.3g}"
        )
    return pixels


def check_points(name: str, pairs) -> np.ndarray:
    """The points as an array [n, 2]; raises unless there are pairs, and nothing but pairs."""
    pairs = [tuple(pair) for pair in pairs]
    if {len(pair) for pair in pairs} != {2}:
        raise ValueError(f"{name} must be (x, y) pairs, at least one")
    return np.array(pairs, dtype=float)


def check_names(name: str, names, count: int, named: str) -> None:
    """Raises unless `names` is None or a sequence of `count` strings, one for each of `named`."""
    if names is None:
        return
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{name} must be a sequence of strings, got {kind(names)}")
    if len(names) != count:
        raise ValueError(f"{name} must be as many as the {named}, {count}, got {len(names)}")


def as_array(name: str, numbers) -> np.ndarray:
    """The numbers of a tensor or an array as float64 on the CPU; raises TypeError for others."""
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().to("cpu", torch.float64).numpy()
    try:
        return np.asarray(numbers, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a tensor or an array of numbers: {error}") from error
