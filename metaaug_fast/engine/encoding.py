"""One pass of a model over samples, with its gradient, where there is no inner loop: features, or classes.

Ordinary torch takes several times as long for the small convolutions of few-shot networks, and on the CPU loses as much
again by returning and clearing memory.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import NotFusedError
from .exclusive import ONE_AT_A_TIME
from .fused import FusedExecutor
from .lowering.trace import lower
from .problem import NORMS, InnerProblem


def encode(model: nn.Module, x: Tensor) -> Tensor:
    """`model(x)` of samples `[N, ...]`, in the model's own mode: batch norms go by it, and learn running statistics.

    On the CPU, models that the fused engine knows run there, and are differentiable once; any other is called. So is
    one that drops.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> x = torch.randn(5, 4)
    >>> torch.allclose(encode(model, x), model(x), atol=1e-6)
    True
    """
    problem = _problem(model)
    executor = _executor(problem, x)
    output: Tensor = model(x) if executor is None else executor.encode(problem, x)
    return output


def is_fused(model: nn.Module, x: Tensor) -> bool:
    """Whether `encode` takes the fused engine for samples such as `x` `[N, ...]`."""
    return _executor(_problem(model), x) is not None


def _problem(model: nn.Module) -> InnerProblem:
    return InnerProblem(model, dict(model.named_parameters()), {}, 0, "mse", batch_norm="running")


_EXECUTORS: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], FusedExecutor]] = WeakKeyDictionary()


def _executor(problem: InnerProblem, x: Tensor) -> FusedExecutor | None:
    """The engine for a model and its mode, if that is the way to take."""
    if not _is_ordinary(problem, x):
        return None
    model, key = problem.model, (tuple(x.shape[1:]), problem.training)
    try:
        graph = lower(model, key[0], fixed_statistics=not problem.training, drop=problem.training)
        with ONE_AT_A_TIME:
            known = _EXECUTORS.setdefault(model, {})
            if key not in known or known[key].graph is not graph:
                known[key] = FusedExecutor(graph, model)
                known[key].engine(problem)  # which may refuse the graph, too
    except NotFusedError:
        return None
    kinds = {op.kind for op in graph.ops if not op.attributes.get("fixed")}
    return None if "dropout" in kinds or ("batch_norm" in kinds and len(x) < 2) else known[key]


def _is_ordinary(problem: InnerProblem, x: Tensor) -> bool:
    """Whether the model and its input are such as the engine takes on the CPU."""
    values = problem.parameters.values()
    kinds = {(value.device.type, value.dtype) for value in (x, *values)}
    if not values or kinds not in ({("cpu", torch.float32)}, {("cpu", torch.float64)}) or not len(x):
        return False
    if not all(map(_has_memory, (x, *values))):
        return False
    for part in problem.model.modules():
        learns_otherwise = getattr(part, "track_running_stats", False) and not isinstance(part, NORMS)
        if part.training != problem.training or learns_otherwise:
            return False
    return not torch.is_autocast_enabled("cpu")


def _has_memory(value: Tensor) -> bool:
    """Whether it is a tensor of numbers, and not what `torch.func` puts in a tensor's place."""
    try:
        value.data_ptr()
    except RuntimeError:
        return False
    return True
