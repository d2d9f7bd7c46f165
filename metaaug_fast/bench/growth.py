"""How time grows with a number, as curves and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .report import Form, milliseconds
from .row import Row

TWO_THREADS = 1.8  # what two threads must gain over one


@dataclass(frozen=True)
class Curve:
    """The rows of one rival, in the order of `Growth.xs`."""

    rival: str
    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Growth:
    """Sinusoid workloads that differ in one number."""

    title: str
    xs: Sequence[int]
    curves: Sequence[Curve]

    def text(self, form: Form) -> str:
        """A table with a row a number."""
        cells = [
            [str(x), *(milliseconds(curve.rows[at].median) or curve.rows[at].status for curve in self.curves)]
            for at, x in enumerate(self.xs)
        ]
        head = [self.title.split()[0], *(curve.title for curve in self.curves)]
        notes = {f"* {row.title}: {row.note}": None for curve in self.curves for row in curve.rows if row.note}
        title = f"{form.title}{self.title}: ms a meta-gradient, sinusoid MLP, one thread"
        return "\n".join([title, "", form.table(head, cells, head), "", *([*notes, ""] if notes else [])])


@dataclass(frozen=True)
class Gain:
    """One of our workloads with one thread and with two: seconds, and whether the results have the same bits."""

    name: str
    one: float
    two: float
    same_bits: bool

    def cells(self) -> list[str]:
        """For the table."""
        gain = self.one / self.two
        met = "met" if gain >= TWO_THREADS else f"MISSED, off by {1 - gain / TWO_THREADS:.0%}"
        times = (milliseconds(self.one), milliseconds(self.two), f"{gain:.2f}", met)
        return [self.name, *times, "met" if self.same_bits else "MISSED"]
