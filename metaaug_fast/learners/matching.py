"""Matching Networks (Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra 2016, arXiv 1606.04080)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_count, check_flag
from .base import class_members
from .closeness import Closeness
from .encoder import EncoderLearner, Predict
from .shapes import features_of


class MatchingNet(EncoderLearner):
    """Learn an embedding in which a query attends to the support samples of its own class.

        p(y | x) = sum over i of a(x, x_i) [y = y_i]                                                (1)
        a(x, x_i) = softmax over i of cos(f(x), g(x_i)) / t
        minimise the mean over queries of -log p(y | x)

    f and g are the encoder, f', and with `full_context` what it makes of a sample beside the whole support set:

        g(x_i) = f'(x_i) + forward and backward states of an LSTM that reads f'(x_1), ..., f'(x_S)
        f(x) = h_K:  h_k = LSTM(f'(x), [h_{k-1}, r_{k-1}]) + f'(x), h_0 = 0                         (2), (3)
                     r_k = sum over i of softmax(h_k . g(x_i)) g(x_i)                               (4), (5)

    Then the order of the support samples matters. Predictions are log p(y | x). The paper has no temperature t: a
    cosine within -1..1 could never be sure.

    Batch norm is the module's own: training normalises support and query samples of all tasks together, evaluation by
    the running statistics, so predictions are not transductive. Classes may have different numbers of samples, and
    training tasks more classes than those judged later.

    Args:
        model: an encoder, `[N, ...]` to features `[N, D]`, such as `mf.models.conv4(ways=None)`.
        full_context: embed samples beside the support set.
        reads: K, how often a query reads the support set; with `full_context`.
        distance: "cosine", or "euclidean" for -|f(x) - g(x_i)|^2 in its place.
        temperature: t, > 0, at the start. None: 0.1, for Euclidean distances 1.
        learn_temperature: None: for the cosine.
        features: D. None: it is found by trying the model; only `full_context` needs it.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or `features` cannot be found.

    >>> import torch, metaaug_fast as mf
    >>> matching = mf.MatchingNet(mf.models.conv4(ways=None, hidden=8), full_context=True)
    >>> y = torch.arange(5).repeat(2, 1)
    >>> out = matching(mf.TaskBatch(torch.rand(2, 5, 1, 28, 28), y, torch.rand(2, 5, 1, 28, 28), y))
    >>> out.loss.backward()
    >>> out.accuracy.shape
    torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module,
        full_context: bool = False,
        reads: int = 5,
        distance: str = "cosine",
        temperature: float | None = None,
        learn_temperature: bool | None = None,
        features: int | None = None,
    ) -> None:
        super().__init__(model)
        check_flag("full_context", full_context)
        check_count("reads", reads, low=1)
        self.closeness = Closeness(distance, temperature, learn_temperature)
        self.full_context = full_context
        self.reads = reads
        if full_context:
            self.features = width = features_of(model, features)
            self.of_support = nn.LSTM(width, width, batch_first=True, bidirectional=True)
            self.of_query = nn.LSTMCell(2 * width, width)

    @property
    def order_matters(self) -> bool:  # type: ignore[override]
        """Whether it reads its support samples one after the other."""
        return self.full_context

    def _fit(self, features: Tensor, labels: Tensor) -> Predict:
        members = class_members(labels, torch.bool).unsqueeze(1)  # [T, 1, S, ways]
        support = self._beside_others(features) if self.full_context else features

        def predict(queries: Tensor) -> Tensor:
            seen = self._reading(queries, support) if self.full_context else queries
            attention = self.closeness(seen, support).log_softmax(-1).unsqueeze(-1)
            return attention.masked_fill(~members, -torch.inf).logsumexp(2)

        return predict

    def _beside_others(self, features: Tensor) -> Tensor:
        """g of support features `[T, S, D]`."""
        forward, backward = self.of_support(features)[0].chunk(2, -1)
        return features + forward + backward

    def _reading(self, queries: Tensor, support: Tensor) -> Tensor:
        """f of query features `[T, Q, D]`."""
        flat = queries.flatten(0, 1)
        h = cell = torch.zeros_like(flat)
        for _ in range(self.reads):
            read = (h.view_as(queries) @ support.mT).softmax(-1) @ support
            h, cell = self.of_query(torch.cat([flat, read.flatten(0, 1)], 1), (h, cell))
            h = h + flat
        return h.view_as(queries)
