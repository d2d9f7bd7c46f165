"""How time grows with tasks, steps and threads, and whether results stay the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically, write_json
from . import worker as commands
from .growth import TWO_THREADS, Curve, Gain, Growth
from .harness import BUILD_LIMIT, measure, take_turns
from .machine import check_out, machine
from .pictures import draw_scaling
from .report import MARKDOWN, PLAIN, Form, machine_line
from .rivals import OURS, RIVALS, check_rivals
from .row import Row
from .worker import Worker, cores
from .workloads import WORKLOADS, Workload

SCALING_RIVALS = (OURS, "vmap", "jax")
TASKS = tuple(4**n for n in range(7))
STEPS = (1, 2, 5, 10, 20)
THREADED = ("sinusoid-t1000-k5", "conv4-t8-k1", "conv4-t4-k5")
BUDGET = 10.0  # seconds of rounds


def scaling(
    out: str | Path,
    *,
    rivals: Sequence[str] = SCALING_RIVALS,
    rounds: int = 5,
    first_call_limit: float = 300.0,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Write `scaling.json`, `scaling.md` and `scaling.png` into the folder `out`; the tables, plain.

    Tasks 1 to 4096 and steps 1 to 20 of the sinusoid with one thread; threads 1 and 2 where there are two cores.

    Raises:
        ValueError: a rival is unknown, or `out` cannot be written.
    """
    out = Path(out)
    names = check_rivals(rivals)
    check_out(out)

    def run(workload: Workload) -> list[Row]:
        return measure(
            workload, names, threads=1, rounds=rounds, limit=first_call_limit, budget=BUDGET, say=say
        )  # fmt: skip

    start = WORKLOADS["sinusoid-t25-k5"]
    growths = [
        _growth("T tasks, K=5", {t: run(replace(start, name=f"sinusoid-t{t}-k5", tasks=t)) for t in TASKS}),
        _growth("K steps, T=25", {k: run(replace(start, name=f"sinusoid-t25-k{k}", inner_steps=k)) for k in STEPS}),
    ]
    two = cores() >= 2
    gains = [thread_gain(WORKLOADS[name], rounds, first_call_limit, say) for name in THREADED] if two else []
    facts = machine(1)
    write_json(
        out / "scaling.json",
        {
            "machine": facts,
            "growth": [_growth_as_dict(growth) for growth in growths],
            "threads": [{**asdict(each), "gain": each.one / each.two} for each in gains],
        },
    )
    write_atomically(out / "scaling.md", _text(MARKDOWN, facts, growths, gains).encode())
    draw_scaling(growths, out / "scaling.png")
    return _text(PLAIN, facts, growths, gains)


def _growth(title: str, runs: Mapping[int, list[Row]]) -> Growth:
    by_rival = zip(*runs.values(), strict=True)
    return Growth(title, tuple(runs), [Curve(rows[0].rival, rows[0].title, rows) for rows in by_rival])


def _growth_as_dict(growth: Growth) -> dict[str, Any]:
    rows = [{"x": x, **curve.rows[at].as_dict()} for curve in growth.curves for at, x in enumerate(growth.xs)]
    return {"title": growth.title, "rows": rows}


def thread_gain(workload: Workload, rounds: int, limit: float, say: Callable[[str], None] = lambda text: None) -> Gain:
    """Ours with one thread and with two, in turns.

    Raises:
        RivalError: it fails.
    """
    say(f"{workload.name}: 1 and 2 threads")
    tasks = workload.inputs()
    workers = {str(threads): Worker(threads) for threads in (1, 2)}
    rows = {threads: Row(OURS, RIVALS[OURS].title, "exact") for threads in workers}
    try:
        results = []
        for worker in workers.values():
            worker.ask(commands.build, RIVALS[OURS].build, workload, tasks, limit=BUILD_LIMIT)
            results.append(worker.ask(commands.first_call, limit=limit).arrays)
        take_turns(workers, rows, rounds, limit, BUDGET)
    finally:
        for worker in workers.values():
            worker.stop()
    for row in rows.values():
        if row.median is None:
            raise commands.RivalError(row.note)
    same = all(np.array_equal(one, two) for one, two in zip(*results, strict=True))
    return Gain(workload.name, rows["1"].median or 0.0, rows["2"].median or 0.0, same)


def _text(form: Form, facts: Mapping[str, Any], growths: Sequence[Growth], gains: Sequence[Gain]) -> str:
    lines = [machine_line(facts), "", *(growth.text(form) for growth in growths), f"{form.title}Threads", ""]
    if gains:
        numbers = ("1 thread, ms", "2 threads, ms", "gain")
        head = ("metaaug_fast", *numbers, f"at least {TWO_THREADS}", "same bits")
        lines.append(form.table(head, [gain.cells() for gain in gains], numbers))
    else:
        lines.append("not judged: this process may use one core only")
    return "\n".join([*lines, ""])
