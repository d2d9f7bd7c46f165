"""Episodes in which a class has the same label whenever it comes, and support sets tell nothing that could be learned.

Yin, Tucker, Zhou, Levine, Finn 2020 (arXiv 1912.03820) call such tasks not mutually exclusive: one function is right
for all of them. Rajendran, Irpan, Jang 2020 (arXiv 2007.05549) make them of known data sets and undo it again by
augmentation: see `augment.ShuffleLabels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checks import check_flag
from .draws import Draws
from .samples import ClassSamples
from .source import EpisodeSpec, Sampler


class FixedLabels:
    """Tasks of `data` with a label for good: class c of the data set has label `c % ways` in every task it is in.

    A task has one class of each label. Where the classes are no multiple of `ways`, the last few never come.

    Args:
        data: `ClassSamples`, or a data set with labels, which `ClassSamples.from_dataset` reads. On a device: put the
            data there first.
        groups: the classes of a task are neighbours, `g * ways` to `g * ways + ways - 1`, which always come together,
            as Rajendran et al. have them: `classes // ways` tasks in all. False: of each label any class.

    Raises:
        TypeError: `data` are no samples with labels, or `groups` is no flag.

    >>> import torch
    >>> from metaaug_fast.data import ClassSamples, Episodes, FixedLabels
    >>> data = ClassSamples.from_arrays(torch.arange(12.0)[:, None], torch.arange(12) // 2)  # six classes of two
    >>> tasks = Episodes(FixedLabels(data), ways=3, shots=1, queries=1, tasks=50).batch(0)
    >>> bool((tasks.support_x[..., 0] // 2 % 3 == tasks.support_y).all())
    True
    """

    target_shape = None

    def __init__(self, data: Any, groups: bool = False) -> None:
        check_flag("groups", groups)
        self.data = data if isinstance(data, ClassSamples) else ClassSamples.from_dataset(data)
        self.groups = groups

    def __repr__(self) -> str:
        return f"FixedLabels({self.data!r}, groups={self.groups})"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.data.sample_shape

    @property
    def default_model(self) -> str | None:
        """The name of a model that suits the samples."""
        return self.data.default_model

    @property
    def ids(self) -> bool:
        """Whether samples are token ids."""
        return self.data.ids

    @property
    def vocabulary(self) -> int | None:
        """What token ids are below, where the data say it."""
        return getattr(self.data, "vocabulary", None)

    def sampler(self, spec: EpisodeSpec) -> Sampler:
        """As of `ClassSamples`, but that a task's stream begins with the place of each class among those of its label.

        With `groups`, it begins with the group's number.

        Raises:
            ValueError: too few classes, samples in a class, or styles.
        """
        labels = np.arange(spec.ways)
        each = len(self.data) // spec.ways

        def classes(draws: Draws) -> np.ndarray:
            if self.groups:
                return draws.distinct(each, 1) * spec.ways + labels
            return draws.distinct(np.full((draws.tasks, spec.ways), each), 1)[..., 0] * spec.ways + labels

        return self.data.sampler(spec, classes)
