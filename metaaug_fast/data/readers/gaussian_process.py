"""Curves drawn from Gaussian processes, as the papers on neural processes have them."""

from __future__ import annotations

import numpy as np
import torch
from torch.distributions import Independent, Normal

from ...checks import check_number
from ...tasks import TaskBatch
from ..curves import Curves, check_range, within
from ..draws import Draws

_JITTER = 1e-8
"""On the diagonal, beside the noise, or rounding would leave no Cholesky factor."""


class GaussianProcesses(Curves):
    """Functions of one number, drawn from a Gaussian process of mean 0, every task with a kernel of its own.

        k(x, x') = amplitude^2 exp(-(x - x')^2 / (2 length^2))
        y_i = f(x_i) + noise e_i                            e_i standard normal

    Support and query points are of one draw of f. The defaults are the one kernel of Conditional Neural Processes
    (Garnelo et al. 2018, arXiv 1807.01613); `length=(0.1, 0.6), amplitude=(0.1, 1.0)` are the kernels that vary in
    Attentive Neural Processes (Kim et al. 2019, arXiv 1901.05761). Both as in the authors' code.

    Args:
        length: range of the length scale, in units of x.
        amplitude: range of the standard deviation of f.
        x: range of the inputs.
        noise: its standard deviation, on support and query targets.

    Raises:
        TypeError, ValueError: a range is not two finite numbers in ascending order, those of the length above 0 and of
            the amplitude at least 0, or the noise is below 0.

    >>> from metaaug_fast.data import Episodes, GaussianProcesses
    >>> next(Episodes(GaussianProcesses(), shots=10, queries=3, tasks=4)).query_y.shape
    torch.Size([4, 3, 1])
    """

    def __init__(
        self,
        length: tuple[float, float] = (0.4, 0.4),
        amplitude: tuple[float, float] = (1.0, 1.0),
        x: tuple[float, float] = (-2.0, 2.0),
        noise: float = 0.02,
    ) -> None:
        for name, value in (("length", length), ("amplitude", amplitude), ("x", x)):
            check_range(name, value)
        if length[0] <= 0:
            raise ValueError(f"length must be > 0 (got {length})")
        if amplitude[0] < 0:
            raise ValueError(f"amplitude must be >= 0 (got {amplitude})")
        check_number("noise", noise)
        self.length = length
        self.amplitude = amplitude
        self.x = x
        self.noise = noise

    def __repr__(self) -> str:
        return f"GaussianProcesses(length={self.length}, amplitude={self.amplitude}, x={self.x}, noise={self.noise})"

    def kernels(self, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Length and amplitude of every task, `[T, 1]` each, as the first two values of its stream give them."""
        uniform = draws.uniform(2)
        return within(self.length, uniform[:, :1]), within(self.amplitude, uniform[:, 1:])

    def points(self, draws: Draws, count: int) -> tuple[np.ndarray, np.ndarray]:
        """A task's stream (see `draws.py`) is consumed as: length, amplitude, x, normal numbers.

        The Cholesky factor of all points' covariance, noise included, turns these into targets.
        """
        length, amplitude = self.kernels(draws)
        x = within(self.x, draws.uniform(count))
        covariance = _kernel(x, x, length, amplitude) + (self.noise**2 + _JITTER) * np.eye(count)
        return x, (np.linalg.cholesky(covariance) @ draws.normal(count)[..., None])[..., 0]

    def predict(self, tasks: TaskBatch, length: np.ndarray, amplitude: np.ndarray) -> Independent:
        """The best that can be predicted of each query from its task's support set by one who knows the kernel.

        Exact regression: of the query points, noise included, the means and, point by point, the standard deviations.

        Args:
            tasks: drawn from such processes.
            length, amplitude: of each task, `[T, 1]`, as `kernels` gives them.

        Returns:
            normal distributions of targets `[T, Q, 1]`, float64.

        >>> from metaaug_fast.data import Draws, Episodes, GaussianProcesses
        >>> family = GaussianProcesses()
        >>> tasks = Episodes(family, shots=5, queries=3, tasks=4, seed=1).batch(0)
        >>> exact = family.predict(tasks, *family.kernels(Draws(seed=1, batch=0, tasks=4)))
        >>> exact.log_prob(tasks.query_y).shape
        torch.Size([4, 3])
        """
        support, y, query = (each.double().cpu().numpy()[..., 0] for each in tasks.tensors[:3])
        between = _kernel(query, support, length, amplitude)
        own = self.noise**2 + _JITTER
        known = _kernel(support, support, length, amplitude) + own * np.eye(support.shape[1])
        weights = np.linalg.solve(known, between.transpose(0, 2, 1)).transpose(0, 2, 1)  # [T, Q, S]
        mean = (weights @ y[..., None])[..., 0]
        variance = amplitude**2 + own - (weights * between).sum(-1)
        std = np.sqrt(np.maximum(variance, own))
        return Independent(Normal(torch.from_numpy(mean[..., None]), torch.from_numpy(std[..., None])), 1)


def _kernel(x: np.ndarray, z: np.ndarray, length: np.ndarray, amplitude: np.ndarray) -> np.ndarray:
    """Covariances `[T, N, M]` of points `[T, N]` and `[T, M]` by kernels `[T, 1]`."""
    apart = (x[:, :, None] - z[:, None]) / length[..., None]
    covariance: np.ndarray = amplitude[..., None] ** 2 * np.exp(-0.5 * apart**2)
    return covariance
