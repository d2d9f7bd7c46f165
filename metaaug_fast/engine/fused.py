"""The fused executor: one compiled call for T tasks x K steps and the whole reverse sweep."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _C
from ..errors import NotFusedError
from ..tasks import MetaOutput
from .autograd import once_differentiable
from .exclusive import ONE_AT_A_TIME
from .losses import has_accuracy
from .lowering.graph import Graph, Op
from .norms import BatchStatistics, update_running
from .problem import InnerProblem, Query, Support

NO_CUDA = (
    "this build of metaaug_fast has no CUDA engine, because it needs {}; with that, install it again: "
    "METAAUG_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."
)
_NUMBERS = itertools.count(1)
"""Of encoders' passes, by which the engine knows its last one again."""

_DATA = ("support_x", "support_y", "support_weight", "initial", "query_x", "query_y", "step_weights")


def refusal(value: Tensor) -> str:
    """Why there is no fused engine for tensors like this one, or nothing."""
    if value.device.type not in ("cpu", "cuda"):
        return f"the fused engine runs on the CPU and on CUDA (got {value.device})"
    if value.dtype not in (torch.float32, torch.float64):
        return f"the fused engine computes in float32 or float64 (got {value.dtype})"
    return NO_CUDA.format(_C.why_no_cuda) if value.is_cuda and not _C.cuda else ""


class FusedExecutor:
    """Runs a lowered graph in the engine; `executor.Executor` says what its methods promise.

    Tasks are spread over `torch.get_num_threads()` cores; results do not depend on how many. A core holds theta_0 ..
    theta_K and activations of one task, up to a budget (`METAAUG_KEEP_MIB`), so `InnerProblem.task_chunk` has nothing
    to bound here.

    Args:
        graph: what `trace.lower` made of the model.
        model: the module itself, for the names and shapes of its parameters.
    """

    name = "fused"

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        self.output_shape = graph.output_shape
        self.graph = graph
        self._shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        self.buffers = [buffer for op in graph.ops for buffer in _frozen(op)]
        self._engines: dict[tuple[tuple[str, int], ...], _C.FusedEngine] = {}

    def adapt(self, problem: InnerProblem, support: Support) -> Tensor:
        """Adapted weights `[T, P]`; differentiable once (with Adam, not at all)."""
        with torch.set_grad_enabled(_differentiable(problem)):
            call = _Call(self, problem, support.rows)
            return _Adapt.apply(call, *call.tensors(support))

    @torch.no_grad()
    def adapt_mean(
        self, problem: InnerProblem, support: Support, query: Query | None = None
    ) -> tuple[Tensor, MetaOutput | None]:
        """Mean over tasks of `theta_K - theta_0`, `[P]`, without gradient, and how theta_K does on the query set."""
        call = _Call(self, problem, support.rows)
        outputs = ["mean_displacement"] if query is None else ["mean_displacement", *call.judgements(query)]
        found = call.run(call.tensors(support, query), outputs)
        judged = None if query is None else MetaOutput(found["loss"], found["task_losses"], found.get("accuracy"))
        return found["mean_displacement"], judged

    def predict(self, problem: InnerProblem, flat: Tensor, x: Tensor) -> Tensor:
        """Output `[T, N, *output_shape]` of each task's weights `flat` `[T, P]` on `x`; differentiable once."""
        return _Predict.apply(self, problem, flat, x)

    def encode(self, problem: InnerProblem, x: Tensor) -> Tensor:
        """Output `[N, *output_shape]` of the problem's own parameters on `x` `[N, ...]`; differentiable once.

        On the CPU. Batch norms see all samples together; in training the model's running statistics move.
        """
        number = next(_NUMBERS) if torch.is_grad_enabled() else 0
        return _Encode.apply(self, problem, number, x, *problem.parameters.values())

    def meta_loss(self, problem: InnerProblem, support: Support, query: Query) -> MetaOutput:
        """The meta-step, and the gradient with it: `backward` only scales what the forward call has found.

        With Adam inside there is no gradient.
        `task_losses.mean()` and `.sum()` are `loss` but for a scale; a loss that weighs tasks unequally needs a second
        call, in `backward` (and so does their mean on a GPU, where to look at weights would wait for it).
        """
        with torch.set_grad_enabled(_differentiable(problem)):
            call = _Call(self, problem, support.rows)
            return MetaOutput(*_MetaLoss.apply(call, call.judgements(query), *call.tensors(support, query)))

    @torch.no_grad()
    def judge_steps(self, problem: InnerProblem, support: Support, query: Query) -> list[MetaOutput]:
        """theta_0 .. theta_K on the query set, in one call that takes K steps; no running statistics move."""
        call = _Call(self, problem, support.rows)
        outputs = ["losses_by_step", "accuracy_by_step"] if has_accuracy(problem.loss, query.y) else ["losses_by_step"]
        found = call.run(call.tensors(support, query), outputs)
        losses, accuracies = found["losses_by_step"], found.get("accuracy_by_step")
        shares = [None] * losses.shape[1] if accuracies is None else accuracies.unbind(1)
        return [MetaOutput(*each) for each in zip(losses.mean(0).unbind(), losses.unbind(1), shares, strict=True)]

    def engine(self, problem: InnerProblem) -> _C.FusedEngine:
        """The engine for the problem's parameters, of which some may have a row for each step."""
        rows = tuple((name, len(problem.parameters[name])) for name in sorted(problem.per_step))
        if rows not in self._engines:
            try:
                on_gpu = next(iter(problem.parameters.values())).is_cuda
                self._engines[rows] = _C.FusedEngine(_native(self.graph, self._shapes, problem), on_gpu)
            except ValueError as error:
                raise NotFusedError(str(error)) from None
        return self._engines[rows]

    def gpu_path(self, problem: InnerProblem, samples: int) -> str:
        """How a meta-step with so many support and query samples a task runs on the parameters' GPU."""
        like = next(iter(problem.parameters.values()))
        settings, device = _settings(problem, True), like.device.index or 0
        task, block = self.engine(problem).footprint(settings, samples, like.dtype == torch.float64, device)
        if task <= block:
            return (
                f"a block of threads a task, all in shared memory: {task / 1024:.1f} of {block / 1024:.1f} KiB "
                f"for {samples} support and query samples"
            )
        return (
            f"in tiles over global memory: for {samples} support and query samples a task needs "
            f"{task / 1024:.1f} KiB, more than the {block / 1024:.1f} KiB of shared memory that a block has"
        )

    def learn_statistics(self, problem: InnerProblem, seen: Tensor) -> None:
        """Move the model's running statistics by `seen` `[T, 2 sum C]`, means and variances in order of ops."""
        with ONE_AT_A_TIME:
            names = {value.data_ptr(): name for name, value in problem.model.named_buffers()}
        columns = iter(seen.split([size for op in self._norms() for size in op.shape[:1] * 2], dim=1))
        statistics = []
        for op in self._norms():
            mean, variance = next(columns), next(columns)
            if op.buffers:
                name = names[op.buffers[0].data_ptr()]
                statistics.append(BatchStatistics(name, _momentum(op, problem.model, name), mean, variance))
        update_running(problem.model, statistics)

    def _norms(self) -> list[Op]:
        return [op for op in self.graph.ops if op.kind == "batch_norm"]


class _Call:
    """One call's arguments apart from its differentiable tensors, which go through autograd.

    Without `steps` the engine only judges weights that it is given.
    """

    def __init__(self, executor: FusedExecutor, problem: InnerProblem, rows: Tensor | None = None, steps: bool = True):
        self.executor, self.problem, self.rows = executor, problem, rows
        self.settings = _settings(problem, steps)
        self.differentiable = torch.is_grad_enabled()  # an autograd function sees its inputs' flags even without
        self.rates = [problem.rates.get(name) if steps else None for name in problem.parameters]
        values = (rate.value for rate in self.rates if rate is not None)
        self.rate_tensors = list({id(value): value for value in values}.values())

    def tensors(self, support: Support, query: Query | None = None) -> tuple[Tensor | None, ...]:
        """Everything that the call is differentiable in: parameters, distinct rates, then data as in `_DATA`."""
        x, y, weights = (None, None, None) if query is None else (query.x, query.y, query.step_weights)
        data = (support.x, support.y, support.sample_weight, support.initial, x, y, weights)
        return *self.problem.parameters.values(), *self.rate_tensors, *data

    def split(self, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], dict[str, Any]]:
        """What belongs to parameters, to rates, and to data by name, of a sequence in the order of `tensors`."""
        first = len(self.problem.parameters)
        last = first + len(self.rate_tensors)
        return tensors[:first], tensors[first:last], dict(zip(_DATA, tensors[last:], strict=True))

    def run(
        self, tensors: Sequence[Any], outputs: list[str], needs: Sequence[bool] = (), **given: Tensor | None
    ) -> dict[str, Tensor]:
        """Call the engine; `given` are further inputs by name."""
        parameters, rates, data = self.split(tensors)
        by_id = dict(zip(map(id, self.rate_tensors), rates, strict=True))
        inputs = _C.Inputs()
        inputs.parameters = parameters if data["initial"] is None else []
        inputs.buffers = self.executor.buffers
        inputs.rates = [None if rate is None else by_id[id(rate.value)] for rate in self.rates]
        inputs.per_step = [rate is not None and rate.per_step for rate in self.rates]
        inputs.wanted = needs[: len(parameters)] or [False] * len(parameters)
        inputs.rows = self.rows
        for name, value in {**data, **given}.items():
            setattr(inputs, name, value)
        return self.executor.engine(self.problem).run(self.settings, inputs, outputs)

    def judgements(self, query: Query) -> list[str]:
        """Names of the engine's outputs that tell how the query set is done."""
        return (
            ["loss", "task_losses", "accuracy"] if has_accuracy(self.problem.loss, query.y) else ["loss", "task_losses"]
        )

    def gradients(self, tensors: Sequence[Any], needs: Sequence[bool]) -> list[str]:
        """Names of the engine's outputs that hold the gradients asked for."""
        parameters, rates, data = self.split(needs)
        names = [f"grad_{name}" for name, need in data.items() if need and name != "step_weights"]
        if any(parameters) and self.split(tensors)[2]["initial"] is None:
            names.append("grad_parameters")
        return [*names, "grad_rates"] if any(rates) else names

    def unpack(self, found: dict[str, Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """The engine's gradients in the order of `tensors`."""
        parameters, rates, data = self.split(needs)
        result: list[Tensor | None] = [None] * len(parameters)
        if "grad_parameters" in found:
            views = _C.unflatten(found["grad_parameters"], list(self.problem.parameters.values()))
            result = [view if need else None for view, need in zip(views, parameters, strict=True)]
        result += self._rate_gradients(found.get("grad_rates"), rates)
        return result + [found.get(f"grad_{name}") if need else None for name, need in data.items()]

    def _rate_gradients(self, found: Tensor | None, needs: Sequence[bool]) -> list[Tensor | None]:
        """Sum the engine's gradients, which come for each parameter, over the parameters that share a rate."""
        if found is None:
            return [None] * len(needs)
        totals = {id(value): torch.zeros_like(value) for value in self.rate_tensors}
        shared = [rate.value for rate in self.rates if rate is not None]
        for value, piece in zip(shared, found.split([value.numel() for value in shared]), strict=True):
            totals[id(value)] += piece.view(value.shape)
        return [total if need else None for total, need in zip(totals.values(), needs, strict=True)]


class _Adapt(torch.autograd.Function):
    """theta_K. The backward call descends again: nothing is kept between the two but the inputs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return call.run(tensors, ["flat"])["flat"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        call, tensors, needs = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[1:]
        found = call.run(tensors, call.gradients(tensors, needs), needs, flat_adjoint=adjoint)
        return None, *call.unpack(found, needs)


class _Predict(torch.autograd.Function):
    """Outputs of given weights: a query pass after no steps of its own."""

    @staticmethod
    def forward(ctx: Any, executor: FusedExecutor, problem: InnerProblem, flat: Tensor, x: Tensor) -> Tensor:
        ctx.executor, ctx.problem = executor, problem
        ctx.save_for_backward(flat, x)
        found = _predict(executor, problem, flat, x, ["predictions"])
        return found["predictions"].view(*x.shape[:2], *executor.output_shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        flat, x = ctx.saved_tensors
        names = ("grad_initial", "grad_query_x")
        wanted = [name for name, need in zip(names, ctx.needs_input_grad[2:], strict=True) if need]
        found = _predict(ctx.executor, ctx.problem, flat, x, wanted, adjoint)
        return None, None, found.get(names[0]), found.get(names[1])


class _Encode(torch.autograd.Function):
    """Outputs of the model's own weights. The engine keeps the last pass's activations; older ones are made again."""

    @staticmethod
    def forward(
        ctx: Any, executor: FusedExecutor, problem: InnerProblem, number: int, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.engine, ctx.number = executor.engine(problem), number
        tensors = (x, *parameters, *executor.buffers)
        ctx.save_for_backward(*tensors)
        needs = ctx.needs_input_grad[3:]
        learns = problem.training
        found = _encode(ctx, tensors, needs, ["output", "statistics"] if learns else ["output"])
        if learns:
            executor.learn_statistics(problem, found["statistics"][None])
        return found["output"].view(len(x), *executor.output_shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, adjoint: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        if not bool(adjoint.isfinite().all()):  # which is for whoever made it to say, with what it is
            filled = zip(tensors, needs, strict=False)
            return None, None, None, *(torch.full_like(value, torch.nan) if need else None for value, need in filled)
        found = _encode(ctx, tensors, needs, ["grad_x"] * needs[0] + ["grad_parameters"] * any(needs[1:]), adjoint)
        gradients: list[Tensor | None] = [None] * len(needs[1:])
        if "grad_parameters" in found:
            views = _C.unflatten(found["grad_parameters"], tensors[1 : len(needs)])
            gradients = [view if need else None for view, need in zip(views, needs[1:], strict=True)]
        return None, None, None, found.get("grad_x"), *gradients


class _MetaLoss(torch.autograd.Function):
    """Mean query loss, task losses and accuracy; the gradient of the mean is found in the forward call."""

    @staticmethod
    def forward(ctx: Any, call: _Call, outputs: list[str], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        problem = call.problem
        needs = ctx.needs_input_grad[2:] if call.differentiable else (False,) * len(tensors)
        learns = problem.batch_norm == "running" and problem.training
        if learns:
            outputs = [*outputs, "statistics"]
        if call.split(tensors)[2]["step_weights"] is not None:
            outputs = [*outputs, "step_losses"]
        found = call.run(tensors, outputs + call.gradients(tensors, needs), needs)
        if learns:
            call.executor.learn_statistics(problem, found["statistics"])
        ctx.call, ctx.tasks = call, len(found["task_losses"])
        ctx.gradients = {name: value for name, value in found.items() if name.startswith("grad_")}
        ctx.step_losses = found.get("step_losses")
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        accuracy = found.get("accuracy")
        if accuracy is not None:
            ctx.mark_non_differentiable(accuracy)
        return found["loss"], found["task_losses"], accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss: Tensor | None, task_losses: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[2:]
        if loss is None and task_losses is None:
            return (None,) * (2 + len(needs))
        if task_losses is not None and _all_equal(task_losses):
            scale = ctx.tasks * task_losses[0]
            loss, task_losses = scale if loss is None else loss + scale, None
        if task_losses is None:
            gradients = {name: value * loss for name, value in ctx.gradients.items()}
        else:
            tensors = ctx.saved_tensors
            weights = task_losses if loss is None else task_losses + loss / ctx.tasks
            gradients = call.run(tensors, call.gradients(tensors, needs), needs, task_weights=weights)
        if ctx.step_losses is not None:
            mean = ctx.step_losses.mean(0)
            gradients["grad_step_weights"] = mean * loss if task_losses is None else weights @ ctx.step_losses
        return None, None, *call.unpack(gradients, needs)


def _all_equal(weights: Tensor) -> bool:
    """Whether tasks weigh alike, as far as can be told without waiting for a GPU."""
    if len(weights) == 1 or weights.stride(0) == 0:
        return True
    return not weights.is_cuda and bool((weights == weights[0]).all())


def _differentiable(problem: InnerProblem) -> bool:
    return torch.is_grad_enabled() and problem.optimizer == "sgd"


def _predict(
    executor: FusedExecutor,
    problem: InnerProblem,
    flat: Tensor,
    x: Tensor,
    outputs: list[str],
    adjoint: Tensor | None = None,
) -> dict[str, Tensor]:
    call = _Call(executor, problem, steps=False)
    data = {"initial": flat, "query_x": x}
    tensors = [None] * len(problem.parameters) + [data.get(name) for name in _DATA]
    return call.run(tensors, outputs, prediction_adjoint=adjoint)


def _encode(
    ctx: Any, tensors: Sequence[Tensor], needs: Sequence[bool], outputs: list[str], adjoint: Tensor | None = None
) -> dict[str, Tensor]:
    """The engine's outputs from x, parameters and frozen statistics, of which the first may need a gradient."""
    inputs = _C.EncoderInputs()
    inputs.x, *inputs.parameters = tensors[: len(needs)]
    inputs.buffers = tensors[len(needs) :]
    inputs.wants_x, *inputs.wanted = needs
    inputs.number = ctx.number if any(needs) else 0
    inputs.adjoint = adjoint
    found: dict[str, Tensor] = ctx.engine.encode(inputs, outputs)
    return found


def _settings(problem: InnerProblem, steps: bool) -> _C.Settings:
    settings = _C.Settings()
    settings.steps = problem.steps if steps else 0
    settings.first_step = 0 if steps else problem.steps
    settings.loss = getattr(_C.LossKind, str(problem.loss))
    settings.optimizer = getattr(_C.OptimizerKind, problem.optimizer)
    settings.precision = getattr(_C.Precision, problem.precision)
    settings.first_order = problem.first_order
    settings.label_smoothing = problem.label_smoothing
    settings.momentum = problem.momentum
    settings.weight_decay = problem.weight_decay
    settings.beta1, settings.beta2 = problem.betas
    settings.eps = problem.eps
    settings.seed = problem.seed
    return settings


def _native(graph: Graph, shapes: dict[str, tuple[int, ...]], problem: InnerProblem) -> _C.Graph:
    """The graph in the engine's terms: indices for names, and each parameter's layout from the op that reads it."""
    index = {name: i for i, name in enumerate(problem.parameters)}
    kinds = {name: op.kind for op in graph.ops for name in reversed(op.params) if name is not None}
    matrices = {op.params[0] for op in graph.ops if op.kind in ("linear", "conv2d")}
    parameters = []
    for name, value in problem.parameters.items():
        shape = shapes[name]
        if name in matrices:
            parameters.append(_C.Parameter(_C.LayoutKind.matrix, 1, shape[0], shape[1], _pair(shape[2:] or (1, 1))))
        elif kinds.get(name) == "layer_norm":
            parameters.append(_C.Parameter(_C.LayoutKind.picture, 1, shape[0], 1, _pair(shape[1:] or (1, 1))))
        else:
            rows = len(value) if name in problem.per_step else 1
            parameters.append(_C.Parameter(_C.LayoutKind.vector, rows, value.numel() // rows))
    frozen = 0
    ops = []
    for op in graph.ops:
        ops.append(_native_op(op, index, frozen))
        frozen += len(_frozen(op))
    values = [_C.Shape(*shape, *(1,) * (3 - len(shape))) for shape in graph.shapes]
    return _C.Graph(ops, values, parameters, graph.output)


def _native_op(op: Op, parameters: dict[str, int], first_buffer: int) -> _C.Op:
    native = _C.Op()
    native.kind = getattr(_C.OpKind, "conv2d" if op.kind == "linear" else op.kind)
    native.input = (op.inputs[0], op.inputs[1] if len(op.inputs) > 1 else -1)
    native.output = op.output
    weight, bias = (-1 if name is None else parameters[name] for name in op.params)
    native.param = (weight, bias)
    native.buffer = (first_buffer, first_buffer + 1) if _frozen(op) else (-1, -1)
    attributes: dict[str, Any] = dict(op.attributes)
    for name in ("kernel", "stride", "padding", "dilation"):
        if name in attributes:
            setattr(native, name, _pair(attributes.pop(name)))
    native.groups = attributes.pop("groups", 1)
    native.eps = attributes.pop("eps", 0.0)
    native.site = attributes.pop("site", 0)
    native.count_padding = bool(attributes.pop("count_include_pad", True))
    scalars = [attributes[name] for name in ("slope", "beta", "threshold", "p") if name in attributes]
    native.scalar = (scalars[0] if scalars else 0.0, scalars[1] if len(scalars) > 1 else 0.0)
    return native


def _pair(value: Sequence[int]) -> _C.Pair:
    return _C.Pair(*value)


def _momentum(op: Op, model: nn.Module, name: str) -> float:
    """Weight of a new batch's statistics; without a momentum in the module, all batches weigh alike."""
    momentum: Any = op.attributes.get("momentum")
    if momentum is not None:
        return float(momentum)
    return 1.0 / (1 + int(model.get_buffer(name.removesuffix("running_mean") + "num_batches_tracked")))


def _frozen(op: Op) -> tuple[Tensor, ...]:
    """The running statistics that the op normalises by, if it does."""
    return op.buffers if op.attributes.get("fixed") else ()
