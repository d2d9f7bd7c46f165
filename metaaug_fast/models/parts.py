"""What the networks share: how an input is checked, and the layer at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from ..checks import check_choice, check_count

_Value = TypeVar("_Value")
_Network = TypeVar("_Network", bound=nn.Module)


def check_ways(ways: int | None) -> None:
    """Raise TypeError or ValueError unless `ways` is a count of outputs, or None for an encoder."""
    if ways is not None:
        check_count("ways", ways, low=1)


def check_picture(sample_shape: Sequence[int], smallest: int = 1) -> tuple[int, int, int]:
    """`(channels, height, width)`; ValueError unless `sample_shape` is that, each side at least `smallest`."""
    sizes = tuple(sample_shape)
    good = len(sizes) == 3 and all(type(size) is int and size >= 1 for size in sizes) and min(sizes[1:]) >= smallest
    if not good:
        sides = f", height and width >= {smallest}" if smallest > 1 else ""
        raise ValueError(f"sample_shape must be (channels, height, width){sides} (got {sizes})")
    return sizes  # type: ignore[return-value]


def choice(name: str, value: str, known: Mapping[str, _Value]) -> _Value:
    """`known[value]`; ValueError names what is known."""
    check_choice(name, value, known)
    return known[value]


def head(features: int, ways: int | None) -> dict[str, nn.Module]:
    """The last layer, by its name, or none for an encoder."""
    return {} if ways is None else {"head": nn.Linear(features, ways)}


def taking(sample_shape: Sequence[int], model: _Network) -> _Network:
    """The model, which then says in an attribute what shape its inputs are of."""
    model.sample_shape = tuple(sample_shape)  # type: ignore[assignment]
    return model
