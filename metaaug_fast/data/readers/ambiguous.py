"""Curves that a few points do not tell apart, from PLATIPUS (Finn, Xu, Levine 2018, arXiv 1806.02817, section 6.1)."""

from __future__ import annotations

import math

import numpy as np

from ...checks import check_number, check_probability
from ..curves import Curves, check_range, within
from ..draws import Draws


class AmbiguousCurves(Curves):
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
            check_range(name, value)
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
            np.where(line, within(self.slope, first), within(self.amplitude, first)),
            np.where(line, within(self.intercept, second), within(self.phase, second)),
        )

    def points(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """A task's stream (see `draws.py`) is consumed as: kind, slope or amplitude, intercept or phase, x, noise."""
        line, first, second = self.curves(draws)
        x = within(self.x, draws.uniform(count))
        y = np.where(line, first * x + second, first * np.sin(x - second))
        return x, y + self.noise * draws.normal(count)
