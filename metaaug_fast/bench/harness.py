"""Every rival in a process of its own, checked before it is timed, and timed in turns so that drift hits all alike.

A process answers one command at a time and sleeps on its pipe in between. It is started with the cores and the number
of threads that were asked for (its affinity, which is what XLA counts, and `OMP_NUM_THREADS`, which torch reads).
"""

from __future__ import annotations

import contextlib
import fnmatch
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import reference
from ..problem import Query, Support
from ..tasks import TaskBatch
from .rivals import RIVALS, SHOWN_ONLY, Rival
from .workloads import Workload

ROUND_SECONDS = 0.2
WARM_UP_BELOW = 10.0  # seconds of a first call, above which no other warms up
ENOUGH = 3  # rounds, after which a rival that has used up its time stops
EPSILON = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


@dataclass
class Row:
    """What became of one rival on one workload.

    status: "exact", "wrong", "unconfirmed" (float32 rounding hides whether it is exact), "missing", "unsupported",
        "failed" or "cut off". note: why, or what the check was. error: relative, of the gradient as a vector; of the
        float64 check where that was needed.
    first_call, median, low, high: seconds; low and high are quartiles over rounds, a round's value the median of its
        calls. peak, total_peak: bytes, above what was resident before the first call and altogether.
    """

    rival: str
    title: str
    status: str
    note: str = ""
    error: float | None = None
    first_call: float | None = None
    median: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    peak: int | None = None
    total_peak: int | None = None

    @property
    def timed(self) -> bool:
        """Whether there is a time."""
        return self.median is not None


class RivalError(Exception):
    """A process could not do what it was asked; `cut_off` if it took too long."""

    def __init__(self, message: str, cut_off: bool = False) -> None:
        super().__init__(message)
        self.cut_off = cut_off


def measure(
    workload: Workload,
    names: list[str],
    *,
    threads: int,
    rounds: int = 9,
    first_call_limit: float = 300.0,
    budget: float = 30.0,
    rivals: Mapping[str, Rival] = RIVALS,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row for every rival.

    Args:
        threads: of every rival, each on the same so many cores.
        first_call_limit: seconds after which a rival that is not through its first call is ended.
        budget: seconds of rounds after which a rival stops before `rounds`, if it has `ENOUGH`.
    """
    names = [name for name in names if name not in SHOWN_ONLY or name in workload.shows]
    rows = {name: Row(name, rivals[name].title, "exact") for name in names}
    tasks = workload.inputs()
    judge = _Judge(workload, tasks)
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
                if not _start(worker, rival, workload, tasks, judge, row, first_call_limit):
                    workers.pop(name).stop()
        say(f"{workload.name}: rounds")
        _take_turns(workers, rows, rounds, budget)
    finally:
        for worker in workers.values():
            worker.stop()
    return list(rows.values())


def _start(
    worker: Worker, rival: Rival, workload: Workload, tasks: TaskBatch, judge: _Judge, row: Row, limit: float
) -> bool:
    """Build, first call and check; whether the rival is to be timed."""
    row.note = rival.remark(workload)
    try:
        worker.ask(_build, rival.build, workload, tasks)
        first = worker.ask(_first_call, limit=limit)
        row.first_call, row.peak, row.total_peak = first.seconds, first.peak, first.total_peak
        judge.check(row, first.arrays, lambda few: worker.ask(_checked, rival.build, workload, few, limit=limit))
    except RivalError as error:
        row.status, row.note = ("cut off" if error.cut_off else "failed"), str(error)
        return False
    return True


def _take_turns(workers: dict[str, Worker], rows: dict[str, Row], rounds: int, budget: float) -> None:
    medians: dict[str, list[float]] = {name: [] for name in workers}
    spent = dict.fromkeys(workers, 0.0)
    for _ in range(rounds):
        for name, worker in workers.items():
            if (len(medians[name]) >= ENOUGH and spent[name] > budget) or rows[name].status == "failed":
                continue
            try:
                times = worker.ask(_round, ROUND_SECONDS)
            except RivalError as error:
                rows[name].status, rows[name].note = "failed", str(error)
                continue
            medians[name].append(statistics.median(times))
            spent[name] += sum(times)
    for name, each in medians.items():
        if each:
            row = rows[name]
            row.low, row.median, row.high = (float(value) for value in np.quantile(each, (0.25, 0.5, 0.75)))
            row.rounds = len(each)


# --- the check -----------------------------------------------------------------------------------------------------


class _Judge:
    """Compares with the reference in float64.

    A float32 result within rounding is exact. Where it is further off, a ReLU or a pooling may have taken the other
    side of a kink, which many steps magnify: then the rival's own float64 result on two tasks decides.
    """

    FEW = 2

    def __init__(self, workload: Workload, tasks: TaskBatch) -> None:
        self.workload = workload
        self.tasks = tasks
        self._known: dict[int, list[np.ndarray]] = {}

    def check(self, row: Row, found: list[np.ndarray], again: Callable[[TaskBatch], list[np.ndarray]]) -> None:
        """Set the row's status, error and note."""
        row.error = self._error(found, self.tasks.tasks)
        if row.error <= self._tolerance(torch.float32):
            return
        few = TaskBatch(*(each[: self.FEW] for each in _sets(self.tasks))).to(torch.float64)
        note = f"{row.error:.0e} off in float32"
        try:
            row.error = self._error(again(few), few.tasks)
        except RivalError as error:
            if row.error < 1 and error.cut_off:
                row.status, note = "unconfirmed", f"{note}, and its float64 check was cut off"
            else:
                row.status, note = "wrong", f"{note}, and its float64 check failed: {error}"
        else:
            row.status = "exact" if row.error <= self._tolerance(torch.float64) else "wrong"
            note = f"{note}; in float64 on {few.tasks} tasks {row.error:.0e}"
        row.note = "; ".join(filter(None, (row.note, note)))

    def _tolerance(self, dtype: torch.dtype) -> float:
        return 2000 * (self.workload.inner_steps + 1) * EPSILON[dtype]

    def _error(self, found: list[np.ndarray], tasks: int) -> float:
        if tasks not in self._known:
            self._known[tasks] = expected(self.workload, tasks)
        ours, theirs = (_join(self.workload, arrays) for arrays in (found, self._known[tasks]))
        ours = ours[: len(theirs)]  # of an evaluation the reference judges only the first tasks
        if ours.shape != theirs.shape or not np.isfinite(ours).all():
            return float("inf")
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def expected(workload: Workload, tasks: int) -> list[np.ndarray]:
    """What a call must return on the workload's first `tasks`: the reference in float64, a task at a time."""
    inputs = workload.inputs().to(torch.float64)
    learner = workload.learner(workload.model().double())
    problem = learner.problem()
    if workload.kind == "evaluation":
        tasks = min(tasks, 20)
    total: list[np.ndarray] = []
    for task in range(tasks):
        x, y, query_x, query_y = (each[task : task + 1] for each in _sets(inputs))
        support, query = Support(x, y), Query(query_x, query_y)
        if workload.kind == "maml":
            loss = reference.meta_loss(problem, support, query).loss
            parts = torch.autograd.grad(loss, list(problem.parameters.values()))
        elif workload.kind == "reptile":
            moved = reference.unpack(problem, reference.adapt(problem, support)[0])
            parts = tuple(moved[name] - value for name, value in problem.parameters.items())
        else:
            parts = (reference.meta_loss(problem, support, query).task_losses,)
        total.append(np.concatenate([part.detach().numpy().ravel() for part in parts]))
    if workload.kind == "evaluation":
        return total
    mean = np.mean(total, 0)
    sizes = np.cumsum([value.numel() for value in problem.parameters.values()])[:-1]
    return list(np.split(mean, sizes))


def _join(workload: Workload, arrays: list[np.ndarray]) -> np.ndarray:
    names = [name for name, _ in workload.model().named_parameters()]
    kept = [
        each
        for index, each in enumerate(arrays)
        if not workload.unchecked or not fnmatch.fnmatchcase(names[index], workload.unchecked)
    ]
    return np.concatenate([np.ravel(each) for each in kept])


def _sets(tasks: TaskBatch) -> tuple[torch.Tensor, ...]:
    return tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y


# --- a process -----------------------------------------------------------------------------------------------------


class Worker:
    """A process that runs functions of one argument and more: the first is its own state, a dictionary."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        with _surroundings(threads):
            self._process.start()
        theirs.close()

    def ask(self, function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
        """What the function returns there.

        Raises:
            RivalError: it raised, died, or took longer than `limit` seconds; then the process is ended.
        """
        try:
            self._pipe.send((function, arguments))
            if limit is not None and not self._pipe.poll(limit):
                self.stop()
                raise RivalError(f"no result within {limit:g} s", cut_off=True)
            succeeded, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise RivalError(f"the process died (exit code {self._process.exitcode})") from error
        if not succeeded:
            raise RivalError(value)
        return value

    def stop(self) -> None:
        """End the process and those that it started."""
        if self._process.pid is not None and self._process.is_alive():
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
        self._process.join()
        self._pipe.close()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _surroundings(threads: int) -> Iterator[None]:
    """Environment and cores that a new process inherits: JAX on the CPU, no compiler cache, so many threads."""
    wanted = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    wanted["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    before = {name: os.environ.get(name) for name in wanted}
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    os.environ.update(wanted)
    if allowed is not None:
        os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        if allowed is not None:
            os.sched_setaffinity(0, allowed)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, threads: int) -> None:
    """The process: one command at a time until the pipe closes."""
    os.setsid()
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    state: dict[str, Any] = {}
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, arguments = pipe.recv()
            try:
                answer = True, function(state, *arguments)
            except Exception as error:
                text = (str(error).strip() or type(error).__name__).splitlines()[0]
                answer = False, f"{type(error).__name__}: {text}"[:300]
            pipe.send(answer)


def _build(state: dict[str, Any], build: Callable[..., Any], workload: Workload, tasks: TaskBatch) -> None:
    state["call"] = build(workload, workload.model(), tasks)


@dataclass
class _FirstCall:
    seconds: float
    arrays: list[np.ndarray]
    peak: int
    total_peak: int


def _first_call(state: dict[str, Any]) -> _FirstCall:
    call = state["call"]
    before = _reset_peak()
    started = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - started
    arrays = _arrays(result)
    del result
    if seconds < WARM_UP_BELOW:
        call()
    peak = _peak()
    return _FirstCall(seconds, arrays, peak - before, peak)


def _checked(state: dict[str, Any], build: Callable[..., Any], workload: Workload, few: TaskBatch) -> list[np.ndarray]:
    return _arrays(build(workload, workload.model().to(few.support_x.dtype), few)())


def _round(state: dict[str, Any], seconds: float) -> list[float]:
    call = state["call"]
    times: list[float] = []
    while not times or sum(times) < seconds:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def _arrays(result: Any) -> list[np.ndarray]:
    return [each.detach().numpy() if isinstance(each, torch.Tensor) else np.asarray(each) for each in result]


def _reset_peak() -> int:
    """Forget the peak, where the system can; the resident bytes now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or _largest()


def _peak() -> int:
    return _status("VmHWM") or _largest()


def _status(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _largest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
