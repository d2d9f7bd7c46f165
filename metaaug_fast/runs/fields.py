"""The fields of a run: the arguments of constructors that a file or an option can give, and what values they take."""

from __future__ import annotations

import argparse
import collections.abc
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from .registry import find_function, is_data, nearest

GIVEN = {"learner": ("model", "seed", "meta_lr"), "model": (), "data": ("split", "download")}
"""Arguments of constructors that are no fields, for the run gives them."""

FROM_DATA: dict[str, dict[str, tuple[Any, str]]] = {
    "learner": {
        "ways": (int, "classes of a task; null: sampling's"),
        "shots": (int, "support samples a class; null: sampling's"),
        "outputs": (int, "numbers in a target; null: the data's, none for classes"),
    },
    "model": {
        "ways": (int, "outputs; null: as the data have classes"),
        "sample_shape": (list[int], "of an input; null: the data's"),
        "vocabulary": (int, "token ids are below it; null: the data's"),
    },
    "data": {},
}
"""Arguments of each section that the data give where they are null, with the type and the help of their fields."""

ORDER = ("training", "sampling", "evaluation", "learner", "data", "model")
"""Of several fields of one name, that of the first of these sections has it for a short name."""

REQUIRED = inspect.Parameter.empty
UNSET: Any = object()
"""For the default of a field which no file can hold, so that it is left to the constructor."""


@dataclass(frozen=True)
class Field:
    """A field of a section.

    type: what of the argument's type YAML can express. default: a plain value, `REQUIRED` or `UNSET`. help: a sentence.
    call: whether a function may stand there, too, which goes by `module:attribute`.
    """

    section: str
    name: str
    type: Any
    default: Any
    help: str = ""
    call: bool = False

    @property
    def key(self) -> str:
        """Its name in messages."""
        return f"{self.section}.{self.name}"

    @property
    def is_flag(self) -> bool:
        """Whether the option alone means true."""
        return bool in (self.type, *typing.get_args(self.type))

    def names_function(self, value: Any) -> bool:
        """Whether a value of this field is the name of a function."""
        return self.call and _is_name(value)

    def of_file(self, value: Any) -> Any:
        """A value out of a file, as the type has it; ValueError if it is none of this type."""
        value = plain(value)
        if self.type is Any or (type(value) is type(self.default) and value == self.default):
            return value
        if value is None and type(None) not in typing.get_args(self.type):
            raise self._no_value(shown(value))
        parser = self._parser()
        return self._tried(lambda: parser.parse_object({"value": value}), shown(value))

    def of_option(self, text: str) -> Any:
        """A value from the command line, as the type has it; ValueError if it is none of this type."""
        parser = self._parser()
        return self._tried(lambda: parser.parse_args([f"--value={text}"]), text)

    def _parser(self) -> ArgumentParser:
        parser = ArgumentParser(exit_on_error=False, add_help=False)
        parser.add_argument("--value", type=self.type)
        return parser

    def _tried(self, parse: Callable[[], Any], got: str) -> Any:
        try:
            return plain(parse().as_dict()["value"])
        except ArgumentError:
            raise self._no_value(got) from None

    def _no_value(self, got: str) -> ValueError:
        return ValueError(f"{self.key} must be {described(self.type)} (got {got})")


def fields_of(section: str, call: Any, name: str) -> list[Field]:
    """The fields of what goes by `name`: the arguments of its constructor that a file can give.

    Raises:
        ValueError: an argument without default cannot be given by a file.
    """
    if isinstance(call, nn.Module) or is_data(call) or not callable(call):
        return []
    about, found = _documented(call), []
    for parameter in parameters_of(call).values():
        if parameter.name in GIVEN[section]:
            continue
        type_, default = _plain_type(parameter.annotation), parameter.default
        if parameter.name in FROM_DATA[section]:
            (type_, about[parameter.name]), default = FROM_DATA[section][parameter.name], None
        # `name` is what the section itself goes by.
        if type_ is None or parameter.name == "name" or parameter.kind is parameter.POSITIONAL_ONLY:
            if default is REQUIRED:
                given = f"; a run gives {', '.join(GIVEN[section])}" if GIVEN[section] else ""
                raise ValueError(
                    f"{section} {name!r} cannot be configured: no file can give its {parameter.name}{given}"
                )
            continue
        if default is None and type_ is not Any:
            type_ = typing.Optional[type_]  # noqa: UP045
        default = plain(default) if default is REQUIRED or _is_plain(default) else UNSET
        help, call = about.get(parameter.name, ""), _takes_function(parameter.annotation)
        found.append(Field(section, parameter.name, type_, default, help, call))
    return found


def parameters_of(call: Any) -> dict[str, inspect.Parameter]:
    """What a function or a constructor takes, with its annotations; `**options` go to the class above.

    Raises:
        ValueError: it does not say what it takes.

    >>> from metaaug_fast import MAML
    >>> class Mine(MAML):
    ...     def __init__(self, model, tau=1.0, **options):
    ...         super().__init__(model, **options)
    >>> list(parameters_of(Mine))[:4]
    ['model', 'tau', 'inner_lr', 'inner_steps']
    """
    calls = [call]
    if isinstance(call, type):
        calls = [each.__dict__["__init__"] for each in call.__mro__ if "__init__" in each.__dict__]
    found: dict[str, inspect.Parameter] = {}
    for each in calls:
        try:
            parameters = list(inspect.signature(each).parameters.values())[isinstance(call, type) :]
        except ValueError:
            raise ValueError(f"{getattr(call, '__qualname__', call)} does not say which arguments it takes") from None
        try:
            hints = typing.get_type_hints(getattr(each, "func", each))  # of a partial, what it calls
        except Exception:  # annotations of another's code may name what is not there
            hints = {}
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, parameter.replace(annotation=hints.get(parameter.name, Any)))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def as_declared(call: Any, given: Mapping[str, Any], allow: Collection[str] | None) -> dict[str, Any]:
    """Arguments as a constructor takes them: for the name of a function that function, for lists out of a file tuples.

    Lists are left where it declares, or has, a list.

    Args:
        allow: see `Registry.find`.

    Raises:
        ValueError: as `find_function`.
    """
    takes, made = parameters_of(call), {}
    for name, value in given.items():
        if _is_name(value) and _takes_function(takes[name].annotation):
            value = find_function(name, value, allow)
        elif not (isinstance(takes[name].default, list) or list in _origins(takes[name].annotation)):
            value = _fixed(value)
        made[name] = value
    return made


def read_options(
    known: Sequence[Field], arguments: Sequence[str], open_to: Collection[str], others: Collection[str] = ()
) -> dict[str, Any]:
    """The values that options of the command line give, by the fields' keys.

    Args:
        open_to: the sections whose fields may be given.
        others: options that the caller reads itself; no field goes by such a short name.

    Raises:
        ValueError: there is no such option (the nearest is named), it lacks a value, or has one of another type.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    names = spellings(known, others)
    options = [each for each in known if each.section in open_to]
    for each in options:
        parser.add_argument(*names[each.key], dest=each.key, nargs="?", const="true" if each.is_flag else UNSET)
    given, left = parser.parse_known_args(list(arguments))
    if left:
        option = left[0].partition("=")[0]
        if not option.startswith("-"):
            raise ValueError(f"what follows must be options and their values (got {left[0]!r})")
        every = [*others, *(name for each in options for name in names[each.key])]
        raise ValueError(f"{option} is no option here{nearest(option, every)} (--help lists them)")
    values = {}
    for each in options:
        text = getattr(given, each.key, None)
        if text is UNSET:
            raise ValueError(f"{each.key} must be given a value, {described(each.type)} (got none)")
        if text is not None:
            values[each.key] = each.of_option(text)
    return values


def spellings(known: Iterable[Field], others: Collection[str] = ()) -> dict[str, list[str]]:
    """The options of each field, by its key: the shortest first.

    >>> spellings([Field("learner", "inner_lr", float, 0.1)])
    {'learner.inner_lr': ['--inner-lr', '--inner_lr', '--learner.inner_lr', '--learner.inner-lr']}
    """
    taken, found = set(others), {}
    for each in sorted(known, key=lambda each: ORDER.index(each.section)):
        short = [f"--{each.name.replace('_', '-')}", f"--{each.name}"]
        long = [f"--{each.key}", f"--{each.section}.{each.name.replace('_', '-')}"]
        found[each.key] = list(dict.fromkeys(long if short[0] in taken else short + long))
        taken.add(short[0])
    return found


def described(type_: Any) -> str:
    """A type in words.

    >>> described(int | None), described(float | list[float])
    ('an integer or null', 'a number or a list of numbers')
    """
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin in (typing.Union, types.UnionType):
        words = [described(each) for each in arguments]
        return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin is list:
        return f"a list of {_several(arguments[0])}"
    if origin is dict:
        return f"a mapping from text to {_several(arguments[1])}"
    return _WORDS[type_]


_WORDS = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null", Any: "anything",
    list: "a list", tuple: "a list", dict: "a mapping",
}  # fmt: skip


def _several(type_: Any) -> str:
    return {int: "integers", float: "numbers"}.get(type_) or described(type_)


def shown(value: Any) -> str:
    """A value in a message."""
    return "none" if value is None else repr(value)


def plain(value: Any) -> Any:
    """A value as YAML and JSON have it: tuples are lists, and paths are text."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _is_plain(value: Any) -> bool:
    """Whether a file can hold it. Subclasses, such as numpy's numbers, are something else."""
    value = plain(value)
    if isinstance(value, dict):
        return all(type(name) is str and _is_plain(each) for name, each in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _plain_type(hint: Any) -> Any:
    """The part of a type that YAML can express, or None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint in (int, float, bool, str, type(None), list, dict, tuple):
        return hint
    if origin in (typing.Union, types.UnionType):
        parts = [each for each in map(_plain_type, arguments) if each is not None]
        return typing.Union[tuple(parts)] if [each for each in parts if each is not type(None)] else None  # noqa: UP007
    if origin is typing.Literal:
        return hint
    if hint is not object and isinstance(origin or hint, type) and issubclass(Path, origin or hint):
        return str
    if isinstance(origin, type) and issubclass(origin, Mapping):
        value = _plain_type(arguments[1])
        return value and dict[str, value]  # type: ignore[valid-type]
    if isinstance(origin, type) and issubclass(origin, Iterable):
        items = {_plain_type(each) for each in arguments if each is not ...}
        if None in items or not items:
            return None
        return list[items.pop() if len(items) == 1 else Any]  # type: ignore[misc]
    return None


def _origins(hint: Any) -> set[Any]:
    """The classes that a type's members are of."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return {typing.get_origin(each) or each for each in parts}


def _takes_function(hint: Any) -> bool:
    return collections.abc.Callable in _origins(hint)


def _is_name(value: Any) -> bool:
    """Whether it can only be `module:attribute`."""
    return isinstance(value, str) and ":" in value


def _fixed(value: Any) -> Any:
    return tuple(map(_fixed, value)) if isinstance(value, list) else value


def _documented(call: Any) -> dict[str, str]:
    """What the section `Args` of a docstring says of each argument, up to its first full stop.

    >>> def made(size: int, ratio: float):
    ...     '''Make it.
    ...
    ...     Args:
    ...         size: of a side, in
    ...             pixels. At least 8.
    ...     '''
    >>> _documented(made)
    {'size': 'of a side, in pixels'}
    """
    section = (inspect.getdoc(call) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = {}
    for entry in re.split(r"\n(?= {4}\w)", "\n" + section):
        names, colon, about = " ".join(entry.split()).partition(": ")
        for name in names.split(", ") if colon else ():
            found[name] = re.split(r"\.(?: (?=[A-Z])|$)", about)[0]
    return found
