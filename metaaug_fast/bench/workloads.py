"""What is timed: named meta-learning workloads with their inputs, and the targets that each is judged by."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..data import Episodes, Sinusoids
from ..learners.maml import MAML
from ..learners.reptile import Reptile
from ..tasks import TaskBatch

ADAM_BETAS, ADAM_EPS = (0.0, 0.999), 1e-8  # of Reptile's inner Adam


@dataclass(frozen=True)
class Target:
    """A bound that a workload's rows must keep.

    quantity: "speedup" (time of the fastest exact one among `rivals` over ours, at least `limit`; no rivals: all),
        "cost" (our second-order time over that of the first-order twin, at most), "ceiling" (share of the measured
        ceiling, at least), "first call" (seconds more than a later call, at most) or "memory" (our peak over the
        least of the exact rivals, at most).
    """

    quantity: str
    limit: float
    rivals: tuple[str, ...] = ()

    @property
    def at_least(self) -> bool:
        """Whether `limit` is a lower bound."""
        return self.quantity in ("speedup", "ceiling")


EVERYWHERE = (Target("first call", 0.5), Target("memory", 1.0))


@dataclass(frozen=True)
class Workload:
    """T tasks with S support and Q query samples each, adapted by K inner steps; one call is one meta-gradient.

    net, options: a function of `models` and its arguments. sample: shape of an input. ways: None for regression on
    sinusoids. support, query: samples of a task, S and Q. kind: "maml" (the call gives the meta-gradient), "reptile"
    (the mean change of the weights by inner Adam steps) or "evaluation" (the query loss of every task, without graph).
    adapt: shell pattern of the parameters that adapt (ANIL). batch: tasks at once in an evaluation. unchecked: shell
    pattern of parameters that the check leaves out. shows: rivals that run here only. core: part of the default run.
    """

    name: str
    net: str
    sample: tuple[int, ...]
    tasks: int
    support: int
    query: int
    inner_steps: int
    inner_lr: float
    ways: int | None = 5
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "maml"
    first_order: bool = False
    adapt: str | None = None
    batch: int | None = None
    unchecked: str = ""
    targets: tuple[Target, ...] = EVERYWHERE
    shows: tuple[str, ...] = ()
    core: bool = False

    @property
    def twin(self) -> str:
        """Name of the same workload in first order."""
        return self.name + "-first-order"

    @property
    def loss(self) -> str:
        """ "mse" for regression, else "cross_entropy"."""
        return "mse" if self.ways is None else "cross_entropy"

    @property
    def ceiling(self) -> str:
        """Which measured ceiling bounds it: "convolution", or "gemm" where there are no convolutions."""
        return "gemm" if "mlp" in self.net else "convolution"

    def __str__(self) -> str:
        inner = {"maml": "first order" if self.first_order else "second order", "reptile": "Adam"}
        return (
            f"{self.net} on {'x'.join(map(str, self.sample))}, T={self.tasks} K={self.inner_steps} S={self.support} "
            f"Q={self.query}, {inner.get(self.kind, 'no graph')}{', head only' if self.adapt else ''}"
        )

    def adapts(self, parameter: str) -> bool:
        """Whether inner steps move the parameter of this name."""
        return self.adapt is None or fnmatch.fnmatchcase(parameter, self.adapt)

    def checks(self, parameter: str) -> bool:
        """Whether the check takes in what belongs to this parameter."""
        return not fnmatch.fnmatchcase(parameter, self.unchecked)

    def model(self) -> nn.Module:
        """The network with its first weights, the same at every call; the random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net: nn.Module = getattr(models, self.net)(**self.options)
        return net

    def inputs(self) -> TaskBatch:
        """The tasks, the same at every call: sinusoids, or uniform noise for pictures."""
        if self.ways is None:
            source = Episodes(Sinusoids(), shots=self.support, queries=self.query, tasks=self.tasks)
            return source.batch(0)
        generator = torch.Generator().manual_seed(2)
        drawn: list[Tensor] = []
        for count in (self.support, self.query):
            drawn.append(torch.rand(self.tasks, count, *self.sample, generator=generator))
            drawn.append(torch.arange(count).remainder(self.ways).repeat(self.tasks, 1))
        return TaskBatch(*drawn)

    def learner(self, model: nn.Module) -> MAML | Reptile:
        """Ours, on a model."""
        if self.kind == "reptile":
            return Reptile(model, self.inner_lr, self.inner_steps, loss=self.loss, betas=ADAM_BETAS)
        return MAML(model, self.inner_lr, self.inner_steps, self.first_order, self.loss, self.adapt)


def faster(limit: float, *rivals: str) -> Target:
    """At least `limit` times as fast as the best of these rivals."""
    return Target("speedup", limit, rivals)


def _sinusoid(name: str, tasks: int, steps: int, *targets: Target, core: bool = False) -> Workload:
    return Workload(
        name, "mlp", (1,), tasks, 10, 10, steps, 0.01, None, {"sizes": (1, 40, 40, 1)},
        targets=EVERYWHERE + targets, core=core,
    )  # fmt: skip


def _pictures(
    name: str, net: str, tasks: int, steps: int, support: int, query: int, *targets: Target, **others: Any
) -> Workload:
    ways, options, sample = others.pop("ways", 5), others.pop("options", {}), others.pop("sample", (1, 28, 28))
    return Workload(
        name, net, sample, tasks, support, query, steps, others.pop("inner_lr", 0.4), ways,
        {"ways": ways, "sample_shape": sample, **options}, targets=EVERYWHERE + targets, **others,
    )  # fmt: skip


_CEILING = Target("ceiling", 0.65)
_MINI_IMAGENET = {"hidden": 32}
_NARROW = {"widths": (16, 32, 64, 128)}

_WRITTEN = (
    _sinusoid("sinusoid-t25-k1", 25, 1),
    _sinusoid("sinusoid-t25-k5", 25, 5, faster(4, "jax", "compile"), faster(60, "loop"), core=True),
    _sinusoid("sinusoid-t1000-k1", 1000, 1),
    _sinusoid("sinusoid-t1000-k5", 1000, 5, faster(4), core=True),
    _pictures("omniglot-mlp-t32-k1", "omniglot_mlp", 32, 1, 5, 5, core=True),
    _pictures(
        "conv4-t8-k1", "conv4", 8, 1, 5, 5, faster(3, "compile"), faster(5, "loop"), _CEILING, Target("cost", 2.2),
        shows=("vmap-batchnorm",), core=True,
    ),
    _pictures("conv4-t32-k1", "conv4", 32, 1, 5, 5, Target("cost", 2.2)),
    _pictures("conv4-t4-k5", "conv4", 4, 5, 25, 75, faster(4, "loop"), _CEILING, Target("cost", 2.9), core=True),
    _pictures("conv4-20way-t4-k5", "conv4", 4, 5, 20, 20, Target("cost", 2.9), ways=20),
    _pictures("strided-conv4-t8-k1", "strided_conv4", 8, 1, 5, 5),
    _pictures("strided-conv4-t32-k1", "strided_conv4", 32, 1, 5, 5, core=True),
    _pictures("strided-conv4-t4-k5", "strided_conv4", 4, 5, 25, 75),
    _pictures("strided-conv4-20way-t4-k5", "strided_conv4", 4, 5, 20, 20, ways=20),
    _pictures(
        "miniimagenet-conv4-t4-k5", "conv4", 4, 5, 5, 75, Target("cost", 2.9), sample=(3, 84, 84),
        options=_MINI_IMAGENET, inner_lr=0.01, core=True,
    ),
    _pictures("resnet12-t4-k1", "resnet12", 4, 1, 5, 5, sample=(3, 32, 32), options=_NARROW, core=True),
    _pictures("anil-conv4-t8-k5", "conv4", 8, 5, 5, 5, adapt="head.*", core=True),
)  # fmt: skip


def _first_order(workload: Workload) -> Workload:
    """The same with inner gradients taken for constants."""
    against_loop = (faster(3, "loop"),) if workload.net == "conv4" and not workload.adapt else ()
    core = workload.core and any(target.quantity == "cost" for target in workload.targets)
    return replace(
        workload, name=workload.twin, first_order=True, targets=EVERYWHERE + against_loop, shows=(),
        core=core,
    )  # fmt: skip


_OTHERS = (
    replace(
        _sinusoid("reptile-sinusoid-t25-k10", 25, 10, core=True), kind="reptile", first_order=True
    ),
    # Biases before a batch norm have no gradient but rounding errors, which Adam divides by their own size.
    _pictures(
        "reptile-strided-conv4-t5-k10", "strided_conv4", 5, 10, 25, 5, inner_lr=1e-3, kind="reptile",
        first_order=True, unchecked="block*.0.bias",
    ),
    _pictures(
        "evaluation-omniglot", "strided_conv4", 600, 3, 5, 5, faster(8, "loop"), kind="evaluation", first_order=True,
        batch=30, core=True,
    ),
)  # fmt: skip

WORKLOADS: dict[str, Workload] = {
    each.name: each
    for each in (*(twin for workload in _WRITTEN for twin in (workload, _first_order(workload))), *_OTHERS)
}


def select(patterns: Sequence[str] = (), every: bool = False) -> list[Workload]:
    """The workloads whose names match any of the patterns; without patterns the core ones, or all.

    Raises:
        ValueError: a pattern matches none.

    >>> [each.name for each in select(["anil*"])]
    ['anil-conv4-t8-k5', 'anil-conv4-t8-k5-first-order']
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in WORKLOADS):
            raise ValueError(f"workloads must be names or patterns of those that --list shows (got {pattern!r})")
    if patterns:
        return [each for name, each in WORKLOADS.items() if any(fnmatch.fnmatchcase(name, one) for one in patterns)]
    return [each for each in WORKLOADS.values() if every or each.core]
