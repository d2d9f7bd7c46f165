"""Rivals that misbehave, in a module that a process of their own can import."""

import os
import subprocess
import time
from pathlib import Path

from metaaug_fast.bench.rivals import plain_loop

PIDS = "METAAUG_TEST_PIDS"  # names the file that a hanging rival writes process ids to


def off_by_a_percent(workload, model, tasks):
    call = plain_loop(workload, model, tasks)
    return lambda: [1.01 * each for each in call()]


def raising(workload, model, tasks):
    def call():
        raise ValueError("no such op\nsecond line")

    return call


def dying(workload, model, tasks):
    return lambda: os._exit(3)


def hanging(workload, model, tasks):
    def call():
        child = subprocess.Popen(["sleep", "1000"])
        Path(os.environ[PIDS]).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(1000)

    return call


def hanging_later(workload, model, tasks):
    call, calls = plain_loop(workload, model, tasks), []

    def later():
        calls.append(None)
        if len(calls) > 2:
            time.sleep(1000)
        return call()

    return later
