"""Prototypical Networks (Snell, Swersky, Zemel 2017, arXiv 1703.05175)."""

from __future__ import annotations

from torch import Tensor

from .base import class_means
from .encoder import EncoderLearner, Predict


class ProtoNet(EncoderLearner):
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

    def _fit(self, features: Tensor, labels: Tensor) -> Predict:
        """The prototypes (1), which predict by (2)."""
        prototypes = class_means(features, labels)
        return lambda queries: _closeness(queries, prototypes)


def _closeness(features: Tensor, prototypes: Tensor) -> Tensor:
    """-|f - c|^2, multiplied out: `[T, N, D]` and `[T, ways, D]` to `[T, N, ways]`."""
    squares = features.square().sum(-1, keepdim=True) + prototypes.square().sum(-1).unsqueeze(1)
    return 2 * features @ prototypes.mT - squares
