"""The executor for a model whose body does not adapt: the body runs once, the inner loop on what comes out of it.

Of ANIL, say, the head alone adapts. With features f = body(x; b) and a tail of weights w, the inner loop over (f, y)
starts from w, and its gradient with respect to f is all that b needs: `dL/db = dL/df df/db`, for support and query.
So the body need not be fused, and takes one pass and one gradient whatever the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from os.path import commonpath
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..tasks import MetaOutput
from .exclusive import ONE_AT_A_TIME
from .executor import Executor
from .fallback import FallbackExecutor
from .norms import forward, forward_all_until, forward_until
from .problem import NORMS, InnerProblem, Query, Rate, Support
from .reference import pack, unpack

BODY_BYTES = 2**30
"""What the graph of a body may take; that of a larger one is made again, chunk by chunk of the tasks, in `backward`."""


@dataclass(frozen=True)
class Cut:
    """Where a model falls in two.

    path: of the tail among its submodules. shape: of the tail's input, per sample. mixes: the body makes of a sample
    what depends on others (beyond what batch norms do), or must be run otherwise than by torch's own functions.
    """

    path: str
    shape: tuple[int, ...]
    mixes: bool


class SplitExecutor:
    """Runs a model as a body that does not adapt and a tail that does; `executor.Executor` says what methods promise.

    What the body cannot be taken out of (`rows`, with which a batch norm sees other samples in every step, and
    `initial`, which may give every task a body of its own) runs in the fallback.

    Args:
        cut: between the two; see `find_cut`.
        tail: the executor of the tail on features.
        whole: that of the whole model.
    """

    def __init__(self, cut: Cut, tail: Executor, whole: FallbackExecutor) -> None:
        self.path, self.mixes, self.tail, self.whole = cut.path, cut.mixes, tail, whole
        self.name = f"{tail.name} from {cut.path} on, behind a body that runs once"
        self.output_shape = tail.output_shape

    def adapt(self, problem: InnerProblem, support: Support) -> Tensor:
        """Adapted weights `[T, P]`, of which those of the body are the model's own."""
        if _cannot_split(support):
            return self.whole.adapt(problem, support)
        adapted = self.tail.adapt(self._tail(problem), self._support(problem, support))
        flat = pack(problem.parameters).expand(len(adapted), -1)
        return flat.scatter(1, self._places(problem).expand(len(adapted), -1), adapted)

    def adapt_mean(
        self, problem: InnerProblem, support: Support, query: Query | None = None
    ) -> tuple[Tensor, MetaOutput | None]:
        """Mean over tasks of `theta_K - theta_0`, `[P]`, and theta_K judged on a query set."""
        if _cannot_split(support):
            return self.whole.adapt_mean(problem, support, query)
        judged = None if query is None else self._query(problem, query)
        moved, output = self.tail.adapt_mean(self._tail(problem), self._support(problem, support), judged)
        mean = torch.zeros_like(pack(problem.parameters).detach())
        mean[self._places(problem)] = moved
        return mean, output

    def predict(self, problem: InnerProblem, flat: Tensor, x: Tensor) -> Tensor:
        """Outputs `[T, N, *output_shape]`; with a gradient, or of weights with another body, those of the whole."""
        rest = torch.ones(flat.shape[1], dtype=torch.bool, device=flat.device)
        places = self._places(problem)
        rest[places] = False
        graph = torch.is_grad_enabled() and (flat.requires_grad or x.requires_grad)
        if graph or not (flat[:, rest] == pack(problem.parameters)[rest]).all():
            return self.whole.predict(problem, flat, x)
        return self.tail.predict(self._tail(problem), flat[:, places], self._features(problem, x))

    def meta_loss(self, problem: InnerProblem, support: Support, query: Query) -> MetaOutput:
        """Adapt the tail and judge it: a whole meta-step."""
        if _cannot_split(support):
            return self.whole.meta_loss(problem, support, query)
        return self.tail.meta_loss(self._tail(problem), self._support(problem, support), self._query(problem, query))

    def judge_steps(self, problem: InnerProblem, support: Support, query: Query) -> list[MetaOutput]:
        """theta_0 .. theta_K judged on the query set."""
        if _cannot_split(support):
            return self.whole.judge_steps(problem, support, query)
        with torch.no_grad():
            return self.tail.judge_steps(
                self._tail(problem), self._support(problem, support), self._query(problem, query)
            )

    def _tail(self, problem: InnerProblem) -> InnerProblem:
        return tail_problem(problem, self.path)

    def _support(self, problem: InnerProblem, support: Support) -> Support:
        return replace(support, x=self._features(problem, support.x))

    def _query(self, problem: InnerProblem, query: Query) -> Query:
        return replace(query, x=self._features(problem, query.x))

    def _features(self, problem: InnerProblem, x: Tensor) -> Tensor:
        """What the body makes of `x` `[T, N, ...]`, as ordinary torch, differentiable."""

        def all_at_once(x: Tensor) -> Tensor:
            return forward_all_until(problem, x, self.path)

        def one(x: Tensor) -> Tensor:
            return forward_until(problem, problem.parameters, x, self.path)[0]

        if self.mixes:
            return self.whole.over_tasks(one, x)
        chunk = problem.task_chunk or max(1, BODY_BYTES // self.whole.saved_bytes(problem, x))
        if chunk >= len(x) or not torch.is_grad_enabled():
            return all_at_once(x)
        parts = [
            checkpoint(all_at_once, part, use_reentrant=False, preserve_rng_state=False) for part in x.split(chunk)
        ]
        return torch.cat(parts)

    def _places(self, problem: InnerProblem) -> Tensor:
        """Where the tail's weights lie among all, `[P of the tail]`."""
        like = next(iter(problem.parameters.values()))
        numbers = torch.arange(sum(value.numel() for value in problem.parameters.values()), device=like.device)
        inside = f"{self.path}."
        return torch.cat([v.flatten() for name, v in unpack(problem, numbers).items() if name.startswith(inside)])


def tail_problem(problem: InnerProblem, path: str) -> InnerProblem:
    """The inner problem of the submodule at `path`, on its own inputs."""
    inside = f"{path}."

    def within(values: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(inside): value for name, value in values.items() if name.startswith(inside)}

    rates: dict[str, Rate] = within(problem.rates)
    per_step = frozenset(within(dict.fromkeys(problem.per_step)))
    parameters = within(problem.parameters)
    return replace(
        problem, model=problem.model.get_submodule(path), parameters=parameters, rates=rates, per_step=per_step
    )


def find_cut(problem: InnerProblem, sample_shape: tuple[int, ...], ids: bool) -> Cut | None:
    """Before the smallest submodule in which all that adapts lies and with which the model ends.

    None where there is none: a pass over random samples shows whether the model calls it once, on one tensor `[N, ...]`
    that depends on none of its weights, and returns what it returns. The body must be the same in all passes: nothing
    in it drops, has weights for each step, or learns running statistics.
    """
    like = next(iter(problem.parameters.values()))
    shape, device = (4, *sample_shape), like.device
    if ids:
        x = torch.zeros(shape, dtype=torch.int64, device=device)
    else:
        x = torch.randn(shape, dtype=like.dtype, device=device, generator=torch.Generator(device).manual_seed(0))
    owners = {name.rpartition(".")[0].replace(".", "/") for name in problem.rates}
    path = commonpath(owners).replace("/", ".")
    while path:
        if _stands_alone(problem, path) and (found := _probe(problem, path, x)) is not None:
            return found
        path = path.rpartition(".")[0]
    return None


def _stands_alone(problem: InnerProblem, path: str) -> bool:
    """Whether the submodule shares no parameter with the rest, and the rest is the same in every step."""
    model, inside = problem.model, f"{path}."
    tail = model.get_submodule(path)
    own = {id(value) for value in tail.parameters()}
    named = model.named_parameters(remove_duplicate=False)
    shared = any(id(value) in own for name, value in named if not name.startswith(inside))
    norms = [name for name, each in model.named_modules() if isinstance(each, NORMS)]
    learns = problem.batch_norm == "running" and problem.training
    learns = learns and any(name != path and not name.startswith(inside) for name in norms)
    by_step = any(not name.startswith(inside) for name in problem.per_step)
    return not (shared or learns or by_step) and tail.training == problem.training


def _probe(problem: InnerProblem, path: str, x: Tensor) -> Cut | None:
    """The cut before a submodule; None where the model does not end with that, see `find_cut`."""
    calls: list[tuple[Any, Any, Any]] = []
    weights = {name: value.detach().requires_grad_() for name, value in problem.parameters.items()}
    with ONE_AT_A_TIME, torch.enable_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
        hook = problem.model.get_submodule(path).register_forward_hook(
            lambda _, *call: calls.append(call), with_kwargs=True
        )
        try:
            output = forward(problem, weights, x, task=0, step=0)
        finally:
            hook.remove()
        if len(calls) != 1:
            return None
        args, kwargs, returned = calls[0]
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or returned is not output:
            return None
        features, drops = forward_until(problem, weights, x, path)
        if drops or features.ndim < 2 or len(features) != len(x) or features.dtype != output.dtype:
            return None
        inside = [value for name, value in weights.items() if name.startswith(f"{path}.")]
        reached = torch.autograd.grad(features.sum(), inside, allow_unused=True) if features.requires_grad else ()
        if any(value is not None for value in reached):
            return None
        return Cut(path, tuple(features.shape[1:]), _mixes(problem, path, x))


@torch.no_grad()
def _mixes(problem: InnerProblem, path: str, x: Tensor) -> bool:
    """Whether two tasks of two samples give other features together than one by one."""
    tasks = x.unflatten(0, (2, 2))
    expected = torch.stack([forward_until(problem, problem.parameters, each, path)[0] for each in tasks])
    found = forward_all_until(problem, tasks, path)
    tolerance = torch.finfo(found.dtype).eps ** 0.75
    return not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def _cannot_split(support: Support) -> bool:
    return support.rows is not None or support.initial is not None
