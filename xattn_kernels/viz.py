"""Pictures of cross-attention: each function returns a matplotlib `Figure`, which nothing shows.

    attention_overlay    where each word looks, on the image itself
    attention_heatmap    a matrix of weights, queries by keys
    history              what a `StabilityMonitor` saw, step by step, with its thresholds
    mask_picture         the keys that each query may see, as intervals
    sparsity_error       error against the share of keys that a sparse attention keeps

`import xattn_kernels` does not import this module, which needs matplotlib (`pip install
'xattn-kernels[viz]'`), but no display and none of pyplot's state: `figure.savefig("map.png")`
writes a picture, and a notebook shows what a cell returns.
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
MOST_LABELS = 40  # along one side of a picture; of more only some are written
GREY = (0.299, 0.587, 0.114)  # luma of red, green and blue, ITU-R BT.601

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
    """The image, and for each word its grey values under the word's map.

    Args:
        image: tensor, array or PIL image [H, W], [H, W, 3] or [3, H, W]; bytes, or numbers from 0
            to 1.
        maps: tensor or array [R, h, w] of weights, as one batch element of `attention_map`.
        words: R titles, of the queries that the maps belong to.
        columns: pictures side by side.
        shared_scale: one scale of colours for all maps, which shows who looks most, and not for
            each its own, which shows where. The largest weight is in every title.
        width: of each picture, in inches.

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
        # what gets no weight shows the image; patches are drawn as they are, not smoothed
        drawn = axes.imshow(
            weights, cmap=HEAT, vmin=0, vmax=top, interpolation="nearest", **over_image,
            alpha=0.15 + 0.65 * np.clip(weights / top, 0, 1),
        )  # fmt: skip
        axes.set_title(f"{word}\nmax {weights.max(initial=0.0):.2g}")
    for axes in panels:
        axes.set_axis_off()
    if shared_scale:
        figure.colorbar(drawn, ax=panels, label="attention", shrink=0.8)
    return figure


def attention_heatmap(
    weights, *, queries: Sequence[str] | None = None, keys: Sequence[str] | None = None
) -> Figure:
    """A matrix of weights [Nq, Nk] as colours, a row for each query.

    Args:
        weights: tensor or array, such as one batch element of `attention_weights`.
        queries, keys: Nq and Nk names along the sides; None: their indices.

    Raises:
        TypeError, ValueError: an argument is not among those named here.
    """
    weights = check_array("weights", weights, "[Nq, Nk]")
    Nq, Nk = weights.shape
    check_names("queries", queries, Nq, "rows of weights")
    check_names("keys", keys, Nk, "columns of weights")
    figure, (axes,) = new_figure(1, 1, (min(4 + 0.12 * Nk, 12), min(2 + 0.25 * Nq, 10)))
    drawn = axes.imshow(weights, cmap=HEAT, aspect="auto", vmin=0, interpolation="nearest")
    axes.set(xlabel="key", ylabel="query")
    write_names(axes.set_xticks, keys, rotation=90)
    write_names(axes.set_yticks, queries)
    figure.colorbar(drawn, ax=axes, label="attention")
    return figure


def history(
    seen: StabilityMonitor | History | Mapping[str, StabilityMonitor | History],
    statistics: str | Sequence[str] = ("entropy", "gates"),
    *,
    thresholds: Thresholds | None = None,
) -> Figure:
    """What a monitor saw: a panel for each statistic, a line for each layer or gate in it.

    Args:
        seen: a monitor; the `history` of one, {name: (step, value) pairs}; or several of either by
            name, whose lines are drawn together.
        statistics: of layers (`entropy`, `max_probability`, `max_score`, `scale_ratio`,
            `query_norm`, ...), `gates`, `grad_norm`, or any whole name of the history.
        thresholds: drawn as lines where the statistic has one. None: those of the monitor, and of
            a mapping none.

    Raises:
        TypeError, ValueError: an argument is not among those named here, or nothing was seen of
            a statistic.
    """
    lines, found = of_runs(seen)
    thresholds = thresholds or found
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
            of_what = f"among {names}" if names else "of something seen, which is nothing"
            raise ValueError(f"statistics must be {of_what}, got {statistic!r}")
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
    """The interval of keys that each query of one batch element may see, a bar for each query.

    Args:
        mask: the intervals. One of a padding mask, which all queries share, is a single bar.
        Nk: keys there are.
        batch: which element of the batch.
        queries: names of the queries, such as the words; None: their indices.
        blocks: names of equal blocks of keys, such as the images; lines are drawn between them.

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
    """Error against the share of keys kept, both on logarithmic axes, a line for each method.

    Args:
        curves: {method: (share of keys from 0 to 1, error) pairs}. An error of 0 has no place on
            the axis and is left out.
        ylabel: what the error is.

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
    """A figure of its own, without pyplot's list of open ones, and its panels row by row."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def write_names(set_ticks, names: Sequence[str] | None, **style) -> None:
    """At every place, or where there are too many to be read at every n-th."""
    if names is not None:
        places = range(0, len(names), math.ceil(max(len(names), 1) / MOST_LABELS))
        set_ticks(places, [names[i] for i in places], **style)


def of_runs(seen) -> tuple[dict[tuple[str, str], np.ndarray], Thresholds | None]:
    """{(run, name): [n, 2] of steps and values}, and the thresholds of the first monitor."""
    if not isinstance(seen, StabilityMonitor | Mapping):
        raise TypeError(f"seen must be a StabilityMonitor or a mapping, got {kind(seen)}")
    several = isinstance(seen, Mapping) and any(
        isinstance(run, StabilityMonitor | Mapping) for run in seen.values()
    )
    runs = seen if several else {"": seen}
    lines, thresholds = {}, None
    for run, of_run in runs.items():
        if isinstance(of_run, StabilityMonitor):
            thresholds, of_run = thresholds or of_run.thresholds, of_run.history
        if not isinstance(of_run, Mapping):
            raise TypeError(f"seen[{run!r}] must be a monitor or a history, got {kind(of_run)}")
        for name, pairs in of_run.items():
            lines[run, name] = check_points(f"seen[{name!r}]", pairs)
    return lines, thresholds


def groups_of(name: str) -> set[str]:
    """What `history` finds a name of the monitor by."""
    kind_of_name = name.partition("/")[0]
    own = {place_of(name)[1]} if kind_of_name in ("attention", "features") else {kind_of_name}
    return {name, *own}


def draw_runs(axes: Axes, statistic: str, lines: Mapping[tuple[str, str], np.ndarray]) -> None:
    """A colour for each run and a style for each of its lines; of one run, colours alone."""
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
    """Of what grows by factors, so that a threshold far off leaves the lines apart."""
    return statistic in ("scale_ratio", "query_norm", "key_norm") or "grad_norm" in statistic


def short(name: str, statistic: str) -> str:
    """What of a name is not in the panel's title already."""
    layer = place_of(name)[0]
    return layer or name.removeprefix(f"{statistic}/")


def limits_of(thresholds: Thresholds | None, statistic: str) -> tuple[float, ...]:
    of_history = {"grad_norm": "gradient_norm", "grad_norm/total": "gradient_norm"}
    limit = getattr(thresholds, of_history.get(statistic, statistic), None)
    return tuple(limit) if isinstance(limit, tuple | list) else () if limit is None else (limit,)


def check_array(name: str, given, shape: str) -> np.ndarray:
    """float64 on the CPU, of as many dimensions as `shape` names, weights in it."""
    found = as_array(name, given)
    if found.ndim != shape.count(",") + 1 or not found.size:
        raise ValueError(f"{name} must be {shape} with none of them 0, got {list(found.shape)}")
    if not np.isfinite(found).all() or (found < 0).any():
        raise ValueError(f"{name} must be finite and at least 0")
    return found


def check_image(image) -> np.ndarray:
    """[H, W] or [H, W, 3] in 0 to 1."""
    image = image if isinstance(image, Tensor) else np.asarray(image)
    is_bytes = str(image.dtype).endswith("uint8")
    found = as_array("image", image)
    if found.ndim == 3 and found.shape[0] == 3 != found.shape[2]:
        found = found.transpose(1, 2, 0)
    if found.ndim not in (2, 3) or found.ndim == 3 and found.shape[2] != 3 or not found.size:
        raise ValueError(f"image must be [H, W], [H, W, 3] or [3, H, W], got {list(found.shape)}")
    found = found / 255 if is_bytes else found
    if not (found.min() >= 0 and found.max() <= 1):
        raise ValueError(
            f"image must be bytes or from 0 to 1, got {found.min():.3g} to {found.max():.3g}"
        )
    return found


def check_points(name: str, pairs) -> np.ndarray:
    """[n, 2] of (x, y) pairs."""
    pairs = [tuple(pair) for pair in pairs]
    found = np.array(pairs, dtype=float) if {len(pair) for pair in pairs} == {2} else None
    if found is None:
        raise ValueError(f"{name} must be (x, y) pairs, at least one")
    return found


def check_names(name: str, names, count: int, of_what: str) -> None:
    if names is None:
        return
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"{name} must be a sequence of strings, got {kind(names)}")
    if len(names) != count:
        raise ValueError(f"{name} must be as many as the {of_what}, {count}, got {len(names)}")


def as_array(name: str, given) -> np.ndarray:
    if isinstance(given, Tensor):
        given = given.detach().to("cpu", torch.float64).numpy()
    try:
        return np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a tensor or an array of numbers: {error}") from error
