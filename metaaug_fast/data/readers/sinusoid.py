"""The sinusoid family of the MAML paper (Finn, Abbeel, Levine 2017, section 5.1)."""

from __future__ import annotations

import math

import numpy as np

from ..curves import Curves, check_range, within
from ..draws import Draws


class Sinusoids(Curves):
    """`y = A sin(x - phase)`, every task with an amplitude and a phase of its own, all uniform.

    Args:
        amplitude: range of A.
        phase: range of the phase, in radians.
        x: range of the inputs.

    Raises:
        ValueError: a range is not two finite numbers in ascending order.

    >>> from metaaug_fast.data import Episodes, Sinusoids
    >>> next(Episodes(Sinusoids(), shots=10, queries=3, tasks=4)).query_y.shape
    torch.Size([4, 3, 1])
    """

    def __init__(
        self,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x: tuple[float, float] = (-5.0, 5.0),
    ) -> None:
        for name, value in (("amplitude", amplitude), ("phase", phase), ("x", x)):
            check_range(name, value)
        self.amplitude = amplitude
        self.phase = phase
        self.x = x

    def __repr__(self) -> str:
        return f"Sinusoids(amplitude={self.amplitude}, phase={self.phase}, x={self.x})"

    def curves(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Amplitude and phase of every task, `[T, 1]` each, as the first two values of its stream give them."""
        uniform = draws.uniform(2)
        return within(self.amplitude, uniform[:, :1]), within(self.phase, uniform[:, 1:])

    def points(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """A task's stream (see `draws.py`) is consumed as: amplitude, phase, support x, query x."""
        amplitude, phase = self.curves(draws)
        x = within(self.x, draws.uniform(count))
        return x, amplitude * np.sin(x - phase)
