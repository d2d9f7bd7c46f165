"""What this machine can do at most: arithmetic and memory traffic, measured, to divide a workload's rates by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch


@dataclass(frozen=True)
class Ceilings:
    """convolution: 3x3, 64 -> 64 channels, 25 samples of 14x14. gemm: float32, 1024 cubed. Both GFLOP/s.

    copy: bytes read and written by copying 256 MiB, GB/s.
    """

    convolution: float
    gemm: float
    copy: float

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each."""
        return Ceilings(
            **{each.name: max(getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        )

    def as_dict(self) -> dict[str, float]:
        """For a report."""
        return asdict(self)


def measure(repeats: int = 20) -> Ceilings:
    """Best of `repeats` calls, with as many threads as torch has."""
    x, w = torch.rand(25, 64, 14, 14), torch.rand(64, 64, 3, 3)
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    source, target = torch.rand(2**26), torch.empty(2**26)
    return Ceilings(
        convolution=2 * 25 * 196 * 64 * 576 / _least(lambda: torch.conv2d(x, w, padding=1), repeats) / 1e9,
        gemm=2 * 1024**3 / _least(lambda: a @ b, repeats) / 1e9,
        copy=8 * 2**26 / _least(lambda: target.copy_(source), repeats) / 1e9,
    )


def _least(call: Callable[[], object], repeats: int) -> float:
    """Seconds."""
    times = []
    for _ in range(3 + repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
