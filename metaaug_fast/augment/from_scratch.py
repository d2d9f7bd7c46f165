"""Networks that learn each task from nothing: what an augmentation is judged by that is to help such ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count, check_integer
from ..engine.problem import InnerProblem, LearningRate, Support, parameters_of
from ..engine.reference import pack
from ..learners.unrolled import UnrolledLearner


class FromScratch(UnrolledLearner):
    """Weights drawn anew for every task, and gradient steps on its support set.

        theta_i = theta_i - inner_lr * grad loss(theta_i; support of task i)      inner_steps times, theta_i drawn anew
        loss: the mean over tasks of loss(theta_i; query of task i)

    Nothing is learned from task to task but what makes the support sets: MAML's weights come to know a domain, and then
    need no augmentation; a policy or a generator of samples that is learned with this teaches networks that know
    nothing. In training the draws come from torch's generator; in evaluation they are always the same.

    Args:
        model: any module whose layers draw their weights by `reset_parameters()`. Its own weights are of no matter.
        inner_lr, inner_steps: of training on the support set; some ten steps, for the network has all to learn.
        seed: of the draws of evaluation.
        options: of `MAML`, but `adapt`; with `learn_inner_lr` the rate is learned, too.

    Raises:
        TypeError, ValueError: an argument is out of range, or a layer cannot draw its weights.

    >>> import torch, metaaug_fast as mf
    >>> policy = mf.augment.AugmentationPolicy(["noise", "scaling"], copies=4, originals=True)
    >>> learner = FromScratch(mf.models.mlp([4, 16, 3]), inner_lr=0.1)
    >>> y = torch.arange(3).repeat(8, 2)
    >>> learner(policy(mf.TaskBatch(torch.randn(8, 6, 4), y, torch.randn(8, 6, 4), y))).loss.backward()
    >>> bool(policy.strength_logit["noise"].grad)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: LearningRate = 0.05,
        inner_steps: int = 15,
        learn_inner_lr: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, inner_lr, inner_steps, **options)
        check_integer("seed", seed)
        self.seed = seed
        random_starts(model, 1)
        self._settle(None, learn_inner_lr)

    def _support(self, problem: InnerProblem, given: Support) -> Support:
        if given.initial is not None:
            return given
        seed = int(torch.randint(2**31, ())) if self.training else self.seed
        return replace(given, initial=random_starts(self.model, len(given.x), seed))


def random_starts(model: nn.Module, count: int, seed: int = 0) -> Tensor:
    """Weights as the layers draw them, `[count, P]`, on the model's device. The model stays as it is.

    Raises:
        ValueError: a layer with parameters has no `reset_parameters()`, or `count` is none.
    """
    check_count("count", count, low=1)
    check_integer("seed", seed)
    twin: Any = copy.deepcopy(model)
    parts = twin.named_modules()
    holders = {path: part for path, part in parts if next(part.parameters(recurse=False), None) is not None}
    for path, part in holders.items():
        if not hasattr(part, "reset_parameters"):
            raise ValueError(
                f"model must have layers that draw their weights by reset_parameters() (got {type(part).__name__} at "
                f"{path!r})"
            )
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        starts = []
        for _ in range(count):
            for part in holders.values():
                part.reset_parameters()
            starts.append(pack(parameters_of(twin)).detach())
    return torch.stack(starts)
