"""The inner loop: T tasks adapt K steps each, differentiably, in the executor that fits the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import FallbackWarning, NotFusedError, in_one_line
from ..tasks import check_samples, check_tensor, sent, usable
from .exclusive import ONE_AT_A_TIME
from .fallback import FallbackExecutor, probe_output_shape
from .fused import FusedExecutor, refusal
from .losses import Loss, accuracy, check_targets, sample_losses, task_loss
from .lowering.trace import lower
from .problem import (
    NORMS,
    InnerProblem,
    LearningRate,
    MetaOutput,
    Query,
    Support,
    check_inputs,
    check_query,
    check_support,
    inner_problem,
    with_seed,
)
from .reference import unpack

_Set = TypeVar("_Set", Support, Query)
BACKENDS = ("auto", "fused", "fallback")


class Executor(Protocol):
    """What runs an `InnerProblem` whose arguments have been checked.

    P counts all of `problem.parameters`, flattened in their order, per-step tensors whole.
    """

    name: str
    output_shape: tuple[int, ...]

    def adapt(self, problem: InnerProblem, support: Support) -> Tensor:
        """Weights after K steps, `[T, P]`, differentiable; with Adam forward only."""
        ...

    def adapt_mean(
        self, problem: InnerProblem, support: Support, query: Query | None = None
    ) -> tuple[Tensor, MetaOutput | None]:
        """Mean over tasks of `theta_K - theta_0`, `[P]`, without gradient; and theta_K judged on a query set."""
        ...

    def predict(self, problem: InnerProblem, flat: Tensor, x: Tensor) -> Tensor:
        """Outputs `[T, N, *output_shape]` of weights `[T, P]`, differentiable once."""
        ...

    def meta_loss(self, problem: InnerProblem, support: Support, query: Query) -> MetaOutput:
        """Adapt, and judge the result on the query set: a whole meta-step."""
        ...


class FastWeights:
    """T sets of adapted weights, which predict and can be read, stored and differentiated.

    flat: `[T, P]`, every parameter of the model flattened in `named_parameters` order; a batch-norm affine that is
        held per step is there with all its rows.
    problem: what they were adapted by.

    >>> import torch, metaaug_fast as mf
    >>> x, y = torch.randn(3, 5, 1), torch.randn(3, 5, 1)
    >>> fast = mf.inner_loop(mf.models.mlp([1, 8, 1]), x, y, loss="mse")
    >>> len(fast), fast(torch.randn(3, 20, 1)).shape
    (3, torch.Size([3, 20, 1]))
    >>> torch.allclose(fast.module(2)(x[2]), fast(x)[2], atol=1e-5)
    True
    """

    def __init__(self, problem: InnerProblem, flat: Tensor, backend: str = "auto") -> None:
        self.problem = problem
        self.flat = flat
        self._backend = backend

    def __len__(self) -> int:
        return len(self.flat)

    def __repr__(self) -> str:
        model, (tasks, size) = type(self.problem.model).__name__, self.flat.shape
        return f"FastWeights({model}, {tasks} tasks x {size} weights, {self.problem.steps} steps)"

    def __call__(self, x: Tensor) -> Tensor:
        """Output `[T, N, ...]` of each task's weights on its `x` `[T, N, ...]`, differentiable once in both.

        Raises:
            TypeError: `x` is no tensor.
            ValueError: `x` does not hold samples for T tasks, or has another dtype or device than the model.
        """
        check_tensor("x", x)
        if x.ndim < 2 or len(x) != len(self) or not x.shape[1]:
            raise ValueError(f"x must be [{len(self)}, samples, ...] with samples > 0 (got shape {tuple(x.shape)})")
        check_inputs(self.problem, "x", x)
        executor = choose_executor(self.problem, x.shape[2:], self._backend)
        return executor.predict(self.problem, usable(self.flat), usable(x))

    def evaluate(self, x: Tensor, y: Tensor) -> MetaOutput:
        """Loss (the problem's, labels smoothed as there) and accuracy of each task on its `x`, `y`; differentiable.

        Raises:
            ValueError: `x` and `y` do not fit each other, the tasks or the model.
        """
        check_samples("", x, y, tasks=len(self))
        loss, smoothing = self.problem.loss, self.problem.label_smoothing
        prediction = self(x)
        check_targets("y", loss, y, tuple(prediction.shape[2:]))
        y = usable(y)
        if callable(loss):
            losses = torch.stack([task_loss(loss, *task) for task in zip(prediction, y, strict=True)])
        else:
            losses = sample_losses(loss, prediction.flatten(0, 1), y.flatten(0, 1), smoothing).view(len(x), -1).mean(1)
        classes = loss == "cross_entropy" and not y.is_floating_point()
        return MetaOutput(losses.mean(), losses, accuracy(prediction.detach(), y) if classes else None)

    def as_dict(self) -> dict[str, Tensor]:
        """Views of `flat` by name, each `[T, *shape of the model's parameter]`.

        Of a batch-norm affine held per step it is the row that predictions read, that of the last step.
        """
        row = max(self.problem.steps - 1, 0)
        return {
            name: value[:, min(row, value.shape[1] - 1)] if name in self.problem.per_step else value
            for name, value in unpack(self.problem, self.flat).items()
        }

    def module(self, task: int) -> nn.Module:
        """A copy of the model that holds one task's weights, to be called, trained on or saved like any other.

        It predicts as `fast(x)[task]` does. So its batch norms, where `fast` normalises with the batch's own
        statistics, no longer have running ones, and with `batch_norm="frozen"` they are in evaluation mode.

        Raises:
            IndexError: there is no such task.
        """
        weights = {name: value[task].detach() for name, value in self.as_dict().items()}
        with ONE_AT_A_TIME:
            module = copy.deepcopy(self.problem.model)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(weights[name])
        for norm in module.modules():
            if isinstance(norm, NORMS) and self.problem.batch_norm in ("batch", "per_step"):
                norm.track_running_stats = False
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            elif isinstance(norm, NORMS) and self.problem.batch_norm == "frozen":
                norm.eval()
        return module

    def detach(self) -> FastWeights:
        """The same weights without their history."""
        return FastWeights(self.problem, self.flat.detach(), self._backend)


def inner_loop(
    model: nn.Module,
    support_x: Tensor,
    support_y: Tensor,
    lr: LearningRate = 0.01,
    steps: int = 5,
    sample_weight: Tensor | None = None,
    loss: Loss = "cross_entropy",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    adapt: str | Iterable[str] | None = None,
    first_order: bool = False,
    initial: Tensor | None = None,
    backend: str = "auto",
    *,
    rows: Tensor | None = None,
    label_smoothing: float = 0.0,
    batch_norm: str = "batch",
    task_chunk: int | None = None,
    precision: str = "float32",
) -> FastWeights:
    """Adapt a copy of `model` to each of T tasks by K = `steps` gradient steps, differentiably.

    `theta_{k+1} = theta_k - lr_k * (momentum * m_k + g_k + weight_decay * theta_k)`, `g_k` the gradient of the mean
    support loss. Gradients of whatever is made of the result reach, exactly to second order, the model's parameters,
    `lr`, `support_x`, a floating `support_y`, `sample_weight` and `initial`.

    Args:
        support_x: `[T, S, ...]`, of the model's dtype and device.
        support_y: class ids `[T, S]`, class probabilities `[T, S, C]`, or targets of the output's shape.
        lr: a number; a tensor `()` or `[K]`; or a mapping from each adapted name to a number, a tensor of the
            parameter's shape, or either with a leading K.
        sample_weight: `[T, S]`; the loss is then `sum_i w_i loss_i / S`. None: ones.
        loss: "cross_entropy", "mse", "bce" (with logits), or a callable `(prediction, target) -> scalar`
            on one task's samples, which runs in the fallback.
        adapt: names or shell patterns (`"head.*"`) of the parameters that move; None: all that require a gradient.
        first_order: take `g_k` for a constant; support data then get no gradient.
        initial: `[T, P]`, where each task starts, in the place of the model's parameters.
        backend: "fused" (the compiled engine, or `NotFusedError`), "fallback" (`torch.func`), or "auto": fused
            where possible, else the fallback with one warning.
        rows: `[T, K, B]` int64, the support samples that each step sees. None: all of them. They may be on the CPU.
        batch_norm: "batch" (every pass normalises with its own batch, which makes predictions depend on the
            other samples beside a sample), "running" or "frozen" (running statistics).
        task_chunk: how many tasks are in work at a time, which bounds memory. None: the executor's choice.
        precision: of the factors in products of a float32 model on a GPU: "float32", or "tf32" or "bf16", which its
            tensor cores multiply and add up in float32. Weights, activations and all else stay float32, and so do the
            products of models so small that a task fits in one block's shared memory. Not for the fallback, which
            computes as torch is set to.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or shapes, dtypes or devices do not fit together.
        NotFusedError: `backend="fused"`, and the model, loss or device cannot be fused.
        NonFiniteError: NaN or infinity arose; the message names task and step.

    >>> import torch, metaaug_fast as mf
    >>> x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
    >>> weight = torch.ones(4, 10, requires_grad=True)
    >>> fast = mf.inner_loop(mf.models.mlp([1, 8, 1]), x, y, lr=0.1, steps=3, loss="mse", sample_weight=weight)
    >>> fast(torch.randn(4, 10, 1)).square().mean().backward()
    >>> weight.grad.shape
    torch.Size([4, 10])
    """
    if batch_norm == "per_step":
        raise ValueError("batch_norm must be batch, running or frozen (got 'per_step', whose affines a MAML holds)")
    problem = inner_problem(
        model,
        lr,
        steps,
        loss=loss,
        label_smoothing=label_smoothing,
        momentum=momentum,
        weight_decay=weight_decay,
        adapt=adapt,
        first_order=first_order,
        batch_norm=batch_norm,
        task_chunk=task_chunk,
        precision=precision,
    )
    return adapt_tasks(problem, Support(support_x, support_y, sample_weight, rows, initial), backend)


def adapt_tasks(problem: InnerProblem, support: Support, backend: str = "auto") -> FastWeights:
    """Check the support set and adapt every task to it."""
    executor, problem = _prepare(problem, support, backend)
    support = _checked(problem, support, executor)
    return FastWeights(problem, executor.adapt(problem, support), backend)


def adapt_tasks_mean(
    problem: InnerProblem, support: Support, query: Query | None = None, backend: str = "auto"
) -> tuple[Tensor, MetaOutput | None]:
    """Check the sets and give the mean over tasks of `theta_K - theta_0`, `[P]`, and theta_K judged on a query set."""
    executor, problem = _prepare(problem, support, backend)
    support = _checked(problem, support, executor)
    return executor.adapt_mean(problem, support, query and _checked_query(problem, support, query, executor))


def meta_loss(problem: InnerProblem, support: Support, query: Query, backend: str = "auto") -> MetaOutput:
    """Check both sets, adapt every task to its support set and judge it on its query set."""
    executor, problem = _prepare(problem, support, backend)
    support = _checked(problem, support, executor)
    return executor.meta_loss(problem, support, _checked_query(problem, support, query, executor))


def _checked(problem: InnerProblem, support: Support, executor: Executor) -> Support:
    """The support set, with its rows where the samples are: those on the CPU are checked without waiting for a GPU."""
    check_support(problem, support, executor.output_shape)
    support = _lasting(support)
    return support if support.rows is None else replace(support, rows=sent(support.rows, support.x.device))


def _checked_query(problem: InnerProblem, support: Support, query: Query, executor: Executor) -> Query:
    check_query(problem, support, query, executor.output_shape)
    return _lasting(query)


def _lasting(given: _Set) -> _Set:
    """The set with tensors that a graph may keep."""
    if True not in [value.is_inference() for value in vars(given).values() if value is not None]:
        return given
    return replace(given, **{name: usable(value) for name, value in vars(given).items() if value is not None})


def choose_executor(problem: InnerProblem, sample_shape: tuple[int, ...], backend: str = "auto") -> Executor:
    """The executor for a problem on samples of a shape, made once for each model, shape and mode.

    A model counts as another when a part of it is replaced. What else its `forward` reads must stay as it was.

    Raises:
        ValueError: `backend` is none of `BACKENDS`, or the model does not accept such samples.
        NotFusedError: `backend="fused"`, and the model, loss or device cannot be fused.
    """
    return _choose(problem, sample_shape, backend)[0]


def fingerprint(module: nn.Module) -> tuple[list[object], list[nn.Module]]:
    """A value that changes when parts of a module are replaced, converted, frozen or unfrozen; and its submodules.

    Identities are unique only while their objects live: who keeps the value keeps the submodules too. Runs in every
    meta-step, hence no `named_parameters`, which takes three times as long.
    """
    parts: list[nn.Module] = [module]
    parameters: list[nn.Parameter] = []
    buffers: list[Tensor | None] = []
    with ONE_AT_A_TIME:
        for part in parts:
            if part._parameters:
                parameters += [value for value in part._parameters.values() if value is not None]
            if part._buffers:
                buffers += part._buffers.values()
            if part._modules:
                parts += [child for child in part._modules.values() if child is not None]
    tensors = [*parameters, *(value for value in buffers if value is not None)]
    # A tensor's `data` may be set to another's of any kind. What is lazy has no shape, which its class tells.
    shaped = [value for value in tensors if type(value) in _PLAIN or not is_lazy(value)]
    mark = [*map(id, parts), *map(id, parameters), *map(id, buffers), *map(type, tensors), *map(_KIND, shaped)]
    return mark, parts[1:]


_PLAIN = (nn.Parameter, Tensor)
_KIND = attrgetter("requires_grad", "dtype", "device", "shape")


@dataclass
class _Known:
    """The executors of one model as it was when `mark` was taken, and the reasons already warned of."""

    mark: list[object] = field(default_factory=list)
    parts: list[nn.Module] = field(default_factory=list)
    executors: dict[tuple[object, ...], tuple[Executor, bool]] = field(default_factory=dict)
    reasons: set[str] = field(default_factory=set)


# Executors must not hold their model, or it would never be freed.
_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _prepare(problem: InnerProblem, support: Support, backend: str) -> tuple[Executor, InnerProblem]:
    """The executor, and the problem with a fresh dropout seed if anything may drop."""
    check_samples("support", support.x, support.y)
    check_inputs(problem, "support_x", support.x)
    executor, drops = _choose(problem, support.x.shape[2:], backend)
    return executor, with_seed(problem) if drops else problem


def _choose(problem: InnerProblem, sample_shape: tuple[int, ...], backend: str) -> tuple[Executor, bool]:
    """An executor, and whether it may drop anything."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} (got {backend!r})")
    mark, parts = fingerprint(problem.model)
    key = (
        backend,
        sample_shape,
        problem.batch_norm,
        callable(problem.loss),
        problem.training,
        *(part.training for part in parts),
        *(part.__dict__.get("p") for part in parts),  # a dropout's, which may be set at any time
    )
    with ONE_AT_A_TIME:
        known = _KNOWN.get(problem.model)
        if known is None:
            known = _KNOWN[problem.model] = _Known()
        if mark != known.mark:
            known.mark, known.parts = mark, parts
            known.executors.clear()
        if key not in known.executors:
            known.executors[key] = _make(problem, tuple(sample_shape), backend, known.reasons)
        return known.executors[key]


def _make(
    problem: InnerProblem, sample_shape: tuple[int, ...], backend: str, reasons: set[str]
) -> tuple[Executor, bool]:
    if backend != "fallback":
        try:
            return _make_fused(problem, sample_shape)
        except NotFusedError as error:
            if backend == "fused":
                raise
            reason = str(error)
            if problem.precision != "float32":
                reason += f", and it does not compute in {problem.precision}"
        if reason not in reasons:
            reasons.add(reason)
            warnings.warn(
                f"{type(problem.model).__name__} runs in the fallback, which is slower: {reason}. "
                'explain(model, example_x) shows what is fused, backend="fused" makes this an error, '
                'backend="fallback" accepts it.',
                FallbackWarning,
                stacklevel=2,
            )
    return FallbackExecutor(problem.model, _output_shape(problem, sample_shape)), problem.training


def _make_fused(problem: InnerProblem, sample_shape: tuple[int, ...]) -> tuple[Executor, bool]:
    if reason := refusal(next(iter(problem.parameters.values()))):
        raise NotFusedError(reason)
    if callable(problem.loss):
        raise NotFusedError(f"the fused engine needs a named loss (got the callable {_name(problem.loss)})")
    fixed = problem.batch_norm == "frozen" or (problem.batch_norm == "running" and not problem.training)
    graph = lower(problem.model, sample_shape, fixed_statistics=fixed, drop=problem.training)
    executor = FusedExecutor(graph, problem.model)
    executor.engine(problem)  # the engine may refuse a graph too
    return executor, any(op.kind == "dropout" for op in graph.ops)


def _name(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _output_shape(problem: InnerProblem, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the model's output per sample, from one pass over zeros."""
    like = next(iter(problem.parameters.values()))
    try:
        return probe_output_shape(problem.model, torch.zeros(1, *sample_shape, dtype=like.dtype, device=like.device))
    except Exception as error:  # the user's forward may raise anything
        got = in_one_line(error, name=True)
        raise ValueError(f"model must accept samples of shape {sample_shape} (got {got})") from error
