"""The result of one rival on one workload."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .worker import RivalError


@dataclass
class Row:
    """What became of one rival on one workload.

    status: "exact", "wrong", "unconfirmed" (float32 rounding hides whether it is exact), "missing", "unsupported",
        "failed" or "cut off". note: why, or what the check was. error: relative, of the gradient as a vector; of the
        float64 check where that was needed.
    first_call, median, low, high: seconds; low and high are quartiles over rounds, a round's value the median of its
        calls. peak, total_peak: bytes, above what was resident before the first call and altogether.
    """

    rival: str
    title: str
    status: str
    note: str = ""
    error: float | None = None
    first_call: float | None = None
    median: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    peak: int | None = None
    total_peak: int | None = None

    def fail(self, error: RivalError) -> None:
        """Keep what is known so far, and say what ended it."""
        self.status, self.note = ("cut off" if error.cut_off else "failed"), str(error)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity: that of an error becomes None."""
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}

    @property
    def timed(self) -> bool:
        """Whether there is a time."""
        return self.median is not None
