"""How the classes of a data set are divided into parts that share none."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from ..checks import check_choice
from .samples import ClassSamples

PARTS = ("train", "validation", "test")
SHARES = {"train": 64, "validation": 16, "test": 20}
"""Of the classes of a data set that is not divided."""
_FEWEST = 2  # classes of a part: of one alone there is nothing to tell apart


def check_split(split: str) -> None:
    """ValueError unless it is a part, or all of them."""
    check_choice("split", split, (*PARTS, "all"))


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


def sizes_of_few(classes: int) -> dict[str, int]:
    """Classes of each part where there are few: 60 : 20 : 20, at least two each.

    Raises:
        ValueError: there are fewer than six.

    >>> sizes_of_few(10), sizes_of_few(6)
    ({'train': 6, 'validation': 2, 'test': 2}, {'train': 2, 'validation': 2, 'test': 2})
    """
    if classes < len(PARTS) * _FEWEST:
        raise ValueError(
            f"split must be all where there are fewer than {len(PARTS) * _FEWEST} classes to divide (got {classes})"
        )
    held_out = max(round(classes / 5), _FEWEST)
    return {"train": classes - 2 * held_out, "validation": held_out, "test": held_out}


def named_classes(data: ClassSamples, names: Iterable[str], splits: str, source: str) -> ClassSamples:
    """The classes of these names, in this order.

    Raises:
        ValueError: the data lack some; the message names `source`, where they were read from.
    """
    names, rows = list(names), {name: row for row, name in enumerate(data.names)}
    if missing := [name for name in names if name not in rows]:
        raise ValueError(
            f"{source} lacks {len(missing)} of {len(names)} classes of splits={splits!r}, {missing[0]!r} the first; "
            "read the whole archives, or take other splits"
        )
    return data.subset(rows[name] for name in names)


def apart(data: ClassSamples) -> ClassSamples:
    """The same classes in a tensor without samples of others, so that three parts do not hold three times the whole.

    >>> whole = ClassSamples.from_arrays(torch.zeros(12, 2), torch.arange(12) % 3)
    >>> part = whole.subset([2, 0])
    >>> len(part.samples), len(apart(part).samples)
    (12, 8)
    """
    sizes = data.counts.sum(1)
    if sizes.sum() == len(data.samples):
        return data
    samples = torch.cat([data.class_samples(index) for index in range(len(data))])
    return ClassSamples(samples, np.cumsum(sizes) - sizes, data.counts, data.names, data.styles)
