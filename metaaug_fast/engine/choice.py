"""Who runs an inner problem: the fused engine where it can, else the fallback; chosen once for each model and shape."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..checks import check_choice
from ..errors import FallbackWarning, NotFusedError, in_one_line
from .executor import Executor
from .fallback import FallbackExecutor, probe_output_shape
from .fused import FusedExecutor, refusal
from .losses import named
from .lowering.trace import lower
from .problem import InnerProblem
from .remembered import Remembered
from .split import SplitExecutor, find_cut, tail_problem

BACKENDS = ("auto", "fused", "fallback")


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


_EXECUTORS: Remembered[tuple[Executor, bool]] = Remembered()
_WARNED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # of what


def choose(
    problem: InnerProblem, sample_shape: tuple[int, ...], backend: str, ids: bool = False
) -> tuple[Executor, bool]:
    """An executor, and whether it may drop anything."""
    check_choice("backend", backend, BACKENDS)
    # By the rates a body is told that does not adapt.
    key = (backend, ids, sample_shape, problem.batch_norm, callable(problem.loss), tuple(problem.rates))
    return _EXECUTORS.get(problem.model, key, lambda: _make(problem, tuple(sample_shape), backend, ids))


def _make(problem: InnerProblem, sample_shape: tuple[int, ...], backend: str, ids: bool) -> tuple[Executor, bool]:
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
        warned = _WARNED.setdefault(problem.model, set())
        if reason not in warned:
            warned.add(reason)
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
