"""What learners share that compare features: one network encodes the samples of all tasks, and no weights adapt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.encoding import encode, is_fused
from ..tasks import MetaOutput, TaskBatch
from .base import Adapted, Learner, Predictor, check_mask, check_steps, one_task_too, scored

Predict = Callable[[Tensor], Tensor]


class EncoderLearner(Learner):
    """A learner that classifies by what an encoder f makes of support and query samples. Subclass it and write `_fit`.

    Batch norm is the module's own: training normalises support and query samples of all tasks together, evaluation by
    the running statistics, so predictions are not transductive. Training tasks may have more classes than those judged
    later. On the CPU the encoder runs in the fused engine where that knows it (`engine.encoding.encode`).

    Args:
        model: an encoder, `[N, ...]` to features `[N, D]`, such as `mf.models.conv4(ways=None)`.

    Raises:
        TypeError: `model` is no module.

    >>> import torch, metaaug_fast as mf
    >>> class NearestMean(mf.learners.EncoderLearner):
    ...     def _fit(self, features, labels):
    ...         means = mf.learners.class_means(features, labels)
    ...         return lambda queries: -torch.cdist(queries, means)
    >>> y = torch.arange(5).repeat(2, 1)
    >>> tasks = mf.TaskBatch(torch.rand(2, 5, 6), y, torch.rand(2, 5, 6), y)
    >>> NearestMean(torch.nn.Linear(6, 3))(tasks).task_losses.shape
    torch.Size([2])
    """

    encoder = True
    forms: ClassVar[Mapping[int, str]] = {2: "features [N, D]"}
    """What the model may give, by its dimensions."""
    features: int | None = None
    """D, where the learner has layers for so many; None: any number will do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module (got {type(model).__name__})")
        self.model = model

    def _fit(self, features: Tensor, labels: Tensor) -> Predict:
        """From support features `[T, S, D]` and class ids `[T, S]`: from query features `[T, Q, D]` to `[T, Q, ways]`.

        What else a subclass's takes, `forward` and `adapt` take by name.

        Raises:
            ValueError: `labels` are none that it can learn from.
        """
        raise NotImplementedError(f"{type(self).__name__} must write _fit(features, labels)")

    def _score(self, prediction: Tensor, y: Tensor) -> MetaOutput:
        """Losses and accuracies of predictions `[T, Q, ways]` for class ids `[T, Q]`."""
        return scored("cross_entropy", prediction, y)

    def _penalty(self, features: Tensor, tasks: TaskBatch, there: Tensor | None = None) -> Tensor | None:
        """What training adds to each task's loss, `[T]`, by the features of its support and query samples.

        there: bool `[T, S + Q]`, which of them there are; None: all.
        """
        return None

    def forward(self, tasks: TaskBatch, *, steps: int | None = None, **given: Any) -> MetaOutput:
        """The loss of every task's queries.

        Raises:
            TypeError, ValueError: the tasks do not fit the model, or `steps` is given.
        """
        tasks = TaskBatch.of(tasks)
        check_steps(self, steps)
        mask = self._mask(given, tasks.support_y)
        there = None if mask is None else F.pad(mask, (0, tasks.query_x.shape[1]), value=True)
        features = self._embed(torch.cat([tasks.support_x, tasks.query_x], 1), there)
        support, query = features.split([tasks.support_x.shape[1], tasks.query_x.shape[1]], 1)
        out = self._score(self._fit(support, tasks.support_y, **given)(query), tasks.query_y)
        penalty = self._penalty(features, tasks, there) if self.training else None
        if penalty is None:
            return out
        losses = out.task_losses + penalty
        return replace(out, loss=losses.mean(), task_losses=losses)

    @one_task_too
    def adapt(self, support_x: Tensor, support_y: Tensor, **given: Any) -> Adapted:
        """What each task `[T, S, ...]` learns from its support set; one task may lack its T."""
        predict = self._fit(self._embed(support_x, self._mask(given, support_y)), support_y, **given)
        return Predictor(lambda x: predict(self._embed(x)), len(support_x), score=self._score)

    def runs_on(self, sample_shape: tuple[int, ...], ids: bool = False) -> str:
        """What computes it on samples of a shape: "fused encoder", or "torch"."""
        like = next(self.model.parameters(), torch.empty(0))
        example = like.new_empty(2, *sample_shape, dtype=torch.int64 if ids else like.dtype)
        return "fused encoder" if is_fused(self.model, example) else "torch"

    def _mask(self, given: Mapping[str, Any], labels: Tensor) -> Tensor | None:
        """Which support samples there are, of what is given by name; TypeError where `_fit` does not take that."""
        for name in given.keys() - inspect.signature(self._fit).parameters.keys():
            raise TypeError(f"{name} must not be given: {type(self).__name__} takes none (got one)")
        mask: Tensor | None = given.get("mask")
        if mask is not None:
            check_mask(mask, labels)
        return mask

    def _embed(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """Features `[T, N, D]` of samples `[T, N, ...]`; 0 of those that are not there, which no batch norm sees."""
        flat = x.flatten(0, 1) if there is None else x[there]
        features = encode(self.model, flat)
        if len(features) != len(flat) or features.ndim not in self.forms:
            forms = " or ".join(self.forms.values())
            raise ValueError(f"model must give {forms} (got shape {tuple(features.shape)})")
        if self.features not in (None, features.shape[1]):
            raise ValueError(
                f"features must be {features.shape[1]}, as model gives of such samples (got {self.features})"
            )
        if there is None:
            return features.unflatten(0, x.shape[:2])
        return features.new_zeros(*there.shape, *features.shape[1:]).index_put((there,), features)
