"""The executor for any module: the engine's reverse recursion in torch, batched over tasks by `torch.vmap`.

Per task, from v_K = dL/dtheta_K and with m_bar = 0, backwards over the steps (all products elementwise):

    u      = m_bar - alpha_k v_{k+1}                    the adjoint of the direction m_{k+1}
    v_k    = v_{k+1} + H_k u + weight_decay u           H_k = d2 loss / dtheta2 at theta_k
    dL/dx += d/deps grad_x loss(theta_k + eps u)        and so for y and the sample weights
    dL/dalpha_k = -v_{k+1} m_{k+1}
    m_bar  = momentum u

The four derivatives along u are one product: the gradient of `g_k . u` with respect to theta_k, x, y and the
weights. Kept from the forward sweep: theta_1 .. theta_K, nothing else (and the directions, where a rate is learned
under momentum). Every pass builds the graph of one chunk of tasks and drops it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FallbackWarning, NonFiniteError
from ..tasks import MetaOutput, usable
from .autograd import once_differentiable
from .losses import accuracies, task_loss
from .norms import BatchStatistics, forward, update_running
from .problem import InnerProblem, Query, Support
from .reference import pack, unpack

GRAPH_BYTES = 2**29
"""What the graphs of one chunk of tasks may take, where `task_chunk` does not say how many tasks that is."""


class FallbackExecutor:
    """Runs the inner loop of any `nn.Module`; `executor.Executor` says what its methods promise.

    A module that `torch.vmap` refuses (it reads values, or writes in place) runs task by task, after one warning.
    Tensors that the model or a callable loss captures beside the parameters are constants.

    Args:
        model: its forward takes `[N, ...]` and returns one tensor `[N, *output_shape]`.
        output_shape: of the model's output, per sample; `probe_output_shape` finds it.

    Raises:
        ValueError: the model holds TorchScript modules, whose norms and dropout cannot be replaced.
    """

    name = "fallback"

    def __init__(self, model: nn.Module, output_shape: tuple[int, ...]) -> None:
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(f"model must hold no TorchScript modules (got one at {path!r})")
        self._model_name = type(model).__name__
        self.output_shape = tuple(output_shape)
        self.vectorised = True
        self._graph_bytes: dict[torch.Size, int] = {}

    def adapt(self, problem: InnerProblem, support: Support) -> Tensor:
        """Adapted weights `[T, P]`, differentiable once (with Adam, not at all).

        Raises:
            NonFiniteError: a task's support loss or its adapted weights are not finite.
        """
        if torch.is_grad_enabled() and problem.optimizer == "sgd":
            return self._trajectory(problem, support)[-1]
        return self._adapted(problem, support)

    @torch.no_grad()
    def adapt_mean(
        self, problem: InnerProblem, support: Support, query: Query | None = None
    ) -> tuple[Tensor, MetaOutput | None]:
        """Mean over tasks of `theta_K - theta_0`, `[P]`, without gradient, and how theta_K does on the query set."""
        adapted = self._adapted(problem, support)
        mean = (adapted - _start(problem, support)).mean(0)
        return mean, None if query is None else self._judge(problem, query, {problem.steps: adapted})

    def predict(self, problem: InnerProblem, flat: Tensor, x: Tensor) -> Tensor:
        """Output `[T, N, *output_shape]` of each task's weights `flat` `[T, P]` on `x`, differentiable once."""
        return _Predict.apply(self, problem, problem.steps, None, flat, x)

    def meta_loss(self, problem: InnerProblem, support: Support, query: Query) -> MetaOutput:
        """The meta-step; in training mode under `batch_norm="running"` the model's statistics move afterwards.

        Raises:
            NonFiniteError: a task's support or query loss, or its adapted weights, are not finite.
        """
        if query.step_weights is None:
            judged = {problem.steps: self.adapt(problem, support)}
        else:
            judged = dict(enumerate(self._trajectory(problem, support)[1:], start=1))
        return self._judge(problem, query, judged)

    @torch.no_grad()
    def judge_steps(self, problem: InnerProblem, support: Support, query: Query) -> list[MetaOutput]:
        """theta_0 .. theta_K on the query set, of which one at a time is kept; no running statistics move.

        Raises:
            NonFiniteError: a task's support or query loss, or its adapted weights, are not finite.
        """
        start = _start(problem, support)
        rates = _rates(problem) if problem.steps else start  # which no step reads
        chunks = [self._chunks(problem, x) for x in (support.x, query.x)]
        judged = []
        for chunk in min(chunks, key=lambda each: each[0].stop):
            first, x, y = chunk.start, query.x[chunk], query.y[chunk]
            descent = self._descend(problem, _take(support, chunk), start[chunk], rates, first)
            weights = chain([start[chunk]], (theta for theta, _ in descent))
            judged.append([self._judged(problem, theta, x, y, step, first) for step, theta in enumerate(weights)])
        return [_over_tasks(step) for step in zip(*judged, strict=True)]

    def _judged(
        self, problem: InnerProblem, theta: Tensor, x: Tensor, y: Tensor, step: int, first: int
    ) -> tuple[Tensor, Tensor | None]:
        """Query losses after `step` steps, and accuracies, of a chunk of tasks that starts at `first`."""
        prediction = self._predictions(problem, theta, x, step, first)
        return self._query_losses(problem, prediction, y, step, first), accuracies(problem.loss, prediction, y)

    def _judge(self, problem: InnerProblem, query: Query, judged: dict[int, Tensor]) -> MetaOutput:
        """Query losses of the weights after each of some steps, weighted and together."""
        last, weights = problem.steps, query.step_weights
        learns = problem.batch_norm == "running" and problem.training
        statistics: list[list[BatchStatistics]] = []
        losses = []
        for step, theta in judged.items():
            collected = statistics if learns and step == last else None
            prediction = _Predict.apply(self, problem, step, collected, theta, query.x)
            losses.append(self._query_losses(problem, prediction, query.y, step))
        task_losses = losses[0] if weights is None else weights @ torch.stack(losses)
        if learns:
            update_running(problem.model, _over_chunks(statistics))
        return MetaOutput(task_losses.mean(), task_losses, accuracies(problem.loss, prediction, query.y))

    def _trajectory(self, problem: InnerProblem, support: Support) -> tuple[Tensor, ...]:
        """theta_0 .. theta_K, each `[T, P]`, in the autograd graph."""
        start = _start(problem, support)
        if not problem.steps:
            return (start,)
        rates = _rates(problem)
        return start, *_Adapt.apply(
            self, problem, support.rows, start, rates, support.x, support.y, support.sample_weight
        )

    @torch.no_grad()
    def _adapted(self, problem: InnerProblem, support: Support) -> Tensor:
        """theta_K `[T, P]`, without a graph and without keeping the others."""
        start = _start(problem, support)
        if not problem.steps:
            return start
        rates, adapted = _rates(problem), _empty(start)
        for chunk in self._chunks(problem, support.x):
            for theta, _ in self._descend(problem, _take(support, chunk), start[chunk], rates, chunk.start):
                last = theta
            adapted[chunk] = last
        return adapted

    def _descend(
        self, problem: InnerProblem, support: Support, theta: Tensor, rates: Tensor, first: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """theta_{k+1} and the direction that led there, k = 0 .. K-1, of a chunk of tasks that starts at `first`."""
        moment = square = torch.zeros_like(theta)
        decay = problem.betas
        for step in range(problem.steps):
            losses, gradient = self._gradient(problem, support, theta, step, first)
            _check_finite(losses, first, f"step {step}")
            gradient = gradient + problem.weight_decay * theta
            if problem.optimizer == "sgd":
                direction = moment = problem.momentum * moment + gradient
            else:
                moment = decay[0] * moment + (1 - decay[0]) * gradient
                square = decay[1] * square + (1 - decay[1]) * gradient.square()
                deviation = (square / (1 - decay[1] ** (step + 1))).sqrt() + problem.eps
                direction = moment / (1 - decay[0] ** (step + 1)) / deviation
            theta = theta - _at_step(rates, step) * direction
            if step == problem.steps - 1:
                _check_finite(theta, first, f"step {step}", "an adapted weight")
            yield theta, direction

    def _gradient(
        self, problem: InnerProblem, support: Support, theta: Tensor, step: int, first: int
    ) -> tuple[Tensor, Tensor]:
        """Support loss `[t]` and g_k `[t, P]`, under `torch.inference_mode` too."""
        with torch.inference_mode(False), torch.enable_grad():
            theta = _leaf(usable(theta))
            losses = self._support_losses(problem, _take(support, slice(None)), theta, step, first)
            return losses.detach(), _gradients(losses.sum(), [theta])[0]

    @torch.enable_grad()
    def _gradient_along(
        self,
        problem: InnerProblem,
        support: Support,
        theta: Tensor,
        step: int,
        first: int,
        u: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """g_k, `H_k u`, and the gradient along u of those of x, y and sample weight that `needs` names."""
        theta = _leaf(theta)
        x, y, weight = data = _leaves((support.x, support.y, support.sample_weight), needs)
        losses = self._support_losses(problem, Support(x, y, weight, support.rows), theta, step, first)
        gradient = _gradients(losses.sum(), [theta], create_graph=True)[0]
        curved, *along = _gradients((gradient * u).sum(), [theta, *_asked(data, needs)])
        return gradient.detach(), curved, along

    def _support_losses(self, problem: InnerProblem, support: Support, theta: Tensor, step: int, first: int) -> Tensor:
        """Support loss at inner step `step` of each task of a chunk, `[t]`."""
        x, y, weight = support.x, support.y, support.sample_weight
        if support.rows is not None:
            seen = torch.arange(len(x), device=x.device)[:, None], support.rows[:, step]
            x, y, weight = x[seen], y[seen], None if weight is None else weight[seen]

        def one(theta: Tensor, x: Tensor, y: Tensor, weight: Tensor | None, task: Tensor) -> tuple[Tensor, ...]:
            prediction = forward(problem, unpack(problem, theta), x, task=task, step=step)
            return (_scalar(task_loss(problem.loss, prediction, y, weight, problem.label_smoothing)),)

        return self._map(one, theta, x, y, weight, _tasks(first, x))[0]

    def _query_losses(self, problem: InnerProblem, prediction: Tensor, y: Tensor, step: int, first: int = 0) -> Tensor:
        """Query loss after `step` steps of each task of a chunk that starts at `first`, `[t]`."""

        def one(prediction: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return (_scalar(task_loss(problem.loss, prediction, y, None, problem.label_smoothing)),)

        losses = self._map(one, prediction, y)[0]
        _check_finite(losses, first, f"query after step {step}")
        return losses

    def _predictions(
        self,
        problem: InnerProblem,
        theta: Tensor,
        x: Tensor,
        step: int,
        first: int,
        statistics: list[list[BatchStatistics]] | None = None,
    ) -> Tensor:
        """Output of a query pass of each task of a chunk, `[t, N, ...]`; `statistics` gets the chunk's."""
        seen: list[BatchStatistics] = []

        def one(theta: Tensor, x: Tensor, task: Tensor) -> tuple[Tensor, ...]:
            seen.clear()
            collected = None if statistics is None else seen
            output = forward(problem, unpack(problem, theta), x, task=task, step=step, query=True, statistics=collected)
            return output, *(value for each in seen for value in (each.mean, each.variance))

        output, *values = self._map(one, theta, x, _tasks(first, x))
        if statistics is not None:
            pairs = zip(seen, values[::2], values[1::2], strict=True)
            statistics.append([replace(each, mean=mean, variance=variance) for each, mean, variance in pairs])
        return output

    def over_tasks(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` of each task's `x`, stacked: by `torch.vmap`, where that takes it."""
        return self._map(lambda each: (function(each),), x)[0]

    def _map(self, function: Callable[..., tuple[Tensor, ...]], *args: Tensor | None) -> tuple[Tensor, ...]:
        """`function` over the leading dimension of every argument that is not None; what it returns, stacked."""
        if not self.vectorised:
            return _loop(function, args)
        try:
            return torch.vmap(function, in_dims=tuple(None if each is None else 0 for each in args))(*args)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            result = _loop(function, args)  # an error of the user's own comes again, without vmap in its way
            self.vectorised = False
            reason = str(error).strip().split("\n")[0]
            warnings.warn(
                f"{self._model_name} runs task by task, because torch.vmap refuses it: {reason}",
                FallbackWarning,
                stacklevel=2,
            )
            return result

    def _chunks(self, problem: InnerProblem, x: Tensor) -> list[slice]:
        """The tasks of `x` in runs that are in memory together."""
        tasks = len(x)
        # Four times what a pass saves: the graph and the double graph.
        size = problem.task_chunk or max(1, GRAPH_BYTES // (4 * self.saved_bytes(problem, x)))
        size = size if self.vectorised else 1
        return [slice(first, min(first + size, tasks)) for first in range(0, tasks, size)]

    def saved_bytes(self, problem: InnerProblem, x: Tensor) -> int:
        """What the graph of one task's forward pass on `x` `[T, N, ...]` saves, about."""
        shape = x.shape[1:]
        if shape not in self._graph_bytes:
            saved = 0

            def count(value: Tensor) -> Tensor:
                nonlocal saved
                saved += value.numel() * value.element_size()
                return value

            hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda value: value)
            with torch.inference_mode(False), torch.enable_grad(), hooks:
                parameters = {name: _leaf(value) for name, value in problem.parameters.items()}
                forward(problem, parameters, usable(x[0].detach()), task=0, step=0)
            self._graph_bytes[shape] = saved + 1
        return self._graph_bytes[shape]


class _Adapt(torch.autograd.Function):
    """theta_1 .. theta_K from theta_0 `[T, P]`, step sizes `[K or 1, P]` and the support set."""

    @staticmethod
    def forward(
        ctx: Any,
        executor: FallbackExecutor,
        problem: InnerProblem,
        rows: Tensor | None,
        start: Tensor,
        rates: Tensor,
        x: Tensor,
        y: Tensor,
        weight: Tensor | None,
    ) -> tuple[Tensor, ...]:
        support = Support(x, y, weight, rows)
        trajectory = [_empty(start) for _ in range(problem.steps)]
        keep = problem.momentum > 0 and ctx.needs_input_grad[4]
        directions = [_empty(start) for _ in range(problem.steps)] if keep else []
        for chunk in executor._chunks(problem, x):
            sweep = executor._descend(problem, _take(support, chunk), start[chunk], rates, chunk.start)
            for step, (theta, direction) in enumerate(sweep):
                trajectory[step][chunk] = theta
                if keep:
                    directions[step][chunk] = direction
        ctx.executor, ctx.problem = executor, problem
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, rates, x, y, weight, start, *trajectory, *directions)
        return tuple(trajectory)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *adjoints: Tensor | None) -> tuple[Tensor | None, ...]:
        executor, problem = ctx.executor, ctx.problem
        rows, rates, x, y, weight, start, *kept = ctx.saved_tensors
        thetas, directions = [start, *kept[: problem.steps - 1]], kept[problem.steps :]
        support = Support(x, y, weight, rows)
        data, needs_rates = (x, y, weight), ctx.needs_input_grad[4]
        needs_data = [need and not problem.first_order for need in ctx.needs_input_grad[5:]]
        d_start, d_rates, d_data = _empty(start), torch.zeros_like(rates), _zeros(data, needs_data)
        for chunk in executor._chunks(problem, x):
            part = _take(support, chunk)
            v = m_bar = torch.zeros_like(d_start[chunk])
            for step in reversed(range(problem.steps)):
                if (adjoint := adjoints[step]) is not None:
                    v = v + adjoint[chunk]
                theta = thetas[step][chunk]
                u = m_bar - _at_step(rates, step) * v
                place = problem, part, theta, step, chunk.start
                gradient, curved, along = None, 0, []
                if not problem.first_order:
                    gradient, curved, along = executor._gradient_along(*place, u, needs_data)
                elif needs_rates and not directions:
                    gradient = executor._gradient(*place)[1]
                if needs_rates:
                    direction = directions[step][chunk] if directions else gradient + problem.weight_decay * theta
                    _at_step(d_rates, step).sub_((v * direction).sum(0))
                for total, value in zip(_asked(d_data, needs_data), along, strict=True):
                    total[chunk] += value
                v = v + curved + problem.weight_decay * u
                m_bar = problem.momentum * u
            d_start[chunk] = v
        return None, None, None, d_start, d_rates, *d_data


class _Predict(torch.autograd.Function):
    """Outputs of query passes. Keeps no activations: the backward pass computes them again, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        executor: FallbackExecutor,
        problem: InnerProblem,
        step: int,
        statistics: list[list[BatchStatistics]] | None,
        theta: Tensor,
        x: Tensor,
    ) -> Tensor:
        ctx.executor, ctx.problem, ctx.step = executor, problem, step
        ctx.save_for_backward(theta, x)
        outputs = [
            executor._predictions(problem, theta[chunk], x[chunk], step, chunk.start, statistics)
            for chunk in executor._chunks(problem, x)
        ]
        return torch.cat(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[4:]
        totals = _zeros(inputs, needs)
        for chunk in ctx.executor._chunks(ctx.problem, inputs[1]):
            with torch.enable_grad():
                leaves = _leaves([each[chunk] for each in inputs], needs)
                output = ctx.executor._predictions(ctx.problem, *leaves, ctx.step, chunk.start)
                values = _gradients((output * adjoint[chunk]).sum(), _asked(leaves, needs))
            for total, value in zip(_asked(totals, needs), values, strict=True):
                total[chunk] = value
        return None, None, None, None, *totals


def probe_output_shape(model: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Shape of the model's output per sample, from inputs `x` `[N, ...]` of which the first is used.

    The module's parameters, buffers and mode and torch's random state stay as they are.

    Raises:
        TypeError: the model does not return one tensor.
        ValueError: its output does not have the samples of its input in front.

    >>> probe_output_shape(nn.Linear(3, 2), torch.zeros(1, 3))
    (2,)
    """
    problem = InnerProblem(model, dict(model.named_parameters()), {}, steps=0)
    twice = torch.cat([x[:1], x[:1]])  # batch statistics need two samples
    devices = [x.device] if x.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        output = forward(problem, problem.parameters, twice, task=0, step=0)
    if output.ndim == 0 or len(output) != 2:
        raise ValueError(f"model must map [2, ...] to [2, ...] (got an output of shape {tuple(output.shape)})")
    return tuple(output.shape[1:])


def _start(problem: InnerProblem, support: Support) -> Tensor:
    """theta_0 of every task, `[T, P]`."""
    return pack(problem.parameters).expand(len(support.x), -1) if support.initial is None else support.initial


def _rates(problem: InnerProblem) -> Tensor:
    """Step size of every element, `[K, P]`, or `[1, P]` where all steps share it; 0 where nothing moves."""
    rates = problem.rates

    def at(step: int) -> Tensor:
        return pack(
            {
                name: rates[name].at(step).expand(value.shape) if name in rates else torch.zeros_like(value)
                for name, value in problem.parameters.items()
            }
        )

    changes = any(rate.per_step for rate in rates.values())
    return torch.stack([at(step) for step in range(problem.steps if changes else 1)])


def _at_step(rates: Tensor, step: int) -> Tensor:
    return rates[min(step, len(rates) - 1)]


def _tasks(first: int, x: Tensor) -> Tensor:
    """Indices in the whole batch of the tasks of a chunk: dropout does not depend on the chunks."""
    return torch.arange(first, first + len(x), device=x.device)


def _take(support: Support, chunk: slice) -> Support:
    """The support sets of a chunk of tasks, as tensors that a graph may keep."""
    weight, rows = support.sample_weight, support.rows
    return Support(
        usable(support.x[chunk]),
        usable(support.y[chunk]),
        None if weight is None else usable(weight[chunk]),
        None if rows is None else rows[chunk],
    )


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()


def _leaves(values: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
    """The values, those asked for as leaves of a new graph."""
    return [_leaf(value) if need else value for value, need in zip(values, needs, strict=True)]


def _zeros(values: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
    return [torch.zeros_like(value) if need else None for value, need in zip(values, needs, strict=True)]


def _asked(values: Sequence[Any], needs: Sequence[bool]) -> list[Tensor]:
    return [value for value, need in zip(values, needs, strict=True) if need]


def _empty(like: Tensor) -> Tensor:
    """Memory of its own in the shape of an expanded tensor."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _gradients(value: Tensor, inputs: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Gradient of a scalar, zeros where it does not depend on an input."""
    if not value.requires_grad:
        return [torch.zeros_like(each) for each in inputs]
    found = torch.autograd.grad(value, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return list(found)


def _scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must return a scalar tensor (got {got})")
    return loss


def _loop(function: Callable[..., tuple[Tensor, ...]], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What vmap does, one task at a time, with vmap's guard against random numbers that a second pass would miss."""
    device = args[0].device
    before = _random_states(device)
    results = [function(*(None if each is None else each[task] for each in args)) for task in range(len(args[0]))]
    if not all(map(torch.equal, before, _random_states(device))):
        raise RuntimeError("model must draw no random numbers but dropout's: another pass cannot draw the same again")
    return tuple(torch.stack(each) for each in zip(*results, strict=True))


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _over_chunks(statistics: list[list[BatchStatistics]]) -> list[BatchStatistics]:
    """The statistics of chunks of tasks, joined along the tasks."""
    return [
        replace(each[0], mean=torch.cat([one.mean for one in each]), variance=torch.cat([one.variance for one in each]))
        for each in zip(*statistics, strict=True)
    ]


def _over_tasks(judged: Sequence[tuple[Tensor, Tensor | None]]) -> MetaOutput:
    """Query losses and accuracies of chunks of tasks, joined along the tasks."""
    losses = torch.cat([each for each, _ in judged])
    right = [each for _, each in judged if each is not None]
    return MetaOutput(losses.mean(), losses, torch.cat(right) if right else None)


def _check_finite(values: Tensor, first: int, place: str, what: str = "loss") -> None:
    """Raise NonFiniteError naming the first task with a value not finite, of a chunk that starts at `first`."""
    bad = values.detach().isfinite().logical_not().reshape(len(values), -1)
    if bad.any():
        task, column = (int(index) for index in bad.nonzero()[0])
        value = float(values.detach().reshape(bad.shape)[task, column])
        raise NonFiniteError(f"task {first + task}, {place}: {what} is {value}")
