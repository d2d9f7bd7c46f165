"""Predictions that no other query has a part in, from weights whose batch norms normalise with their own batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine.fast_weights import FastWeights
from ..tasks import check_inputs_of, usable
from .base import OneTask


def one_by_one(fast: Any, support_x: Tensor) -> Any:
    """What `adapt` gave for the support samples `[T, S, ...]`, or for one task's, so that it predicts as `OneByOne`."""
    if isinstance(fast, OneTask):
        return OneTask(OneByOne(fast.many, support_x[None]))
    return OneByOne(fast, support_x)


class OneByOne(FastWeights):
    """T sets of adapted weights, which predict every query in a batch of its own, behind the support samples.

    That takes a pass over S + 1 samples for each of N queries. A `module(task)` predicts what it is called with in one
    batch, as ever.
    """

    def __init__(self, fast: FastWeights, support_x: Tensor) -> None:
        super().__init__(fast.problem, fast.flat, fast._backend)
        self.support_x = usable(support_x)

    def __call__(self, x: Tensor) -> Tensor:
        """Output `[T, N, ...]` of each task's weights on its `x` `[T, N, ...]`; errors as of `FastWeights`."""
        check_inputs_of(len(self), x)
        if x.shape[2:] != self.support_x.shape[2:]:
            wanted, got = tuple(self.support_x.shape[2:]), tuple(x.shape[2:])
            raise ValueError(f"x must hold samples of the support set's shape {wanted} (got {got})")
        if x.dtype != self.support_x.dtype or x.device != self.support_x.device:
            like = self.support_x
            raise ValueError(
                f"x must be as the support samples, {like.dtype} on {like.device} (got {x.dtype} on {x.device})"
            )
        batches = [torch.cat([self.support_x, usable(query)], 1) for query in x.split(1, 1)]
        return torch.cat([super(OneByOne, self).__call__(batch)[:, -1:] for batch in batches], 1)

    def detach(self) -> OneByOne:
        """The same weights without their history."""
        return OneByOne(super().detach(), self.support_x)
