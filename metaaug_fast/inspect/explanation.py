"""What of a module the fused engine runs, what it costs, and why the rest is not fused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..engine.choice import choose_executor
from ..engine.fused import FusedExecutor, refusal
from ..engine.lowering.graph import Op, Refusal
from ..engine.lowering.table import Shape, batched
from ..engine.lowering.trace import survey
from ..engine.problem import InnerProblem, inner_problem
from ..engine.split import SplitExecutor
from ..errors import FallbackWarning
from ..learners.gradient import GradientLearner
from ..report.tables import plain


@dataclass(frozen=True)
class Row:
    """One op. `shape` (of its output), `parameters` and `flops` are per sample; unknown ones are None."""

    op: str
    path: str
    shape: Shape | None
    parameters: int
    flops: int | None
    fused: bool
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """`explain`'s answer; printed, it is a table.

    fused: the fused engine runs this model. reason: why it does not, or "". rows: every op, in order.
    parameters: of the model. flops: of one sample's forward pass through the rows whose cost is known.
    device: what example_x is on, "cpu" or "cuda". path: on a GPU, how tasks of N samples run there.
    split: where only a part adapts and the rest is not fused, how the two run: the rest once, the part by itself.
    """

    fused: bool
    reason: str
    rows: tuple[Row, ...]
    parameters: int
    flops: int
    device: str = "cpu"
    path: str = ""
    split: str = ""

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            shape = "?" if row.shape is None else batched(row.shape)
            cost = "?" if row.flops is None else f"{row.flops:,}"
            lines.append(
                (row.op, row.path, shape, f"{row.parameters:,}", cost, "yes" if row.fused else f"no: {row.reason}")
            )
        partial = "" if all(row.flops is not None for row in self.rows) else " + ?"
        lines.append(("total", "", "", f"{self.parameters:,}", f"{self.flops:,}{partial}", ""))
        verdict = (
            f"fused engine ({self.device.upper()}){self.path and ', '}{self.path}"
            if self.fused
            else f"fallback (torch.func), because {self.reason}"
        )
        if self.split:
            verdict = f"{self.split}; the whole would run on the {verdict}"
        head = ("op", "where", "output", "parameters", "FLOPs", "fused")
        return f"{plain(head, lines, numbers=('parameters', 'FLOPs'))}\nruns on: {verdict}"

    __repr__ = __str__


def explain(model: nn.Module, example_x: Tensor, adapt: str | Iterable[str] | None = None) -> Explanation:
    """What the fused engine makes of `model` in its present mode, op by op: shape, parameters, FLOPs, fused or why not.

    FLOPs are those of one sample's forward pass: a multiply-add counts 2, an activation 1 an element, a normalisation 8
    (2 with fixed statistics). The table goes on behind an op that is not fused, as far as shapes can be found; "yes"
    then says that the engine knows the op. A parameter that several ops share counts once in the total.

    Args:
        model: a module, or a learner that adapts one by gradients, whose own `adapt` then counts.
        example_x: an input of the model, `[N, ...]`; only its shape, dtype and device matter, and N only for `path`.
        adapt: names or patterns of what adapts, see `inner_loop`. Where a body that does not adapt keeps the model from
            being fused, it says whether the rest is.

    Raises:
        ValueError: `example_x` has no batch dimension, or `adapt` names nothing.

    >>> import torch
    >>> explain(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 3))
    op      where  output  parameters  FLOPs  fused
    linear  0      [N, 4]          16     28  yes
    relu    1      [N, 4]           0      4  yes
    linear  2      [N, 2]          10     18  yes
    total                          26     50
    runs on: fused engine (CPU)
    """
    if example_x.ndim < 2:
        raise ValueError(f"example_x must be a batch [N, ...] (got shape {tuple(example_x.shape)})")
    problem = None
    if isinstance(model, GradientLearner):
        problem = model.problem()
        model = problem.model
    elif adapt is not None:
        problem = inner_problem(model, 0.01, 1, adapt=adapt)
    found = survey(model, tuple(example_x.shape[1:]), drop=model.training, dtype=example_x.dtype)
    named = dict(model.named_parameters())
    rows = tuple(_row(step, named, found.shapes) for step in found.steps)
    reason = str(found.blocker) if found.blocker else _misplaced(example_x, named.values())
    return Explanation(
        fused=not reason,
        reason=reason,
        rows=rows,
        parameters=sum(value.numel() for value in named.values()),
        flops=sum(row.flops or 0 for row in rows),
        device=example_x.device.type,
        path=_gpu_path(model, example_x) if example_x.is_cuda and not reason else "",
        split=_split(problem, example_x) if problem is not None and reason else "",
    )


def _split(problem: InnerProblem, example_x: Tensor) -> str:
    """How a model that is not fused runs in two, if it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        ids = example_x.dtype == torch.int64
        executor = choose_executor(problem, tuple(example_x.shape[1:]), ids=ids)
    return executor.name if isinstance(executor, SplitExecutor) else ""


def _gpu_path(model: nn.Module, example_x: Tensor) -> str:
    """How the CUDA engine runs one inner step on N support samples, and the query."""
    if not any(value.requires_grad for value in model.parameters()):
        return ""
    problem = inner_problem(model, 0.01, 1)
    executor = choose_executor(problem, tuple(example_x.shape[1:]))
    return executor.gpu_path(problem, len(example_x)) if isinstance(executor, FusedExecutor) else ""


def _misplaced(example_x: Tensor, parameters: Iterable[Tensor]) -> str:
    """Why a module of fused ops does not run on the engine all the same."""
    for value in (example_x, *parameters):
        if reason := refusal(value):
            return reason
    return ""


def _row(step: Op | Refusal, named: dict[str, nn.Parameter], shapes: tuple[Shape, ...]) -> Row:
    params = {name: tuple(named[name].shape) for name in step.params if name is not None}
    count = sum(math.prod(shape) for shape in params.values())
    if isinstance(step, Refusal):
        return Row(step.name, step.path, step.shape, count, None, False, step.reason)
    flops = _flops(step, [shapes[value] for value in step.inputs], list(params.values()))
    return Row(step.kind, step.path, step.shape, count, flops, True)


def _flops(op: Op, inputs: list[Shape], params: list[Shape]) -> int:
    size = math.prod(op.shape)
    if op.kind in ("linear", "conv2d"):
        weight, *bias = params
        return size * (2 * math.prod(weight[1:]) + len(bias))
    if op.kind.endswith("_norm"):
        # Scale and shift 2; with statistics of its own also mean 1, variance 3, subtract and divide 2.
        return size * (2 if op.attributes.get("fixed") else 8)
    if op.kind in ("max_pool", "avg_pool"):
        return size * math.prod(op.attributes["kernel"])  # type: ignore[arg-type]
    if op.kind == "mean_pool":
        return math.prod(inputs[0])
    return 0 if op.kind == "flatten" else size
