"""What learners share that compare features: one network encodes the samples of all tasks, and no weights adapt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..engine.encoding import encode
from ..engine.losses import check_targets, judge
from ..tasks import MetaOutput, TaskBatch
from .base import Learner, Predictor, check_steps, one_task_too

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

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module (got {type(model).__name__})")
        self.model = model

    def _fit(self, features: Tensor, labels: Tensor) -> Predict:
        """From support features `[T, S, D]` and class ids `[T, S]`: from query features `[T, Q, D]` to `[T, Q, ways]`.

        Raises:
            ValueError: `labels` are none that it can learn from.
        """
        raise NotImplementedError(f"{type(self).__name__} must write _fit(features, labels)")

    def forward(self, tasks: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """The cross entropy of every task's queries.

        Raises:
            TypeError, ValueError: the tasks do not fit the model, or `steps` is given.
        """
        tasks = TaskBatch.of(tasks)
        check_steps(self, steps)
        features = self._embed(torch.cat([tasks.support_x, tasks.query_x], 1))
        support, query = features.split([tasks.support_x.shape[1], tasks.query_x.shape[1]], 1)
        prediction = self._fit(support, tasks.support_y)(query)
        check_targets("query_y", "cross_entropy", tasks.query_y, tuple(prediction.shape[2:]))
        return judge("cross_entropy", prediction, tasks.query_y)

    @one_task_too
    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        """What each task `[T, S, ...]` learns from its support set; one task may lack its T."""
        predict = self._fit(self._embed(support_x), support_y)
        return Predictor(lambda x: predict(self._embed(x)), len(support_x))

    def _embed(self, x: Tensor) -> Tensor:
        features = encode(self.model, x.flatten(0, 1))
        if features.ndim != 2 or len(features) != x.shape[0] * x.shape[1]:
            raise ValueError(f"model must give features [N, D] (got shape {tuple(features.shape)})")
        return features.unflatten(0, x.shape[:2])
