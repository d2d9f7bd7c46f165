"""The whole run: ceilings, every workload, ceilings again; then the table, the JSON and the picture."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoint import write_atomically, write_json
from ..errors import NotFusedError
from .ceilings import Ceilings
from .ceilings import measure as measure_ceilings
from .harness import Row, Worker, cores, measure
from .operations import Count, count
from .pictures import draw, draw_scaling
from .report import Report, Result, milliseconds, table
from .rivals import OURS, RIVALS
from .workloads import WORKLOADS, Workload

SCALING_RIVALS = (OURS, "vmap", "jax")
TWO_THREADS = 1.8  # what two threads must gain over one
_VERSIONS = ("torch", "jax", "higher", "torchopt", "learn2learn", "numpy")


def bench(
    workloads: Sequence[Workload],
    out: str | Path,
    *,
    rivals: Sequence[str] = tuple(RIVALS),
    threads: int | None = None,
    rounds: int = 9,
    first_call_limit: float = 300.0,
    progress: bool = True,
) -> Report:
    """Measure, and write `bench.json`, `bench.md` and `bench.png` into the folder `out`; JSON after every workload.

    Args:
        rivals: names from `RIVALS`; ours is always one of them.
        threads: of every rival; as many as there are cores by default.

    Raises:
        ValueError: a rival is unknown, or there are fewer cores than threads.
    """
    out, threads = Path(out), threads or cores()
    check_rivals(rivals)
    check_threads(threads)
    torch.set_num_threads(threads)
    names = [name for name in RIVALS if name == OURS or name in rivals]
    report = Report(machine(threads), _ceilings(threads))
    for workload in workloads:
        rows = measure(
            workload, names, threads=threads, rounds=rounds, first_call_limit=first_call_limit,
            say=_say if progress else lambda text: None,
        )  # fmt: skip
        report.results.append(Result(workload, rows, _count(workload)))
        write_json(out / "bench.json", report.as_dict())
    report.ceilings = report.ceilings.best(_ceilings(threads))
    write_json(out / "bench.json", report.as_dict())
    write_atomically(out / "bench.md", f"{report.markdown()}\n{report.summary()}\n".encode())
    draw(report, out / "bench.png")
    return report


def scaling(
    out: str | Path,
    *,
    rivals: Sequence[str] = SCALING_RIVALS,
    rounds: int = 5,
    first_call_limit: float = 300.0,
    progress: bool = True,
) -> str:
    """How time grows with tasks, steps and threads; writes `scaling.json`, `scaling.md`, `scaling.png`; the table.

    Tasks 1 to 4096 and steps 1 to 20 of the sinusoid with one thread; threads 1 and 2 where there are two cores.

    Raises:
        ValueError: a rival is unknown.
    """
    out = Path(out)
    check_rivals(rivals)
    names = [name for name in RIVALS if name == OURS or name in rivals]
    start = WORKLOADS["sinusoid-t25-k5"]

    def run(workload: Workload, threads: int, names: Sequence[str] = names) -> list[Row]:
        return measure(
            workload, list(names), threads=threads, rounds=rounds, first_call_limit=first_call_limit, budget=10,
            say=_say if progress else lambda text: None,
        )  # fmt: skip

    by_tasks = {
        tasks: run(replace(start, name=f"sinusoid-t{tasks}-k5", tasks=tasks), 1) for tasks in (4**n for n in range(7))
    }
    by_steps = {
        steps: run(replace(start, name=f"sinusoid-t25-k{steps}", inner_steps=steps), 1) for steps in (1, 2, 5, 10, 20)
    }
    grown = {"T tasks, K=5": by_tasks, "K steps, T=25": by_steps}
    lines = [_machine_line(machine(1)), ""]
    for title, runs in grown.items():
        titles = [row.title for row in next(iter(runs.values()))]
        cells = [[str(x), *(milliseconds(row.median) or row.status for row in rows)] for x, rows in runs.items()]
        lines += [
            f"## {title}: ms a meta-gradient, sinusoid MLP, one thread",
            "",
            *table([title[0], *titles], cells),
            "",
        ]
    content: dict[str, Any] = {
        "machine": machine(1),
        "growth": [
            {"title": title, "x": x, "rows": [vars(row) for row in rows]}
            for title, runs in grown.items()
            for x, rows in runs.items()
        ],
    }
    if cores() >= 2:
        gains = [_gain(WORKLOADS[name], run) for name in ("sinusoid-t1000-k5", "conv4-t8-k1", "conv4-t4-k5")]
        head = ("metaaug_fast", "1 thread, ms", "2 threads, ms", "gain", f"at least {TWO_THREADS}")
        lines += ["## Threads", "", *table(head, [_gain_cells(*gain) for gain in gains]), ""]
        content["threads"] = [{"name": name, "one": one, "two": two, "gain": one / two} for name, one, two in gains]
    text = "\n".join(lines)
    write_json(out / "scaling.json", content)
    write_atomically(out / "scaling.md", (text + "\n").encode())
    draw_scaling({title: _curves(runs) for title, runs in grown.items()}, out / "scaling.png")
    return text


def _gain(workload: Workload, run: Any) -> tuple[str, float, float]:
    one, two = (run(workload, threads, [OURS])[0].median for threads in (1, 2))
    return workload.name, one, two


def _gain_cells(name: str, one: float, two: float) -> list[str]:
    met = "met" if one / two >= TWO_THREADS else "MISSED"
    return [name, milliseconds(one), milliseconds(two), f"{one / two:.2f}", met]


def _curves(runs: dict[int, list[Row]]) -> list[tuple[str, str, list[float], list[float]]]:
    found = []
    for index, first in enumerate(next(iter(runs.values()))):
        points = [(float(x), rows[index].median) for x, rows in runs.items()]
        timed = [(x, seconds) for x, seconds in points if seconds]
        if timed:
            found.append((first.rival, first.title, [x for x, _ in timed], [seconds for _, seconds in timed]))
    return found


def check_rivals(names: Sequence[str]) -> None:
    """Raise ValueError unless all are names of rivals."""
    for name in names:
        if name not in RIVALS:
            raise ValueError(f"rivals must be among {', '.join(RIVALS)} (got {name!r})")


def check_threads(threads: int) -> None:
    """Raise ValueError where there are fewer cores."""
    if threads > cores():
        raise ValueError(f"threads must be at most the {cores()} cores that this process may use (got {threads})")


def machine(threads: int) -> dict[str, Any]:
    """What a reader must know of the machine; no host names, no paths."""
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "threads": threads,
        "system": platform.system(),
        "python": platform.python_version(),
        **versions,
        "date": datetime.date.today().isoformat(),
    }


def _machine_line(facts: dict[str, Any]) -> str:
    return f"Machine: {', '.join(f'{name} {value}' for name, value in facts.items())}."


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


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
        return count(workload, workload.learner(workload.model()).problem())
    except NotFusedError:
        return None


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
