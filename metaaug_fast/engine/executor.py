"""Who runs an inner problem: the fused engine where it can, else the fallback; chosen once for each model and shape."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import check_choice
from ..errors import FallbackWarning, NotFusedError, in_one_line
from ..tasks import MetaOutput
from .exclusive import ONE_AT_A_TIME
from .fallback import FallbackExecutor, probe_output_shape
from .fused import FusedExecutor, refusal
from .losses import named
from .lowering.trace import lower
from .problem import InnerProblem, Query, Support
from .split import SplitExecutor, find_cut, tail_problem

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

    def judge_steps(self, problem: InnerProblem, support: Support, query: Query) -> list[MetaOutput]:
        """theta_0 .. theta_K judged on the query set, K + 1 of them, without gradient; no running statistics move."""
        ...


def choose_executor(
    problem: InnerProblem, sample_shape: tuple[int, ...], backend: str = "auto", *, ids: bool = False
) -> Executor:
    """The executor for a problem on samples of a shape, made once for each model, shape and mode.

    A model counts as another when a part of it is replaced. What else its `forward` reads must stay as it was.

    Args:
        ids: samples are token ids, for which the fallback runs.

    Raises:
        ValueError: `backend` is none of `BACKENDS`, or the model does not accept such samples.
        NotFusedError: `backend="fused"`, and the model, loss or device cannot be fused.
    """
    return choose(problem, sample_shape, backend, ids)[0]


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


def choose(
    problem: InnerProblem, sample_shape: tuple[int, ...], backend: str, ids: bool = False
) -> tuple[Executor, bool]:
    """An executor, and whether it may drop anything."""
    check_choice("backend", backend, BACKENDS)
    mark, parts = fingerprint(problem.model)
    key = (
        backend,
        ids,
        sample_shape,
        problem.batch_norm,
        callable(problem.loss),
        problem.training,
        tuple(problem.rates),  # of which a body that does not adapt can be told
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
            known.executors[key] = _make(problem, tuple(sample_shape), backend, ids, known.reasons)
        return known.executors[key]


def _make(
    problem: InnerProblem, sample_shape: tuple[int, ...], backend: str, ids: bool, reasons: set[str]
) -> tuple[Executor, bool]:
    if backend != "fallback":
        try:
            if ids:
                raise NotFusedError("the fused engine takes floating inputs (got token ids, int64)")
            return _make_fused(problem, sample_shape)
        except NotFusedError as error:
            if split := _make_split(problem, sample_shape, backend, ids):
                return split
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
    return FallbackExecutor(problem.model, _output_shape(problem, sample_shape, ids)), problem.training


def _make_fused(problem: InnerProblem, sample_shape: tuple[int, ...]) -> tuple[Executor, bool]:
    if reason := refusal(next(iter(problem.parameters.values()))):
        raise NotFusedError(reason)
    if callable(problem.loss):
        option = named(problem.loss)[2]
        why = f", for {option}" if option else ""
        raise NotFusedError(f"the fused engine needs a named loss (got the callable {_name(problem.loss)}{why})")
    fixed = problem.batch_norm == "frozen" or (problem.batch_norm == "running" and not problem.training)
    graph = lower(problem.model, sample_shape, fixed_statistics=fixed, drop=problem.training)
    executor = FusedExecutor(graph, problem.model)
    executor.engine(problem)  # the engine may refuse a graph too
    return executor, any(op.kind == "dropout" for op in graph.ops)


def _make_split(
    problem: InnerProblem, sample_shape: tuple[int, ...], backend: str, ids: bool
) -> tuple[Executor, bool] | None:
    """An executor for a model whose body does not adapt, and whether what does may drop anything."""
    try:
        whole = FallbackExecutor(problem.model, _output_shape(problem, sample_shape, ids))
        cut = find_cut(problem, sample_shape, ids)
    except ValueError:  # the whole is none for the fallback, which says so
        return None
    if cut is None:
        return None
    tail, drops = choose(tail_problem(problem, cut.path), cut.shape, backend)
    return SplitExecutor(cut, tail, whole), drops


def _name(function: object) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _output_shape(problem: InnerProblem, sample_shape: tuple[int, ...], ids: bool) -> tuple[int, ...]:
    """Shape of the model's output per sample, from one pass over zeros."""
    like = next(iter(problem.parameters.values()))
    try:
        zeros = torch.zeros(1, *sample_shape, dtype=torch.int64 if ids else like.dtype, device=like.device)
        return probe_output_shape(problem.model, zeros)
    except Exception as error:  # the user's forward may raise anything
        got = in_one_line(error, name=True)
        raise ValueError(f"model must accept samples of shape {sample_shape} (got {got})") from error
