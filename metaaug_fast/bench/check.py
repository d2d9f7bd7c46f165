"""Whether a rival computes what it should."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..engine import reference
from ..engine.problem import InnerProblem, Query, Support
from ..tasks import TaskBatch
from .row import Row
from .worker import RivalError
from .workloads import Workload

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
        few = self.tasks[: self.FEW].to(torch.float64)
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
        wanted = self._known[tasks]
        if self.workload.kind == "evaluation":
            found = [np.concatenate(found)[: len(wanted[0])]]
        if [each.shape for each in found] != [each.shape for each in wanted]:
            return float("inf")
        got, right = (self._join(arrays) for arrays in (found, wanted))
        return float(np.linalg.norm(got - right) / np.linalg.norm(right)) if np.isfinite(got).all() else float("inf")

    def _join(self, arrays: list[np.ndarray]) -> np.ndarray:
        """One vector of all that is checked."""
        names = (name for name, _ in self.workload.model().named_parameters())
        pairs = zip(names, arrays, strict=False)  # an evaluation has one array
        return np.concatenate([each.ravel() for name, each in pairs if self.workload.checks(name)])


def expected(workload: Workload, tasks: int) -> list[np.ndarray]:
    """What a call must return on the workload's first `tasks`: the reference in float64, a task at a time.

    Of an evaluation the losses of no more than `JUDGED` tasks.
    """
    inputs = workload.inputs().to(torch.float64)
    problem = workload.learner(workload.model().double()).problem()
    if workload.kind == "evaluation":
        tasks = min(tasks, JUDGED)
    each_task = []
    for task in range(tasks):
        x, y, query_x, query_y = inputs[task].tensors
        each_task.append(_of_a_task(workload.kind, problem, Support(x, y), Query(query_x, query_y)))
    combine = np.concatenate if workload.kind == "evaluation" else np.mean
    return [combine(arrays, axis=0) for arrays in zip(*each_task, strict=True)]


def _of_a_task(kind: str, problem: InnerProblem, support: Support, query: Query) -> list[np.ndarray]:
    if kind == "reptile":
        moved = reference.unpack(problem, reference.adapt(problem, support)[0])
        return [(moved[name] - value).detach().numpy() for name, value in problem.parameters.items()]
    judged = reference.meta_loss(problem, support, query)
    if kind == "evaluation":
        return [judged.task_losses.detach().numpy()]
    return [each.numpy() for each in torch.autograd.grad(judged.loss, list(problem.parameters.values()))]
