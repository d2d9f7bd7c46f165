"""Pictures as tasks of regression: from some pixels of a picture to the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..tasks import TaskBatch
from .draws import Draws
from .samples import ClassSamples
from .source import EpisodeSpec, Sampler


class Pixels:
    """Image completion (Garnelo et al. 2018, arXiv 1807.01613, section 4.2): a task is one picture of `data`.

    x is a pixel's place `[2]`, its row and column, each from -1 (top, left) to 1 (bottom, right); y its intensity
    `[C]`, 0 to 1 in pictures of bytes, as it is in others. `shots` pixels are the context and `queries` others are to
    be predicted, all drawn anew for each task; `ways` does not matter. The command line has `Completion`.

    Args:
        data: pictures, `ClassSamples` or a data set with labels, which `ClassSamples.from_dataset` reads. Tasks are of
            any of its pictures, each as likely. On a device: put the data there first.

    Raises:
        TypeError, ValueError: the samples are no pictures `[C, H, W]`.

    >>> import torch
    >>> from metaaug_fast.data import ClassSamples, Episodes, Pixels
    >>> pictures = ClassSamples.from_arrays(torch.rand(6, 1, 28, 28), [0, 0, 0, 1, 1, 1])
    >>> tasks = Episodes(Pixels(pictures), shots=10, queries=774, tasks=2).batch(0)
    >>> tasks.support_x.shape, tasks.query_y.shape
    (torch.Size([2, 10, 2]), torch.Size([2, 774, 1]))
    """

    sample_shape = (2,)
    default_model = "mlp"

    def __init__(self, data: Any) -> None:
        self.data = data if isinstance(data, ClassSamples) else ClassSamples.from_dataset(data)
        if len(self.data.sample_shape) != 3 or self.data.ids:
            raise ValueError(f"data must hold pictures [C, H, W] (got samples of shape {self.data.sample_shape})")

    def __repr__(self) -> str:
        return f"Pixels({self.data!r})"

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Of a pixel: its channels."""
        return self.data.sample_shape[:1]

    def sampler(self, spec: EpisodeSpec) -> Sampler:
        """Draw tasks of `spec.shots` and `spec.queries` pixels.

        A task's stream (see `draws.py`) is consumed as: `distinct(pictures, 1)`, the pictures counted class by class;
        `distinct(pixels of a picture, shots + queries)`, row by row, support first.

        Raises:
            ValueError: `split_styles`, or `shots + queries` are more than a picture has pixels.
        """
        channels, height, width = self.data.sample_shape
        if spec.split_styles:
            raise ValueError("split_styles must be False for Pixels, whose tasks are of one picture (got True)")
        if spec.shots + spec.queries > height * width:
            raise ValueError(
                f"shots + queries must be at most {height * width}, the pixels of a picture "
                f"(got {spec.shots} + {spec.queries})"
            )
        ends = self.data.counts.sum(1).cumsum()  # of the classes, in the count of all pictures
        rows, columns = (torch.linspace(-1, 1, side, dtype=torch.float64) for side in (height, width))
        places = torch.cartesian_prod(rows, columns).to(spec.dtype)

        def sample(draws: Draws) -> TaskBatch:
            picture = draws.distinct(int(ends[-1]), 1)
            chosen = torch.from_numpy(draws.distinct(height * width, spec.shots + spec.queries))
            owner = np.searchsorted(ends, picture, side="right")
            row = self.data.first[owner] + picture - (ends - self.data.counts.sum(1))[owner]
            y = self.data._gather(row[..., None], spec.dtype).view(draws.tasks, channels, -1).mT
            x, chosen = places.to(y.device)[chosen], chosen.to(y.device)
            y = y.gather(1, chosen[..., None].expand(-1, -1, channels))
            support, query = slice(spec.shots), slice(spec.shots, None)
            return TaskBatch(x[:, support], y[:, support], x[:, query], y[:, query])

        return sample
