"""How many classes the targets are of that become probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_count


def count_ways(ways: int | None, *targets: Tensor) -> int:
    """`ways`, or the largest of the class ids and 1.

    Raises:
        TypeError, ValueError: `ways` is no count, or there are class ids that it does not count.

    >>> count_ways(None, torch.tensor([0, 2]), torch.tensor([1]))
    3
    """
    if ways is not None:
        check_count("ways", ways, low=1)
    low, high = (int(value) for value in torch.cat([each.flatten() for each in targets]).aminmax())
    if low < 0:
        raise ValueError(f"support_y must hold class ids >= 0 (got {low})")
    if ways is not None and high >= ways:
        raise ValueError(f"support_y must hold class ids 0..{ways - 1} (got {high})")
    return high + 1 if ways is None else ways
