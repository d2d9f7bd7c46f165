"""What a run did: its curves, its time, and what ended it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EARLY, TIME = "early stopping", "minutes"


@dataclass(frozen=True)
class Point:
    """Means over the meta-steps since the point before; accuracy is None for regression."""

    step: int
    loss: float
    accuracy: float | None = None
    tasks_per_second: float = 0.0


@dataclass(frozen=True)
class ValidationPoint:
    """What `evaluate` found after so many meta-steps: the mean, half its 95 % interval, and the score to compare by.

    seconds: in meta-steps until then; None in what was written before there were any.
    """

    step: int
    mean: float
    interval: float
    score: float
    seconds: float | None = field(default=None, compare=False)


@dataclass
class History:
    """What a run did.

    training, validation: the curves. seconds: time in meta-steps, validation and checkpoints left out, summed over
    resumed runs. stopped_by: the signal that ended it early, "early stopping", "minutes", or None.
    """

    training: list[Point] = field(default_factory=list)
    validation: list[ValidationPoint] = field(default_factory=list)
    seconds: float = 0.0
    stopped_by: str | None = None

    @property
    def best(self) -> ValidationPoint | None:
        """The first of the best validations."""
        return max(self.validation, key=lambda point: point.score, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for a report or a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> History:
        """The inverse of `as_dict`; ValueError or TypeError if `content` is something else."""
        history = cls(
            [Point(**point) for point in content["training"]],
            [ValidationPoint(**{"score": point["mean"], **point}) for point in content["validation"]],
            content["seconds"],
            content["stopped_by"],
        )
        points: list[Any] = [*history.training, *history.validation]
        numbers = [history.seconds, *(value for each in points for value in vars(each).values() if value is not None)]
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise ValueError("history must hold numbers")
        return history
