"""The sinusoid family of the MAML paper (Finn, Abbeel, Levine 2017, section 5.1)."""

from __future__ import annotations

import math

import numpy as np
import torch

from ...tasks import TaskBatch
from ..draws import Draws
from ..source import EpisodeSpec, Sampler


class Sinusoids:
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

    sample_shape = (1,)
    target_shape = (1,)
    default_model = "mlp"

    def __init__(
        self,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x: tuple[float, float] = (-5.0, 5.0),
    ) -> None:
        for name, value in (("amplitude", amplitude), ("phase", phase), ("x", x)):
            if len(value) != 2 or not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] <= value[1]):
                raise ValueError(f"{name} must be two finite numbers in ascending order (got {value})")
        self.amplitude = amplitude
        self.phase = phase
        self.x = x

    def __repr__(self) -> str:
        return f"Sinusoids(amplitude={self.amplitude}, phase={self.phase}, x={self.x})"

    def curves(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Amplitude and phase of every task, `[T, 1]` each, as the first two values of its stream give them."""
        uniform = draws.uniform(2)
        return _within(self.amplitude, uniform[:, :1]), _within(self.phase, uniform[:, 1:])

    def sampler(self, spec: EpisodeSpec) -> Sampler:
        """Draw tasks of `spec.shots` and `spec.queries` points `[T, points, 1]`; `spec.ways` does not matter.

        A task's stream (see `draws.py`) is consumed as: amplitude, phase, support x, query x. The sine is taken in
        float64 and rounded once.

        Raises:
            ValueError: `split_styles`, which a function has not.
        """
        if spec.split_styles:
            raise ValueError("split_styles needs a data set with styles (got Sinusoids)")
        dtype = np.float64 if spec.dtype == torch.float64 else np.float32

        def sample(draws: Draws) -> TaskBatch:
            amplitude, phase = self.curves(draws)
            x = _within(self.x, draws.uniform(spec.shots + spec.queries))
            y = amplitude * np.sin(x - phase)
            support, query = slice(spec.shots), slice(spec.shots, None)
            parts = (x[:, support], y[:, support], x[:, query], y[:, query])
            return TaskBatch(*(torch.from_numpy(part[..., None].astype(dtype, order="C")) for part in parts))

        return sample


def _within(extent: tuple[float, float], uniform: np.ndarray) -> np.ndarray:
    low, high = extent
    return low + (high - low) * uniform
