"""Labelled samples as one tensor, grouped by class, so that an episode is a gather."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..tasks import TaskBatch
from .draws import Draws, shuffled
from .mapped import Mapped, Rows, rows_in
from .source import EpisodeSpec, Sampler

MAX_STYLES = 12
_DTYPES = ("uint8", "float32", "float64", "int64")


class ClassSamples:
    """Samples of many classes, of any shape, held as one tensor in order of class (and of style within a class).

    `subset` and `split` share the tensor.

    Args:
        samples: pictures `[N, H, W]` or `[N, C, H, W]` in uint8 (a sample is handed out divided by 255, and a single
            channel is added to `[N, H, W]`), or any `[N, ...]` in float32, float64 or, as token ids, int64 (as it is).
            Grouped by class. Or a file of such an array in NumPy's format, `.npy`, which is mapped: samples are read
            from it as they are drawn, and may be more than memory holds.
        first: where each class begins in `samples`, `[classes]`.
        counts: samples of each class in each style, `[classes, styles]`; one column where there are no styles.
        names: a name for each class, for messages.
        styles: a name for each style family.
        order: int64 `[N]`, the samples in order of class, where they lie in another one; `first` is a place in it.

    Raises:
        ValueError: the arguments do not fit together. FileNotFoundError: there is no such file.

    >>> import torch
    >>> data = ClassSamples.from_arrays(torch.zeros(12, 28, 28, dtype=torch.uint8), torch.arange(12) % 3)
    >>> data
    ClassSamples(3 classes, 4 to 4 samples each of shape (1, 28, 28))
    """

    target_shape = None
    default_model: str | None = "conv4"

    def __init__(
        self,
        samples: Tensor | str | os.PathLike[str],
        first: Sequence[int] | np.ndarray,
        counts: Sequence[Sequence[int]] | np.ndarray,
        names: Sequence[str],
        styles: Sequence[str] = (),
        order: Tensor | None = None,
    ) -> None:
        self._file = None if isinstance(samples, Tensor) else Path(samples).absolute()
        self._hold(samples)
        _check_dtype(self.samples.dtype)
        self.order = order
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
        ends, held = self.first + self._sizes, len(self.samples if order is None else order)
        if len(self) and (self.first.min() < 0 or self.counts.min() < 0 or ends.max() > held):
            raise ValueError(f"first and counts must stay within the {held} samples (got an end at {ends.max()})")

    def __getstate__(self) -> dict[str, Any]:
        """Of samples in a file, where that is; another process maps it, too."""
        left_out = () if self._file is None else ("samples", "_mapped")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._file is not None:
            self._hold(self._file)

    def _hold(self, samples: Tensor | str | os.PathLike[str]) -> None:
        """The samples, or those in a file; grey pictures with a channel."""
        self._mapped = None if isinstance(samples, Tensor) else Mapped(samples)
        tensor: Any = samples if self._mapped is None else self._mapped.tensor
        self.samples: Tensor = tensor.unsqueeze(1) if tensor.dtype == torch.uint8 and tensor.ndim == 3 else tensor

    @classmethod
    def from_arrays(
        cls,
        samples: Tensor | np.ndarray | str | os.PathLike[str],
        labels: Tensor | np.ndarray | Sequence[Any],
        styles: Sequence[Any] | Tensor | np.ndarray | None = None,
    ) -> ClassSamples:
        """Group samples `[N, ...]` by their labels `[N]`, numbers or text; classes in sorted order of the labels.

        `samples` may be a file, `"pictures.npy"`, that is mapped and not read. `styles` `[N]`, if given, says which
        style family each sample belongs to.

        Raises:
            ValueError: labels or styles are missing (None, NaN), of several kinds, or not one for each sample.
            FileNotFoundError, ValueError: there is no such file, or it holds no array.
        """
        file = Path(samples) if isinstance(samples, (str, os.PathLike)) else None
        samples = torch.as_tensor(samples) if file is None else Mapped(file).tensor
        _check_complete("labels", labels)
        if styles is not None:
            _check_complete("styles", styles)
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
        sizes, rows = counts.sum(1), torch.from_numpy(order)
        return ClassSamples(
            samples[rows] if file is None else file,
            np.cumsum(sizes) - sizes,
            counts,
            [str(name) for name in classes],
            () if styles is None else [str(name) for name in families],
            None if file is None else rows,
        )

    @classmethod
    def from_classes(cls, classes: Mapping[str, Tensor]) -> ClassSamples:
        """Samples `[n, ...]` of each class, by its name; all of one shape and dtype.

        Raises:
            ValueError: there is no class, or they differ in shape, dtype or device.

        >>> ClassSamples.from_classes({"circle": torch.rand(3, 1, 8, 8), "star": torch.rand(5, 1, 8, 8)})
        ClassSamples(2 classes, 3 to 5 samples each of shape (1, 8, 8))
        """
        _check_alike([*classes.values()])
        sizes = np.array([len(each) for each in classes.values()])
        return ClassSamples(torch.cat([*classes.values()]), np.cumsum(sizes) - sizes, sizes[:, None], [*classes])

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        sample: str | None = None,
        label: str = "label",
        file: str | os.PathLike[str] | None = None,
    ) -> ClassSamples:
        """Read a map-style data set of samples of one shape once, into memory or a file.

        Its labels come from `get_labels()`, `targets` or `labels`, as those of torch and torchvision have them, or from
        the column `label`, as those of Hugging Face (`features`) have it; classes then go by the names that the column
        knows. An item is a mapping with the column `sample`, or a tuple that begins with the sample. Samples are
        tensors, arrays, lists of numbers or PIL images (`[H, W]` or `[H, W, C]`).

        Args:
            dataset: the data set.
            sample: a column; None: the first of image, img and text that there is.
            label: a column.
            file: where to keep the samples, `"pictures.npy"`, if they are more than memory holds: they are mapped from
                there. If it is there already, with as many samples and the same at both ends, the rest is taken to be
                the same, too, and is not read again.

        Raises:
            TypeError: the data set has no labels, or samples that are no numbers.
            ValueError: there is no such column, a label is missing, samples have several shapes, the data set has
                another length than its labels, or another one when it has been read, or `file` has other samples.
            FileWriteError: `file` cannot be written.
        """
        labels = _labels_of(dataset, label)
        lengths = {"labels": len(labels)}
        if hasattr(dataset, "__len__"):
            lengths["samples"] = len(dataset)
        if not len(labels) or len({*lengths.values()}) > 1:
            counts = " and ".join(f"{count} {name}" for name, count in lengths.items())
            raise ValueError(f"dataset must have a label for each of one sample or more (got {counts})")
        _check_complete("labels", labels)
        if file is None:
            rows = Rows()
            _read_into(rows, dataset, labels, sample)
            return cls.from_arrays(rows.stacked(), labels)
        if Path(file).exists():
            _check_same(Mapped(file).tensor, dataset, len(labels), sample, file)
        else:
            with rows_in(file) as rows:
                _read_into(rows, dataset, labels, sample)
        return cls.from_arrays(file, labels)

    @classmethod
    def from_table(cls, frame: Any, label: str = "label") -> ClassSamples:
        """Rows of a table, such as a pandas DataFrame or a mapping of columns, as float32 `[features]`.

        Args:
            frame: its iteration gives the names of its columns, `frame[name]` a column.
            label: the column of the labels; all others are features.

        Raises:
            ValueError: there is no such column, none besides it, one of them is not numeric or lacks numbers (all such
                are named), or a label is missing.

        >>> ClassSamples.from_table({"width": [1, 2, 3, 4], "height": [0.5, 1, 2, 4], "kind": [*"abab"]}, label="kind")
        ClassSamples(2 classes, 2 to 2 samples each of shape (2,))
        """
        names = list(frame)
        _check_column("label", label, names)
        names.remove(label)
        if not names:
            raise ValueError(f"frame must have a column besides {label!r} (got none)")
        _check_complete("labels", frame[label])
        labels = np.asarray(frame[label])
        if not len(labels):
            raise ValueError("frame must have rows (got none)")
        columns = {name: np.asarray(frame[name]) for name in names}
        for name, values in columns.items():
            if values.shape != labels.shape:
                raise ValueError(
                    f"frame must have columns of one length (got {labels.shape} for {label!r}, {values.shape} for "
                    f"{name!r})"
                )
        if others := [name for name, values in columns.items() if values.dtype.kind not in "biuf"]:
            raise ValueError(f"features must be numbers (got columns {', '.join(map(repr, others))} of other things)")
        with np.errstate(over="ignore"):
            samples = np.stack([*columns.values()], axis=1, dtype=np.float32, casting="unsafe")
        if others := [name for index, name in enumerate(names) if not np.isfinite(samples[:, index]).all()]:
            raise ValueError(
                f"features must be finite numbers of float32 (got columns {', '.join(map(repr, others))} with others)"
            )
        return cls.from_arrays(samples, labels)

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
        """All samples of one class, `[n, C, H, W]`, as stored; those in a file must not be written to."""
        places = slice(self.first[index], self.first[index] + self._sizes[index])
        return self.samples[places if self.order is None else self.order[places]]

    def subset(self, classes: Iterable[int]) -> ClassSamples:
        """The data set of these classes, in this order; the samples are shared."""
        rows = np.fromiter(classes, dtype=np.int64)
        return ClassSamples(
            self._file or self.samples,
            self.first[rows],
            self.counts[rows],
            [self.names[i] for i in rows],
            self.styles,
            self.order,
        )

    def __add__(self, other: ClassSamples) -> ClassSamples:
        """The classes of both, those of one name as one, without styles; the other's samples after one's own.

        Where one has bytes and the other floating point samples, those are divided by 255.

        Raises:
            ValueError: a name is of two classes, or samples differ in shape, device or otherwise in dtype.

        >>> few = ClassSamples.from_classes({"a": torch.zeros(1, 4), "b": torch.ones(1, 4)})
        >>> few + ClassSamples.from_classes({"b": torch.rand(5, 4)})
        ClassSamples(2 classes, 1 to 6 samples each of shape (4,))
        """
        if not isinstance(other, ClassSamples):
            return NotImplemented
        both = (self, other)
        for each in both:
            if len({*each.names}) < len(each):
                raise ValueError("classes must have names of their own to be joined (got one name twice)")
        kinds = {each.samples.dtype for each in both}
        floating = [kind for kind in kinds if kind.is_floating_point]
        mixed = torch.uint8 in kinds and len(floating) == 1
        classes: dict[str, list[Tensor]] = {}
        for each in both:
            for index, name in enumerate(each.names):
                own = each.class_samples(index)
                own = own.to(floating[0]) / 255 if mixed and own.dtype == torch.uint8 else own
                classes.setdefault(name, []).append(own)
        _check_alike([part for parts in classes.values() for part in parts])
        return ClassSamples.from_classes({name: torch.cat(parts) for name, parts in classes.items()})

    def to(self, device: torch.device | str) -> ClassSamples:
        """The data set with its samples on a device; episodes are then drawn there, the same ones for the same seed."""
        samples = self.samples if self.order is None else self.samples[self.order]
        return ClassSamples(samples.to(device), self.first, self.counts, self.names, self.styles)

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
        samples = self.samples[self._places(np.arange(self._sizes.sum()) + np.repeat(self.first - first, self._sizes))]
        return ClassSamples(
            torch.cat([samples.rot90(turns, (2, 3)) for turns in range(4)]),
            np.concatenate([first + turns * len(samples) for turns in range(4)]),
            np.tile(self.counts, (4, 1)),
            [f"{name} turned by {90 * turns}" if turns else name for turns in range(4) for name in self.names],
            self.styles,
        )

    def sampler(self, spec: EpisodeSpec, classes: Callable[[Draws], np.ndarray] | None = None) -> Sampler:
        """Draw episodes by `spec`: classes, then (with `split_styles`) styles of the support set, then samples.

        `classes` draws these otherwise: from the draws of T tasks to int64 `[T, ways]`, in the order of their labels.

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
        if divisions is None and classes is None and self.samples.is_cuda and _C.cuda and not self.ids:
            return self._device_sampler(spec)
        labels = torch.arange(spec.ways, device=self.samples.device)
        support_y, query_y = labels.repeat_interleave(spec.shots), labels.repeat_interleave(spec.queries)

        def rows(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
            chosen = draws.distinct(len(self), spec.ways) if classes is None else classes(draws)
            if divisions is None:
                rows = draws.distinct(self._sizes[chosen], spec.shots + spec.queries)
                rows += self.first[chosen][..., None]
                return rows[..., : spec.shots], rows[..., spec.shots :]
            on_support = divisions[draws.distinct(len(divisions), 1)]
            support = self._rows(draws, chosen, on_support, spec.shots)
            return support, self._rows(draws, chosen, ~on_support, spec.queries)

        def sample(draws: Draws) -> TaskBatch:
            support, query = rows(draws)
            tasks = len(support)
            return TaskBatch(
                self._gather(support, spec.dtype),
                support_y.repeat(tasks, 1),
                self._gather(query, spec.dtype),
                query_y.repeat(tasks, 1),
            )

        def expect(draws: Draws) -> None:
            for each in rows(draws):
                self._mapped.expect(self._places(each).numpy())  # type: ignore[union-attr]

        if self._mapped is not None:
            sample.expect = expect  # type: ignore[attr-defined]
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

    def _places(self, rows: np.ndarray) -> Tensor:
        """Where in `samples` the rows lie, all in one dimension."""
        flat = torch.from_numpy(rows.reshape(-1))
        return flat if self.order is None else self.order[flat]

    def _gather(self, rows: np.ndarray, dtype: torch.dtype) -> Tensor:
        """The samples at rows `[T, ways, n]`, `[T, ways * n, ...]`."""
        picked = self.samples.index_select(0, self._places(rows).to(self.samples.device))
        shape = (len(rows), rows.shape[1] * rows.shape[2], *self.sample_shape)
        if picked.dtype == torch.int64:
            return picked.view(shape)
        scaled = picked.to(dtype).div_(255) if picked.dtype == torch.uint8 else picked.to(dtype)
        return scaled.view(shape)


def _check_alike(parts: Sequence[Tensor]) -> None:
    kinds = {(tuple(each.shape[1:]), each.dtype, each.device) for each in parts}
    if len(kinds) != 1:
        got = " and ".join(f"{dtype} {list(shape)} on {device}" for shape, dtype, device in kinds)
        raise ValueError(f"classes must hold samples of one shape, dtype and device (got {got or 'none'})")


def _check_dtype(dtype: Any) -> None:
    if str(dtype).removeprefix("torch.") not in _DTYPES:
        raise ValueError(f"samples must be {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]} (got {dtype})")


def _read_into(rows: Rows, dataset: Any, labels: Any, sample: str | None) -> None:
    """Append all samples of a data set, which must keep its length meanwhile."""
    for index in range(len(labels)):
        try:
            item = dataset[index]
        except IndexError as error:
            raise ValueError(
                f"dataset must keep its length while it is read (got {len(labels)}, and nothing at {index})"
            ) from error
        rows.append(_as_array(_sample_of(item, sample)))
    if hasattr(dataset, "__len__") and len(dataset) != len(labels):
        raise ValueError(
            f"dataset must keep its length while it is read (got {len(labels)}, and {len(dataset)} at the end)"
        )


def _check_same(samples: Tensor, dataset: Any, count: int, sample: str | None, file: str | os.PathLike[str]) -> None:
    ends = [_as_array(_sample_of(dataset[index], sample)) for index in (0, count - 1)]
    held = [samples[0].numpy(), samples[-1].numpy()] if len(samples) == count else []
    if not all(map(np.array_equal, ends, held)) or not held:
        raise ValueError(
            f"file must be a new one, or hold the samples of this data set (got {file} with others); delete it"
        )


def _labels_of(dataset: Any, label: str) -> Any:
    """The labels of a data set; of a column that knows their names, these."""
    get_labels = getattr(dataset, "get_labels", None)
    if callable(get_labels):
        return get_labels()
    for name in ("targets", "labels"):
        if (labels := getattr(dataset, name, None)) is not None:
            return labels
    columns = getattr(dataset, "features", None)
    if not isinstance(columns, Mapping):
        raise TypeError(
            "dataset must have sampler(spec), get_labels(), targets, labels, or features with a column of labels "
            f"(got {type(dataset).__name__}); ClassSamples.from_arrays(samples, labels) takes plain tensors"
        )
    _check_column("label", label, columns)
    labels = list(dataset[label])
    if names := getattr(columns[label], "names", None):
        if wrong := [each for each in labels if each is not None and not 0 <= each < len(names)]:
            raise ValueError(f"labels must be 0 to {len(names) - 1}, for which there are names (got {wrong[0]})")
        labels = [None if each is None else names[each] for each in labels]
    return labels


def _sample_of(item: Any, sample: str | None) -> Any:
    """The sample of an item: the named column, or what a tuple begins with."""
    if not isinstance(item, Mapping):
        return item[0]
    if sample is None:
        sample = next((name for name in ("image", "img", "text") if name in item), None)
    _check_column("sample", sample, item)
    return item[sample]


def _check_column(name: str, value: Any, columns: Iterable[Any]) -> None:
    columns = list(columns)
    if columns.count(value) != 1:
        raise ValueError(f"{name} must be one of the columns {', '.join(map(str, columns))} (got {value!r})")


def _check_complete(name: str, labels: Any) -> None:
    """ValueError where one is None or NaN, or text among numbers: NumPy would make `nan` and `1` of them, in text."""
    array = np.array(labels, dtype=object) if isinstance(labels, (list, tuple)) else np.asarray(labels)
    if array.dtype.kind not in "Of":
        return
    values = array.ravel().tolist()
    if missing := [index for index, each in enumerate(values) if _is_missing(each)]:
        raise ValueError(
            f"{name} must not be missing (got {values[missing[0]]} at {missing[0]}; {len(missing)} of {len(values)})"
        )
    texts = sum(isinstance(each, str) for each in values)
    if 0 < texts < len(values):
        raise ValueError(f"{name} must be all text or all numbers (got {texts} and {len(values) - texts})")


def _is_missing(label: Any) -> bool:
    """None, NaN, or what pandas has for them."""
    missing = label is None or type(label).__name__ in ("NAType", "NaTType")
    return missing or (isinstance(label, (float, np.floating)) and bool(np.isnan(label)))


def _as_array(sample: Any) -> np.ndarray:
    """An array `[C, H, W]` or `[H, W]` of a tensor, or of a PIL image or array `[H, W]` or `[H, W, C]`."""
    if isinstance(sample, Tensor):
        _check_dtype(sample.dtype)
        return sample.detach().cpu().numpy()
    array = np.array(sample)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"samples must be numbers (got {type(sample).__name__} {str(sample)[:40]!r}); data.Text reads sentences"
        )
    _check_dtype(array.dtype)
    return array.transpose(2, 0, 1) if array.ndim == 3 else array
