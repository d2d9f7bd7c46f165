"""Conditional Neural Processes (Garnelo et al. 2018, arXiv 1807.01613), with attention where that is asked for."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from ..checks import check_count, check_flag, check_probability
from ..tasks import MetaOutput, TaskBatch, check_tensor, is_one_task
from .base import Adapted, class_members, scored
from .encoder import EncoderLearner, Predict
from .shapes import features_of


class CNP(EncoderLearner):
    """Predict a distribution from the mean of what each support sample says, in one pass. There is no inner loop.

    Regression, `outputs=D`: for targets of D numbers a normal distribution with a deviation for each.

        r_i = h([f(x_i), y_i])                  for each support sample                              (1)
        r = sum_i a_i r_i                       a_i = 1 / S, or attention                            (2)
        mean, s = g([f(x*), r])                 std = min_std + (1 - min_std) softplus(s)            (3)
        minimise the mean over queries, and over the D numbers of a target, of -log p(y* | mean, std)

    Classification, `outputs=None`: a representation for each class, and one g that scores them all.

        r_c = sum_i a_i r_i, r_i = h(f(x_i))    over the support samples of class c alone            (2')
        logit_c = g([f(x*), r_c, r])            r the mean of all r_c                                (3')
        minimise the mean over queries of -log softmax_y(logit)

    The paper joins the representations of all classes in a fixed order instead, which takes one number of ways and
    depends on the classes' names; (3') takes any number, training's may be larger, and does not. f is the encoder, h
    and g are perceptrons with ReLU between their layers. With `attention` (Kim et al. 2019, arXiv 1901.05761, the
    cross-attention of their deterministic path, without the latent one) a query has weights of its own:

        a_i = softmax over i of f(x*) . f(x_i) / sqrt(features)       in (2') over the samples of class c

    Batch norm is the module's own: training normalises support and query samples of all tasks together, evaluation by
    the running statistics, so predictions are not transductive.

    Args:
        model: an encoder f, `[N, ...]` to features `[N, features]`: `mf.models.perceptron(None, (1,), (128, 128))` for
            numbers, `mf.models.conv4(ways=None)` for pictures.
        outputs: numbers in a target. None: targets are classes.
        attention: weigh support samples by their likeness to the query, rather than equally.
        width: of the hidden layers of h and g, and of r.
        layers: hidden layers of each of h and g.
        min_std: the least standard deviation of a predicted number, in 0..1; classes have none.
        vary_context: in regression each training batch learns from its first n support samples alone, n uniform in 1..S
            from torch's default generator, as in the paper; evaluation takes all.
        features: how many the encoder gives. None: found by trying it.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or `features` cannot be found.

    >>> import torch, metaaug_fast as mf
    >>> cnp = mf.CNP(mf.models.perceptron(None, (1,), (32, 32)), outputs=1, attention=True)
    >>> tasks = next(mf.data.Episodes(mf.data.Sinusoids(), shots=10, queries=20, tasks=4))
    >>> cnp(tasks).loss.backward()
    >>> adapted = cnp.adapt(tasks.support_x, tasks.support_y)
    >>> adapted(tasks.query_x).shape, adapted.distribution(tasks.query_x).log_prob(tasks.query_y).shape
    (torch.Size([4, 20, 1]), torch.Size([4, 20]))
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: int | None = None,
        attention: bool = False,
        width: int = 128,
        layers: int = 2,
        min_std: float = 0.1,
        vary_context: bool = True,
        features: int | None = None,
    ) -> None:
        super().__init__(model)
        if outputs is not None:
            check_count("outputs", outputs, low=1)
            self.loss = "negative log-likelihood"
        check_flag("attention", attention)
        check_count("width", width, low=1)
        check_count("layers", layers, low=1)
        check_probability("min_std", min_std)
        check_flag("vary_context", vary_context)
        self.outputs, self.attention = outputs, attention
        self.width, self.layers = width, layers
        self.min_std, self.vary_context = min_std, vary_context
        self.features = features_of(model, features)
        hidden = [width] * layers
        if outputs is None:
            self.h = _perceptron(self.features, *hidden, width)
            self.g = _perceptron(self.features + 2 * width, *hidden, 1)
        else:
            self.h = _perceptron(self.features + outputs, *hidden, width)
            self.g = _perceptron(self.features + width, *hidden, 2 * outputs)

    def forward(self, tasks: TaskBatch, *, steps: int | None = None, **given: Any) -> MetaOutput:
        """The loss of every task's queries.

        Raises:
            TypeError, ValueError: the tasks do not fit the model, or `steps` is given.
        """
        tasks = TaskBatch.of(tasks)
        self._check_targets("support_y", tasks.support_y)
        if self.training and self.vary_context and self.outputs is not None:
            count = int(torch.randint(1, tasks.support_x.shape[1] + 1, ()))
            tasks = TaskBatch(tasks.support_x[:, :count], tasks.support_y[:, :count], tasks.query_x, tasks.query_y)
        return super().forward(tasks, steps=steps, **given)

    def adapt(self, support_x: Tensor, support_y: Tensor, **given: Any) -> PredictedDistributions:
        """What each task `[T, S, ...]` learns from its support set; one task may lack its T."""
        check_tensor("support_x", support_x)
        check_tensor("support_y", support_y)
        one = is_one_task(support_x, support_y)
        self._check_targets("support_y", support_y[None] if one else support_y)  # before the encoder sees what is none
        return PredictedDistributions(super().adapt(support_x, support_y, **given), self)

    def _fit(self, features: Tensor, labels: Tensor) -> Predict:
        """Give logits `[T, Q, ways]`, or means and deviations side by side, `[T, Q, 2 outputs]`."""
        if self.outputs is None:
            members = class_members(labels, features.dtype).mT
            inputs = features
        else:
            members = features.new_ones(len(features), 1, features.shape[1])  # all in one group
            inputs = torch.cat([features, labels.to(features.dtype)], -1)
        each = self.h(inputs)  # (1), [T, S, width]

        def predict(queries: Tensor) -> Tensor:
            weights = self._weights(queries, features, members)
            r = (weights.flatten(1, 2) @ each).unflatten(1, weights.shape[1:3])  # (2), [T, Q or 1, groups, width]
            parts = [queries.unsqueeze(2), r] + ([r.mean(2, keepdim=True)] if self.outputs is None else [])
            scores = self.g[1:](_joined(self.g[0], *parts))  # (3), [T, Q, groups, ...]
            if self.outputs is None:
                return scores.squeeze(-1)
            mean, s = scores.squeeze(2).chunk(2, -1)
            return torch.cat([mean, self.min_std + (1 - self.min_std) * F.softplus(s)], -1)

        return predict

    def _weights(self, queries: Tensor, features: Tensor, members: Tensor) -> Tensor:
        """How much each support sample counts in its group: `members` `[T, groups, S]` to `[T, Q, groups, S]`.

        They add up to 1 in each group. In place of Q stands 1 where they are the same for all queries.
        """
        if not self.attention:
            return (members / members.sum(-1, keepdim=True)).unsqueeze(1)
        scores = queries @ features.mT / math.sqrt(queries.shape[-1])
        return scores.unsqueeze(2).masked_fill(members.unsqueeze(1) == 0, -math.inf).softmax(-1)

    def _score(self, prediction: Tensor, y: Tensor) -> MetaOutput:
        if self.outputs is None:
            return scored("cross_entropy", prediction, y)
        self._check_targets("query_y", y)
        mean, std = prediction.chunk(2, -1)
        losses = -Normal(mean, std, validate_args=False).log_prob(y.to(mean.dtype)).mean((1, 2))
        return MetaOutput(losses.mean(), losses, None, mean.detach())

    def _check_targets(self, name: str, y: Tensor) -> None:
        """ValueError where targets of numbers are none, `[T, N, outputs]`; classes are checked where they are met."""
        if self.outputs is not None and not (y.is_floating_point() and tuple(y.shape[2:]) == (self.outputs,)):
            kind = str(y.dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be numbers [T, N, {self.outputs}], outputs (got {kind} {tuple(y.shape)})")


class PredictedDistributions:
    """T tasks after adaptation, or one: what `CNP.adapt` gives. It predicts a distribution for each query."""

    def __init__(self, adapted: Adapted, learner: CNP) -> None:
        self._adapted, self._numbers = adapted, learner.outputs is not None

    def __len__(self) -> int:
        return len(self._adapted)

    def __call__(self, x: Tensor) -> Tensor:
        """Means `[T, N, outputs]`, or logits `[T, N, ways]`, for `x` `[T, N, ...]`; of one task `[N, ...]`."""
        prediction = self._adapted(x)
        return prediction.chunk(2, -1)[0] if self._numbers else prediction

    def distribution(self, x: Tensor) -> Distribution:
        """`Independent(Normal, 1)` of targets `[T, N, outputs]`, or `Categorical` of classes `[T, N]`."""
        prediction = self._adapted(x)
        if not self._numbers:
            return Categorical(logits=prediction)
        mean, std = prediction.chunk(2, -1)
        return Independent(Normal(mean, std), 1)

    def evaluate(self, x: Tensor, y: Tensor) -> MetaOutput:
        """Losses, and accuracies for class ids, of the predictions for `x`."""
        return self._adapted.evaluate(x, y)


def _perceptron(*sizes: int) -> nn.Sequential:
    """Linear layers of the last dimension with ReLU in between, started as in the authors' code: Glorot, no bias."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _joined(layer: nn.Module, *parts: Tensor) -> Tensor:
    """A linear layer of parts joined in their last dimension; they broadcast, and are not joined."""
    assert isinstance(layer, nn.Linear)
    weights = layer.weight.split([part.shape[-1] for part in parts], 1)
    total = F.linear(parts[0], weights[0], layer.bias)
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + F.linear(part, weight)
    return total
