"""Few-shot episodes: an endless, seeded, resumable sequence of `TaskBatch`es."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..checks import check_integer
from ..tasks import TaskBatch
from .draws import Draws
from .samples import ClassSamples
from .source import EpisodeSpec, TaskSource


class Episodes:
    """Batches of few-shot tasks without end: `batch(i)` depends on `seed` and `i` alone.

    Args:
        dataset: a `TaskSource` (`Glyphs`, `Omniglot`, `Sinusoids`, any `ClassSamples`), or a torch data set with
            `targets` or `get_labels()`, which is read into memory once.
        ways, shots, queries: see `EpisodeSpec`; ways mean nothing to a regression family.
        tasks: tasks a batch, T.
        seed: any integer; another seed is another sequence.
        split_styles: support images from some style families of the data set, queries from the others.
        dtype: of the inputs.

    Yields:
        `TaskBatch` with support_x `[T, ways * shots, ...]`, class after class, and support_y `0..ways-1` (which class
        of the data set gets which label is part of the draw); queries likewise.

    Raises:
        TypeError, ValueError: an argument is out of range, or the data set has too few classes, samples or styles.

    >>> from metaaug_fast.data import Episodes, Sinusoids
    >>> episodes = Episodes(Sinusoids(), shots=10, queries=10, tasks=25, seed=1)
    >>> batch = next(episodes)
    >>> batch.support_x.shape, episodes.state_dict()
    (torch.Size([25, 10, 1]), {'seed': 1, 'position': 1})
    """

    def __init__(
        self,
        dataset: TaskSource | Any,
        ways: int = 5,
        shots: int = 1,
        queries: int = 5,
        tasks: int = 32,
        seed: int = 0,
        split_styles: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_integer("tasks", tasks, low=1)
        check_integer("seed", seed)
        self.dataset: TaskSource = dataset if isinstance(dataset, TaskSource) else ClassSamples.from_dataset(dataset)
        self.spec = EpisodeSpec(ways, shots, queries, split_styles, dtype)
        self.tasks = tasks
        self.seed = seed
        self.position = 0
        self._sample = self.dataset.sampler(self.spec)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one input, as a model sees it without the batch dimension."""
        return self.dataset.sample_shape

    def batch(self, index: int) -> TaskBatch:
        """The batch of that index, >= 0, wherever the iteration stands."""
        check_integer("index", index, low=0)
        return self._sample(Draws(self.seed, index, self.tasks))

    def __iter__(self) -> Iterator[TaskBatch]:
        return self

    def __next__(self) -> TaskBatch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands: the seed, and the index of the batch that comes next."""
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a `state_dict()`."""
        check_integer("position", state["position"], low=0)
        check_integer("seed", state["seed"])
        self.seed, self.position = state["seed"], state["position"]
