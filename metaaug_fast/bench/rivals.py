"""One function per rival: the workload as users of that library write it.

Each takes the workload, its model and its tasks, and gives a call without arguments that returns arrays: the
meta-gradient (of Reptile the mean change) in the order of `named_parameters`, or of an evaluation the tasks' losses.

Batch norm takes the batch's own statistics. In second order it is written out from means for every rival, because the
double backward of `F.batch_norm` is several times slower and under `vmap` wrong; in first order loops take torch's own,
which is faster.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ..engine.lowering.trace import lower
from ..engine.problem import NORMS
from ..errors import NotFusedError
from ..learners.maml import MAML
from ..learners.reptile import Reptile
from ..tasks import TaskBatch
from .workloads import ADAM_BETAS, ADAM_EPS, Workload

Call = Callable[[], Sequence[Any]]
Build = Callable[[Workload, nn.Module, TaskBatch], Call]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Rival:
    """title: in tables. package: what must be importable. install: how to get it.

    refuses: why it does not run a workload, or None. remark: how it differs there from what the title says.
    """

    title: str
    build: Build
    package: str = "torch"
    install: str = ""
    refuses: Callable[[Workload], str | None] = lambda workload: None
    remark: Callable[[Workload], str] = lambda workload: ""

    @property
    def installed(self) -> bool:
        """Whether its package can be found; nothing is imported."""
        return importlib.util.find_spec(self.package) is not None


# --- ours --------------------------------------------------------------------------------------------------------


def ours(workload: Workload, model: nn.Module, tasks: TaskBatch) -> Call:
    """`metaaug_fast`, through its learners."""
    learner = workload.learner(model)
    parameters = list(model.parameters())
    if isinstance(learner, Reptile):
        start = [value.detach().clone() for value in parameters]

        def move() -> list[Tensor]:
            learner.step(tasks, measure=False)
            with torch.no_grad():
                moved = [value - first for value, first in zip(parameters, start, strict=True)]
                for value, first in zip(parameters, start, strict=True):
                    value.copy_(first)
            return moved

        return move
    if workload.kind == "evaluation":
        return lambda: [torch.cat([_judge(learner, batch) for batch in _batches(workload, tasks)])]
    return lambda: torch.autograd.grad(learner(tasks).loss, parameters)


@torch.no_grad()
def _judge(learner: MAML, tasks: TaskBatch) -> Tensor:
    return learner(tasks).task_losses


# --- plain torch ---------------------------------------------------------------------------------------------------


def plain_loop(workload: Workload, model: nn.Module, tasks: TaskBatch) -> Call:
    """`autograd.grad` with `create_graph`, a task and a step at a time; the graph of one task lives at a time."""
    net = own_statistics(model) if workload.first_order else written_out(model)
    parameters: Weights = dict(net.named_parameters())
    loss = _loss(workload, net)
    adapted = _adapted(workload, net)

    def adapt(x: Tensor, y: Tensor) -> Weights:
        fast = parameters
        for _ in range(workload.inner_steps):
            inner = torch.autograd.grad(
                loss(fast, x, y), [fast[name] for name in adapted], create_graph=not workload.first_order
            )
            fast = {**fast, **{n: fast[n] - workload.inner_lr * g for n, g in zip(adapted, inner, strict=True)}}
        return fast

    def meta_gradient() -> list[Tensor]:
        total = [torch.zeros_like(value) for value in parameters.values()]
        for x, y, query_x, query_y in _each(tasks):
            outer = loss(adapt(x, y), query_x, query_y) / tasks.tasks
            for sum_, part in zip(total, torch.autograd.grad(outer, list(parameters.values())), strict=True):
                sum_ += part
        return total

    def evaluation() -> list[Tensor]:
        found = []
        for x, y, query_x, query_y in _each(tasks):
            fast = adapt(x, y)
            with torch.no_grad():
                found.append(loss(fast, query_x, query_y))
        return [torch.stack(found)]

    def reptile() -> list[Tensor]:
        total = [torch.zeros_like(value) for value in parameters.values()]
        for x, y, _, _ in _each(tasks):
            fast = copy.deepcopy(net)
            optimizer = torch.optim.Adam(fast.parameters(), workload.inner_lr, ADAM_BETAS, ADAM_EPS)
            for _ in range(workload.inner_steps):
                optimizer.zero_grad()
                _task_loss(workload, fast(x), y).backward()
                optimizer.step()
            with torch.no_grad():
                for sum_, value, first in zip(total, fast.parameters(), parameters.values(), strict=True):
                    sum_ += (value - first) / tasks.tasks
        return total

    return {"maml": meta_gradient, "evaluation": evaluation, "reptile": reptile}[workload.kind]


def func_vmap(workload: Workload, model: nn.Module, tasks: TaskBatch) -> Call:
    """`torch.func`: `grad` of a `vmap` over tasks."""
    return _vmapped(workload, written_out(model), tasks, lambda function: function)


def compiled_vmap(workload: Workload, model: nn.Module, tasks: TaskBatch) -> Call:
    """`torch.compile` of the same."""
    return _vmapped(workload, written_out(model), tasks, torch.compile)


def vmap_batchnorm(workload: Workload, model: nn.Module, tasks: TaskBatch) -> Call:
    """The same with `nn.BatchNorm2d` as it stands."""
    return _vmapped(workload, own_statistics(model), tasks, lambda function: function)


def _vmapped(workload: Workload, net: nn.Module, tasks: TaskBatch, wrap: Callable[..., Any]) -> Call:
    loss = _loss(workload, net)
    adapted = _adapted(workload, net)
    parameters = {name: value.detach() for name, value in net.named_parameters()}
    rate, (beta1, beta2) = workload.inner_lr, ADAM_BETAS

    def sgd(p: Weights, x: Tensor, y: Tensor) -> Weights:
        for _ in range(workload.inner_steps):
            inner = grad(lambda moving, p=p: loss({**p, **moving}, x, y))({name: p[name] for name in adapted})
            if workload.first_order:
                inner = {name: value.detach() for name, value in inner.items()}
            p = {**p, **{name: p[name] - rate * inner[name] for name in adapted}}
        return p

    def adam(p: Weights, x: Tensor, y: Tensor) -> Weights:
        start, moment, square = p, *({name: torch.zeros_like(value) for name, value in p.items()} for _ in range(2))
        for step in range(1, workload.inner_steps + 1):
            inner = grad(loss)(p, x, y)
            moment = {n: beta1 * moment[n] + (1 - beta1) * inner[n] for n in p}
            square = {n: beta2 * square[n] + (1 - beta2) * inner[n].square() for n in p}
            scale = {n: (square[n] / (1 - beta2**step)).sqrt() + ADAM_EPS for n in p}
            p = {n: p[n] - rate * moment[n] / (1 - beta1**step) / scale[n] for n in p}
        return {name: p[name] - start[name] for name in p}

    def judged(p: Weights, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        return loss(sgd(p, x, y), query_x, query_y)

    def over_tasks(p: Weights, *data: Tensor) -> Tensor:
        return vmap(judged, (None, 0, 0, 0, 0))(p, *data)

    if workload.kind == "evaluation":
        evaluation = wrap(over_tasks)
        batches = [batch.tensors for batch in _batches(workload, tasks)]
        return lambda: [torch.cat([evaluation(parameters, *batch) for batch in batches])]
    data = tasks.tensors
    if workload.kind == "reptile":
        changes = wrap(lambda p: vmap(adam, (None, 0, 0))(p, *data[:2]))
        return lambda: [value.mean(0) for value in changes(parameters).values()]

    def meta_loss(p: Weights) -> Tensor:
        return over_tasks(p, *data).mean()

    meta_gradient = wrap(grad(meta_loss))
    return lambda: list(meta_gradient(parameters).values())


# --- libraries -----------------------------------------------------------------------------------------------------


def with_higher(workload: Workload, model: nn.Module, tasks: TaskBatch) -> Call:
    """`higher.innerloop_ctx` around `torch.optim.SGD`."""
    import higher

    net = written_out(model)
    inner = torch.optim.SGD(_moving(workload, net).parameters(), lr=workload.inner_lr)

    def meta_gradient() -> list[Tensor]:
        net.zero_grad()
        for x, y, query_x, query_y in _each(tasks):
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, optimizer):
                for _ in range(workload.inner_steps):
                    optimizer.step(_task_loss(workload, fast(x), y))
                (_task_loss(workload, fast(query_x), query_y) / tasks.tasks).backward()
        return _gradients(net)

    return meta_gradient


def with_torchopt(workload: Workload, model: nn.Module, tasks: TaskBatch) -> Call:
    """`torchopt.MetaSGD`; weights are put back between tasks."""
    import torchopt

    net = written_out(model)
    inner = torchopt.MetaSGD(_moving(workload, net), lr=workload.inner_lr)

    def meta_gradient() -> list[Tensor]:
        leaves = list(net.parameters())
        weights, state = torchopt.extract_state_dict(net), torchopt.extract_state_dict(inner)
        total = [torch.zeros_like(value) for value in leaves]
        for x, y, query_x, query_y in _each(tasks):
            for _ in range(workload.inner_steps):
                inner.step(_task_loss(workload, net(x), y))
            outer = _task_loss(workload, net(query_x), query_y) / tasks.tasks
            for sum_, part in zip(total, torch.autograd.grad(outer, leaves), strict=True):
                sum_ += part
            torchopt.recover_state_dict(net, weights)
            torchopt.recover_state_dict(inner, state)
        return total

    return meta_gradient


def with_learn2learn(workload: Workload, model: nn.Module, tasks: TaskBatch) -> Call:
    """`learn2learn.algorithms.MAML`: `clone()` and `adapt(loss)`.

    The package's own `__init__` needs a compiled data module that does not build on Python 3.11, and gym; the algorithm
    needs neither, so it is imported without them.
    """
    for name in ("learn2learn", "learn2learn.algorithms"):
        place = importlib.util.find_spec(name)
        assert place is not None
        if name not in sys.modules:
            sys.modules[name] = importlib.util.module_from_spec(place)  # its path, but not its content
    maml: Any = importlib.import_module("learn2learn.algorithms.maml").MAML
    net = own_statistics(model) if workload.first_order else written_out(model)
    body = nn.Sequential(*list(net.children())[:-1]) if workload.adapt else nn.Identity()
    learner = maml(_moving(workload, net), lr=workload.inner_lr, first_order=workload.first_order)

    def meta_gradient() -> list[Tensor]:
        net.zero_grad()
        for x, y, query_x, query_y in _each(tasks):
            fast, features = learner.clone(), body(x)
            for _ in range(workload.inner_steps):
                fast.adapt(_task_loss(workload, fast(features), y))
            (_task_loss(workload, fast(body(query_x)), query_y) / tasks.tasks).backward()
        return _gradients(net)

    return meta_gradient


def with_jax(workload: Workload, model: nn.Module, tasks: TaskBatch) -> Call:
    """`jax.jit` of `jax.vmap`, `lax.scan` over the inner steps; see `jax_rival.py`."""
    from .jax_rival import build

    return build(workload, model, tasks)


def _not_fused(workload: Workload) -> str:
    try:
        lower(workload.model(), workload.sample)
    except NotFusedError as error:
        return f"not fused: {error}"
    return ""


def _only_second_order(workload: Workload) -> str | None:
    if workload.kind != "maml":
        return "differentiates through inner loops only"
    return "no first-order mode" if workload.first_order else None


def _only_maml(workload: Workload) -> str | None:
    return None if workload.kind == "maml" else "only MAML here"


def _not_for_jax(workload: Workload) -> str | None:
    return "not written in JAX here" if workload.net == "resnet12" else None


def _mapped(workload: Workload) -> str:
    return "lax.map over tasks, which is faster here than vmap" if "conv" in workload.net else ""


def _batch_norm_only(workload: Workload) -> str | None:
    return None if workload.kind == "maml" and not workload.first_order else "shown in second order only"


OURS = "metaaug_fast"
_LEARN2LEARN = (
    "no release builds on Python >= 3.11; pip download --no-deps --no-binary :all: learn2learn==0.2.0, unpack it "
    "and put its folder on PYTHONPATH"
)
RIVALS: dict[str, Rival] = {
    OURS: Rival("metaaug_fast", ours, remark=_not_fused),
    "loop": Rival("plain loop", plain_loop),
    "learn2learn": Rival("learn2learn", with_learn2learn, "learn2learn", _LEARN2LEARN, _only_maml),
    "higher": Rival("higher", with_higher, "higher", "pip install 'metaaug_fast[bench-higher]'", _only_second_order),
    "torchopt": Rival(
        "TorchOpt", with_torchopt, "torchopt", "pip install 'metaaug_fast[bench-torchopt]'", _only_second_order
    ),
    "vmap": Rival("torch.func vmap", func_vmap),
    "compile": Rival("torch.compile(vmap)", compiled_vmap),
    "jax": Rival("JAX jit(vmap)", with_jax, "jax", "pip install 'metaaug_fast[bench-jax]'", _not_for_jax, _mapped),
    "vmap-batchnorm": Rival("vmap, nn.BatchNorm2d", vmap_batchnorm, refuses=_batch_norm_only),
}
SHOWN_ONLY = ("vmap-batchnorm",)  # where a workload asks for them


def check_rivals(names: Sequence[str]) -> list[str]:
    """Ours and these, in the order of `RIVALS`.

    Raises:
        ValueError: a name is unknown.
    """
    for name in names:
        if name not in RIVALS:
            raise ValueError(f"rivals must be among {', '.join(RIVALS)} (got {name!r})")
    return [name for name in RIVALS if name == OURS or name in names]


# --- what they share -----------------------------------------------------------------------------------------------


def own_statistics(model: nn.Module) -> nn.Module:
    """A copy whose batch norms keep no running statistics."""
    net = copy.deepcopy(model)
    for norm in net.modules():
        if isinstance(norm, NORMS):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return net


def written_out(model: nn.Module) -> nn.Module:
    """A copy whose batch norms are written out from means."""
    net = copy.deepcopy(model)
    for path, norm in list(net.named_modules()):
        if isinstance(norm, NORMS):
            net.set_submodule(path, WrittenOutBatchNorm(norm))
    return net


class WrittenOutBatchNorm(nn.Module):
    """Batch norm by the batch's own mean and variance over all dimensions but the second."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, ...]`."""
        dims, affine = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        centred = x - x.mean(dims, keepdim=True)
        variance = (centred * centred).mean(dims, keepdim=True)
        return centred * torch.rsqrt(variance + self.eps) * self.weight.view(affine) + self.bias.view(affine)


def _loss(workload: Workload, net: nn.Module) -> Callable[[Weights, Tensor, Tensor], Tensor]:
    return lambda p, x, y: _task_loss(workload, functional_call(net, p, (x,)), y)


def _task_loss(workload: Workload, prediction: Tensor, target: Tensor) -> Tensor:
    return (F.mse_loss if workload.loss == "mse" else F.cross_entropy)(prediction, target)


def _adapted(workload: Workload, net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_parameters() if workload.adapts(name)]


def _moving(workload: Workload, net: nn.Module) -> nn.Module:
    return net.get_submodule("head") if workload.adapt else net


def _gradients(net: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in net.parameters()]


def _each(tasks: TaskBatch) -> list[tuple[Tensor, ...]]:
    return list(zip(*tasks.tensors, strict=True))


def _batches(workload: Workload, tasks: TaskBatch) -> list[TaskBatch]:
    return tasks.split(workload.batch or tasks.tasks)
