"""The pictures of a run: bars per rival with the roofline beside them, and the scaling curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.plots import ACCENT, INK, MUTED, RIGHT, SECOND, WRONG, style
from .ceilings import Ceilings
from .growth import Growth
from .operations import Count
from .report import Report, Result, milliseconds
from .rivals import OURS, RIVALS

_SHADES = (ACCENT, MUTED, "#b0b6c2", "#8e6bbf", "#c79bd8", SECOND, WRONG, RIGHT, "#d9dce3")
COLORS = dict(zip(RIVALS, _SHADES, strict=True))
_ABSENT = {"missing": "not installed"}


ROOFLINE_INCHES = 5.0
SMALL = 9  # points


def draw(report: Report, path: str | Path) -> None:
    """Write the picture; the suffix names the format."""
    shown = [result for result in report.results if result.ours]
    height = max(ROOFLINE_INCHES + 2, 0.19 * sum(len(_bars(result)) + 1.7 for result in shown) + 1.6)
    figure = Figure(figsize=(15, height), dpi=130, facecolor="white", layout="constrained")
    columns = figure.add_gridspec(1, 2, width_ratios=(1.55, 1))
    _draw_bars(figure.add_subplot(columns[0]), shown)
    right = columns[1].subgridspec(2, 1, height_ratios=(ROOFLINE_INCHES, height - ROOFLINE_INCHES))
    roofline, keys = figure.add_subplot(right[0]), figure.add_subplot(right[1])
    _draw_roofline(roofline, report.ceilings, shown)
    _draw_keys(keys, shown)
    machine = report.machine
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    figure.suptitle(
        f"metaaug_fast bench: {machine['processor']}, {threads}, torch {machine['torch']}",
        x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path)


def draw_scaling(growths: Sequence[Growth], path: str | Path) -> None:
    """A panel for each, both axes logarithmic."""
    figure = Figure(figsize=(5.2 * len(growths), 4.2), dpi=130, facecolor="white", layout="constrained")
    for axes, growth in zip(figure.subplots(1, len(growths), squeeze=False)[0], growths, strict=True):
        for curve in growth.curves:
            points = [(x, 1e3 * row.median) for x, row in zip(growth.xs, curve.rows, strict=True) if row.median]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=COLORS[curve.rival], lw=1.8, ms=4, label=curve.title)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(growth.xs, [str(x) for x in growth.xs])
        axes.minorticks_off()
        axes.set_title(growth.title, loc="left", fontsize=11, color=INK)
        style(axes, growth.title.split()[0], "ms a meta-gradient", size=SMALL)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path)


class _Bar(NamedTuple):
    """times: relative to ours, None for no bar. text: beside it."""

    rival: str
    title: str
    times: float | None
    text: str
    wrong: bool


def _bars(result: Result) -> list[_Bar]:
    found = []
    for row in result.rows:
        times = result.times_ours(row)
        if times is not None:
            text = f"{milliseconds(row.median)} ms"
            if row.rival != OURS:
                text = f"{times:.1f}x  {text}"
            if row.status != "exact":
                text = f"{text}  {row.status}"
            found.append(_Bar(row.rival, row.title, times, text, row.status == "wrong"))
        elif row.status != "unsupported":
            found.append(_Bar(row.rival, row.title, None, _ABSENT.get(row.status, row.status), False))
    return found


def _draw_bars(axes: Axes, results: Sequence[Result]) -> None:
    bars = [_bars(result) for result in results]
    times = [bar.times for each in bars for bar in each if bar.times] or [1.0]
    start = min(0.5, *times) / 1.2
    at = 0.0
    ticks, labels = [], []
    for result, each in zip(results, bars, strict=True):
        axes.text(0.0, at - 0.25, result.workload.name, transform=axes.get_yaxis_transform(), fontsize=9, color=INK,
                  fontweight="bold", va="bottom")  # fmt: skip
        at += 0.5
        for bar in each:
            if bar.times:
                axes.barh(at, bar.times, 0.78, color="white" if bar.wrong else COLORS[bar.rival],
                          edgecolor=COLORS[bar.rival], hatch="////" if bar.wrong else None)  # fmt: skip
            color = WRONG if bar.wrong or not bar.times else INK
            axes.text((bar.times or start) * 1.06, at, bar.text, va="center", fontsize=7.5, color=color)
            ticks.append(at)
            labels.append(bar.title)
            at += 1
        at += 1.2
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(start, 6 * max(times))
    axes.axvline(1, color=ACCENT, lw=0.8, zorder=0)
    axes.set_yticks(ticks, labels)
    axes.set_ylim(at - 0.8, -1.2)
    style(axes, "time relative to metaaug_fast (shorter is faster)", "", size=SMALL)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=7.5)


def _draw_roofline(axes: Axes, ceilings: Ceilings, results: Sequence[Result]) -> None:
    intensities = [count.flops / count.bytes for _, count in _counted(results)]
    low, high = min([0.5, *intensities]) / 2, max([64.0, *intensities]) * 3
    for top, name in ((ceilings.convolution, "3x3 convolution"), (ceilings.gemm, "sgemm")):
        corner = top / ceilings.copy
        axes.plot([low, min(corner, high), high], [low * ceilings.copy, min(top, high * ceilings.copy), top], color=INK,
                  lw=1.2, ls="-" if "conv" in name else "--")  # fmt: skip
        axes.text(high, top * 1.06, f"{name} {top:.0f} GFLOP/s", ha="right", fontsize=8, color=INK)
    axes.text(low * 1.4, low * ceilings.copy, f"copy {ceilings.copy:.0f} GB/s", fontsize=8, color=INK)
    for number, (result, count) in enumerate(_counted(results), 1):
        intensity = count.flops / count.bytes
        for row in result.rows:
            rate = result.gflops(row)
            if rate is None or row.status == "wrong":
                continue
            ours = row.rival == OURS
            axes.plot(intensity, rate, "o", color=COLORS[row.rival], ms=8 if ours else 4, zorder=3 if ours else 2,
                      markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
            if ours:
                axes.annotate(str(number), (intensity, rate), (5, 4), textcoords="offset points", fontsize=8, color=INK)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(low, high)
    style(axes, "FLOP per byte, every product's operands read and written once", "GFLOP/s", size=SMALL)


def _draw_keys(axes: Axes, results: Sequence[Result]) -> None:
    """What the numbers and colors of the roofline mean."""
    axes.set_axis_off()
    seen = {row.rival: row.title for result in results for row in result.rows if row.timed and row.status != "wrong"}
    for rival, title in seen.items():
        axes.plot([], [], "o", color=COLORS[rival], label=title)
    if seen:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
    names = "\n".join(f"{number}  {result.workload.name}" for number, (result, _) in enumerate(_counted(results), 1))
    axes.text(0, 1, names, transform=axes.transAxes, va="top", fontsize=8, color=INK)


def _counted(results: Sequence[Result]) -> list[tuple[Result, Count]]:
    return [(result, result.count) for result in results if result.count]
