"""Times rivals in turns, so that drift hits all alike, each in a process of its own and checked first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..tasks import TaskBatch
from . import worker as commands
from .check import Check
from .rivals import RIVALS, SHOWN_ONLY, Rival
from .row import Row
from .worker import RivalError, Worker
from .workloads import Workload

BUILD_LIMIT = 120.0  # seconds to start a process and import its library
ROUND_SECONDS = 0.2
ENOUGH = 3  # rounds, after which a rival that has used up its time stops


def measure(
    workload: Workload,
    names: Sequence[str],
    *,
    threads: int,
    rounds: int = 9,
    limit: float = 300.0,
    budget: float = 30.0,
    rivals: Mapping[str, Rival] = RIVALS,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row for every rival of these names that the workload shows.

    Args:
        threads: of every rival, each on the same so many cores.
        limit: seconds after which a rival that is not through its first call, or a later one, is ended.
        budget: seconds of rounds after which a rival stops before `rounds`, if it has `ENOUGH`.
    """
    names = [name for name in names if name not in SHOWN_ONLY or name in workload.shows]
    rows = {name: Row(name, rivals[name].title, "exact", rivals[name].remark(workload)) for name in names}
    tasks = workload.inputs()
    check = Check(workload, tasks)
    workers: dict[str, Worker] = {}
    try:
        for name, row in rows.items():
            rival = rivals[name]
            refusal = rival.refuses(workload)
            if refusal is not None:
                row.status, row.note = "unsupported", refusal
            elif not rival.installed:
                row.status, row.note = "missing", f"not installed: {rival.install}"
            else:
                say(f"{workload.name}: {rival.title}")
                worker = workers[name] = Worker(threads)
                if not _start(worker, rival, workload, tasks, check, row, limit):
                    workers.pop(name).stop()
        say(f"{workload.name}: rounds")
        take_turns(workers, rows, rounds, limit, budget)
    finally:
        for worker in workers.values():
            worker.stop()
    return list(rows.values())


def _start(
    worker: Worker, rival: Rival, workload: Workload, tasks: TaskBatch, check: Check, row: Row, limit: float
) -> bool:
    """Build, first call and check; whether the rival is to be timed."""

    def again(few: TaskBatch) -> list[np.ndarray]:
        found: list[np.ndarray] = worker.ask(commands.fresh_call, rival.build, workload, few, limit=limit)
        return found

    try:
        worker.ask(commands.build, rival.build, workload, tasks, limit=BUILD_LIMIT)
        first: commands.FirstCall = worker.ask(commands.first_call, limit=limit)
        row.first_call, row.peak, row.total_peak = first.seconds, first.peak, first.total_peak
        check.judge(row, first.arrays, again)
    except RivalError as error:
        row.fail(error)
        return False
    return worker.alive


def take_turns(
    workers: Mapping[str, Worker], rows: Mapping[str, Row], rounds: int, limit: float, budget: float
) -> None:
    """Give each row its times; a rival that fails is out."""
    medians: dict[str, list[float]] = {name: [] for name in workers}
    spent = dict.fromkeys(workers, 0.0)
    running = list(workers)
    for _ in range(rounds):
        for name in tuple(running):
            try:
                times = workers[name].ask(commands.one_round, ROUND_SECONDS, limit=commands.ROUND_AT_MOST + limit)
            except RivalError as error:
                rows[name].fail(error)
                running.remove(name)
                continue
            medians[name].append(statistics.median(times))
            spent[name] += sum(times)
            if len(medians[name]) >= ENOUGH and spent[name] > budget:
                running.remove(name)
    for name, each in medians.items():
        if each:
            row = rows[name]
            row.low, row.median, row.high = (float(value) for value in np.quantile(each, (0.25, 0.5, 0.75)))
            row.rounds = len(each)
