"""How the classes of a data set are divided into parts that share none."""

from __future__ import annotations

from collections.abc import Iterable

from ..checks import check_choice
from .samples import ClassSamples

PARTS = ("train", "validation", "test")
_FEWEST = 2  # classes of a part: of one alone there is nothing to tell apart


def check_split(split: str) -> None:
    """ValueError unless it is a part, or all of them."""
    check_choice("split", split, (*PARTS, "all"))


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
