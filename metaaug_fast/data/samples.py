"""Labelled samples as one tensor, grouped by class, so that an episode is a gather."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..tasks import TaskBatch
from .draws import Draws, shuffled
from .source import EpisodeSpec, Sampler

MAX_STYLES = 12
SHARES = {"train": 64, "validation": 16, "test": 20}
"""Of the classes of a data set that is not divided."""
_DTYPES = (torch.uint8, torch.float32, torch.float64, torch.int64)


class ClassSamples:
    """Samples of many classes, of any shape, held as one tensor in order of class (and of style within a class).

    `subset` and `split` share the tensor.

    Args:
        samples: pictures `[N, H, W]` or `[N, C, H, W]` in uint8 (a sample is handed out divided by 255, and a single
            channel is added to `[N, H, W]`), or any `[N, ...]` in float32, float64 or, as token ids, int64 (as it is).
            Grouped by class.
        first: where each class begins in `samples`, `[classes]`.
        counts: samples of each class in each style, `[classes, styles]`; one column where there are no styles.
        names: a name for each class, for messages.
        styles: a name for each style family.

    Raises:
        ValueError: the arguments do not fit together.

    >>> import torch
    >>> data = ClassSamples.from_arrays(torch.zeros(12, 28, 28, dtype=torch.uint8), torch.arange(12) % 3)
    >>> data
    ClassSamples(3 classes, 4 to 4 samples each of shape (1, 28, 28))
    """

    target_shape = None
    default_model: str | None = "conv4"

    def __init__(
        self,
        samples: Tensor,
        first: Sequence[int] | np.ndarray,
        counts: Sequence[Sequence[int]] | np.ndarray,
        names: Sequence[str],
        styles: Sequence[str] = (),
    ) -> None:
        if samples.dtype not in _DTYPES:
            raise ValueError(f"samples must be uint8, float32, float64 or int64 (got {samples.dtype})")
        self.samples = samples.unsqueeze(1) if samples.dtype == torch.uint8 and samples.ndim == 3 else samples
        self.first = np.asarray(first, dtype=np.int64)
        self.counts = np.asarray(counts, dtype=np.int64)
        self.names = tuple(names)
        self.styles = tuple(styles)
        if self.counts.shape != (len(self.first), max(len(self.styles), 1)) or len(self.names) != len(self.first):
            raise ValueError(
                f"names and counts must have a row for each of {len(self.first)} classes, counts a column for each of "
                f"{max(len(self.styles), 1)} styles (got {len(self.names)} names, counts {self.counts.shape})"
            )
        self._sizes = self.counts.sum(1)
        ends = self.first + self._sizes
        if len(self) and (self.first.min() < 0 or self.counts.min() < 0 or ends.max() > len(samples)):
            raise ValueError(
                f"first and counts must stay within the {len(samples)} samples (got an end at {ends.max()})"
            )

    @classmethod
    def from_arrays(
        cls,
        samples: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | Sequence[Any],
        styles: Sequence[Any] | Tensor | np.ndarray | None = None,
    ) -> ClassSamples:
        """Group samples `[N, ...]` by their labels `[N]`; classes in sorted order of the labels.

        `styles` `[N]`, if given, says which style family each sample belongs to.
        """
        samples = torch.as_tensor(samples)
        classes, label_of = np.unique(np.asarray(labels), return_inverse=True)
        families, style_of = np.unique(
            np.zeros(len(samples)) if styles is None else np.asarray(styles), return_inverse=True
        )
        for name, values in (("labels", label_of), ("styles", style_of)):
            if values.shape != (len(samples),):
                raise ValueError(f"{name} must have one entry for each of {len(samples)} samples (got {values.shape})")
        order = np.lexsort((style_of, label_of))
        counts = np.zeros((len(classes), len(families)), dtype=np.int64)
        np.add.at(counts, (label_of, style_of), 1)
        sizes = counts.sum(1)
        return ClassSamples(
            samples[torch.from_numpy(order)],
            np.cumsum(sizes) - sizes,
            counts,
            [str(name) for name in classes],
            () if styles is None else [str(name) for name in families],
        )

    @classmethod
    def from_dataset(cls, dataset: Any) -> ClassSamples:
        """Read a torch data set of `(sample, label)` pairs, of one shape, into memory once.

        Its labels come from `get_labels()` or `targets`. Samples are tensors, arrays or PIL images (`[H, W]` or
        `[H, W, C]`).

        Raises:
            TypeError: the data set has neither.
        """
        get_labels = getattr(dataset, "get_labels", None)
        labels = get_labels() if callable(get_labels) else getattr(dataset, "targets", None)
        if labels is None:
            raise TypeError(
                f"dataset must have sampler(spec), get_labels() or targets (got {type(dataset).__name__}); "
                "ClassSamples.from_arrays(samples, labels) takes plain tensors"
            )
        return cls.from_arrays(torch.stack([_as_tensor(dataset[i][0]) for i in range(len(labels))]), labels)

    def __len__(self) -> int:
        """The number of classes."""
        return len(self.first)

    def __repr__(self) -> str:
        extent = f"{self._sizes.min()} to {self._sizes.max()} samples each" if len(self) else "no samples"
        styles = f", {len(self.styles)} styles" if self.styles else ""
        return f"{type(self).__name__}({len(self)} classes, {extent} of shape {self.sample_shape}{styles})"

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, `(C, H, W)`."""
        return tuple(self.samples.shape[1:])

    @property
    def ids(self) -> bool:
        """Whether samples are token ids rather than numbers."""
        return self.samples.dtype == torch.int64

    def class_samples(self, index: int) -> Tensor:
        """All samples of one class, `[n, C, H, W]`, as stored."""
        return self.samples[self.first[index] : self.first[index] + self._sizes[index]]

    def subset(self, classes: Iterable[int]) -> ClassSamples:
        """The data set of these classes, in this order; the samples are shared."""
        rows = np.fromiter(classes, dtype=np.int64)
        return ClassSamples(
            self.samples, self.first[rows], self.counts[rows], [self.names[i] for i in rows], self.styles
        )

    def to(self, device: torch.device | str) -> ClassSamples:
        """The data set with its samples on a device; episodes are then drawn there, the same ones for the same seed."""
        return ClassSamples(self.samples.to(device), self.first, self.counts, self.names, self.styles)

    def split(self, sizes: Sequence[int], seed: int = 0) -> list[ClassSamples]:
        """Disjoint data sets of `sizes` classes each, from one shuffle of the classes given by the seed.

        Raises:
            ValueError: a size is negative, or they exceed the number of classes.
        """
        if min(sizes, default=0) < 0 or sum(sizes) > len(self):
            raise ValueError(f"sizes must be >= 0 and add up to at most {len(self)} classes (got {list(sizes)})")
        parts = np.split(shuffled(len(self), seed), np.cumsum(sizes))
        return [self.subset(part) for part in parts[: len(sizes)]]

    def split_shares(self, sizes: Mapping[str, int], seed: int = 0) -> dict[str, ClassSamples]:
        """Split by name into parts of these sizes, or of the same shares where the sizes add up to another total."""
        bounds = np.cumsum([0, *sizes.values()])
        parts = np.diff(np.round(bounds / bounds[-1] * len(self)).astype(int))
        return dict(zip(sizes, self.split(parts.tolist(), seed), strict=True))

    def with_rotations(self) -> ClassSamples:
        """Four times the classes: every class turned by 0, 90, 180 and 270 degrees (counter-clockwise).

        Raises:
            ValueError: the samples are no square pictures.
        """
        if self.samples.ndim != 4 or self.samples.shape[2] != self.samples.shape[3]:
            raise ValueError(f"with_rotations needs square pictures [N, C, H, H] (got {tuple(self.samples.shape)})")
        first = np.cumsum(self._sizes) - self._sizes
        # Only the samples of these classes: the tensor may be shared with other splits.
        rows = np.arange(self._sizes.sum()) + np.repeat(self.first - first, self._sizes)
        samples = self.samples[torch.from_numpy(rows)]
        return ClassSamples(
            torch.cat([samples.rot90(turns, (2, 3)) for turns in range(4)]),
            np.concatenate([first + turns * len(samples) for turns in range(4)]),
            np.tile(self.counts, (4, 1)),
            [f"{name} turned by {90 * turns}" if turns else name for turns in range(4) for name in self.names],
            self.styles,
        )

    def sampler(self, spec: EpisodeSpec) -> Sampler:
        """Draw episodes by `spec`: classes, then (with `split_styles`) styles of the support set, then samples.

        A task's stream (see `draws.py`) is consumed as: `distinct(classes, ways)`; without `split_styles`
        `distinct(samples of the class, shots + queries)` for every class, support first; with it, `distinct(divisions,
        1)`, one of the ways to divide the styles in two that leaves every class enough samples on both sides, then
        `distinct(its samples on the support side, shots)` and `distinct(its samples on the query side, queries)`.

        Raises:
            ValueError: too few classes, samples in a class, or styles.
        """
        if spec.ways > len(self):
            raise ValueError(f"ways must be at most the data set's {len(self)} classes (got {spec.ways})")
        self._check_sizes(spec)
        divisions = self._divisions(spec) if spec.split_styles else None
        if divisions is None and self.samples.is_cuda and _C.cuda and not self.ids:
            return self._device_sampler(spec)
        labels = torch.arange(spec.ways, device=self.samples.device)
        support_y, query_y = labels.repeat_interleave(spec.shots), labels.repeat_interleave(spec.queries)

        def sample(draws: Draws) -> TaskBatch:
            classes = draws.distinct(len(self), spec.ways)
            if divisions is None:
                rows = draws.distinct(self._sizes[classes], spec.shots + spec.queries)
                rows += self.first[classes][..., None]
                support, query = rows[..., : spec.shots], rows[..., spec.shots :]
            else:
                on_support = divisions[draws.distinct(len(divisions), 1)]
                support = self._rows(draws, classes, on_support, spec.shots)
                query = self._rows(draws, classes, ~on_support, spec.queries)
            tasks = len(classes)
            return TaskBatch(
                self._gather(support, spec.dtype),
                support_y.repeat(tasks, 1),
                self._gather(query, spec.dtype),
                query_y.repeat(tasks, 1),
            )

        return sample

    def _device_sampler(self, spec: EpisodeSpec) -> Sampler:
        """The sampler without styles in one kernel, which draws where the samples lie."""
        first, sizes = (torch.from_numpy(each).to(self.samples.device) for each in (self.first, self._sizes))

        def sample(draws: Draws) -> TaskBatch:
            counts = (draws.tasks, spec.ways, spec.shots, spec.queries)
            in_double = spec.dtype == torch.float64
            return TaskBatch(*_C.sample_episodes(self.samples, first, sizes, draws.key, *counts, in_double))

        return sample

    def _check_sizes(self, spec: EpisodeSpec) -> None:
        needed = spec.shots + spec.queries
        smallest = int(self._sizes.argmin())
        if self._sizes[smallest] < needed:
            raise ValueError(
                f"shots + queries must be at most the samples of every class (got {spec.shots} + {spec.queries}; class "
                f"{self.names[smallest]!r} has {self._sizes[smallest]}, {(self._sizes < needed).sum()} classes have "
                "too few)"
            )

    def _divisions(self, spec: EpisodeSpec) -> np.ndarray:
        """Every choice of styles for the support set that leaves all classes enough samples: bool `[..., styles]`."""
        styles = len(self.styles)
        if not 2 <= styles <= MAX_STYLES:
            raise ValueError(f"split_styles needs a data set with 2 to {MAX_STYLES} styles (got {styles})")
        choices = np.arange(1, 2**styles - 1)[:, None] >> np.arange(styles) & 1
        enough = (self.counts @ choices.T >= spec.shots) & (self.counts @ (1 - choices).T >= spec.queries)
        possible = enough.all(0)
        if not possible.any():
            hardest = int(enough.sum(1).argmin())
            held = ", ".join(f"{name}: {count}" for name, count in zip(self.styles, self.counts[hardest], strict=True))
            raise ValueError(
                f"split_styles needs styles that can be divided into {spec.shots} support and {spec.queries} query "
                f"samples in every class (got class {self.names[hardest]!r} with {held})"
            )
        return choices[possible].astype(bool)

    def _rows(self, draws: Draws, classes: np.ndarray, chosen: np.ndarray, count: int) -> np.ndarray:
        """Draw `count` samples in the chosen styles `[T, 1, styles]` of the classes `[T, ways]`: `[T, ways, count]`."""
        counts = self.counts[classes]
        ends = (counts * chosen).cumsum(-1)
        picks = draws.distinct(ends[..., -1], count)
        style = (picks[..., None] >= ends[..., None, :]).sum(-1)
        # The samples of the styles left out, which lie in front of the pick in the class.
        skipped = np.take_along_axis((counts * ~chosen).cumsum(-1), style, -1)
        return picks + skipped + self.first[classes][..., None]

    def _gather(self, rows: np.ndarray, dtype: torch.dtype) -> Tensor:
        """The samples at rows `[T, ways, n]`, `[T, ways * n, ...]`."""
        picked = self.samples.index_select(0, torch.from_numpy(rows.reshape(-1)).to(self.samples.device))
        shape = (len(rows), rows.shape[1] * rows.shape[2], *self.sample_shape)
        if picked.dtype == torch.int64:
            return picked.view(shape)
        scaled = picked.to(dtype).div_(255) if picked.dtype == torch.uint8 else picked.to(dtype)
        return scaled.view(shape)


def part_of(data: ClassSamples, split: str, seed: int) -> ClassSamples:
    """A part of data that are not divided: classes by `SHARES`, shuffled by the seed; `"all"` is the whole.

    Raises:
        ValueError: the classes are so few that none falls to this part.
    """
    part = data if split == "all" else data.split_shares(SHARES, seed)[split]
    if not len(part):
        shares = " : ".join(map(str, SHARES.values()))
        raise ValueError(
            f"split must have classes: of {len(data)}, divided {shares}, none is for {split} (got {split!r})"
        )
    return part


def _as_tensor(sample: Any) -> Tensor:
    """A tensor `[C, H, W]` or `[H, W]` of a tensor, or of a PIL image or array `[H, W]` or `[H, W, C]`."""
    if isinstance(sample, Tensor):
        return sample
    array = torch.from_numpy(np.array(sample))
    return array.permute(2, 0, 1) if array.ndim == 3 else array
