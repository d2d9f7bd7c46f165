"""What tasks can be drawn from, and what one task consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from ..checks import check_integer
from ..tasks import TaskBatch
from .draws import Draws

Sampler = Callable[[Draws], TaskBatch]


@dataclass(frozen=True)
class EpisodeSpec:
    """What one task consists of.

    ways: classes a task. shots, queries: samples of each class to adapt on and to be judged on (of the whole task
    in regression, where there are no classes). split_styles: support and queries come from different styles.
    dtype: of the inputs, float32 or float64.

    Raises:
        TypeError, ValueError: a count is not an integer >= 1, or the dtype is another one.
    """

    ways: int = 5
    shots: int = 1
    queries: int = 5
    split_styles: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("ways", "shots", "queries"):
            check_integer(name, getattr(self, name), low=1)
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64 (got {self.dtype})")


@runtime_checkable
class TaskSource(Protocol):
    """Anything tasks can be drawn from: `ClassSamples`, `Sinusoids`, or a class of your own.

    A run also reads attributes, where there are any: `target_shape` of a sample, if targets are numbers rather than
    class ids; `default_model`, the name of a model that suits it; `ids`, whether inputs are token ids, and
    `vocabulary`, which these are below. A source of classes takes `split` in its constructor, "train", "validation" or
    "test".
    """

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one input, without tasks and samples."""
        ...

    def sampler(self, spec: EpisodeSpec) -> Sampler:
        """A function from the draws of T tasks to their `TaskBatch`; ValueError if the source cannot serve `spec`.

        It may have an attribute `expect`, a function that is called with the draws that come next, so that what they
        need can be fetched meanwhile.
        """
        ...
