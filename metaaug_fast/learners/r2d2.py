"""R2-D2, differentiable ridge regression (Bertinetto, Henriques, Torr, Vedaldi 2019, arXiv 1805.08136)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import check_flag, check_number, check_positive
from .base import class_members
from .encoder import EncoderLearner, Predict


class R2D2(EncoderLearner):
    """Learn an encoder f on whose features ridge regression, solved in closed form in each task, classifies.

        W  = argmin |X W - Y|^2 + lambda |W|^2
           = (X^T X + lambda I)^-1 X^T Y
           = X^T (X X^T + lambda I)^-1 Y                        by Woodbury's identity
        p(y | x) = softmax of alpha f(x) W + beta
        minimise the mean over queries of -log p(y | x)         over f, alpha, beta and, if it is learned, lambda

    X are a task's support features, with a 1 appended for a bias, Y its classes as ones and zeros; both are divided by
    the root of the number of samples, as in the authors' code, so that lambda means the same for any number. Of the
    two systems the smaller is solved, in float64.

    Batch norm is the module's own: training normalises support and query samples of all tasks together, evaluation by
    the running statistics, so predictions are not transductive. Training tasks may have more classes than those judged
    later, as in the paper.

    Args:
        model: an encoder, `[N, ...]` to features `[N, D]`, such as `mf.models.conv4(ways=None)`.
        ridge: lambda at the start.
        scale: alpha at the start; beta starts at 0.
        learn_ridge: learn the logarithm of lambda.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    >>> import torch, metaaug_fast as mf
    >>> r2d2 = mf.R2D2(mf.models.conv4(ways=None, hidden=8))
    >>> y = torch.arange(5).repeat(2, 1)
    >>> out = r2d2(mf.TaskBatch(torch.rand(2, 5, 1, 28, 28), y, torch.rand(2, 5, 1, 28, 28), y))
    >>> out.loss.backward()
    >>> out.accuracy.shape
    torch.Size([2])
    """

    def __init__(self, model: nn.Module, ridge: float = 50.0, scale: float = 10.0, learn_ridge: bool = True) -> None:
        super().__init__(model)
        check_positive("ridge", ridge)
        check_number("scale", scale)
        check_flag("learn_ridge", learn_ridge)
        self.log_ridge = nn.Parameter(torch.tensor(math.log(ridge)), requires_grad=learn_ridge)
        self.alpha = nn.Parameter(torch.tensor(float(scale)))
        self.beta = nn.Parameter(torch.tensor(0.0))

    def _fit(self, features: Tensor, labels: Tensor) -> Predict:
        root = math.sqrt(features.shape[1])
        weights = ridge_regression(
            _with_one(features) / root, class_members(labels, features.dtype) / root, self.log_ridge.exp()
        )
        return lambda queries: self.alpha * (_with_one(queries) @ weights) + self.beta


def ridge_regression(x: Tensor, y: Tensor, ridge: Tensor) -> Tensor:
    """`argmin_w |x w - y|^2 + ridge |w|^2` of each task: `[T, S, D]` and `[T, S, C]` to `[T, D, C]`.

    >>> x, y = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[1.0], [2.0]]])
    >>> ridge_regression(x, y, torch.tensor(5.0)).tolist()      # (1 + 4 + 5)^-1 (1 + 4)
    [[[0.5]]]
    """
    dtype, x, y, ridge = x.dtype, x.double(), y.double(), ridge.double()
    samples, features = x.shape[1:]
    identity = torch.eye(min(samples, features), dtype=x.dtype, device=x.device)
    if samples < features:
        weights = x.mT @ torch.linalg.solve(x @ x.mT + ridge * identity, y)
    else:
        weights = torch.linalg.solve(x.mT @ x + ridge * identity, x.mT @ y)
    return weights.to(dtype)


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], -1)
