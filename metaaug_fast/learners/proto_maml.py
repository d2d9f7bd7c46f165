"""Proto-MAML (Triantafillou et al. 2020, Meta-Dataset, arXiv 1903.03096, section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.fast_weights import FastWeights
from ..engine.problem import InnerProblem, LearningRate, Support, with_seed
from .base import class_means
from .parts import find_head, inside, replaced
from .unrolled import UnrolledLearner


class ProtoMAML(UnrolledLearner):
    """MAML whose head starts, in each task, as the prototypical network of the features f(x) that it gets.

        c_k = mean of f(x) over the support samples of class k
        w_k = 2 c_k,  b_k = -|c_k|^2                so that w_k f + b_k = |f|^2 - |f - c_k|^2
        theta_i = (theta, w, b) - inner_lr * grad loss(theta, w, b; support of task i)          inner_steps times
        minimise the mean over tasks of loss(theta_i; query of task i)                          over theta

    Gradients reach theta through the prototypes, too. Nothing reads the weights that the model's own head has. Without
    steps it decides as `ProtoNet` does.

    Args:
        model: any module that ends in a linear layer with a bias; its other parameters are the meta-parameters.
        inner_lr, inner_steps, adapt, learn_inner_lr: see `MAML`; where `adapt` leaves the head out, it stays as it
            starts.
        head: the name of that layer, such as "classifier". None: it is found. Tasks have as many classes as it has
            outputs.
        first_order, loss, batch_norm, backend, label_smoothing, momentum, weight_decay, task_chunk, precision: see
            `MAML`. Prototypes are exact in first order, too.

    Raises:
        ValueError: no head can be found, none goes by that name, it is no linear layer with a bias, or another argument
            is out of range.

    >>> import torch, metaaug_fast as mf
    >>> proto_maml = mf.ProtoMAML(mf.models.mlp([4, 8, 3]))
    >>> y = torch.arange(3).repeat(2, 1)
    >>> fast = proto_maml.adapt(torch.randn(2, 3, 4), y, steps=0)
    >>> centres = fast.as_dict()["head.weight"] / 2
    >>> torch.allclose(fast.as_dict()["head.bias"], -centres.square().sum(-1))
    True
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: LearningRate = 0.01,
        inner_steps: int = 5,
        head: str | None = None,
        adapt: str | Iterable[str] | None = None,
        learn_inner_lr: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, inner_lr, inner_steps, **options)
        self.head = find_head(model, head)
        layer = model.get_submodule(self.head)
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            raise ValueError(f"head must be a linear layer with a bias (got {layer} at {self.head!r})")
        self._settle(adapt, learn_inner_lr)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_body": None}

    def _inner_problem(self) -> InnerProblem:
        self.__dict__["_body"] = replaced(self.model, {self.head: nn.Identity()})
        return super()._inner_problem()

    def _support(self, problem: InnerProblem, given: Support) -> Support:
        if given.initial is not None:
            return given
        means = class_means(self._features(problem, given.x), given.y)
        layer: Any = self.model.get_submodule(self.head)
        if means.shape[1] != layer.out_features:
            raise ValueError(
                f"support_y must have the {layer.out_features} classes of the head's outputs (got {means.shape[1]})"
            )
        prefix = inside(self.head).removesuffix("*")
        start = {name: value.expand(len(means), *value.shape) for name, value in problem.parameters.items()}
        start[f"{prefix}weight"] = 2 * means
        start[f"{prefix}bias"] = -means.square().sum(-1)
        return replace(given, initial=torch.cat([value.flatten(1) for value in start.values()], 1))

    def _features(self, problem: InnerProblem, x: Tensor) -> Tensor:
        """What the head gets of each task's samples, `[T, S, D]`, with the norms and dropout of the problem."""
        body: nn.Module = self.__dict__["_body"]
        names = self.head.split(".")
        for above in (".".join(names[:depth]) for depth in range(len(names))):  # copies, whose mode does not follow
            body.get_submodule(above).training = self.model.get_submodule(above).training
        parameters = {name: problem.parameters[name] for name, _ in body.named_parameters()}
        shorn = replace(problem, model=body, parameters=parameters, rates={}, steps=0, loss="cross_entropy")
        if not parameters:  # of a model that is a head and nothing else
            return x.flatten(2)
        weights = torch.cat([value.flatten() for value in parameters.values()]).expand(len(x), -1)
        features = FastWeights(with_seed(shorn) if problem.training else shorn, weights, self.backend)(x)
        layer: Any = self.model.get_submodule(self.head)
        if features.ndim != 3 or features.shape[-1] != layer.in_features:
            got = f"got [N, {', '.join(map(str, features.shape[2:]))}] before it"
            raise ValueError(f"head must be the model's last layer, on features [N, {layer.in_features}] ({got})")
        return features
