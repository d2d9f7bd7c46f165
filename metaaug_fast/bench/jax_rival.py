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
from .workloads import Workload

BETAS, EPS = (0.0, 0.999), 1e-8  # Reptile's inner Adam
Arrays = tuple[Any, ...]


def build(workload: Workload, model: nn.Module, tasks: TaskBatch) -> Callable[[], Any]:
    """A call that gives the arrays that `rivals.py` describes."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)  # for the check; arrays of float32 stay what they are
    predict = _NETS[workload.net](workload)
    parameters = tuple(jnp.array(value.detach().numpy()) for value in model.parameters())
    adapted = [workload.adapt is None or name.startswith("head.") for name, _ in model.named_parameters()]
    sets = [jnp.array(each.numpy()) for each in (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)]
    rate = workload.inner_lr
    convolutions = "conv" in workload.net

    def loss(p: Arrays, x: Any, y: Any) -> Any:
        output = predict(p, x)
        if workload.loss == "mse":
            return jnp.mean((output - y) ** 2)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(output), y[:, None], 1))

    def moving(p: Arrays) -> Arrays:
        return tuple(value for value, moves in zip(p, adapted, strict=True) if moves)

    def merge(p: Arrays, moved: Arrays) -> Arrays:
        left = iter(moved)
        return tuple(next(left) if moves else value for value, moves in zip(p, adapted, strict=True))

    def judged(p: Arrays, x: Any, y: Any, query_x: Any, query_y: Any) -> Any:
        def step(fast: Arrays, _: None) -> tuple[Arrays, None]:
            inner = jax.grad(lambda moved: loss(merge(p, moved), x, y))(fast)
            if workload.first_order:
                inner = lax.stop_gradient(inner)
            return jax.tree.map(lambda w, g: w - rate * g, fast, inner), None

        fast, _ = lax.scan(step, moving(p), None, workload.inner_steps)
        return loss(merge(p, fast), query_x, query_y)

    def change(p: Arrays, x: Any, y: Any) -> Any:
        def step(state: tuple[Arrays, Arrays, Arrays], number: Any) -> tuple[tuple[Arrays, Arrays, Arrays], None]:
            fast, moment, square = state
            inner = jax.grad(loss)(fast, x, y)
            moment = jax.tree.map(lambda m, g: BETAS[0] * m + (1 - BETAS[0]) * g, moment, inner)
            square = jax.tree.map(lambda s, g: BETAS[1] * s + (1 - BETAS[1]) * g * g, square, inner)
            fast = jax.tree.map(
                lambda w, m, s: w - rate * m / (1 - BETAS[0]**number) / (jnp.sqrt(s / (1 - BETAS[1]**number)) + EPS),
                fast, moment, square,
            )  # fmt: skip
            return (fast, moment, square), None

        zeros = jax.tree.map(jnp.zeros_like, p)
        numbers = jnp.arange(1, workload.inner_steps + 1, dtype=p[0].dtype)
        (fast, _, _), _ = lax.scan(step, (p, zeros, zeros), numbers)
        return jax.tree.map(lambda w, first: w - first, fast, p)

    def over_tasks(p: Arrays, *sets: Any) -> Any:
        if convolutions:
            return lax.map(lambda task: judged(p, *task), sets)
        return jax.vmap(judged, (None, 0, 0, 0, 0))(p, *sets)

    def changes(p: Arrays, x: Any, y: Any) -> Any:
        if convolutions:
            return lax.map(lambda task: change(p, *task), (x, y))
        return jax.vmap(change, (None, 0, 0))(p, x, y)

    if workload.kind == "evaluation":
        evaluation = jax.jit(over_tasks)
        size = workload.batch or tasks.tasks
        batches = [[each[at : at + size] for each in sets] for at in range(0, tasks.tasks, size)]
        return lambda: [jnp.concatenate(jax.block_until_ready([evaluation(parameters, *batch) for batch in batches]))]
    if workload.kind == "reptile":
        mean = jax.jit(lambda p, x, y: jax.tree.map(lambda each: each.mean(0), changes(p, x, y)))
        return lambda: jax.block_until_ready(mean(parameters, *sets[:2]))
    meta_gradient = jax.jit(jax.grad(lambda p, *sets: over_tasks(p, *sets).mean()))
    return lambda: jax.block_until_ready(meta_gradient(parameters, *sets))


Predict = Callable[[Arrays, Any], Any]


def _mlp(workload: Workload) -> Predict:
    def predict(p: Arrays, x: Any) -> Any:
        x = x.reshape(len(x), -1)
        for weight, bias in zip(p[:-2:2], p[1:-2:2], strict=True):
            x = jax.nn.relu(x @ weight.T + bias)
        return x @ p[-2].T + p[-1]

    return predict


def _omniglot_mlp(workload: Workload) -> Predict:
    def predict(p: Arrays, x: Any) -> Any:
        x = x.reshape(len(x), -1)
        for at in range(0, len(p) - 2, 4):
            weight, bias, scale, shift = p[at : at + 4]
            x = jax.nn.relu(_batch_norm(x @ weight.T + bias, scale, shift, (0,)))
        return x @ p[-2].T + p[-1]

    return predict


def _conv4(workload: Workload, pool: bool = True) -> Predict:
    stride = 1 if pool else 2

    def predict(p: Arrays, x: Any) -> Any:
        for at in range(0, len(p) - 2, 4):
            weight, bias, scale, shift = p[at : at + 4]
            x = lax.conv_general_dilated(x, weight, (stride, stride), ((1, 1), (1, 1)))
            x = jax.nn.relu(_batch_norm(x + bias[:, None, None], scale, shift, (0, 2, 3)))
            if pool:
                samples, channels, height, width = x.shape
                x = x[:, :, : height // 2 * 2, : width // 2 * 2]
                x = x.reshape(samples, channels, height // 2, 2, width // 2, 2).max((3, 5))
        x = x.reshape(len(x), -1) if pool else x.mean((2, 3))
        return x @ p[-2].T + p[-1]

    return predict


def _batch_norm(x: Any, scale: Any, shift: Any, axes: tuple[int, ...]) -> Any:
    affine = (-1, *[1] * (x.ndim - 2))
    centred = x - x.mean(axes, keepdims=True)
    variance = (centred * centred).mean(axes, keepdims=True)
    return centred * lax.rsqrt(variance + 1e-5) * scale.reshape(affine) + shift.reshape(affine)


_NETS: dict[str, Callable[[Workload], Predict]] = {
    "mlp": _mlp,
    "omniglot_mlp": _omniglot_mlp,
    "conv4": _conv4,
    "strided_conv4": lambda workload: _conv4(workload, pool=False),
}
