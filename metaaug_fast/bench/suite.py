"""A run: ceilings, every workload, ceilings again; then the table, the JSON and the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import NotFusedError
from ..files import write_atomically, write_json
from .ceilings import Ceilings
from .ceilings import measure as measure_ceilings
from .harness import measure
from .machine import check_out, check_threads, machine
from .operations import Count, count
from .pictures import draw
from .report import MARKDOWN, Report, Result
from .rivals import RIVALS, check_rivals
from .worker import Worker, cores
from .workloads import Workload


def bench(
    workloads: Sequence[Workload],
    out: str | Path,
    *,
    rivals: Sequence[str] = tuple(RIVALS),
    threads: int | None = None,
    rounds: int = 9,
    first_call_limit: float = 300.0,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measure, and write `bench.json`, `bench.md` and `bench.png` into the folder `out`; JSON after every workload.

    Args:
        rivals: names from `RIVALS`; ours is always one of them.
        threads: of every rival; as many as there are cores by default.

    Raises:
        ValueError: a rival is unknown, there are fewer cores than threads, or `out` cannot be written.
    """
    out, threads = Path(out), threads or cores()
    names = check_rivals(rivals)
    check_threads(threads)
    check_out(out)
    report = Report(machine(threads), _ceilings(threads))
    for workload in workloads:
        rows = measure(workload, names, threads=threads, rounds=rounds, limit=first_call_limit, say=say)
        report.results.append(Result(workload, rows, _count(workload)))
        write_json(out / "bench.json", report.as_dict())
    report.ceilings = report.ceilings.best(_ceilings(threads))
    write_json(out / "bench.json", report.as_dict())
    write_atomically(out / "bench.md", f"{report.text(MARKDOWN)}\n".encode())
    draw(report, out / "bench.png")
    return report


def _ceilings(threads: int) -> Ceilings:
    worker = Worker(threads)
    try:
        found: Ceilings = worker.ask(_measure_ceilings)
    finally:
        worker.stop()
    return found


def _measure_ceilings(state: dict[str, Any]) -> Ceilings:
    return measure_ceilings()


def _count(workload: Workload) -> Count | None:
    try:
        return count(workload)
    except NotFusedError:
        return None
