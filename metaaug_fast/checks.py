"""Arguments that are wrong become one sentence: the caller's name for it, what must hold, and what was got."""

from __future__ import annotations

import sys
from collections.abc import Iterable

_COUNTS_END = 2**31  # the engine counts in 31 bits


def check_number(name: str, value: object, low: float = 0) -> None:
    """Raise TypeError unless `value` is a number, and ValueError unless it is finite and >= `low`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number (got {value!r})")
    if not value >= low:  # NaN neither
        raise ValueError(f"{name} must be >= {low:g} (got {value})")
    if value > sys.float_info.max:
        raise ValueError(f"{name} must be finite (got {value})")


def check_positive(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a number, and ValueError unless it is finite and > 0."""
    if isinstance(value, (int, float)) and not value > 0:
        raise ValueError(f"{name} must be > 0 (got {value})")
    check_number(name, value)


def check_probability(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a number, and ValueError unless it is in 0..1."""
    check_number(name, value)
    if isinstance(value, (int, float)) and value > 1:
        raise ValueError(f"{name} must be in 0..1 (got {value})")


def check_integer(name: str, value: object, low: int | None = None) -> None:
    """Raise TypeError unless `value` is an integer, and ValueError unless it is >= `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer (got {value!r})")
    if low is not None and value < low:
        raise ValueError(f"{name} must be >= {low} (got {value})")


def check_count(name: str, value: object, low: int = 0) -> None:
    """Raise TypeError unless `value` is an integer, and ValueError unless the engine can count `low` .. `value`."""
    check_integer(name, value, low)
    if isinstance(value, int) and value >= _COUNTS_END:
        raise ValueError(f"{name} must be below 2**31 (got {value})")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False (got {value!r})")


def check_choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of the known ones."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)} (got {value!r})")
