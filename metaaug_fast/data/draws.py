"""Counter-based random numbers: what a task draws depends on (seed, batch, task) alone, on every device.

With `mix` the finaliser of SplitMix64 and `G = 0x9E3779B97F4A7C15`, all arithmetic modulo 2**64:

    task key   k(t) = mix(mix(mix(seed) + G (batch + 1)) + G (t + 1))
    value e    u(t, e) = mix(k(t) + G (e + 1))                       e = 0, 1, ... in the order of consumption
    below n    (u >> 32) * n >> 32                                   an integer in 0..n-1 (bias below n / 2**32)
    uniform    (u >> 11) / 2**53                                     in [0, 1), float64
    normal     sqrt(-2 log(1 - a)) cos(2 pi b)                       of two uniform ones, a and b (Box and Muller 1958)

so that each task owns a SplitMix64 stream and nothing depends on how tasks are spread over threads or devices.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def _mix(x: Any) -> Any:
    """SplitMix64's finaliser, of a Python int or of a uint64 array."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def _multiples(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.uint64) * _GOLDEN


class Draws:
    """The random streams of one batch of tasks; every call takes the next values of each task's stream.

    Args:
        seed: any integer (modulo 2**64).
        batch: index of the batch, from 0.
        tasks: T, the number of streams.
        first: the task whose stream comes first.

    >>> int(Draws(seed=0, batch=3, tasks=2).distinct(10, 4)[1, 0]) in range(10)
    True
    """

    def __init__(self, seed: int, batch: int, tasks: int, first: int = 0) -> None:
        self.tasks = tasks
        # Of the batch; to count tasks from another one is to begin at another multiple of G.
        self.key: int = _mix(_mix(seed & _MASK) + (batch + 1) * _GOLDEN & _MASK) + first * _GOLDEN & _MASK
        self._keys = _mix(_multiples(1, tasks) + self.key)[:, None]
        self._used = 0

    def bits(self, count: int) -> np.ndarray:
        """The next `count` 64-bit values of each task, uint64 `[T, count]`."""
        self._used += count
        return _mix(self._keys + _multiples(self._used - count + 1, count))

    def uniform(self, count: int) -> np.ndarray:
        """`count` numbers a task, uniform in `[0, 1)`, float64 `[T, count]`."""
        return (self.bits(count) >> 11) * 2.0**-53

    def normal(self, count: int) -> np.ndarray:
        """`count` numbers a task, normal with mean 0 and standard deviation 1, float64 `[T, count]`.

        >>> Draws(seed=0, batch=3, tasks=2).normal(5).shape
        (2, 5)
        """
        radius, angle = np.split(self.uniform(2 * count), 2, axis=1)
        return np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)

    def distinct(self, population: int | np.ndarray, count: int) -> np.ndarray:
        """`count` different integers below `population`, in random order: int64 `[T, ..., count]`.

        `population` is one number or an array `[T, ...]`, nowhere below `count`. The values are the first `count`
        entries of a Fisher-Yates shuffle, entry i swapped with entry `i + below(population - i)`, for which the
        entries that no swap touches need not be written down.
        """
        rows = np.shape(population)[1:]
        bits = self.bits(int(np.prod(rows, dtype=np.int64)) * count).reshape(-1, *rows, count)
        left: Any = np.asarray(population, dtype=np.uint64)[..., None] - np.arange(count, dtype=np.uint64)
        swapped = ((bits >> 32) * left >> 32).astype(np.int64) + np.arange(count)
        values = swapped.copy()
        for entry in range(count - 2, -1, -1):
            later = values[..., entry + 1 :]
            np.putmask(later, later == swapped[..., entry, None], entry)
        return values


def shuffled(count: int, seed: int) -> np.ndarray:
    """`0..count-1` in a random order given by the seed alone, int64 `[count]`: the ranks of `count` draws."""
    return np.argsort(Draws(seed, 0, 1).bits(count)[0], kind="stable")
