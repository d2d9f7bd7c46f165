"""Curves that a few points do not tell apart, from PLATIPUS (Finn, Xu, Levine 2018, arXiv 1806.02817, section 6.1)."""

from __future__ import annotations

import math

import numpy as np
import torch

from ...checks import check_number, check_probability
from ...tasks import TaskBatch
from ..draws import Draws
from ..source import EpisodeSpec, Sampler


class AmbiguousCurves:
    """Sinusoids `y = A sin(x - phase) + noise` and lines `y = slope x + intercept + noise`, as often as each other.

    Args:
        amplitude, phase, slope, intercept: ranges, in each of which a task's own is uniform; the phase in radians.
        x: range of the inputs.
        noise: standard deviation of the targets, support and query ones. The same tasks have the same curves and inputs
            without it.
        lines: the chance that a task is a line.

    Raises:
        TypeError, ValueError: a range is not two finite numbers in ascending order, `noise` is negative, or `lines`
            is no probability.

    >>> from metaaug_fast.data import AmbiguousCurves, Episodes
    >>> next(Episodes(AmbiguousCurves(), shots=5, queries=10, tasks=4)).query_y.shape
    torch.Size([4, 10, 1])
    """

    sample_shape = (1,)
    target_shape = (1,)
    default_model = "mlp"

    def __init__(
        self,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        slope: tuple[float, float] = (-3.0, 3.0),
        intercept: tuple[float, float] = (-3.0, 3.0),
        x: tuple[float, float] = (-5.0, 5.0),
        noise: float = 0.3,
        lines: float = 0.5,
    ) -> None:
        ranges = {"amplitude": amplitude, "phase": phase, "slope": slope, "intercept": intercept, "x": x}
        for name, value in ranges.items():
            if len(value) != 2 or not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] <= value[1]):
                raise ValueError(f"{name} must be two finite numbers in ascending order (got {value})")
        check_number("noise", noise)
        check_probability("lines", lines)
        self.amplitude = amplitude
        self.phase = phase
        self.slope = slope
        self.intercept = intercept
        self.x = x
        self.noise = noise
        self.lines = lines

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"AmbiguousCurves({settings})"

    def curves(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every task whether it is a line, its slope or amplitude, and its intercept or phase, `[T, 1]` each."""
        kind, first, second = np.split(draws.uniform(3), 3, axis=1)
        line = kind < self.lines
        return (
            line,
            np.where(line, _within(self.slope, first), _within(self.amplitude, first)),
            np.where(line, _within(self.intercept, second), _within(self.phase, second)),
        )

    def sampler(self, spec: EpisodeSpec) -> Sampler:
        """Draw tasks of `spec.shots` and `spec.queries` points `[T, points, 1]`; `spec.ways` does not matter.

        A task's stream (see `draws.py`) is consumed as: kind, slope or amplitude, intercept or phase, support x, query
        x, noise. All is computed in float64 and rounded once.

        Raises:
            ValueError: `split_styles`, which a function has not.
        """
        if spec.split_styles:
            raise ValueError("split_styles needs a data set with styles (got AmbiguousCurves)")
        dtype = np.float64 if spec.dtype == torch.float64 else np.float32
        points = spec.shots + spec.queries

        def sample(draws: Draws) -> TaskBatch:
            line, first, second = self.curves(draws)
            x = _within(self.x, draws.uniform(points))
            y = np.where(line, first * x + second, first * np.sin(x - second)) + self.noise * draws.normal(points)
            support, query = slice(spec.shots), slice(spec.shots, None)
            parts = (x[:, support], y[:, support], x[:, query], y[:, query])
            return TaskBatch(*(torch.from_numpy(part[..., None].astype(dtype, order="C")) for part in parts))

        return sample


def _within(extent: tuple[float, float], uniform: np.ndarray) -> np.ndarray:
    low, high = extent
    return low + (high - low) * uniform
