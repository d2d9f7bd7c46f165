"""A process for each rival, which answers one command at a time and sleeps on its pipe in between.

It is started with the cores and the number of threads that were asked for (its affinity, which is what XLA counts, and
`OMP_NUM_THREADS`, which torch reads).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..tasks import TaskBatch
from .rivals import Build
from .workloads import Workload

ROUND_CALLS = 3  # at least, of calls that take longer than a round
ROUND_AT_MOST = 4.0  # seconds of a round's calls, above which no other follows
WARM_UP_BELOW = 10.0  # seconds of a first call, above which no other warms up


class RivalError(Exception):
    """A process could not do what it was asked; `cut_off` if it took too long."""

    def __init__(self, message: str, cut_off: bool = False) -> None:
        super().__init__(message)
        self.cut_off = cut_off


class Worker:
    """A process that runs functions of its state, a dictionary, and more arguments."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        self.alive = True
        try:
            with _held(signal.SIGINT, signal.SIGTERM), _surroundings(threads):
                self._process.start()
        except BaseException:
            if self._process.pid is not None:
                self._process.kill()
            raise
        assert self._process.pid is not None
        self._pid = self._process.pid
        theirs.close()

    def ask(self, function: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
        """What the function returns there.

        Raises:
            RivalError: it raised, died, or took longer than `limit` seconds; after the last two the process is ended.
        """
        try:
            self._pipe.send((function, arguments))
            if limit is not None and not self._pipe.poll(limit):
                self.stop()
                raise RivalError(f"no result within {limit:g} s", cut_off=True)
            succeeded, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            wait([self._process.sentinel], timeout=5)
            self.stop()
            raise RivalError(f"the process died (exit code {self._process.exitcode})") from error
        if not succeeded:
            raise RivalError(value)
        return value

    def stop(self) -> None:
        """End the process and those that it started."""
        if self.alive:
            self.alive = False
            with contextlib.suppress(OSError):  # it may not lead a group yet
                os.killpg(self._pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
            self._pipe.close()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _held(*numbers: signal.Signals) -> Iterator[None]:
    """Let signals that come meanwhile take effect at the end: a mask does not, for other threads may take them."""
    if threading.current_thread() is not threading.main_thread():  # which no handler interrupts
        yield
        return
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda taken, frame: came.append(taken)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for taken in came:
            signal.raise_signal(taken)


@contextlib.contextmanager
def _surroundings(threads: int) -> Iterator[None]:
    """What a new process inherits: so many cores and threads, JAX on the CPU, no compiler cache, no Ctrl-C."""
    wanted = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
    wanted["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    before = {name: os.environ.get(name) for name in wanted}
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    os.environ.update(wanted)
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
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
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def _serve(pipe: Connection, threads: int) -> None:
    """The process: one command at a time until the pipe closes; then it ends itself and those that it started."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    state: dict[str, Any] = {}
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, arguments = pipe.recv()
            pipe.send(_answer(function, state, *arguments))
    os.killpg(0, signal.SIGKILL)


def _answer(function: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
    try:
        return True, function(*arguments)
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        return False, f"{type(error).__name__}: {text}"[:300]


# --- commands ------------------------------------------------------------------------------------------------------


def build(state: dict[str, Any], build: Build, workload: Workload, tasks: TaskBatch) -> None:
    """Make the call that the others take."""
    state["call"] = build(workload, workload.model(), tasks)


@dataclass
class FirstCall:
    """What a first call took, and what it returned; peaks as in `Row`, over this call and one to warm up."""

    seconds: float
    arrays: list[np.ndarray]
    peak: int
    total_peak: int


def first_call(state: dict[str, Any]) -> FirstCall:
    """Take it, and one more where that is quick."""
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
    return FirstCall(seconds, arrays, peak - before, peak)


def fresh_call(state: dict[str, Any], build: Build, workload: Workload, tasks: TaskBatch) -> list[np.ndarray]:
    """What another call returns, on other tasks and with weights of their type."""
    return _arrays(build(workload, workload.model().to(tasks.support_x.dtype), tasks)())


def one_round(state: dict[str, Any], seconds: float) -> list[float]:
    """Seconds of each call, for about so many in all; of slower ones three, for the first finds the caches cold."""
    call = state["call"]
    times: list[float] = []
    while not times or sum(times) < seconds or (len(times) < ROUND_CALLS and sum(times) < ROUND_AT_MOST):
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
