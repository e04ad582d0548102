"""Records of measurements, as CSV, JSON and tables; the order of fields is that of columns."""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from statistics import median

WIDTH = 79


@dataclass(frozen=True)
class Row:
    """The measurement of one provider on one workload in one mode.

    status is "ok", or for a row without numbers "unsupported", "wrong", "error" or "skipped", with
    a reason. flops (None where arithmetic does not take the time) and min_bytes count attended
    pairs only. Percentages are of the ceilings measured in the same run (a large matrix product, a
    large copy). peak_mib is extra memory. error_share is the largest error as a share of the
    allowed one (twice that of eager code, plus a floor).
    """

    workload: str
    provider: str
    mode: str
    dtype: str
    status: str
    reason: str = ""
    ms: float | None = None
    ms_25: float | None = None
    ms_75: float | None = None
    repeats: int | None = None
    peak_mib: float | None = None
    tflops: float | None = None
    percent_of_product: float | None = None
    gbytes_per_s: float | None = None
    percent_of_copy: float | None = None
    error_share: float | None = None
    flops: int | None = None
    min_bytes: int | None = None
    visible_fraction: float | None = None
    product_tflops: float | None = None
    copy_gbytes_per_s: float | None = None
    mask: str = ""
    regime: str = ""
    original: str = ""
    actual: str = ""
    input: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


COLUMNS = [field.name for field in fields(Row)]


def save(rows: list[Row], folder: Path, name: str) -> list[Path]:
    """Writes `name`.json and `name`.csv and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.csv"]
    paths[0].write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return paths


def load(path: Path) -> list[Row]:
    """The rows of a .json or .csv file that `save` wrote."""
    if path.suffix == ".json":
        return [Row(**row) for row in json.loads(path.read_text())]
    with path.open(newline="") as file:
        return [Row(**{k: _parse(k, v) for k, v in row.items()}) for row in csv.DictReader(file)]


def _parse(column: str, text: str) -> str | float | int | None:
    annotation = Row.__dataclass_fields__[column].type
    if annotation == "str":
        return text
    return None if text == "" else (float(text) if annotation.startswith("float") else int(text))


def table(rows: Iterable[Row]) -> str:
    """One block of text per workload and mode: every provider that ran, the fastest first."""
    blocks = []
    for (workload, mode), group in groupby(rows, key=lambda r: (r.workload, r.mode)):
        group = list(group)
        ran = sorted((r for r in group if r.status == "ok"), key=lambda r: r.ms)
        share = group[0].visible_fraction
        visible = "" if share is None or share == 1 else f", {share:.1%} of the pairs attended"
        lines = textwrap.wrap(f"{workload}, {mode} ({group[0].dtype}{visible})", WIDTH)
        lines += [_HEAD] * bool(ran) + [_line(r) for r in ran]
        lines += without_times(r for r in group if r.status != "unsupported")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def without_times(rows: Iterable[Row]) -> list[str]:
    """Lines on why providers have no time, with the providers of one reason together."""
    reasons = {}
    for r in rows:
        if r.status != "ok":
            reasons.setdefault(f"{r.status}: {r.reason}", {})[r.provider] = None
    texts = [f"{', '.join(names)} {reason}" for reason, names in reasons.items()]
    look = {"width": WIDTH, "initial_indent": "  ", "subsequent_indent": "    ", "max_lines": 3}
    return [line for text in texts for line in textwrap.wrap(text, **look)]


def summary(rows: list[Row]) -> str:
    """A line per workload: the ms of our fastest provider, and the ratio of the fastest other."""
    modes = list(dict.fromkeys(r.mode for r in rows))
    head = "".join(f" {mode:>8} {'ratio':>6} {'against':<14}" for mode in modes)
    lines = ["our fastest in ms, and how many times as long the fastest other takes"]
    lines.append(f"{'':<22}{head}".rstrip())
    ratios = {mode: [] for mode in modes}
    for workload, group in groupby(rows, key=lambda r: r.workload):
        line, by_mode = f"{short(workload):<22}", {mode: [] for mode in modes}
        for row in group:
            by_mode[row.mode].append(row)
        for mode, same in by_mode.items():
            ours, theirs = best(same)
            ratio = theirs.ms / ours.ms if ours and theirs else None
            ratios[mode] += [] if ratio is None else [ratio]
            rival = theirs.provider if ratio else ""
            line += f" {number(ours and ours.ms):>8} {number(ratio):>6} {rival:<14}"
        lines.append(line.rstrip())
    middles = [number(median(ratios[mode]) if ratios[mode] else None) for mode in modes]
    return "\n".join([*lines, f"{'median':<22}" + "".join(f"{m:>16}{'':<15}" for m in middles)])


def short(workload: str) -> str:
    """The name in 22 characters, with "~" in place of scaled sizes that do not fit."""
    return workload if len(workload) <= 22 else "~" + workload.split("[")[0][:21]


YARDSTICKS = ("dense",)  # providers of another result, which are no rivals


def best(rows: list[Row]) -> tuple[Row | None, Row | None]:
    """(the fastest of our backends, the fastest of all others), None where none ran."""
    ran = sorted((r for r in rows if r.status == "ok"), key=lambda r: r.ms)
    ours = next((r for r in ran if r.provider.startswith("xattn-")), None)
    others = (r for r in ran if not r.provider.startswith("xattn-"))
    return ours, next((r for r in others if r.provider not in YARDSTICKS), None)


_HEAD = (
    f"  {'provider':<14}{'ms':>8} {'quartiles':>15} {'MiB':>7} {'GFLOP/s':>8} {'% peak':>6} "
    f"{'GB/s':>6} {'% copy':>6}"
)


def _line(r: Row) -> str:
    quartiles = f"{number(r.ms_25)} - {number(r.ms_75)}"
    return (
        f"  {r.provider:<14}{number(r.ms):>8} {quartiles:>15} {number(r.peak_mib):>7} "
        f"{number(r.tflops and 1e3 * r.tflops):>8} {number(r.percent_of_product):>6} "
        f"{number(r.gbytes_per_s):>6} {number(r.percent_of_copy):>6}"
    )


def number(x: float | None) -> str:
    """Three significant digits without an exponent; "-" for None."""
    if x is None:
        return "-"
    digits = next(d for d, least in enumerate((100, 10, 0.1, 0)) if x >= least)
    return f"{x:.{digits}f}"
