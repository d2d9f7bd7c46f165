"""The inner problem: what is adapted, how, and on what; validated once, before any work.

`reference.py`, the fused engine and the fallback all read this one description.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count, check_flag, check_number
from ..tasks import check_samples, check_tensor
from .exclusive import ONE_AT_A_TIME
from .losses import Loss, check_targets, named

BATCH_NORM = ("batch", "per_step", "running", "frozen")
PRECISIONS = ("float32", "tf32", "bf16")
OPTIMIZERS = ("sgd", "adam")
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# A scalar, a [K] tensor, or a mapping from parameter names to a scalar, a tensor of the parameter's shape, or
# either of these with a leading dimension K.
LearningRate = float | Tensor | Sequence[float] | Mapping[str, float | Tensor]


@dataclass(frozen=True)
class Rate:
    """Step size of one parameter tensor: `value` is `()`, or the parameter's shape; per step with a leading K."""

    value: Tensor
    per_step: bool = False

    def at(self, step: int) -> Tensor:
        """The step size at inner step `step`, broadcastable to the parameter."""
        return self.value[step] if self.per_step else self.value


@dataclass(frozen=True)
class InnerProblem:
    """`theta_{k+1} = theta_k - alpha_k * direction_k` for every task.

    With SGD, `m_{k+1} = momentum * m_k + g_k + weight_decay * theta_k` is the direction; with Adam, the
    bias-corrected ratio of moments (forward only). `g_k` is the gradient of the mean support loss.

    parameters: every meta-parameter by its name in the model, in `named_parameters` order. A batch-norm
        affine named in `per_step` has shape `[rows, C]`: the support pass at step k reads row
        `min(k, rows - 1)`, a query pass after k steps row `min(max(k - 1, 0), rows - 1)`.
    rates: a `Rate` for every adapted name; names without one do not move.
    seed: keys dropout masks, see `dropout.py`.
    precision: of the products of large float32 models in the CUDA engine, one of `PRECISIONS`; see `inner_loop`.
    """

    model: nn.Module
    parameters: dict[str, Tensor]
    rates: dict[str, Rate]
    steps: int
    loss: Loss = "cross_entropy"
    label_smoothing: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    first_order: bool = False
    batch_norm: str = "batch"
    per_step: frozenset[str] = frozenset()
    optimizer: str = "sgd"
    betas: tuple[float, float] = (0.0, 0.999)
    eps: float = 1e-8
    seed: int = 0
    task_chunk: int | None = None
    precision: str = "float32"

    @property
    def training(self) -> bool:
        """Whether dropout drops and `batch_norm="running"` normalises with the batch's statistics."""
        return self.model.training

    def at_row(self, parameters: dict[str, Tensor], row: int) -> dict[str, Tensor]:
        """The parameters with each per-step tensor replaced by its row."""
        if not self.per_step:
            return parameters
        return {
            name: value[min(row, len(value) - 1)] if name in self.per_step else value
            for name, value in parameters.items()
        }


@dataclass(frozen=True)
class Support:
    """What the tasks adapt on.

    x `[T, S, ...]`; y class ids `[T, S]`, probabilities `[T, S, C]` or targets; sample_weight `[T, S]`;
    rows `[T, K, B]` int64, the samples that step k sees (all of them without it); initial `[T, P]`, where
    each task starts, in the order of `InnerProblem.parameters`.
    """

    x: Tensor
    y: Tensor
    sample_weight: Tensor | None = None
    rows: Tensor | None = None
    initial: Tensor | None = None


@dataclass(frozen=True)
class Query:
    """What adapted tasks are judged on, and the weight of the loss after each of the K steps (last only without)."""

    x: Tensor
    y: Tensor
    step_weights: Tensor | None = None


def inner_problem(
    model: nn.Module,
    lr: LearningRate,
    steps: int,
    *,
    loss: Loss = "cross_entropy",
    label_smoothing: float = 0.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    adapt: str | Iterable[str] | None = None,
    first_order: bool = False,
    batch_norm: str = "batch",
    parameters: Mapping[str, Tensor] | None = None,
    optimizer: str = "sgd",
    betas: tuple[float, float] = (0.0, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
    task_chunk: int | None = None,
    precision: str = "float32",
    prefix: str = "",
) -> InnerProblem:
    """Validate the arguments of an inner loop and put them into one form.

    Args:
        adapt: names or shell patterns (`"head.*"`) of the parameters that move; None: all that require a gradient.
        parameters: replacements for some of the model's parameters, by name (per-step batch-norm affines).
        prefix: of the caller's names for `lr`, `steps` and `optimizer`, for messages.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or nothing adapts.
    """
    own = parameters_of(model)
    loss, smoothing, _ = named(loss)
    check_count(f"{prefix}steps", steps)
    check_number("momentum", momentum)
    check_number("weight_decay", weight_decay)
    check_number("label_smoothing", label_smoothing)
    check_flag("first_order", first_order)
    if smoothing and label_smoothing not in (0, smoothing):
        raise ValueError(f"label_smoothing must be that of loss, {smoothing:g} (got {label_smoothing})")
    label_smoothing = label_smoothing or smoothing
    if label_smoothing >= 1:
        raise ValueError(f"label_smoothing must be below 1 (got {label_smoothing})")
    check_choice("batch_norm", batch_norm, BATCH_NORM)
    check_choice(f"{prefix}optimizer", optimizer, OPTIMIZERS)
    if optimizer == "adam" and momentum:
        raise ValueError(f"momentum must be 0 with {prefix}optimizer 'adam', which has betas (got {momentum})")
    if task_chunk is not None:
        check_count("task_chunk", task_chunk, low=1)
    _check_running_statistics(model, batch_norm)
    values = {name: (parameters or {}).get(name, value) for name, value in own.items()}
    per_step = frozenset(name for name, value in values.items() if value.ndim == own[name].ndim + 1)
    adapted = [name for name in _adapted_names(own, adapt) if name not in per_step]
    if not adapted:
        raise ValueError(f"adapt must leave a parameter that moves (got {adapt!r}; all of them are frozen or per-step)")
    dtypes = {value.dtype for value in values.values()}
    devices = {value.device for value in values.values()}
    if len(dtypes) > 1:
        raise ValueError(f"model must have parameters of one dtype (got {', '.join(sorted(map(str, dtypes)))})")
    if len(devices) > 1:
        raise ValueError(f"model must have its parameters on one device (got {', '.join(sorted(map(str, devices)))})")
    _check_precision(precision, next(iter(values.values())))
    return InnerProblem(
        model=model,
        parameters=values,
        rates=_rates(f"{prefix}lr", lr, values, adapted, steps),
        steps=steps,
        loss=loss,
        label_smoothing=float(label_smoothing),
        momentum=float(momentum),
        weight_decay=float(weight_decay),
        first_order=first_order,
        batch_norm=batch_norm,
        per_step=per_step,
        optimizer=optimizer,
        betas=betas,
        eps=eps,
        seed=seed,
        task_chunk=task_chunk,
        precision=precision,
    )


def check_support(problem: InnerProblem, support: Support, output_shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the support set fits the problem and the model's output per sample.

    Its samples are those that `check_samples` and `check_inputs` have let through.
    """
    check_targets("support_y", problem.loss, support.y, output_shape)
    tasks, samples = support.x.shape[:2]
    weight, rows, initial = support.sample_weight, support.rows, support.initial
    for name, value in (("sample_weight", weight), ("rows", rows), ("initial", initial)):
        if value is not None:
            check_tensor(name, value)
    if weight is not None:
        if callable(problem.loss):
            raise ValueError("sample_weight needs a named loss (got a callable, which must weigh its samples itself)")
        _check_shape("sample_weight", weight, (tasks, samples))
        _check_like("sample_weight", weight, *_kind_of(problem, support.x, "support_x"))
    if rows is not None:
        if rows.dtype != torch.int64 or rows.ndim != 3 or rows.shape[:2] != (tasks, problem.steps) or not rows.shape[2]:
            raise ValueError(
                f"rows must be int64 [{tasks}, {problem.steps}, B] with B > 0 (got {rows.dtype} {tuple(rows.shape)})"
            )
        if rows.device not in (torch.device("cpu"), support.x.device):
            raise ValueError(f"rows must be on the CPU or with support_x on {support.x.device} (got {rows.device})")
        if rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < samples):
            raise ValueError(
                f"rows must index the {samples} support samples (got {int(rows.min())}..{int(rows.max())})"
            )
    if initial is not None:
        _check_shape("initial", initial, (tasks, sum(value.numel() for value in problem.parameters.values())))
        _check_like("initial", initial, *_kind_of(problem, support.x, "support_x"))


def check_query(problem: InnerProblem, support: Support, query: Query, output_shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the query set fits the support set and the model's output per sample."""
    check_samples("query", query.x, query.y, tasks=support.x.shape[0])
    check_targets("query_y", problem.loss, query.y, output_shape)
    check_inputs(problem, "query_x", query.x)
    if query.step_weights is not None:
        check_tensor("step_weights", query.step_weights)
        if not problem.steps:
            raise ValueError("step_weights needs steps >= 1 (got 0)")
        _check_shape("step_weights", query.step_weights, (problem.steps,))
        _check_like("step_weights", query.step_weights, *_kind_of(problem, query.x, "query_x"))


def check_inputs(problem: InnerProblem, name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` has the parameters' device and, unless it holds token ids, their dtype."""
    like, whose = next(iter(problem.parameters.values())), "the model's parameters"
    if x.dtype == torch.int64:
        _check_device(name, x, like, whose)
    else:
        _check_like(name, x, like, whose)


def with_seed(problem: InnerProblem) -> InnerProblem:
    """The problem with a fresh dropout seed, drawn from torch's generator."""
    return replace(problem, seed=int(torch.randint(2**31, ())))


def with_steps(problem: InnerProblem, steps: int) -> InnerProblem:
    """The problem with another number of steps; rates given per step are cut, or go on as in their last step.

    Raises:
        ValueError: `steps` is negative.
    """
    check_count("steps", steps)
    per_step = {id(rate): rate.value for rate in problem.rates.values() if rate.per_step}
    index = torch.arange(steps if per_step else 0).clamp(max=problem.steps - 1)
    cut = {rate: Rate(value[index.to(value.device)], True) for rate, value in per_step.items()}
    rates = {name: cut.get(id(rate), rate) for name, rate in problem.rates.items()}
    return replace(problem, steps=steps, rates=rates)


def parameters_of(model: object) -> dict[str, nn.Parameter]:
    """A module's parameters by name, which must all hold values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module (got {type(model).__name__})")
    with ONE_AT_A_TIME:
        own = dict(model.named_parameters())
    if not own:
        raise ValueError(f"model must have parameters to adapt (got {type(model).__name__} with none)")
    for name, value in own.items():
        if nn.parameter.is_lazy(value):
            raise ValueError(f"model must have been called once, which gives {name!r} its shape (got a lazy parameter)")
        check_tensor(f"model's parameter {name!r}", value)
    return own


def patterns(adapt: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """What `adapt` names, as a tuple, or None for all that require a gradient."""
    if adapt is None:
        return None
    given = (adapt,) if isinstance(adapt, str) else tuple(adapt) if isinstance(adapt, Iterable) else ()
    if not given or not all(isinstance(pattern, str) for pattern in given):
        raise TypeError(f"adapt must be a name, a pattern or several of them (got {adapt!r})")
    return given


def _adapted_names(own: Mapping[str, Tensor], adapt: str | Iterable[str] | None) -> list[str]:
    given = patterns(adapt)
    if given is None:
        return [name for name, value in own.items() if value.requires_grad]
    for pattern in given:
        if not fnmatch.filter(own, pattern):
            raise ValueError(f"adapt must name parameters of the model (got {pattern!r}; there are {', '.join(own)})")
    return [name for name in own if any(fnmatch.fnmatchcase(name, pattern) for pattern in given)]


def _rates(
    called: str, lr: LearningRate, values: Mapping[str, Tensor], adapted: list[str], steps: int
) -> dict[str, Rate]:
    like = next(iter(values.values()))
    if not isinstance(lr, Mapping):
        value = _rate_tensor(called, lr, like)
        if value.ndim > 1 or (value.ndim == 1 and len(value) != steps):
            raise ValueError(
                f"{called} must be a scalar, [{steps}] or a mapping by name (got shape {tuple(value.shape)})"
            )
        shared = Rate(value, per_step=value.ndim == 1)
        return dict.fromkeys(adapted, shared)
    unknown = [name for name in lr if name not in adapted]
    missing = [name for name in adapted if name not in lr]
    if unknown or missing:
        raise ValueError(f"{called} must name the adapted parameters (unknown: {unknown}, missing: {missing})")
    rates = {}
    for name in adapted:
        value, shape = _rate_tensor(f"{called}[{name!r}]", lr[name], like), values[name].shape
        per_step = value.ndim > 0 and value.shape != shape and value.shape[0] == steps
        rest = value.shape[1:] if per_step else value.shape
        if rest not in (torch.Size(()), shape):
            raise ValueError(
                f"{called}[{name!r}] must be a scalar or of shape {tuple(shape)}, with or without a leading {steps} "
                f"(got shape {tuple(value.shape)})"
            )
        rates[name] = Rate(value, per_step)
    return rates


def _rate_tensor(name: str, lr: float | Tensor | Sequence[float], like: Tensor) -> Tensor:
    try:
        value = lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=like.dtype)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise TypeError(f"{name} must be a number, numbers or a tensor (got {lr!r})") from None
    check_tensor(name, value)
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must hold real numbers (got {value.dtype})")
    if value.is_meta:
        raise ValueError(f"{name} must hold values (got a tensor on the meta device)")
    if value.is_cuda:  # to look at it would wait for the GPU; the engine reports what becomes of a bad one
        return value.to(like.device, like.dtype)
    detached = value.detach()
    good = detached.isfinite() & ((detached >= 0) | value.requires_grad)  # learning may take a rate below zero
    if not bool(good.all()):
        raise ValueError(f"{name} must be >= 0 and finite (got {float(detached[~good].flatten()[0]):g})")
    if like.is_cuda and value.ndim == 0 and not value.requires_grad:
        return torch.full((), float(value), dtype=like.dtype, device=like.device)  # a copy would wait, too
    return value.to(like.device, like.dtype)


def _check_running_statistics(model: nn.Module, batch_norm: str) -> None:
    if batch_norm not in ("running", "frozen"):
        return
    for path, module in model.named_modules():
        if isinstance(module, NORMS) and module.running_mean is None:
            raise ValueError(
                f"batch_norm={batch_norm!r} needs running statistics (got track_running_stats=False at {path!r})"
            )


def _check_precision(precision: str, like: Tensor) -> None:
    check_choice("precision", precision, PRECISIONS)
    if precision == "float32":
        return
    if like.dtype != torch.float32 or not like.is_cuda:
        raise ValueError(
            f"precision {precision!r} is a GPU's for float32 models (got a model in {like.dtype} on {like.device})"
        )


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} (got {tuple(value.shape)})")


def _kind_of(problem: InnerProblem, x: Tensor, name: str) -> tuple[Tensor, str]:
    """What has the dtype of the computation, and its name: samples, or where these are token ids, the parameters."""
    if x.is_floating_point():
        return x, name
    return next(iter(problem.parameters.values())), "the model's parameters"


def _check_device(name: str, value: Tensor, like: Tensor, whose: str) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {whose} (got {value.device}, {like.device})")


def _check_like(name: str, value: Tensor, like: Tensor, whose: str) -> None:
    _check_device(name, value, like, whose)
    if value.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of {whose} (got {value.dtype}, {like.dtype})")
