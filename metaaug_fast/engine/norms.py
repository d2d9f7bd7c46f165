"""One call of the user's model, with the torch functions replaced that meta-learning cannot leave as they are.

* Batch norm, layer norm and instance norm are written out from means: `torch.func.vmap` gives silently wrong
  second-order gradients through torch's own (pytorch/functorch#534). Batch norm follows `InnerProblem.batch_norm`.
* Scaled dot-product attention is written out: torch's flash kernel for the CPU has no double backward.
* Dropout takes its mask from counters, see `dropout.py`.

The replacement is a `TorchFunctionMode`: it also sees functional calls and nested modules, and while it is active
torch's attention modules leave their inference fast path.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .dropout import mask
from .exclusive import ONE_AT_A_TIME
from .problem import InnerProblem


@dataclass(frozen=True)
class BatchStatistics:
    """What one batch norm saw in one pass: batch mean and unbiased variance, `[C]` (or `[T, C]`, stacked over tasks).

    name: of the running mean among the model's buffers. momentum: weight of the new value.
    """

    name: str
    momentum: float
    mean: Tensor
    variance: Tensor


def forward(
    problem: InnerProblem,
    parameters: dict[str, Tensor],
    x: Tensor,
    *,
    task: int | Tensor,
    step: int,
    query: bool = False,
    statistics: list[BatchStatistics] | None = None,
) -> Tensor:
    """Output `[N, ...]` of one task's model on `x` `[N, ...]`. The module's parameters and buffers stay untouched.

    Args:
        parameters: one task's weights, a value for every name in `problem.parameters`.
        task: index of the task in its batch, for dropout; may be a scalar tensor under `torch.vmap`.
        step: support pass at this inner step, or query pass after this many steps.
        statistics: receives the statistics of every batch norm that has running ones and used the batch's.

    Raises:
        TypeError: the model does not return one tensor.
    """
    values = problem.at_row(parameters, max(step - 1, 0) if query else step)
    with ONE_AT_A_TIME:
        return _called(problem, values, x, ModelPass(problem, task, 2 * step + query, statistics))


def forward_until(problem: InnerProblem, parameters: dict[str, Tensor], x: Tensor, path: str) -> tuple[Tensor, int]:
    """What the model calls its submodule at `path` with in a pass, once and alone; and how often dropout drops before.

    Shared by all tasks and steps: see `forward`.
    """
    mode = ModelPass(problem, 0, 0, None)
    return _until(problem, parameters, x, path, mode), mode.site


def forward_all_until(problem: InnerProblem, x: Tensor, path: str) -> Tensor:
    """The same of all tasks' samples `[T, N, ...]` in one pass, differentiable once: `[T, N, ...]`.

    Batch norms see each task's samples by themselves. Nothing else in the model may look at other samples, or drop.
    """
    features = _until(problem, problem.parameters, x.flatten(0, 1), path, _SharedPass(problem, len(x)))
    return features.unflatten(0, x.shape[:2])


class _Reached(Exception):
    """The pass has come to where it was to stop."""


def _until(problem: InnerProblem, parameters: dict[str, Tensor], x: Tensor, path: str, mode: ModelPass) -> Tensor:
    found: list[Tensor] = []

    def stop(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.append(given[0])
        raise _Reached  # what follows might draw random numbers

    with ONE_AT_A_TIME, contextlib.suppress(_Reached):
        hook = problem.model.get_submodule(path).register_forward_pre_hook(stop)
        try:
            _called(problem, parameters, x, mode)
        finally:
            hook.remove()
    return found[0]


def _called(problem: InnerProblem, values: dict[str, Tensor], x: Tensor, mode: ModelPass) -> Tensor:
    # Copies, because a batch norm in training mode counts its batches in place.
    buffers = {name: value.clone() for name, value in problem.model.named_buffers()}
    mode.names = {id(value): name for name, value in buffers.items()}
    with mode:
        output = torch.func.functional_call(problem.model, {**values, **buffers}, (x,))
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return one tensor (got {type(output).__name__})")
    return output


@torch.no_grad()
def update_running(model: nn.Module, statistics: Iterable[BatchStatistics]) -> None:
    """Move the model's running statistics towards `statistics`, whose leading dimension of tasks is averaged."""
    with ONE_AT_A_TIME:
        buffers = dict(model.named_buffers())
    for seen in statistics:
        prefix = seen.name.removesuffix("running_mean")
        for name, value in (("running_mean", seen.mean), ("running_var", seen.variance)):
            buffers[prefix + name].lerp_(value.mean(0), seen.momentum)
        if (count := buffers.get(prefix + "num_batches_tracked")) is not None:
            count.add_(1)


def normalise(x: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`(x - mean) / sqrt(variance + eps)` over `dims`, with that mean and (biased) variance, dimensions kept."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    variance = centred.square().mean(dims, keepdim=True)
    return centred * (variance + eps).rsqrt(), mean, variance


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x * weight + bias` with weight and bias per channel (dimension 1)."""
    shape = (-1,) + (1,) * (x.ndim - 2)
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _open(function: Callable) -> Callable:
    """A copy of a Python function of `torch.nn.functional` that does not look for overrides of itself.

    Its body then runs under the mode, which so sees the dropout and the attention inside.
    """
    scope = {**vars(F), "has_torch_function": lambda _: False}
    opened = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


def _values_a_channel(x: Tensor) -> int:
    count = math.prod(x.shape[dim] for dim in (0, *range(2, x.ndim)))
    if count < 2:
        raise ValueError(f"batch norm needs at least 2 values a channel (got input {tuple(x.shape)})")
    return count


_multi_head_attention = _open(F.multi_head_attention_forward)


class ModelPass(TorchFunctionMode):
    """Active during one call of the model: replaces norms, attention and dropout.

    Methods named after a torch function take its arguments.
    """

    def __init__(
        self,
        problem: InnerProblem,
        task: int | Tensor,
        step_pass: int,
        statistics: list[BatchStatistics] | None,
    ) -> None:
        super().__init__()
        self.problem, self.task, self.step_pass = problem, task, step_pass
        self.names: dict[int, str] = {}  # of buffers
        self.statistics = statistics
        self.site = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        replacement = _REPLACEMENTS.get(func)
        return (func if replacement is None else replacement.__get__(self))(*args, **(kwargs or {}))

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        policy = self.problem.batch_norm
        running = policy == "frozen" or (policy == "running" and not self.problem.training)
        if running and running_mean is not None and running_var is not None:
            scale = (running_var + eps).rsqrt()
            return _affine(_affine(input, scale, -running_mean * scale), weight, bias)
        return self._by_batch(input, running_mean, weight, bias, momentum, eps)

    def _by_batch(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Normalise by the statistics of the batch itself."""
        count = _values_a_channel(input)
        output, mean, variance = normalise(input, (0, *range(2, input.ndim)), eps)
        name = self.names.get(id(running_mean))
        if self.statistics is not None and name is not None:
            unbiased = variance.flatten() * (count / (count - 1))
            self.statistics.append(BatchStatistics(name, momentum, mean.flatten(), unbiased))
        return _affine(output, weight, bias)

    def torch_batch_norm(
        self, input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, *rest: Any, **kwargs: Any
    ) -> Tensor:
        kwargs.pop("cudnn_enabled", None)
        return self.batch_norm(input, running_mean, running_var, weight, bias, *rest[:3], **kwargs)

    def layer_norm(
        self,
        input: Tensor,
        normalized_shape: list[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Tensor:
        output = normalise(input, tuple(range(-len(normalized_shape), 0)), eps)[0]
        output = output if weight is None else output * weight
        return output if bias is None else output + bias

    def instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if use_input_stats or running_mean is None or running_var is None:
            return _affine(normalise(input, tuple(range(2, input.ndim)), eps)[0], weight, bias)
        scale = (running_var + eps).rsqrt()
        return _affine(_affine(input, scale, -running_mean * scale), weight, bias)

    def torch_instance_norm(
        self, input: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, *rest: Any, **kwargs: Any
    ) -> Tensor:
        kwargs.pop("cudnn_enabled", None)
        return self.instance_norm(input, running_mean, running_var, weight, bias, *rest[:3], **kwargs)

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return self._drop(input, input.shape, p, training, inplace)

    def torch_dropout(self, input: Tensor, p: float, train: bool) -> Tensor:
        return self.dropout(input, p, train)

    def feature_dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return self._drop(input, input.shape[:2] + (1,) * (input.ndim - 2), p, training, inplace)

    def _drop(self, input: Tensor, shape: tuple[int, ...], p: float, training: bool, inplace: bool) -> Tensor:
        if not training or p == 0:
            return input
        problem = self.problem
        factor = mask(shape, p, seed=problem.seed, task=self.task, step_pass=self.step_pass, site=self.site, like=input)
        self.site += 1
        return input.mul_(factor) if inplace else input * factor

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = (each.repeat_interleave(groups, -3) for each in (key, value))
        score = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = score.new_ones(score.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            score = score.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else score + attn_mask
        return self.dropout(score.softmax(-1), dropout_p) @ value

    def multi_head_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        with self:
            return _multi_head_attention(*args, **kwargs)


_REPLACEMENTS: dict[Callable, Callable] = {
    F.batch_norm: ModelPass.batch_norm,
    torch.batch_norm: ModelPass.torch_batch_norm,
    F.layer_norm: ModelPass.layer_norm,
    torch.layer_norm: ModelPass.layer_norm,
    F.instance_norm: ModelPass.instance_norm,
    torch.instance_norm: ModelPass.torch_instance_norm,
    F.dropout: ModelPass.dropout,
    torch.dropout: ModelPass.torch_dropout,
    F.dropout1d: ModelPass.feature_dropout,
    F.dropout2d: ModelPass.feature_dropout,
    F.dropout3d: ModelPass.feature_dropout,
    F.scaled_dot_product_attention: ModelPass.attention,
    F.multi_head_attention_forward: ModelPass.multi_head_attention,
}


class _SharedPass(ModelPass):
    """Active during one call of the model on the samples of T tasks in a row; batch norms alone are replaced."""

    def __init__(self, problem: InnerProblem, tasks: int) -> None:
        super().__init__(problem, 0, 0, None)
        self.tasks = tasks

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        replaced: dict[Callable, Callable] = {F.batch_norm: self.batch_norm, torch.batch_norm: self.torch_batch_norm}
        return replaced.get(func, func)(*args, **(kwargs or {}))

    def _by_batch(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        each = input.chunk(self.tasks)
        _values_a_channel(each[0])
        return torch.cat([F.batch_norm(one, None, None, weight, bias, True, momentum, eps) for one in each])
