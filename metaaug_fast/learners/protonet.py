"""Prototypical Networks (Snell, Swersky, Zemel 2017, arXiv 1703.05175)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_number
from ..tasks import TaskBatch
from .base import class_means, class_members
from .closeness import Closeness
from .encoder import EncoderLearner, Predict


class ProtoNet(EncoderLearner):
    """Learn an embedding f in which a class is near the mean of its few samples. There is no inner loop.

        c_k = mean of f(x) over the support samples of class k                                      (1)
        p(y = k | x) = softmax over k of -|f(x) - c_k|^2 / t, the squared Euclidean distance,       (2)
                       or of cos(f(x), c_k) / t
        minimise the mean over queries of -log p(y | x)

    With `clustering` > 0 training also minimises that many times the variance within a task's classes, relative to that
    between them: R_FC of Goldblum et al. 2020 (arXiv 2002.06753), of support and query samples,

        (mean over samples of |f(x) - m_y|^2) / (mean over classes of |m_k - m|^2)        m_k, m: means of features

    Batch norm is the module's own: training normalises support and query samples of all tasks together, evaluation by
    the running statistics, so predictions are not transductive. Classes may have different numbers of samples, and
    training tasks more classes than those judged later, as in the paper. Where tasks have different numbers of samples,
    fill up the smaller ones and give a `mask`, bool `[T, S]`, to `forward` or `adapt`: what it leaves out counts
    nowhere.

    Args:
        model: an encoder, `[N, ...]` to features `[N, D]`, such as `mf.models.conv4(ways=None)`.
        distance: "euclidean" or "cosine".
        temperature: t, > 0, at the start. None: 1 as in the paper, for the cosine 0.1.
        learn_temperature: None: for the cosine.
        clustering: weight of the variance within classes.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    >>> import torch, metaaug_fast as mf
    >>> protonet = mf.ProtoNet(mf.models.conv4(ways=None, hidden=8))
    >>> y = torch.arange(5).repeat(2, 1)
    >>> out = protonet(mf.TaskBatch(torch.rand(2, 5, 1, 28, 28), y, torch.rand(2, 5, 1, 28, 28), y))
    >>> out.loss.backward()
    >>> out.accuracy.shape
    torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module,
        distance: str = "euclidean",
        temperature: float | None = None,
        learn_temperature: bool | None = None,
        clustering: float = 0.0,
    ) -> None:
        super().__init__(model)
        check_number("clustering", clustering)
        self.closeness = Closeness(distance, temperature, learn_temperature)
        self.clustering = clustering

    def _fit(self, features: Tensor, labels: Tensor, mask: Tensor | None = None) -> Predict:
        """The prototypes (1), which predict by (2)."""
        prototypes = class_means(features, labels, mask)
        return lambda queries: self.closeness(queries, prototypes)

    def _penalty(self, features: Tensor, tasks: TaskBatch, there: Tensor | None = None) -> Tensor | None:
        return self.clustering * variance_ratio(features, tasks, there) if self.clustering else None


def variance_ratio(features: Tensor, tasks: TaskBatch, there: Tensor | None = None) -> Tensor:
    """Variance of features `[T, S + Q, D]` within classes over that between them, `[T]`.

    Args:
        there: bool `[T, S + Q]`, which samples count. None: all.

    Raises:
        ValueError: targets are no class ids, or there is one class only.
    """
    if tasks.query_y.is_floating_point():
        raise ValueError(f"query_y must be class ids for clustering (got {tasks.query_y.dtype})")
    labels = torch.cat([tasks.support_y, tasks.query_y], 1)
    members = class_members(labels, features.dtype, there)
    if members.shape[2] < 2:
        raise ValueError("support_y must have two classes or more for clustering (got 1)")
    means = class_means(features, labels, there)
    counts = members.sum(2)  # 1, or 0 of what is not there
    within = (counts * (features - members @ means).square().sum(-1)).sum(1) / counts.sum(1)
    between = (means - means.mean(1, keepdim=True)).square().sum(-1).mean(1)
    return within / between
