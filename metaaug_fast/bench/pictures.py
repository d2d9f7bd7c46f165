"""The pictures of a run: bars per rival with the roofline beside them, and the scaling curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..plots import ACCENT, GRID, INK, MUTED, RIGHT, SECOND, WRONG
from .report import Report, Result
from .rivals import OURS, RIVALS

_SHADES = (ACCENT, MUTED, "#b0b6c2", "#8e6bbf", "#c79bd8", SECOND, WRONG, RIGHT, "#d9dce3")
COLORS = dict(zip(RIVALS, _SHADES, strict=True))


def draw(report: Report, path: str | Path) -> None:
    """Write the picture; the suffix names the format."""
    shown = [result for result in report.results if result.ours]
    bars = sum(len(_bars(result)) for result in shown)
    height = max(4.5, 0.19 * bars + 0.32 * len(shown) + 1.6)
    figure = Figure(figsize=(15, height), dpi=130, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.55, 1))
    _draw_bars(left, shown)
    _draw_roofline(right, report, shown)
    machine = report.machine
    figure.suptitle(
        f"metaaug_fast bench: {machine.get('processor', '')}, {machine.get('threads', '')} threads, "
        f"torch {machine.get('torch', '')}",
        x=0.01, ha="left", fontsize=12, color=INK, fontweight="bold",
    )  # fmt: skip
    _write(figure, path)


def draw_scaling(
    curves: Mapping[str, Sequence[tuple[str, str, Sequence[float], Sequence[float]]]], path: str | Path
) -> None:
    """A panel for each title: curves `(rival, label, x, seconds)`, both axes logarithmic."""
    figure = Figure(figsize=(5.2 * len(curves), 4.2), dpi=130, facecolor="white", layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for rival, label, x, seconds in lines:
            axes.plot(x, [1e3 * each for each in seconds], "o-", color=COLORS[rival], lw=1.8, ms=4, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        _style(axes, title.split()[0], "ms a meta-gradient")
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    _write(figure, path)


def _bars(result: Result) -> list[tuple[str, str, float | None, str]]:
    """Rival, title, time relative to ours (None: no bar) and what is written beside it."""
    ours = result.ours
    found: list[tuple[str, str, float | None, str]] = []
    for row in result.rows:
        if row.median and ours and ours.median:
            times = row.median / ours.median
            text = f"{times:.1f}x  {_time(row.median)}" if row.rival != OURS else _time(row.median)
            found.append((row.rival, row.title, times, text if row.status == "exact" else f"{text}  {row.status}"))
        elif row.status in ("failed", "cut off", "missing"):
            found.append((row.rival, row.title, None, {"missing": "not installed"}.get(row.status, row.status)))
    return found


def _draw_bars(axes: Axes, results: Sequence[Result]) -> None:
    at = 0.0
    ticks, labels = [], []
    for result in results:
        axes.text(0.0, at - 0.25, result.workload.name, transform=axes.get_yaxis_transform(), fontsize=9, color=INK,
                  fontweight="bold", va="bottom")  # fmt: skip
        at += 0.5
        for rival, title, times, text in _bars(result):
            if times is not None:
                wrong = "wrong" in text
                axes.barh(at, times, 0.78, left=0.0, color="white" if wrong else COLORS[rival],
                          edgecolor=COLORS[rival], hatch="////" if wrong else None)  # fmt: skip
            color = WRONG if times is None or "wrong" in text else INK
            axes.text((times or 0.5) * 1.06, at, text, va="center", fontsize=7.5, color=color)
            ticks.append(at)
            labels.append(title)
            at += 1
        at += 1.1
    axes.set_xscale("log")
    longest = max((bar[2] or 1.0 for result in results for bar in _bars(result)), default=1.0)
    axes.set_xlim(0.45, 6 * longest)
    axes.axvline(1, color=ACCENT, lw=0.8, zorder=0)
    axes.set_yticks(ticks, labels)
    axes.set_ylim(at - 0.8, -1.2)
    _style(axes, "time relative to metaaug_fast (shorter is faster)", "")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0, labelsize=7.5)


def _draw_roofline(axes: Axes, report: Report, results: Sequence[Result]) -> None:
    ceilings = report.ceilings
    counted = [result for result in results if result.count]
    intensities = [result.count.flops / result.count.bytes for result in counted if result.count]
    low, high = min([0.5, *intensities]) / 2, max([64.0, *intensities]) * 3
    for top, name in ((ceilings.convolution, "3x3 convolution"), (ceilings.gemm, "sgemm")):
        corner = top / ceilings.copy
        axes.plot([low, min(corner, high), high], [low * ceilings.copy, min(top, high * ceilings.copy), top], color=INK,
                  lw=1.2, ls="-" if "conv" in name else "--")  # fmt: skip
        axes.text(high, top * 1.06, f"{name} {top:.0f} GFLOP/s", ha="right", fontsize=8, color=INK)
    axes.text(low * 1.1, low * 1.4 * ceilings.copy, f"copy {ceilings.copy:.0f} GB/s", fontsize=8, color=INK,
              rotation=35, va="bottom")  # fmt: skip
    for number, (result, intensity) in enumerate(zip(counted, intensities, strict=True), 1):
        for row in result.rows:
            rate = result.gflops(row)
            if not rate or row.status == "wrong":
                continue
            ours = row.rival == OURS
            axes.plot(intensity, rate, "o", color=COLORS[row.rival], ms=8 if ours else 4, zorder=3 if ours else 2,
                      markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
            if ours:
                axes.annotate(str(number), (intensity, rate), (5, 4), textcoords="offset points", fontsize=8, color=INK)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    _style(axes, "FLOP per byte, every product's operands read and written once", "GFLOP/s")
    seen = {row.rival: row.title for result in results for row in result.rows if row.timed and row.status != "wrong"}
    for rival, title in seen.items():
        axes.plot([], [], "o", color=COLORS[rival], label=title)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    names = "\n".join(f"{number}  {result.workload.name}" for number, result in enumerate(counted, 1))
    axes.text(0.02, 0.98, names, transform=axes.transAxes, va="top", fontsize=7.5, color=INK)


def _time(seconds: float) -> str:
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3)
    digits = max(0, 2 - math.floor(math.log10(seconds * scale)))
    return f"{seconds * scale:.{digits}f} {unit}"


def _style(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)


def _write(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
