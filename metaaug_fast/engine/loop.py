"""The inner loop: T tasks adapt K steps each, differentiably, in the executor that fits the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..tasks import MetaOutput, check_samples, check_tensor, class_ids, sent, usable
from .choice import choose
from .executor import Executor
from .fast_weights import FastWeights
from .losses import Loss
from .problem import (
    InnerProblem,
    LearningRate,
    Query,
    Support,
    check_inputs,
    check_query,
    check_support,
    inner_problem,
    with_seed,
)

_Set = TypeVar("_Set", Support, Query)


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
        support_x: `[T, S, ...]`, of the model's dtype and device; or token ids, int64, for which the fallback runs.
        support_y: class ids `[T, S]` (integers), class probabilities `[T, S, C]`, or targets of the output's shape.
        lr: a number; a tensor `()` or `[K]`; or a mapping from each adapted name to a number, a tensor of the
            parameter's shape, or either with a leading K. `[K]` of a parameter with the shape `[K]` is one for each
            element; repeated to `[K, K]`, either is said without doubt.
        sample_weight: `[T, S]`, of either sign; the loss is then `sum_i w_i loss_i / S`. None: ones.
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
    check_tensor("support_y", support_y)
    return adapt_tasks(problem, Support(support_x, class_ids(support_y), sample_weight, rows, initial), backend)


def adapt_tasks(problem: InnerProblem, support: Support, backend: str = "auto") -> FastWeights:
    """Check the support set and adapt every task to it."""
    executor, problem, support = prepare(problem, support, backend)
    return FastWeights(problem, executor.adapt(problem, support), backend)


def adapt_tasks_mean(
    problem: InnerProblem, support: Support, query: Query | None = None, backend: str = "auto"
) -> tuple[Tensor, MetaOutput | None]:
    """Check the sets and give the mean over tasks of `theta_K - theta_0`, `[P]`, and theta_K judged on a query set."""
    executor, problem, support = prepare(problem, support, backend)
    return executor.adapt_mean(problem, support, query and _checked_query(problem, support, query, executor))


def meta_loss(problem: InnerProblem, support: Support, query: Query, backend: str = "auto") -> MetaOutput:
    """Check both sets, adapt every task to its support set and judge it on its query set.

    Raises:
        ValueError: they do not fit, or support data require a gradient in first order, which gives them none.
    """
    _check_reached(problem, support, query)
    executor, problem, support = prepare(problem, support, backend)
    return executor.meta_loss(problem, support, _checked_query(problem, support, query, executor))


def judge_steps(problem: InnerProblem, support: Support, query: Query, backend: str = "auto") -> list[MetaOutput]:
    """Check both sets, adapt every task to its support set once, and judge it on its query set after 0, 1, ... K steps.

    Entry k of the K + 1 is what `meta_loss` gives for `with_steps(problem, k)` and the first k of the support set's
    `rows`, to rounding, but without gradient; dropout drops the same in all of them. Running statistics never move, not
    even in training mode under `batch_norm="running"`, where `meta_loss` moves them.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the query set weighs the steps.
        NonFiniteError: NaN or infinity arose; the message names task and step.

    >>> import torch, metaaug_fast as mf
    >>> from metaaug_fast.engine.problem import inner_problem
    >>> model, x, y = mf.models.mlp([1, 8, 1]), torch.randn(2, 4, 5, 1), torch.randn(2, 4, 5, 1)
    >>> problem = inner_problem(model, lr=0.01, steps=3, loss="mse")
    >>> [out.task_losses.shape for out in judge_steps(problem, Support(x[0], y[0]), Query(x[1], y[1]))]
    [torch.Size([4]), torch.Size([4]), torch.Size([4]), torch.Size([4])]
    """
    if query.step_weights is not None:
        got = type(query.step_weights).__name__
        raise ValueError(f"step_weights must be None where every step is judged by itself (got a {got})")
    executor, problem, support = prepare(problem, support, backend)
    return executor.judge_steps(problem, support, _checked_query(problem, support, query, executor))


def prepare(problem: InnerProblem, support: Support, backend: str) -> tuple[Executor, InnerProblem, Support]:
    """Check the support set; who runs it, the problem with a fresh dropout seed if anything may drop, and the set.

    Its rows come to lie where the samples are: those on the CPU are checked without waiting for a GPU.
    """
    check_samples("support", support.x, support.y)
    check_inputs(problem, "support_x", support.x)
    executor, drops = choose(problem, support.x.shape[2:], backend, support.x.dtype == torch.int64)
    check_support(problem, support, executor.output_shape)
    support = _lasting(support)
    if support.rows is not None:
        support = replace(support, rows=sent(support.rows, support.x.device))
    return executor, with_seed(problem) if drops else problem, support


def _check_reached(problem: InnerProblem, support: Support, query: Query) -> None:
    """ValueError where support data were made by what would learn, and the first order leaves its gradient out.

    Where queries were made, too, what lies in front of the model learns from these. Of a leaf the caller sees that its
    gradient is 0.
    """
    if not problem.first_order or not torch.is_grad_enabled():
        return
    wanting = {
        "support_x": support.x if not _was_made(query.x) else None,
        "support_y": support.y,
        "sample_weight": support.sample_weight,
    }
    for name, value in wanting.items():
        if _was_made(value):
            raise ValueError(
                f"{name} must not require a gradient in first order, which takes the inner gradients for constants "
                "(got one that does): a policy, weights or labels learn in second order, first_order=False"
            )


def _was_made(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf


def _checked_query(problem: InnerProblem, support: Support, query: Query, executor: Executor) -> Query:
    check_query(problem, support, query, executor.output_shape)
    return _lasting(query)


def _lasting(given: _Set) -> _Set:
    """The set with tensors that a graph may keep."""
    if True not in [value.is_inference() for value in vars(given).values() if value is not None]:
        return given
    return replace(given, **{name: usable(value) for name, value in vars(given).items() if value is not None})
