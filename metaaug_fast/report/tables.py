"""Tables as text: plain, for terminals, log files and doctests, or as markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Sequence

from ..runs.evaluation import student


def plain(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()) -> str:
    """Rows under a head, in columns as wide as their widest cell: the same text wherever it is printed.

    Args:
        head: the name of each column.
        rows: as many cells each, which are shown as they are.
        numbers: names of the columns that are aligned to the right.

    Raises:
        ValueError: a row has more or fewer cells than the head, or `numbers` names a column that it has not.

    >>> print(plain(("op", "FLOPs", "fused"), [("linear", "28", "yes"), ("relu", "4", "yes")], numbers=["FLOPs"]))
    op      FLOPs  fused
    linear     28  yes
    relu        4  yes
    """
    # Here, for rich takes 0.1 s to import, which those would wait for who print no table.
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    _check(head, rows, numbers)
    columns = [Column(Text(name), justify="right" if name in numbers else "left", no_wrap=True) for name in head]
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(Text, row))
    # Without both of its sizes, a console takes them from the terminal and the environment.
    lines = Console(width=_UNBOUNDED, height=1).render_lines(table, pad=False)
    return "\n".join("".join(segment.text for segment in line).rstrip() for line in lines)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str] = ()) -> str:
    """The same as markdown, aligned as text too.

    >>> print(markdown(("op", "FLOPs"), [("linear", "28"), ("relu", "4")], numbers=["FLOPs"]))
    | op     | FLOPs |
    | :----- | ----: |
    | linear |    28 |
    | relu   |     4 |
    """
    _check(head, rows, numbers)
    widths = [max(2, *(len(row[column]) for row in (head, *rows))) for column in range(len(head))]
    sides = [">" if name in numbers else "<" for name in head]

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    dashes = ["-" * (width - 1) for width in widths]
    rule = [f"{dash}:" if side == ">" else f":{dash}" for dash, side in zip(dashes, sides, strict=True)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


_UNBOUNDED = 10**9
"""Columns of a console in which no line is too long."""


def _check(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[str]) -> None:
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"rows must have a cell for each of {list(head)} (got {list(row)})")
    if unknown := set(numbers).difference(head):
        raise ValueError(f"numbers must be among {list(head)} (got {sorted(unknown)})")


def with_interval(values: Iterable[float], digits: int = 1, sign: str = "") -> str:
    """A mean with half its 95 % interval by Student's t, as over seeds.

    Args:
        digits: behind the point.
        sign: "+" for one in front of a mean that is positive, too.

    Raises:
        statistics.StatisticsError: there are fewer than two values.

    >>> with_interval([1.0, 2.0, 3.0]), with_interval([1.0, 2.0, 3.0], digits=0, sign="+")
    ('2.0 ± 2.5', '+2 ± 2')
    """
    each = [float(value) for value in values]
    half = student(len(each) - 1) * statistics.stdev(each) / math.sqrt(len(each))
    return f"{statistics.fmean(each):{sign}.{digits}f} ± {half:.{digits}f}"
