"""Few-shot episodes: an endless, seeded, resumable sequence of `TaskBatch`es."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..checks import check_integer
from ..tasks import TaskBatch
from .draws import Draws
from .samples import ClassSamples
from .source import EpisodeSpec, TaskSource


class Episodes(IterableDataset):
    """Batches of few-shot tasks without end: `batch(i)` depends on `seed` and `i` alone.

    `DataLoader(episodes, batch_size=None, num_workers=2)` draws them in other processes, in the same order; `Loader`
    does so and can be resumed. `shard` divides every batch over processes that train together.

    Args:
        dataset: a `TaskSource` (`Glyphs`, `Omniglot`, `Sinusoids`, any `ClassSamples`), or a data set with labels,
            which `ClassSamples.from_dataset` reads into memory once.
        ways, shots, queries: see `EpisodeSpec`; ways mean nothing to a regression family.
        tasks: tasks a batch, T.
        seed: any integer; another seed is another sequence.
        split_styles: support images from some style families of the data set, queries from the others.
        dtype: of the inputs.
        transform: called with each whole `TaskBatch`, where it is drawn (in a loader's process, for one: then it has to
            be picklable); returns one of as many tasks, in a form that `TaskBatch.of` takes. What it takes from torch's
            own generators is given by `seed`, the batch and the shard, and leaves these as they were.

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
        transform: Callable[[TaskBatch], Any] | None = None,
    ) -> None:
        check_integer("tasks", tasks, low=1)
        check_integer("seed", seed)
        if transform is not None and not callable(transform):
            raise TypeError(f"transform must be a function of a TaskBatch (got {transform!r})")
        self.dataset: TaskSource = dataset if isinstance(dataset, TaskSource) else ClassSamples.from_dataset(dataset)
        self.spec = EpisodeSpec(ways, shots, queries, split_styles, dtype)
        self.tasks = tasks
        self.seed = seed
        self.position = 0
        self.first = 0  # of the tasks of a batch, those before it being other shards'
        self.transform = transform
        self._sample = self.dataset.sampler(self.spec)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_sample"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._sample = self.dataset.sampler(self.spec)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one input, as a model sees it without the batch dimension."""
        if self.transform is None:
            return self.dataset.sample_shape
        return tuple(self.batch(self.position).support_x.shape[2:])

    def batch(self, index: int) -> TaskBatch:
        """The batch of that index, >= 0, wherever the iteration stands."""
        check_integer("index", index, low=0)
        draws = Draws(self.seed, index, self.tasks, self.first)
        tasks = self._sample(draws)
        return tasks if self.transform is None else transformed(self.transform, tasks, draws.key)

    def shard(self, rank: int, shards: int) -> Episodes:
        """The share of process `rank` of `shards`, which together draw just these batches.

        Raises:
            TypeError, ValueError: `shards` does not divide `tasks`, or `rank` is none of them.

        >>> from metaaug_fast.data import Episodes, Sinusoids
        >>> episodes = Episodes(Sinusoids(), tasks=6)
        >>> episodes.shard(1, 2).batch(4) == episodes.batch(4)[3:]
        True
        """
        check_integer("shards", shards, low=1)
        check_integer("rank", rank, low=0)
        if rank >= shards:
            raise ValueError(f"rank must be below shards, {shards} (got {rank})")
        if self.tasks % shards:
            raise ValueError(f"shards must divide tasks, {self.tasks} (got {shards})")
        share = copy.copy(self)
        share.tasks = self.tasks // shards
        share.first = self.first + rank * share.tasks
        return share

    def __iter__(self) -> Iterator[TaskBatch]:
        worker = get_worker_info()
        if worker is None:
            return self
        # Batches are taken from the workers in turns.
        own = itertools.count(self.position + worker.id, worker.num_workers)
        return (self._batch_before(index, index + worker.num_workers) for index in own)

    def __next__(self) -> TaskBatch:
        batch = self._batch_before(self.position, self.position + 1)
        self.position += 1
        return batch

    def _batch_before(self, index: int, following: int) -> TaskBatch:
        """The batch of that index; where samples lie in a file, those of the following one are read meanwhile."""
        batch = self.batch(index)
        expect = getattr(self._sample, "expect", None)
        if expect is not None:
            expect(Draws(self.seed, following, self.tasks, self.first))
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands: the seed, and the index of the batch that comes next."""
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a `state_dict()`."""
        check_integer("position", state["position"], low=0)
        check_integer("seed", state["seed"])
        self.seed, self.position = state["seed"], state["position"]


def transformed(transform: Callable[[TaskBatch], Any], tasks: TaskBatch, key: int) -> TaskBatch:
    """What `transform` makes of the tasks, as with torch's seed `key`."""
    device = tasks.support_x.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(key)
        made = transform(tasks)
    try:
        result = TaskBatch.of(made)
    except (TypeError, ValueError) as error:
        raise type(error)(f"transform must return tasks ({error})") from error
    if len(result) != len(tasks):
        raise ValueError(f"transform must return as many tasks as it was given, {len(tasks)} (got {len(result)})")
    return result


class Loader:
    """The batches of `episodes`, drawn ahead by processes of their own; the same ones, and resumable like them.

    Args:
        episodes: where to begin, and what to draw; its own position stays.
        workers: how many processes. They are started by the first batch and end with `close`.

    Raises:
        TypeError, ValueError: `workers` is no count.

    >>> from metaaug_fast.data import Episodes, Loader, Sinusoids
    >>> Loader(Episodes(Sinusoids(), tasks=4), workers=1).state_dict()
    {'seed': 0, 'position': 0}
    """

    def __init__(self, episodes: Episodes, workers: int = 1) -> None:
        check_integer("workers", workers, low=1)
        self.episodes = copy.copy(episodes)
        self.workers = workers
        self._ahead: tuple[ThreadPoolExecutor, Iterator[TaskBatch], Future[TaskBatch]] | None = None

    def __iter__(self) -> Iterator[TaskBatch]:
        return self

    def __next__(self) -> TaskBatch:
        if self._ahead is None:
            loader = DataLoader(
                self.episodes, batch_size=None, num_workers=self.workers, multiprocessing_context="spawn"
            )
            self._take(ThreadPoolExecutor(1), iter(loader))
        assert self._ahead is not None
        pool, batches, coming = self._ahead
        batch = coming.result()
        self._take(pool, batches)
        self.episodes.position += 1
        return batch

    def _take(self, pool: ThreadPoolExecutor, batches: Iterator[TaskBatch]) -> None:
        """Take the next batch from its process meanwhile: that takes milliseconds."""
        self._ahead = pool, batches, pool.submit(next, batches)

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands, as of `Episodes`."""
        return self.episodes.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a `state_dict()`; the processes are started anew."""
        self.episodes.load_state_dict(state)
        self.close()

    def close(self) -> None:
        """End the processes."""
        if self._ahead is not None:
            self._ahead[0].shutdown()
            self._ahead = None
