"""Whether a rival computes what it should."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

import numpy as np
import torch

from .. import reference
from ..problem import Query, Support
from ..tasks import TaskBatch
from .row import Row
from .worker import RivalError
from .workloads import Workload, sets

EPSILON = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
JUDGED = 20


class Check:
    """Compares what rivals return with the reference in float64.

    A float32 result within rounding is exact. Where it is further off, a ReLU or a pooling may have taken the other
    side of a kink, which many steps magnify: then the rival's own float64 result on two tasks decides.
    """

    FEW = 2

    def __init__(self, workload: Workload, tasks: TaskBatch) -> None:
        self.workload = workload
        self.tasks = tasks
        self._known: dict[int, list[np.ndarray]] = {}

    def judge(self, row: Row, found: list[np.ndarray], again: Callable[[TaskBatch], list[np.ndarray]]) -> None:
        """Set the row's status, error and note; `again` gives the rival's result on a few tasks in float64."""
        row.error = self._error(found, self.tasks.tasks)
        if row.error <= self._tolerance(torch.float32):
            return
        few = TaskBatch(*(each[: self.FEW] for each in sets(self.tasks))).to(torch.float64)
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
        got, wanted = (_join(self.workload, arrays) for arrays in (found, self._known[tasks]))
        if self.workload.kind == "evaluation":
            got = got[: len(wanted)]
        if got.shape != wanted.shape or not np.isfinite(got).all():
            return float("inf")
        return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def expected(workload: Workload, tasks: int) -> list[np.ndarray]:
    """What a call must return on the workload's first `tasks`: the reference in float64, a task at a time.

    Of an evaluation the losses of no more than `JUDGED` tasks.
    """
    inputs = workload.inputs().to(torch.float64)
    learner = workload.learner(workload.model().double())
    problem = learner.problem()
    if workload.kind == "evaluation":
        tasks = min(tasks, JUDGED)
    results: list[np.ndarray] = []
    for task in range(tasks):
        x, y, query_x, query_y = (each[task : task + 1] for each in sets(inputs))
        support, query = Support(x, y), Query(query_x, query_y)
        if workload.kind == "maml":
            loss = reference.meta_loss(problem, support, query).loss
            parts = torch.autograd.grad(loss, list(problem.parameters.values()))
        elif workload.kind == "reptile":
            moved = reference.unpack(problem, reference.adapt(problem, support)[0])
            parts = tuple(moved[name] - value for name, value in problem.parameters.items())
        else:
            parts = (reference.meta_loss(problem, support, query).task_losses,)
        results.append(np.concatenate([part.detach().numpy().ravel() for part in parts]))
    if workload.kind == "evaluation":
        return results
    mean = np.mean(results, 0)
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
