"""MAML++ (Antoniou, Edwards, Storkey 2019, How to train your MAML, arXiv 1810.09502)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import check_count, check_flag
from ..engine.problem import NORMS, InnerProblem, Rate
from ..tasks import MetaOutput, TaskBatch
from .unrolled import UnrolledLearner

LEAST_META_LR = 1e-5
"""Where the cosine ends, as in the authors' runs on Omniglot."""


class MAMLpp(UnrolledLearner):
    """MAML with five changes that make it stable, each of which can be switched off; without all of them it is MAML.

    * multi_step_loss: the meta-loss is sum_k v_k loss(theta_k; query) over the steps k = 1 .. K. Of E epochs with it,
      epoch e has the weights of the authors' code, and from epoch E on only the last loss counts, as in evaluation:

          v_k = max(1/K - e / (K E), 0.03 / K)  for k < K,    v_K = min(1/K + e (K - 1) / (K E), 1 - 0.03 (K - 1) / K)

    * rates_per_step: a learned rate for each tensor and step.
    * norm_per_step: batch-norm affines of their own for each step, as `MAML` has them (`batch_norm="per_step"`); None:
      where there are batch norms. Every pass normalises with its own batch, which is what the authors' code does, too.
    * first_order_epochs: epochs in first order before the others.
    * cosine: the meta-learning rate falls from epoch to epoch along half a cosine, to 0.00001.

    `meta_step` counts epochs, and checkpoints hold the count.

    Args:
        model: any module; its parameters are meta-parameters.
        inner_lr: every rate at the start. inner_steps: K.
        multi_step_epochs: E. epoch_steps: meta-steps an epoch. epochs: of the cosine.
        adapt: see `inner_loop`.
        first_order, loss, backend, label_smoothing, momentum, weight_decay, task_chunk, precision: see `MAML`; so is
            batch_norm, which counts where norm_per_step is off.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or nothing adapts.

    >>> import metaaug_fast as mf
    >>> mamlpp = mf.MAMLpp(mf.models.conv4(ways=5, hidden=8), inner_steps=4, multi_step_epochs=2)
    >>> mamlpp.step_weights(0).tolist(), mamlpp.step_weights(1).tolist(), mamlpp.step_weights(2)
    ([0.25, 0.25, 0.25, 0.25], [0.125, 0.125, 0.125, 0.625], None)
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = 0.1,
        inner_steps: int = 5,
        multi_step_loss: bool = True,
        rates_per_step: bool = True,
        norm_per_step: bool | None = None,
        first_order_epochs: int = 0,
        cosine: bool = True,
        *,
        multi_step_epochs: int = 10,
        epoch_steps: int = 500,
        epochs: int = 100,
        adapt: str | Iterable[str] | None = None,
        batch_norm: str = "batch",
        **options: Any,
    ) -> None:
        has_norms = isinstance(model, nn.Module) and _has_affine_norms(model)
        if norm_per_step is None:
            norm_per_step = has_norms
        flags = {"multi_step_loss": multi_step_loss, "rates_per_step": rates_per_step, "norm_per_step": norm_per_step}
        for name, flag in {**flags, "cosine": cosine}.items():
            check_flag(name, flag)
        if norm_per_step and not has_norms and isinstance(model, nn.Module):
            raise ValueError(
                "norm_per_step must be False, or None, for a model without batch norms that have an affine "
                f"(got True, and {type(model).__name__})"
            )
        check_count("first_order_epochs", first_order_epochs)
        counts = {"multi_step_epochs": multi_step_epochs, "epoch_steps": epoch_steps, "epochs": epochs}
        for name, count in counts.items():
            check_count(name, count, low=1)
        if norm_per_step:
            batch_norm = "per_step"
        super().__init__(model, inner_lr, inner_steps, batch_norm=batch_norm, **options)
        self.multi_step_loss = multi_step_loss
        self.rates_per_step = rates_per_step
        self.norm_per_step = norm_per_step
        self.first_order_epochs = first_order_epochs
        self.cosine = cosine
        self.multi_step_epochs = multi_step_epochs
        self.epoch_steps = epoch_steps
        self.epochs = epochs
        self.__dict__["done"] = 0  # no setting, after whose change the problem were built anew
        self._settle(adapt)
        if rates_per_step:
            rates = self.problem().rates
            self.inner_lr = {name: rate.value.expand(inner_steps).clone() for name, rate in rates.items()}
            self._settle(adapt, learn_inner_lr=True)

    @property
    def epoch(self) -> int:
        """Whole epochs of meta-steps done."""
        return int(self.__dict__["done"]) // self.epoch_steps

    def step_weights(self, epoch: int) -> Tensor | None:
        """The weights v of the losses after each step in an epoch, `[K]`; None: the last one's alone."""
        steps, share = self.inner_steps, epoch / self.multi_step_epochs
        if not self.multi_step_loss or epoch >= self.multi_step_epochs or not steps:
            return None
        like = next(self.model.parameters())
        weights = torch.full((steps,), max((1 - share) / steps, 0.03 / steps), dtype=like.dtype)
        weights[-1] = min((1 + share * (steps - 1)) / steps, 1 - 0.03 * (steps - 1) / steps)
        return weights.to(like.device)

    def forward(self, tasks: TaskBatch, *, steps: int | None = None, **options: Any) -> MetaOutput:
        """The meta-loss of the epoch in training mode, that of the last step in evaluation; see `MAML`."""
        if self.training and steps is None:
            options = {"step_weights": self.step_weights(self.epoch), **options}
        return super().forward(tasks, steps=steps, **options)

    def problem(self, steps: int | None = None) -> InnerProblem:
        """As `MAML`'s, in first order while the epoch is one of the first."""
        problem = super().problem(steps)
        return replace(problem, first_order=True) if self.epoch < self.first_order_epochs else problem

    def _inner_problem(self) -> InnerProblem:
        problem = super()._inner_problem()
        if not self.rates_per_step:
            return problem
        # `[K]` for a bias of K elements would be taken for a rate of each element.
        rates = {name: Rate(rate.value, per_step=rate.value.ndim == 1) for name, rate in problem.rates.items()}
        return replace(problem, rates=rates)

    def meta_step(self, tasks: TaskBatch, optimizers: Sequence[Optimizer]) -> MetaOutput:
        """One update, at the rate of its epoch."""
        if self.cosine:
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                start = group.setdefault("initial_lr", group["lr"])
                least = min(start, LEAST_META_LR)
                part = min(1.0, self.epoch / self.epochs)
                group["lr"] = least + (start - least) * 0.5 * (1 + math.cos(math.pi * part))
        out = super().meta_step(tasks, optimizers)
        self.__dict__["done"] += 1
        return out

    def specification(
        self,
        tasks: TaskBatch,
        *,
        first_order: bool,
        step_weights: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> MetaOutput | None:
        """What `forward` computes, by `reference.meta_loss`."""
        if step_weights is None and self.training:
            step_weights = self.step_weights(self.epoch)
        return super().specification(
            tasks, first_order=first_order, step_weights=step_weights, sample_weight=sample_weight
        )

    def get_extra_state(self) -> int:
        """Meta-steps done."""
        return int(self.__dict__["done"])

    def set_extra_state(self, state: int) -> None:
        """Go on counting from there."""
        self.__dict__["done"] = int(state)


def _has_affine_norms(model: nn.Module) -> bool:
    return any(isinstance(each, NORMS) and each.affine for each in model.modules())
