"""The workloads in JAX on the CPU: `jit(grad(vmap))`, with `lax.scan` over the inner steps.

Convolutions with weights of each task's own become grouped ones under `vmap`, which XLA's CPU backend runs slower than
one task after the other: there `lax.map` takes the place of `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from torch import nn

from ..tasks import TaskBatch
from .workloads import ADAM_BETAS, ADAM_EPS, Workload

Arrays = tuple[Any, ...]


def build(workload: Workload, model: nn.Module, tasks: TaskBatch) -> Callable[[], Any]:
    """A call that gives the arrays that `rivals.py` describes."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)  # for the check; arrays of float32 stay what they are
    parameters = tuple(jnp.array(value.detach().numpy()) for value in model.parameters())
    data = [jnp.array(each.numpy()) for each in tasks.tensors]
    loss = _loss(workload)
    if workload.kind == "reptile":
        changes = _over_tasks(workload, _adam_change(workload, loss))
        mean_change = jax.jit(lambda p, *data: jax.tree.map(lambda each: each.mean(0), changes(p, *data)))
        return lambda: jax.block_until_ready(mean_change(parameters, *data[:2]))
    losses = _over_tasks(workload, _adapted_loss(workload, model, loss))
    if workload.kind == "evaluation":
        evaluation = jax.jit(losses)
        size = workload.batch or tasks.tasks
        batches = [[each[at : at + size] for each in data] for at in range(0, tasks.tasks, size)]
        return lambda: [jnp.concatenate(jax.block_until_ready([evaluation(parameters, *batch) for batch in batches]))]
    meta_gradient = jax.jit(jax.grad(lambda p, *data: losses(p, *data).mean()))
    return lambda: jax.block_until_ready(meta_gradient(parameters, *data))


def _over_tasks(workload: Workload, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(parameters, *one task)` of every task."""
    if "conv" in workload.net:
        return lambda p, *data: lax.map(lambda task: function(p, *task), data)
    return lambda p, *data: jax.vmap(lambda *task: function(p, *task))(*data)


def _loss(workload: Workload) -> Callable[[Arrays, Any, Any], Any]:
    predict = _NETS[workload.net]

    def mse(p: Arrays, x: Any, y: Any) -> Any:
        return jnp.mean((predict(p, x) - y) ** 2)

    def cross_entropy(p: Arrays, x: Any, y: Any) -> Any:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(predict(p, x)), y[:, None], 1))

    return mse if workload.loss == "mse" else cross_entropy


def _adapted_loss(workload: Workload, model: nn.Module, loss: Callable[..., Any]) -> Callable[..., Any]:
    """The query loss after inner steps of SGD."""
    adapts = [workload.adapts(name) for name, _ in model.named_parameters()]

    def merge(p: Arrays, moved: Arrays) -> Arrays:
        left = iter(moved)
        return tuple(next(left) if moves else value for value, moves in zip(p, adapts, strict=True))

    def adapted_loss(p: Arrays, x: Any, y: Any, query_x: Any, query_y: Any) -> Any:
        def step(fast: Arrays, _: None) -> tuple[Arrays, None]:
            inner = jax.grad(lambda moved: loss(merge(p, moved), x, y))(fast)
            if workload.first_order:
                inner = lax.stop_gradient(inner)
            return jax.tree.map(lambda w, g: w - workload.inner_lr * g, fast, inner), None

        start = tuple(value for value, moves in zip(p, adapts, strict=True) if moves)
        fast, _ = lax.scan(step, start, None, workload.inner_steps)
        return loss(merge(p, fast), query_x, query_y)

    return adapted_loss


def _adam_change(workload: Workload, loss: Callable[..., Any]) -> Callable[..., Any]:
    """How far inner steps of Adam move the parameters."""
    (beta1, beta2), rate = ADAM_BETAS, workload.inner_lr

    def change(p: Arrays, x: Any, y: Any) -> Any:
        def step(state: tuple[Arrays, Arrays, Arrays], number: Any) -> tuple[tuple[Arrays, Arrays, Arrays], None]:
            fast, moment, square = state
            inner = jax.grad(loss)(fast, x, y)
            moment = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, moment, inner)
            square = jax.tree.map(lambda s, g: beta2 * s + (1 - beta2) * g * g, square, inner)

            def move(w: Any, m: Any, s: Any) -> Any:
                return w - rate * m / (1 - beta1**number) / (jnp.sqrt(s / (1 - beta2**number)) + ADAM_EPS)

            return (jax.tree.map(move, fast, moment, square), moment, square), None

        zeros = jax.tree.map(jnp.zeros_like, p)
        numbers = jnp.arange(1, workload.inner_steps + 1, dtype=p[0].dtype)
        (fast, _, _), _ = lax.scan(step, (p, zeros, zeros), numbers)
        return jax.tree.map(lambda w, first: w - first, fast, p)

    return change


def _mlp(p: Arrays, x: Any) -> Any:
    x = x.reshape(len(x), -1)
    for weight, bias in zip(p[:-2:2], p[1:-2:2], strict=True):
        x = jax.nn.relu(x @ weight.T + bias)
    return x @ p[-2].T + p[-1]


def _omniglot_mlp(p: Arrays, x: Any) -> Any:
    x = x.reshape(len(x), -1)
    for weight, bias, scale, shift in _blocks(p):
        x = jax.nn.relu(_batch_norm(x @ weight.T + bias, scale, shift, (0,)))
    return x @ p[-2].T + p[-1]


def _conv4(p: Arrays, x: Any) -> Any:
    for block in _blocks(p):
        x = _conv_block(x, 1, *block)
        samples, channels, height, width = x.shape
        x = x[:, :, : height // 2 * 2, : width // 2 * 2]
        x = x.reshape(samples, channels, height // 2, 2, width // 2, 2).max((3, 5))
    return x.reshape(len(x), -1) @ p[-2].T + p[-1]


def _strided_conv4(p: Arrays, x: Any) -> Any:
    for block in _blocks(p):
        x = _conv_block(x, 2, *block)
    return x.mean((2, 3)) @ p[-2].T + p[-1]


def _blocks(p: Arrays) -> list[Arrays]:
    """Weight, bias, scale and shift of each block before the head."""
    return [p[at : at + 4] for at in range(0, len(p) - 2, 4)]


def _conv_block(x: Any, stride: int, weight: Any, bias: Any, scale: Any, shift: Any) -> Any:
    x = lax.conv_general_dilated(x, weight, (stride, stride), ((1, 1), (1, 1))) + bias[:, None, None]
    return jax.nn.relu(_batch_norm(x, scale, shift, (0, 2, 3)))


def _batch_norm(x: Any, scale: Any, shift: Any, axes: tuple[int, ...]) -> Any:
    affine = (-1, *[1] * (x.ndim - 2))
    centred = x - x.mean(axes, keepdims=True)
    variance = (centred * centred).mean(axes, keepdims=True)
    return centred * lax.rsqrt(variance + 1e-5) * scale.reshape(affine) + shift.reshape(affine)


_NETS: dict[str, Callable[[Arrays, Any], Any]] = {
    "mlp": _mlp,
    "omniglot_mlp": _omniglot_mlp,
    "conv4": _conv4,
    "strided_conv4": _strided_conv4,
}
