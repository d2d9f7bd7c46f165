"""How far a learner's confidence is from its accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_count


def calibration_error(probabilities: Tensor, classes: Tensor, bins: int = 15) -> float:
    """Expected calibration error: how far confidence is from accuracy (Guo et al. 2017, arXiv 1706.04599).

        sum over bins b of |b| / N |accuracy in b - mean confidence in b|

    Args:
        probabilities: `[N, C]`, rows that sum to 1.
        classes: the right ones, ids `[N]`.
        bins: of confidence, the largest probability, all of the same width in 0..1.

    Returns:
        0 to 1.

    Raises:
        TypeError, ValueError: the shapes do not fit, or `bins` is no count.

    >>> round(calibration_error(torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.3, 0.7]]), torch.tensor([0, 1, 1])), 6)
    0.3
    """
    check_count("bins", bins, low=1)
    if probabilities.ndim != 2 or classes.shape != probabilities.shape[:1] or not len(classes):
        raise ValueError(
            f"probabilities and classes must be [N, C] and [N] (got {list(probabilities.shape)}, {list(classes.shape)})"
        )
    confidence, guess = probabilities.double().max(1)
    right = (guess == classes).double()
    bin_ = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=confidence.device).index_add_(0, bin_, right - confidence)
    return float(gaps.abs().sum()) / len(classes)
