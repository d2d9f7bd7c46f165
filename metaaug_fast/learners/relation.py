"""Relation Networks (Sung, Yang, Zhang, Xiang, Torr, Hospedales 2018, arXiv 1711.06025)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_count
from ..engine.encoding import encode
from ..tasks import MetaOutput
from .base import class_members
from .encoder import EncoderLearner, Predict
from .shapes import features_of, gives_maps


class RelationNet(EncoderLearner):
    """Learn an embedding f and a comparison g, which says of a class and a query how related they are.

        c_k     = sum of f(x) over the support samples of class k
        r_k(x)  = sigmoid(z_k(x)),  z_k(x) = g([c_k, f(x)])                                         (1), (2)
        minimise the mean over queries and classes of (r_k(x) - 1[y = k])^2                         (3)
        or, by `loss="cross_entropy"`, the mean over queries of -log softmax over k of z_k(x)

    Predictions are z. Of feature maps, g is two convolutions, each with batch norm, ReLU and 2x2 max-pooling where that
    leaves anything, the mean over space and two linear layers; of flat features, three linear layers. Its first layer
    is linear in the pair, so that each class and each query goes through it once, and not each pair.

    Batch norm, of f and of g, is the module's own: training normalises the samples of all tasks together, evaluation by
    the running statistics, so predictions are not transductive. Training tasks may have more classes than those judged
    later.

    Args:
        model: an encoder, `[N, ...]` to feature maps `[N, C, H, W]`, such as `mf.models.conv4(pools=2, maps=True)`, or
            to features `[N, D]`.
        loss: "mse", as in the paper, or "cross_entropy".
        hidden: width of g between its two last layers.
        features: C or D. None: it is found by trying the model.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or `features` cannot be found.

    >>> import torch, metaaug_fast as mf
    >>> relation = mf.RelationNet(mf.models.conv4(hidden=8, pools=2, maps=True))
    >>> y = torch.arange(5).repeat(2, 1)
    >>> out = relation(mf.TaskBatch(torch.rand(2, 5, 1, 28, 28), y, torch.rand(2, 5, 1, 28, 28), y))
    >>> out.loss.backward()
    >>> out.accuracy.shape
    torch.Size([2])
    """

    forms: ClassVar = {2: "features [N, D]", 4: "feature maps [N, C, H, W]"}

    def __init__(self, model: nn.Module, loss: str = "mse", hidden: int = 8, features: int | None = None) -> None:
        super().__init__(model)
        check_choice("loss", loss, ("mse", "cross_entropy"))
        check_count("hidden", hidden, low=1)
        self.loss = loss
        self.features = width = features_of(model, features)
        self.maps = gives_maps(model)
        self.relation = (_OfMaps if self.maps else _OfVectors)(width, hidden)

    def _fit(self, features: Tensor, labels: Tensor) -> Predict:
        if self.maps != (features.ndim == 5):
            raise ValueError(f"model must give {self.forms[4 if self.maps else 2]} (got {tuple(features.shape[1:])})")
        members = class_members(labels, features.dtype)
        classes = (members.mT @ features.flatten(2)).unflatten(2, features.shape[2:])
        return lambda queries: self.relation(classes, queries)

    def _score(self, prediction: Tensor, y: Tensor) -> MetaOutput:
        out = super()._score(prediction, y)
        if self.loss == "cross_entropy":
            return out
        wanted = y if y.is_floating_point() else F.one_hot(y, prediction.shape[-1]).to(prediction.dtype)
        losses = (prediction.sigmoid() - wanted).square().mean((1, 2))
        return replace(out, loss=losses.mean(), task_losses=losses)


class _OfVectors(nn.Module):
    """g of pairs of vectors."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * features, features)
        self.second = nn.Linear(features, hidden)
        self.last = nn.Linear(hidden, 1)

    def forward(self, classes: Tensor, queries: Tensor) -> Tensor:
        """`[T, ways, D]` and `[T, Q, D]` to `[T, Q, ways]`."""
        of_class, of_query = self.first.weight.chunk(2, 1)
        pairs = (classes @ of_class.mT).unsqueeze(1) + (queries @ of_query.mT + self.first.bias).unsqueeze(2)
        return self.last(self.second(pairs.relu()).relu()).squeeze(-1)


class _OfMaps(nn.Module):
    """g of pairs of feature maps."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.rest = _BehindTheFirst(channels, hidden)

    def forward(self, classes: Tensor, queries: Tensor) -> Tensor:
        """`[T, ways, C, H, W]` and `[T, Q, C, H, W]` to `[T, Q, ways]`."""
        of_class, of_query = self.first.weight.chunk(2, 1)
        one = F.conv2d(classes.flatten(0, 1), of_class, padding=1).unflatten(0, classes.shape[:2])
        other = F.conv2d(queries.flatten(0, 1), of_query, self.first.bias, padding=1).unflatten(0, queries.shape[:2])
        pairs = one.unsqueeze(1) + other.unsqueeze(2)
        return encode(self.rest, pairs.flatten(0, 2)).view(pairs.shape[:3])


class _BehindTheFirst(nn.Module):
    """What follows the first convolution of pairs of maps, `[N, C, H, W]` to `[N, 1]`."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(channels)
        self.third = nn.Linear(channels, hidden)
        self.last = nn.Linear(hidden, 1)

    def forward(self, maps: Tensor) -> Tensor:
        h = _halved(self.norm1(maps).relu())
        h = _halved(self.norm2(self.second(h)).relu()).mean((2, 3))
        return self.last(self.third(h).relu())


def _halved(maps: Tensor) -> Tensor:
    return F.max_pool2d(maps, 2) if min(maps.shape[2:]) > 1 else maps
