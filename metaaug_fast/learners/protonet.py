"""Prototypical Networks (Snell, Swersky, Zemel 2017, arXiv 1703.05175)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..engine.losses import check_targets, judge
from ..tasks import MetaOutput, TaskBatch
from .base import Learner, Predictor, check_steps, class_means, one_task_too


class ProtoNet(Learner):
    """Learn an embedding f in which a class is near the mean of its few samples. There is no inner loop.

        c_k = mean of f(x) over the support samples of class k                                      (1)
        p(y = k | x) = softmax over k of -|f(x) - c_k|^2, the squared Euclidean distance            (2)
        minimise the mean over queries of -log p(y | x)

    Batch norm is the module's own: training normalises support and query samples of all tasks together, evaluation by
    the running statistics, so predictions are not transductive. Classes may have different numbers of samples, and
    training tasks more classes than those judged later, as in the paper.

    Args:
        model: an encoder, `[N, ...]` to features `[N, D]`, such as `mf.models.conv4(ways=None)`.

    Raises:
        TypeError: `model` is no module.

    >>> import torch, metaaug_fast as mf
    >>> protonet = mf.ProtoNet(mf.models.conv4(ways=None, hidden=8))
    >>> y = torch.arange(5).repeat(2, 1)
    >>> out = protonet(mf.TaskBatch(torch.rand(2, 5, 1, 28, 28), y, torch.rand(2, 5, 1, 28, 28), y))
    >>> out.loss.backward()
    >>> out.accuracy.shape
    torch.Size([2])
    """

    encoder = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module (got {type(model).__name__})")
        self.model = model

    def forward(self, tasks: TaskBatch, *, steps: int | None = None) -> MetaOutput:
        """The loss (2) of every task's queries.

        Raises:
            TypeError, ValueError: the tasks do not fit the model, or `steps` is given.
        """
        tasks = TaskBatch.of(tasks)
        check_steps(self, steps)
        features = self._embed(torch.cat([tasks.support_x, tasks.query_x], 1))
        support, query = features.split([tasks.support_x.shape[1], tasks.query_x.shape[1]], 1)
        prediction = _closeness(query, class_means(support, tasks.support_y))
        check_targets("query_y", "cross_entropy", tasks.query_y, tuple(prediction.shape[2:]))
        return judge("cross_entropy", prediction, tasks.query_y)

    @one_task_too
    def adapt(self, support_x: Tensor, support_y: Tensor) -> Predictor:
        """The prototypes (1) of each task, which predict by (2)."""
        prototypes = class_means(self._embed(support_x), support_y)
        return Predictor(lambda x: _closeness(self._embed(x), prototypes), len(support_x))

    def _embed(self, x: Tensor) -> Tensor:
        features: Tensor = self.model(x.flatten(0, 1))
        if features.ndim != 2 or len(features) != x.shape[0] * x.shape[1]:
            raise ValueError(f"model must give features [N, D] (got shape {tuple(features.shape)})")
        return features.unflatten(0, x.shape[:2])


def _closeness(features: Tensor, prototypes: Tensor) -> Tensor:
    """-|f - c|^2, multiplied out: `[T, N, D]` and `[T, ways, D]` to `[T, N, ways]`."""
    squares = features.square().sum(-1, keepdim=True) + prototypes.square().sum(-1).unsqueeze(1)
    return 2 * features @ prototypes.mT - squares
