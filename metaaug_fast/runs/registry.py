"""What learners, models and data sets there are, by name: ours, those of installed packages, and the user's own.

Ours stand in `learners.LEARNERS`, `models.MODELS` and `data.SOURCES`. A package adds its own by entry points of
the groups `metaaug_fast.learners`, `metaaug_fast.models` and `metaaug_fast.data`. Whatever else can be imported goes by
`module:attribute`, from the folder one works in, too, functions that a field may hold among them; its code runs, so a
name out of a file needs the user's word.

A module is imported as with seed 0: what it makes of random numbers, such as a network's weights, is always the same.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import nn

from ..data import SOURCES, TaskSource
from ..errors import in_one_line
from ..learners import LEARNERS as OUR_LEARNERS
from ..learners.base import Learner
from ..models import MODELS as OUR_MODELS


@dataclass(frozen=True)
class Registry:
    """Names of one kind.

    kind: in messages, and the section of a configuration. ours: what this package brings. group: of entry points.
    """

    kind: str
    ours: Mapping[str, Any]
    group: str

    def names(self) -> list[str]:
        """All registered names."""
        return sorted({*self.ours, *(point.name for point in self._points())})

    def find(self, name: str, allow: Collection[str] | None = None) -> Any:
        """What goes by that name.

        Args:
            allow: what may run as a `module:attribute`, by that name or by its module or a package around that; None:
                anything, for the user has named it.

        Raises:
            ValueError: there is nothing of that name, its module is not allowed, or importing it fails.

        >>> DATA.find("sinusoid")
        <class 'metaaug_fast.data.readers.sinusoid.Sinusoids'>
        """
        if name in self.ours:
            return self.ours[name]
        points = {point.value: point for point in self._points() if point.name == name}
        if len(points) > 1:
            raise ValueError(f"{self.kind} {name!r} is registered more than once: {', '.join(sorted(points))}")
        for point in points.values():
            return self.tried(name, point.load)
        module, colon, attribute = name.partition(":")
        if not colon:
            raise ValueError(
                f"{self.kind} must be one of {', '.join(self.names())}, or module:attribute "
                f"(got {name!r}{nearest(name, self.names())})"
            )
        if allow is None or name in allow:
            return self.tried(name, lambda: _attribute(module, attribute))
        self._check_allowed(name, module, allow)
        found = self.tried(name, lambda: _attribute(module, attribute))
        # What an allowed module has imported from elsewhere would run as well.
        if not any(found is each for each in self.ours.values()):
            self._check_allowed(name, _home(found, module), allow)
        return found

    def tried(self, name: str, call: Callable[[], Any], verb: str = "imported") -> Any:
        """What `call` gives; whatever goes wrong in code that is not ours is a ValueError, with its cause."""
        try:
            return call()
        except (Exception, SystemExit) as error:  # another's may raise anything, and SystemExit would end us silently
            if name in self.ours:
                raise
            raise ValueError(f"{self.kind} {name!r} cannot be {verb} ({in_one_line(error, name=True)})") from error

    def _points(self) -> Iterable[EntryPoint]:
        return entry_points(group=self.group)

    def _check_allowed(self, name: str, module: str | None, allow: Collection[str]) -> None:
        above = (module or "").split(".")
        if not any(".".join(above[: index + 1]) in allow for index in range(len(above))):
            raise ValueError(
                f"{self.kind} {name} is code outside this package, which only you can name: "
                f"allow its module (--allow {module}, in Python allow=[{module!r}])"
            )


_LABELLED = ("targets", "get_labels", "labels", "features")
LEARNERS = Registry("learner", OUR_LEARNERS, "metaaug_fast.learners")
MODELS = Registry("model", OUR_MODELS, "metaaug_fast.models")
DATA = Registry("data", SOURCES, "metaaug_fast.data")


def find_learner(name: str, allow: Collection[str] | None = None) -> type[Learner]:
    """The class of a learner; ValueError as `Registry.find`, or if it is something else."""
    found = LEARNERS.find(name, allow)
    if not (isinstance(found, type) and issubclass(found, Learner)):
        raise ValueError(f"learner {name!r} must be a subclass of metaaug_fast.Learner (got {_kind(found)})")
    return found


def find_model(name: str, allow: Collection[str] | None = None) -> Any:
    """A module, or what makes one; ValueError as `Registry.find`, or if it is something else."""
    found = MODELS.find(name, allow)
    if not (callable(found) or isinstance(found, nn.Module)):
        raise ValueError(f"model {name!r} must be an nn.Module or make one (got {_kind(found)})")
    return found


def find_data(name: str, allow: Collection[str] | None = None) -> Any:
    """A source of tasks, a data set, or what makes one; ValueError as `Registry.find`, or if it is something else."""
    found = DATA.find(name, allow)
    if not (callable(found) or is_data(found)):
        raise ValueError(f"data {name!r} must be, or make, a TaskSource or a data set with labels (got {_kind(found)})")
    return found


def find_function(field: str, name: str, allow: Collection[str] | None = None) -> Any:
    """What the value of a field names; ValueError as `Registry.find`, or if it cannot be called."""
    found = Registry(field, {}, group="").find(name, allow)
    if not callable(found):
        raise ValueError(f"{field} must name what can be called (got {name!r}, {_kind(found)})")
    return found


def is_data(found: Any) -> bool:
    """Whether it is what tasks are drawn from, rather than what makes that; see `ClassSamples.from_dataset`."""
    if isinstance(found, type):
        return False
    return isinstance(found, TaskSource) or any(hasattr(found, name) for name in _LABELLED)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing.

    >>> nearest("protonett", ["maml", "protonet"])
    "; did you mean 'protonet'?"
    """
    by_letters = {each.lstrip("-").replace("_", "-"): each for each in reversed(list(known))}
    found = difflib.get_close_matches(name.lstrip("-").replace("_", "-"), by_letters, 1, cutoff=0.65)
    return f"; did you mean {by_letters[found[0]]!r}?" if found else ""


def _attribute(module: str, attribute: str) -> Any:
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _home(found: Any, module: str) -> str | None:
    """The module whose code runs when `found`, an attribute of `module`, is called."""
    if not callable(found) or isinstance(found, nn.Module) or is_data(found):
        return module
    while isinstance(found, functools.partial):
        found = found.func
    return getattr(found, "__module__", None)


def _kind(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__
