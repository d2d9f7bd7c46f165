"""SNAIL, a simple neural attentive learner (Mishra, Rohaninejad, Chen, Abbeel 2018, arXiv 1707.03141)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count
from .base import class_members
from .encoder import EncoderLearner, Predict
from .shapes import features_of

_Pair = tuple[Tensor, Tensor]


class SNAIL(EncoderLearner):
    """Learn to read a task as a sequence: its labelled support samples, then a query without its label.

        s = (e(x_1), y_1), ..., (e(x_S), y_S), (e(x), 0)        y_i as ones and zeros
        attention, temporal convolutions, attention, temporal convolutions, attention; each adds its output to s
        logits of the query = a linear layer on the last element

    A layer of temporal convolutions has dilations 1, 2, 4, ... up to the sequence's length, each a causal convolution
    of size 2 with gates, tanh(W_f * s) sigmoid(W_g * s). Attention is causal, too: softmax over j <= i of
    q_i . k_j / sqrt(d), times v_j. So no element changes what stands before it, each query is the end of a sequence of
    its own, and what the queries of a task share, its support set, is computed once.

    The order of support samples and the names of classes matter; tasks have at most `ways` classes. Batch norm, in the
    encoder alone, is the module's own: running statistics in evaluation, so predictions are not transductive.

    Args:
        model: an encoder, `[N, ...]` to features `[N, D]`, such as `mf.models.conv4(ways=None)`; a linear layer to 64
            numbers follows.
        ways: classes of a task, at most.
        shots: support samples of each that the dilations span; more or fewer may be given.
        filters: of a temporal convolution; attention has a quarter, then as many and twice as many values.
        features: D. None: it is found by trying the model.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or `features` cannot be found.

    >>> import torch, metaaug_fast as mf
    >>> snail = mf.SNAIL(mf.models.conv4(ways=None, hidden=8), ways=5, shots=1)
    >>> y = torch.arange(5).repeat(2, 1)
    >>> out = snail(mf.TaskBatch(torch.rand(2, 5, 1, 28, 28), y, torch.rand(2, 5, 1, 28, 28), y))
    >>> out.loss.backward()
    >>> out.accuracy.shape
    torch.Size([2])
    """

    order_matters = True
    names_matter = True

    def __init__(
        self, model: nn.Module, ways: int = 5, shots: int = 1, filters: int = 128, features: int | None = None
    ) -> None:
        super().__init__(model)
        for name, count in {"ways": ways, "shots": shots, "filters": filters}.items():
            check_count(name, count, low=1)
        self.ways = ways
        self.features = features_of(model, features)
        self.embed = nn.Linear(self.features, 64)
        depth = math.ceil(math.log2(ways * shots + 1))
        quarter = max(filters // 4, 1)
        width = 64 + ways
        layers: list[nn.Module] = []
        for keys, values in ((2 * quarter, quarter), (2 * filters, filters), (4 * filters, 2 * filters)):
            layers.append(_Attention(width, keys, values))
            width += values
            if values < 2 * filters:
                layers.append(_Convolutions(width, depth, filters))
                width += depth * filters
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, ways)

    def _fit(self, features: Tensor, labels: Tensor) -> Predict:
        class_members(labels, features.dtype)
        if int(labels.max()) >= self.ways:
            raise ValueError(f"support_y must hold class ids 0..{self.ways - 1} (got {int(labels.max())})")
        support = torch.cat([self.embed(features), F.one_hot(labels, self.ways).to(features.dtype)], -1)
        return lambda queries: self.head(self.read(support, F.pad(self.embed(queries), (0, self.ways)))[1])

    def read(self, support: Tensor, queries: Tensor) -> _Pair:
        """What all layers make of the elements of T sequences.

        Args:
            support: `[T, S, D]`, the elements that the sequences of a task share.
            queries: `[T, Q, D]`, the last element of each.

        Returns:
            Both with all layers' outputs behind their own D numbers.
        """
        for layer in self.layers:
            support, queries = layer(support, queries)
        return support, queries


class _Convolutions(nn.Module):
    """Dense blocks of dilations 1, 2, 4, ...: each adds its gated causal convolution to every element."""

    def __init__(self, width: int, depth: int, filters: int) -> None:
        super().__init__()
        widths = [width + index * filters for index in range(depth)]
        self.now = nn.ModuleList(nn.Linear(inputs, 2 * filters) for inputs in widths)
        self.before = nn.ModuleList(nn.Linear(inputs, 2 * filters, bias=False) for inputs in widths)

    def forward(self, support: Tensor, queries: Tensor) -> _Pair:
        count = support.shape[1]
        for index, (now, before) in enumerate(zip(self.now, self.before, strict=True)):
            past = F.pad(before(support), (0, 0, 2**index, 0))  # of the element so far before each; a query is at S
            support = torch.cat([support, _gated(now(support) + past[:, :count])], -1)
            queries = torch.cat([queries, _gated(now(queries) + past[:, count : count + 1])], -1)
        return support, queries


class _Attention(nn.Module):
    """Adds to every element what it reads of those before it and of itself."""

    def __init__(self, width: int, keys: int, values: int) -> None:
        super().__init__()
        self.keys = nn.Linear(width, keys)
        self.queries = nn.Linear(width, keys)
        self.values = nn.Linear(width, values)
        # So that it begins by comparing, and sharply: it learns to read labels several times sooner.
        nn.init.normal_(self.keys.weight, std=6 / math.sqrt(width))
        self.queries.load_state_dict(self.keys.state_dict())

    def forward(self, support: Tensor, queries: Tensor) -> _Pair:
        keys, values = self.keys(support), self.values(support)
        scale = math.sqrt(keys.shape[-1])
        wanted = self.queries(queries)
        own = (wanted * self.keys(queries)).sum(-1, keepdim=True)
        weights = (torch.cat([wanted @ keys.mT, own], -1) / scale).softmax(-1)
        read = weights[..., :-1] @ values + weights[..., -1:] * self.values(queries)
        scores = self.queries(support) @ keys.mT / scale
        later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        known = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
        return torch.cat([support, known], -1), torch.cat([queries, read], -1)


def _gated(both: Tensor) -> Tensor:
    value, gate = both.chunk(2, -1)
    return value.tanh() * gate.sigmoid()
