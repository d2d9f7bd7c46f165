"""What families of curves share: functions of one number, of which a task shows some points and asks for others."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..tasks import TaskBatch
from .draws import Draws
from .source import EpisodeSpec, Sampler


class Curves:
    """A family of functions of one number. Subclass it and write `points`.

    >>> from metaaug_fast.data import Episodes
    >>> class Lines(Curves):
    ...     def points(self, draws, count):
    ...         x, slope = draws.uniform(count), draws.uniform(1)
    ...         return x, slope * x
    >>> next(Episodes(Lines(), shots=5, queries=3, tasks=4)).query_y.shape
    torch.Size([4, 3, 1])
    """

    sample_shape = (1,)
    target_shape = (1,)
    default_model = "mlp"

    def points(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """So many inputs and targets of each task, `[T, count]` each, in float64."""
        raise NotImplementedError(f"{type(self).__name__} must write points(draws, count)")

    def sampler(self, spec: EpisodeSpec) -> Sampler:
        """Draw tasks of `spec.shots` and `spec.queries` points `[T, points, 1]`; `spec.ways` does not matter.

        Everything is computed in float64 and rounded once.

        Raises:
            ValueError: `split_styles`, which a function has not.
        """
        if spec.split_styles:
            raise ValueError(f"split_styles needs a data set with styles (got {type(self).__name__})")
        dtype = np.float64 if spec.dtype == torch.float64 else np.float32
        support, query = slice(spec.shots), slice(spec.shots, None)

        def sample(draws: Draws) -> TaskBatch:
            x, y = self.points(draws, spec.shots + spec.queries)
            parts = (x[:, support], y[:, support], x[:, query], y[:, query])
            return TaskBatch(*(torch.from_numpy(part[..., None].astype(dtype, order="C")) for part in parts))

        return sample


def check_range(name: str, value: tuple[float, float]) -> None:
    """Raise ValueError unless these are two finite numbers in ascending order."""
    if len(value) != 2 or not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] <= value[1]):
        raise ValueError(f"{name} must be two finite numbers in ascending order (got {value})")


def within(extent: tuple[float, float], uniform: np.ndarray) -> np.ndarray:
    """Numbers of 0..1 as such of a range.

    >>> within((-5.0, 5.0), np.array([0.0, 0.75]))
    array([-5. ,  2.5])
    """
    low, high = extent
    return low + (high - low) * uniform
