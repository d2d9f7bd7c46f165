"""Results as a table, judged against their targets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..report import tables
from .ceilings import Ceilings
from .operations import Count
from .rivals import OURS, RIVALS
from .row import Row
from .workloads import Target, Workload


class Form(NamedTuple):
    """How a report is written: what stands before a title, and the function of `report.tables` that writes a table."""

    title: str
    table: Callable[[Sequence[str], Sequence[Sequence[str]], Collection[str]], str]


PLAIN, MARKDOWN = Form("", tables.plain), Form("## ", tables.markdown)


@dataclass(frozen=True)
class Result:
    """One workload's rows, ours first; count: of one call, None where the model is not lowered."""

    workload: Workload
    rows: Sequence[Row]
    count: Count | None

    @property
    def ours(self) -> Row | None:
        """Our row, if it was timed."""
        return next((row for row in self.rows if row.rival == OURS and row.timed), None)

    def gflops(self, row: Row) -> float | None:
        """The row's rate by the workload's own operations, whatever else the rival computes; GFLOP/s."""
        return self.count.flops / row.median / 1e9 if self.count and row.median else None

    def times_ours(self, row: Row) -> float | None:
        """How many times our time the row takes."""
        return row.median / self.ours.median if row.median and self.ours and self.ours.median else None

    def exact(self, names: Sequence[str] = ()) -> list[Row]:
        """Timed rivals that are right, among these or all."""
        return [
            row
            for row in self.rows
            if row.rival != OURS and row.status == "exact" and row.timed and (not names or row.rival in names)
        ]


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured; `met` is None where that could not be judged, and `text` says why."""

    target: Target
    value: float | None
    met: bool | None
    text: str


@dataclass
class Report:
    """All of a run. machine: processor, cores, threads, versions, date."""

    machine: Mapping[str, Any]
    ceilings: Ceilings
    results: list[Result] = field(default_factory=list)

    def verdicts(self, result: Result) -> list[Verdict]:
        """Every target of a workload, judged."""
        return [judge(target, result, self.ceilings, self._twin(result)) for target in result.workload.targets]

    def _twin(self, result: Result) -> Result | None:
        return next((each for each in self.results if each.workload.name == result.workload.twin), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in seconds, memory in bytes, rates in GFLOP/s."""
        return {
            "machine": dict(self.machine),
            "ceilings": self.ceilings.as_dict(),
            "workloads": [self._workload_as_dict(result) for result in self.results],
        }

    def _workload_as_dict(self, result: Result) -> dict[str, Any]:
        return {
            "name": result.workload.name,
            "description": str(result.workload),
            "flops": result.count and result.count.flops,
            "bytes": result.count and result.count.bytes,
            "rows": [
                {
                    **row.as_dict(),
                    "gflops": result.gflops(row),
                    "share_of_ceiling": _share(result, row, self.ceilings),
                }
                for row in result.rows
            ],
            "targets": [asdict(each) for each in self.verdicts(result)],
        }

    def __str__(self) -> str:
        return self.text(PLAIN)

    def text(self, form: Form) -> str:
        """The table of every workload, with its targets under it; then the summary."""
        lines = [
            machine_line(self.machine),
            f"Ceilings: 3x3 convolution {self.ceilings.convolution:.0f} GFLOP/s, sgemm {self.ceilings.gemm:.0f} "
            f"GFLOP/s, copy {self.ceilings.copy:.1f} GB/s.",
            "Operations are those of the algorithm as it is defined: who needs fewer may be above a ceiling.",
            "",
        ]
        for result in self.results:
            lines += [f"{form.title}{result.workload.name}", "", f"{result.workload}{_cost(result.count)}", ""]
            lines.append(form.table(_HEAD, [_cells(result, row, self.ceilings) for row in result.rows], _NUMBERS))
            notes = [f"* {row.title}: {row.note}" for row in result.rows if row.note]
            marks = {True: "met", False: "MISSED", None: "not judged"}
            judged = [f"* {marks[each.met]}: {each.text}" for each in self.verdicts(result)]
            lines += ["", *notes, *judged, ""]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """How many targets are met, and which are missed by how much."""
        verdicts = [(result.workload.name, each) for result in self.results for each in self.verdicts(result)]
        missed = [f"  {name}: {each.text}" for name, each in verdicts if each.met is False]
        met, unknown = (sum(each.met is state for _, each in verdicts) for state in (True, None))
        return "\n".join([f"targets: {met} met, {len(missed)} missed, {unknown} not judged", *missed])


def judge(target: Target, result: Result, ceilings: Ceilings, twin: Result | None = None) -> Verdict:
    """Whether our row keeps a target. twin: the first-order workload, for "cost"."""
    ours = result.ours
    if ours is None or ours.status != "exact":
        return Verdict(target, None, None, f"{target.quantity}: ours has no exact time")
    if target.quantity == "first call":
        value = max(0.0, (ours.first_call or 0.0) - (ours.median or 0.0))
        text = f"first call takes {value:.2f} s more than a later one (at most {target.limit:g})"
        return _verdict(target, value, text)
    if target.quantity == "ceiling":
        share = _share(result, ours, ceilings)
        if share is None:
            return Verdict(target, None, None, "ceiling: operations are not counted")
        text = f"{share:.0%} of the {result.workload.ceiling} ceiling (at least {target.limit:.0%})"
        return _verdict(target, share, text)
    if target.quantity == "cost":
        first_order = twin.ours if twin else None
        if first_order is None or first_order.status != "exact":
            return Verdict(target, None, None, "cost: its first-order twin has no exact time")
        value = _times(ours, first_order)
        return _verdict(target, value, f"second order costs {value:.2f} first orders (at most {target.limit:g})")
    return _against(target, result, ours)


def _against(target: Target, result: Result, ours: Row) -> Verdict:
    """Of the targets that take other rivals' rows: "speedup" and "memory"."""
    rivals = result.exact(target.rivals)
    if not rivals:
        wanted = ", ".join(RIVALS[name].title for name in target.rivals) or "any other"
        return Verdict(target, None, None, f"{target.quantity}: no exact time of {wanted}")
    if target.quantity == "memory":
        least = min(rivals, key=lambda row: row.peak or 0)
        value = (ours.peak or 0) / max(least.peak or 0, 1)
        sizes = f"{_megabytes(ours.peak)} against {_megabytes(least.peak)} MB of {least.title}"
        return _verdict(target, value, f"peak memory {sizes} (at most the least)")
    fastest = min(rivals, key=lambda row: row.median or 0.0)
    value = _times(fastest, ours)
    absent = [row.title for row in result.rows if row.rival in target.rivals and row not in rivals]
    without = f", without {', '.join(absent)}" if absent else ""
    return _verdict(target, value, f"{value:.2f} times as fast as {fastest.title} (at least {target.limit:g}{without})")


def _times(row: Row, other: Row) -> float:
    """How many times the other's time a timed row takes."""
    return (row.median or 0.0) / (other.median or 1.0)


def _verdict(target: Target, value: float, text: str) -> Verdict:
    met = value >= target.limit if target.at_least else value <= target.limit
    return Verdict(target, value, met, text if met else f"{text}, off by {abs(value / target.limit - 1):.0%}")


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine in a sentence."""
    return f"Machine: {', '.join(f'{name} {value}' for name, value in machine.items())}."


_NUMBERS = ("error", "ms", "quartiles", "x ours", "first call s", "peak MB", "total MB", "GFLOP/s", "ceiling")
_HEAD = ("rival", "check", *_NUMBERS)


def _cells(result: Result, row: Row, ceilings: Ceilings) -> list[str]:
    times, gflops, share = result.times_ours(row), result.gflops(row), _share(result, row, ceilings)
    spread = f"{milliseconds(row.low)} - {milliseconds(row.high)}" if row.timed else ""
    return [
        row.title,
        row.status,
        "" if row.error is None else f"{row.error:.0e}",
        milliseconds(row.median),
        spread,
        "" if times is None else f"{times:.2f}",
        "" if row.first_call is None else f"{row.first_call:.2f}",
        _megabytes(row.peak),
        _megabytes(row.total_peak),
        "" if gflops is None else f"{gflops:.1f}",
        "" if share is None else f"{share:.0%}",
    ]


def _share(result: Result, row: Row, ceilings: Ceilings) -> float | None:
    gflops = result.gflops(row)
    return None if gflops is None else gflops / ceilings.as_dict()[result.workload.ceiling]


def milliseconds(seconds: float | None) -> str:
    """Three significant digits.

    >>> milliseconds(0.0123456), milliseconds(1.5), milliseconds(None)
    ('12.3', '1500', '')
    >>> milliseconds(0.0047)
    '4.70'
    """
    if seconds is None:
        return ""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"


def _cost(count: Count | None) -> str:
    if count is None:
        return ""
    return f"; {count.flops / 1e9:.3g} GFLOP, {count.flops / count.bytes:.1f} FLOP a byte"
