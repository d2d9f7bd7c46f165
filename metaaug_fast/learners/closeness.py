"""How close features are: what learners share that compare a query with classes or with support samples."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_positive

DISTANCES = ("euclidean", "cosine")


class Closeness(nn.Module):
    """-|a - b|^2 / t, or cos(a, b) / t, for a temperature t that may be learned, by its logarithm.

    Args:
        distance: "euclidean" (squared) or "cosine".
        temperature: t at the start, > 0. None: 1, or 0.1 for the cosine, which without it is never above 1.
        learn: whether t is learned. None: for the cosine.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    >>> a, b = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    >>> Closeness()(a, b).tolist(), Closeness("cosine", learn=False)(a, b).tolist()
    ([[[-16.0, -13.0]]], [[[6.0, 8.0]]])
    """

    def __init__(
        self, distance: str = "euclidean", temperature: float | None = None, learn: bool | None = None
    ) -> None:
        super().__init__()
        check_choice("distance", distance, DISTANCES)
        cosine = distance == "cosine"
        if temperature is None:
            temperature = 0.1 if cosine else 1.0
        check_positive("temperature", temperature)
        if learn is not None:
            check_flag("learn_temperature", learn)
        self.distance = distance
        self.start = float(temperature)
        learns = cosine if learn is None else learn
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learns else None

    @property
    def temperature(self) -> Tensor | float:
        """t as it is now."""
        return self.start if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, features: Tensor, others: Tensor) -> Tensor:
        """`[T, N, D]` and `[T, M, D]` to `[T, N, M]`."""
        if self.distance == "cosine":
            close = F.normalize(features, dim=-1) @ F.normalize(others, dim=-1).mT
        else:
            close = _minus_squares(features, others)
        return close if self.log_temperature is None and self.start == 1 else close / self.temperature


def _minus_squares(features: Tensor, others: Tensor) -> Tensor:
    """-|a - b|^2, multiplied out."""
    squares = features.square().sum(-1, keepdim=True) + others.square().sum(-1).unsqueeze(1)
    return 2 * features @ others.mT - squares
