"""Which torch functions and modules are which op of the fused engine, and under what conditions.

Each row has the signature of torch's own function. It takes symbolic values, checks that the engine computes exactly
this, and emits an op; otherwise it raises `Refused` with the reason. `trace.py` finds the calls.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
Pair = tuple[int, int]


class Refused(Exception):
    """Why a call is not fused."""


# --- what a name in the user's forward can stand for ----------------------------------------------------------------


@dataclass(eq=False)
class Storage:
    """Memory that several tensors may view; each write in place makes the other views stale."""

    version: int = 0


@dataclass(eq=False)
class Value:
    """`[N, *shape]`: value `id` of the graph. A write in place moves the same object on to a new id."""

    id: int
    shape: Shape
    storage: Storage
    version: int = 0


@dataclass(frozen=True, eq=False)
class ParameterName:
    """A parameter of the model."""

    name: str
    shape: Shape


@dataclass(frozen=True, eq=False)
class Constant:
    """A buffer of the model, or another tensor that is no parameter."""

    tensor: Tensor
    buffer: bool


BATCH = object()  # the number of samples, N
UNKNOWN = object()  # what comes out of a refused call


class Builder(Protocol):
    """What collects the ops of one module.

    fixed_statistics, drop: as in `trace.lower`. training: of the module as a whole. sites: dropout calls so far.
    """

    fixed_statistics: bool
    drop: bool
    training: bool
    sites: int

    def emit(
        self,
        kind: str,
        *inputs: Value,
        shape: Shape | None = None,
        params: tuple[str | None, str | None] = (None, None),
        buffers: tuple[Tensor, ...] = (),
        inplace: bool = False,
        view: bool = False,
        **attributes: Any,
    ) -> Value:
        """The output of a new op, of the first input's shape by default. A `view` shares the first input's memory."""


# --- the table: functions with torch's own signatures ----------------------------------------------------------------

FUNCTIONS: dict[Any, Callable] = {}


def _row(*targets: Any, **fixed: Any) -> Callable:
    """Registers a row under functions and, as strings, tensor methods; `fixed` arguments are implied by these names."""

    def register(row: Callable) -> Callable:
        for target in targets:
            FUNCTIONS[target] = functools.partial(row, **fixed) if fixed else row
        return row

    return register


@_row(F.linear)
def _linear(t: Builder, input: Value, weight: Any, bias: Any = None) -> Value:
    _expect_rank(input, 1)
    outputs = _weight_shape(weight, 2)[0]
    params = _names(weight, bias, (outputs, *input.shape), (outputs,))
    return t.emit("linear", input, shape=(outputs,), params=params)


@_row(F.conv2d)
def _conv2d(
    t: Builder,
    input: Value,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Value:
    _expect_rank(input, 3)
    if groups != 1:
        raise Refused(f"fused only with groups=1 (got {groups})")
    if padding_mode != "zeros":
        raise Refused(f"fused only with padding_mode='zeros' (got {padding_mode!r})")
    channels, _, *window = _weight_shape(weight, 4)
    kernel, stride, dilation = _pair(window), _pair(stride), _pair(dilation)
    padding = _padding(padding, kernel, stride, dilation)
    params = _names(weight, bias, (channels, input.shape[0], *kernel), (channels,))
    shape = (channels, *_windows(input.shape[1:], kernel, stride, padding, dilation))
    return t.emit(
        "conv2d", input, shape=shape, params=params, kernel=kernel, stride=stride, padding=padding, dilation=dilation
    )


@_row(F.batch_norm)
def _batch_norm(
    t: Builder,
    input: Value,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Value:
    channels = input.shape[:1]
    running = (running_mean, running_var)
    buffers = tuple(
        value.tensor
        for value in running
        if isinstance(value, Constant) and value.buffer and tuple(value.tensor.shape) == channels
    )
    if len(buffers) < 2:
        buffers = ()
        if t.fixed_statistics:
            raise Refused(
                f"needs running statistics as buffers of the module (got {', '.join(map(describe, running))})"
            )
    params = _names(weight, bias, channels, channels)
    return t.emit(
        "batch_norm", input, params=params, buffers=buffers, eps=eps, momentum=momentum, fixed=t.fixed_statistics
    )


@_row(F.layer_norm)
def _layer_norm(
    t: Builder, input: Value, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Value:
    if tuple(normalized_shape) != input.shape:
        raise Refused(f"fused only over a whole sample, {input.shape} (got normalized_shape={tuple(normalized_shape)})")
    return t.emit("layer_norm", input, params=_names(weight, bias, input.shape, input.shape), eps=eps)


@_row(F.group_norm)
def _group_norm(
    t: Builder, input: Value, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Value:
    channels = input.shape[:1]
    if num_groups < 1 or channels[0] % num_groups:
        raise Refused(f"{num_groups} groups do not divide {channels[0]} channels")
    params = _names(weight, bias, channels, channels)
    return t.emit("group_norm", input, params=params, eps=eps, groups=num_groups)


@_row(F.instance_norm)
def _instance_norm(
    t: Builder,
    input: Value,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    _expect_rank(input, 3)
    if not use_input_stats:
        raise Refused("fused only with the instance's own statistics (it uses running ones)")
    if math.prod(input.shape[1:]) == 1:
        raise Refused("torch refuses a single spatial element")
    return _group_norm(t, input, input.shape[0], weight, bias, eps)


@_row(F.relu, torch.relu, "relu")
@_row(torch.relu_, "relu_", inplace=True)
def _relu(t: Builder, input: Value, inplace: bool = False) -> Value:
    return t.emit("relu", input, inplace=inplace)


@_row(F.leaky_relu)
@_row(F.leaky_relu_, inplace=True)
def _leaky_relu(t: Builder, input: Value, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    return t.emit("leaky_relu", input, inplace=inplace, slope=negative_slope)


@_row(F.gelu)
def _gelu(t: Builder, input: Value, approximate: str = "none") -> Value:
    return t.emit({"none": "gelu", "tanh": "gelu_tanh"}[approximate], input)


@_row(torch.tanh, "tanh")
@_row(torch.tanh_, "tanh_", inplace=True)
def _tanh(t: Builder, input: Value, inplace: bool = False) -> Value:
    return t.emit("tanh", input, inplace=inplace)


@_row(torch.sigmoid, "sigmoid")
@_row(torch.sigmoid_, "sigmoid_", inplace=True)
def _sigmoid(t: Builder, input: Value, inplace: bool = False) -> Value:
    return t.emit("sigmoid", input, inplace=inplace)


@_row(F.softplus)
def _softplus(t: Builder, input: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    return t.emit("softplus", input, beta=beta, threshold=threshold)


@_row(F.max_pool2d, torch.max_pool2d)
def _max_pool2d(
    t: Builder,
    input: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    _expect_plain(ceil_mode=(ceil_mode, False), return_indices=(return_indices, False))
    _expect_plain(dilation=(_pair(dilation), (1, 1)))
    return _pool(t, "max_pool", input, kernel_size, stride, padding)


@_row(F.avg_pool2d)
def _avg_pool2d(
    t: Builder,
    input: Value,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    _expect_plain(ceil_mode=(ceil_mode, False), divisor_override=(divisor_override, None))
    return _pool(t, "avg_pool", input, kernel_size, stride, padding, count_include_pad=bool(count_include_pad))


def _pool(t: Builder, kind: str, input: Value, kernel: Any, stride: Any, padding: Any, **attributes: Any) -> Value:
    _expect_rank(input, 3)
    kernel, padding = _pair(kernel), _pair(padding)
    stride = kernel if stride is None else _pair(stride)
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        raise Refused(f"its padding must be at most half the kernel (got {padding}, {kernel})")
    shape = (input.shape[0], *_windows(input.shape[1:], kernel, stride, padding, (1, 1)))
    return t.emit(kind, input, shape=shape, kernel=kernel, stride=stride, padding=padding, **attributes)


@_row(F.adaptive_avg_pool2d)
def _adaptive_avg_pool2d(t: Builder, input: Value, output_size: Any) -> Value:
    _expect_rank(input, 3)
    if output_size not in (1, (1,), (1, 1)):
        raise Refused(f"fused only to output size 1 (got {output_size})")
    return t.emit("mean_pool", input, shape=(input.shape[0], 1, 1))


@_row(torch.mean, "mean")
def _mean(t: Builder, input: Value, dim: Any = None, keepdim: bool = False) -> Value:
    rank = len(input.shape) + 1
    dims = range(rank) if dim is None else [each % rank for each in ((dim,) if isinstance(dim, int) else dim)]
    if 0 in dims:
        raise Refused("mixes the samples of a batch")
    if rank != 4 or sorted(dims) != [2, 3]:
        raise Refused(f"fused only over the two dimensions of space (got dim={dim} of {batched(input.shape)})")
    return t.emit("mean_pool", input, shape=(input.shape[0], 1, 1) if keepdim else input.shape[:1])


@_row(torch.flatten, "flatten")
def _flatten(t: Builder, input: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    rank = len(input.shape) + 1
    start, end = start_dim % rank, end_dim % rank
    if start == end:
        return _alias(t, input)
    if start == 0:
        raise Refused("mixes the samples of a batch")
    middle = math.prod(input.shape[start - 1 : end])
    return _reshaped(t, input, (*input.shape[: start - 1], middle, *input.shape[end:]))


@_row(torch.reshape, "reshape", "view")
def _reshape(t: Builder, input: Value, *shape: Any) -> Value:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
    if not sizes or not all(size is BATCH or isinstance(size, int) for size in sizes):
        raise Refused("fused only with sizes that are integers or the batch size")
    samples, *rest = sizes
    count = math.prod(input.shape)
    if samples is BATCH and rest.count(-1) == 1 and BATCH not in rest:
        rest[rest.index(-1)] = count // (-math.prod(rest) or 1)
    if BATCH in rest or -1 in rest or not (samples is BATCH or samples == -1) or math.prod(rest) != count:
        wanted = ", ".join("N" if size is BATCH else str(size) for size in sizes)
        raise Refused(f"must keep the samples of a batch apart ({batched(input.shape)} to [{wanted}])")
    return _reshaped(t, input, tuple(rest))


def _reshaped(t: Builder, input: Value, shape: Shape) -> Value:
    if shape == input.shape:
        return _alias(t, input)
    if shape[:1] == input.shape[:1] and math.prod(shape[1:]) == 1:  # to or from a picture of one pixel
        if not spatial_or_flat(shape):  # on the way there
            return Value(input.id, shape, input.storage, input.version)
        flat = Value(input.id, shape[:1], input.storage, input.version)
        return t.emit("flatten", flat, shape=shape, view=True)
    if len(input.shape) != 3 or len(shape) != 1:
        raise Refused(f"fused only from [N, C, H, W] to [N, C*H*W] (got {batched(input.shape)} to {batched(shape)})")
    return t.emit("flatten", input, shape=shape, view=True)


@_row(torch.unsqueeze, "unsqueeze")
def _unsqueeze(t: Builder, input: Value, dim: int) -> Value:
    at = dim % (len(input.shape) + 2)
    if at == 0:
        raise Refused("mixes the samples of a batch")
    return _reshaped(t, input, (*input.shape[: at - 1], 1, *input.shape[at - 1 :]))


@_row(torch.squeeze, "squeeze")
def _squeeze(t: Builder, input: Value, dim: Any = None) -> Value:
    if dim is None:
        raise Refused("takes away the samples of a batch where there is one")
    rank = len(input.shape) + 1
    dims = {each % rank for each in (dim if isinstance(dim, tuple) else (dim,))}
    if 0 in dims:
        raise Refused("takes away the samples of a batch where there is one")
    return _reshaped(t, input, tuple(size for i, size in enumerate(input.shape) if i + 1 not in dims or size != 1))


@_row(operator.getitem)
def _getitem(t: Builder, input: Value, index: Any) -> Value:
    wanted = index if isinstance(index, tuple) else (index,)
    if any(each is not None and each != slice(None) for each in wanted) or wanted[:1] != (slice(None),):
        raise Refused("fused only where it adds dimensions, as in x[:, :, None, None]")
    left = list(input.shape)
    shape = [1 if each is None else left.pop(0) for each in wanted[1:]]
    return _reshaped(t, input, (*shape, *left))


@_row("contiguous", "clone", torch.clone)
def _alias(t: Builder, input: Value, memory_format: Any = None) -> Value:
    # Taken for a view even if it copies: then a later write in place is refused, never misread.
    return Value(input.id, input.shape, input.storage, input.version)


@_row(operator.add, torch.add, "add")
@_row(operator.iadd, "add_", inplace=True)
def _add(t: Builder, input: Value, other: Any, alpha: float = 1, inplace: bool = False) -> Value:
    if alpha != 1:
        raise Refused(f"fused only with alpha=1 (got {alpha})")
    return _of_two(t, "add", input, other, inplace)


@_row(operator.mul, torch.mul, torch.multiply, "mul", "multiply")
@_row(operator.imul, "mul_", "multiply_", inplace=True)
def _multiply(t: Builder, input: Value, other: Any, inplace: bool = False) -> Value:
    return _of_two(t, "multiply", input, other, inplace)


def _of_two(t: Builder, kind: str, input: Value, other: Any, inplace: bool) -> Value:
    """A sum or product, which does not mind the order; one may have a pixel for all of a sample's."""
    if not isinstance(other, Value):
        raise Refused(f"fused only between two computed values (got {describe(other)})")
    if input.shape == other.shape or (len(input.shape) == 3 and other.shape == (input.shape[0], 1, 1)):
        return t.emit(kind, input, other, inplace=inplace)
    if len(other.shape) == 3 and input.shape == (other.shape[0], 1, 1) and not inplace:
        return t.emit(kind, other, input)
    raise Refused(
        "fused only between equal shapes, or [N, C, H, W] and [N, C, 1, 1] "
        f"(got {batched(input.shape)} and {batched(other.shape)})"
    )


@_row(F.dropout, torch.dropout)
def _dropout(t: Builder, input: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    if p == 0 or not training:
        return _alias(t, input)
    if not 0 < p < 1:
        raise Refused(f"fused only with 0 <= p < 1 (got {p})")
    if not t.drop and not t.training:
        raise Refused("drops although the module is in eval mode")
    site, t.sites = t.sites, t.sites + 1
    return t.emit("dropout", input, inplace=inplace, p=p, site=site) if t.drop else _alias(t, input)


# Modules are what their forward calls: a function of the table and the arguments that the module holds.
MODULES: dict[type, Callable[[Any], tuple[Any, dict[str, Any]]]] = {
    nn.Linear: lambda m: (F.linear, _held(m, "weight bias")),
    nn.Conv2d: lambda m: (F.conv2d, _held(m, "weight bias stride padding dilation groups padding_mode")),
    nn.BatchNorm1d: lambda m: (F.batch_norm, _held(m, "running_mean running_var weight bias momentum eps")),
    nn.BatchNorm2d: lambda m: (F.batch_norm, _held(m, "running_mean running_var weight bias momentum eps")),
    nn.LayerNorm: lambda m: (F.layer_norm, _held(m, "normalized_shape weight bias eps")),
    nn.GroupNorm: lambda m: (F.group_norm, _held(m, "num_groups weight bias eps")),
    nn.InstanceNorm2d: lambda m: (
        F.instance_norm,
        _held(m, "weight bias eps") | {"use_input_stats": m.training or not m.track_running_stats},
    ),
    nn.ReLU: lambda m: (F.relu, _held(m, "inplace")),
    nn.LeakyReLU: lambda m: (F.leaky_relu, _held(m, "negative_slope inplace")),
    nn.GELU: lambda m: (F.gelu, _held(m, "approximate")),
    nn.Tanh: lambda m: (torch.tanh, {}),
    nn.Sigmoid: lambda m: (torch.sigmoid, {}),
    nn.Softplus: lambda m: (F.softplus, _held(m, "beta threshold")),
    nn.MaxPool2d: lambda m: (
        F.max_pool2d,
        _held(m, "kernel_size stride padding dilation ceil_mode return_indices"),
    ),
    nn.AvgPool2d: lambda m: (
        F.avg_pool2d,
        _held(m, "kernel_size stride padding ceil_mode count_include_pad divisor_override"),
    ),
    nn.AdaptiveAvgPool2d: lambda m: (F.adaptive_avg_pool2d, _held(m, "output_size")),
    nn.Flatten: lambda m: (torch.flatten, _held(m, "start_dim end_dim")),
    nn.Dropout: lambda m: (F.dropout, _held(m, "p training inplace")),
    nn.Identity: lambda m: (torch.clone, {}),
}
RANKS: dict[type, int] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 3}


def _held(module: nn.Module, names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names.split()}


def describe(value: Any) -> str:
    """What a refusal calls an argument."""
    if isinstance(value, ParameterName):
        return f"parameter {value.name!r}"
    if isinstance(value, Constant):
        return "a buffer" if value.buffer else "a tensor that is no parameter"
    if value is BATCH:
        return "the batch size"
    return "a computed value" if isinstance(value, Value) else repr(value)


def batched(shape: Shape) -> str:
    """The shape with its batch dimension, `[N, ...]`."""
    return f"[{', '.join(['N', *map(str, shape)])}]"


def spatial_or_flat(shape: Shape) -> bool:
    """Whether the engine has values of this shape per sample: `(F,)` or `(C, H, W)`."""
    return len(shape) in (1, 3)


def check_fresh(value: Value) -> None:
    """Raise Refused if the value's memory was written to since."""
    if value.version != value.storage.version:
        raise Refused("reads a tensor that was changed in place through another name")


def _expect_rank(input: Value, rank: int) -> None:
    if len(input.shape) != rank:
        raise Refused(f"fused only on {'[N, F]' if rank == 1 else '[N, C, H, W]'} (got {batched(input.shape)})")


def _expect_plain(**settings: tuple[Any, Any]) -> None:
    for name, (value, plain) in settings.items():
        if value != plain:
            raise Refused(f"fused only with {name}={plain} (got {value})")


def _weight_shape(weight: Any, rank: int) -> Shape:
    if not isinstance(weight, ParameterName):
        raise Refused(f"its weight must be a parameter of the module (got {describe(weight)})")
    if len(weight.shape) != rank:
        raise Refused(f"its weight must have {rank} dimensions (got {weight.shape})")
    return weight.shape


def _pair(value: Any) -> Pair:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, 2) or not all(isinstance(each, int) for each in values):
        raise Refused(f"fused only with one or two integers for height and width (got {describe(value)})")
    return values[0], values[-1]


def _padding(padding: Any, kernel: Pair, stride: Pair, dilation: Pair) -> Pair:
    if padding == "valid":
        return 0, 0
    if padding != "same":
        return _pair(padding)
    total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if stride != (1, 1) or total[0] % 2 or total[1] % 2:
        raise Refused(f"padding='same' is fused only where it is symmetric (got kernel {kernel}, stride {stride})")
    return total[0] // 2, total[1] // 2


def _windows(sizes: Shape, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    height, width = (
        (size + 2 * pad - step * (window - 1) - 1) // by + 1
        for size, window, by, pad, step in zip(sizes, kernel, stride, padding, dilation, strict=True)
    )
    if height < 1 or width < 1:
        raise Refused(f"its window {kernel} does not fit into {sizes}")
    return height, width


def _names(weight: Any, bias: Any, weight_shape: Shape, bias_shape: Shape) -> tuple[str | None, str | None]:
    """The names of an op's weight and bias, each a parameter of the expected shape or None."""
    return _name("weight", weight, weight_shape), _name("bias", bias, bias_shape)


def _name(role: str, value: Any, shape: Shape) -> str | None:
    if value is None:
        return None
    if not isinstance(value, ParameterName):
        raise Refused(f"its {role} must be a parameter of the module (got {describe(value)})")
    if value.shape != shape:
        raise Refused(f"its {role} must have shape {shape} (got {value.shape})")
    return value.name
