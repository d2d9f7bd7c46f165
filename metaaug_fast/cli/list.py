"""`metaaug-fast list`: what there is, by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from ..report.tables import plain
from ..runs.config import recipe, recipes
from ..runs.registry import DATA, LEARNERS, MODELS, Registry
from .options import Parser


def run(arguments: Sequence[str]) -> int:
    """Print learners, models, data sets and recipes."""
    Parser(prog="metaaug-fast list", description="Learners, models, data sets and recipes.").parse_args(arguments)
    for title, registry in (("learners", LEARNERS), ("models", MODELS), ("data", DATA)):
        rows = [(name, _first_line(registry, name)) for name in registry.names()]
        print(f"{plain((title, ''), rows)}\n")
    rows = [(name, _settings(name)) for name in recipes()]
    print(plain(("recipes", ""), rows))
    return 0


def _first_line(registry: Registry, name: str) -> str:
    """What it says of itself; a package that cannot be imported is no reason to hide the others."""
    try:
        found = registry.find(name)
    except ValueError as error:
        return str(error)
    return (inspect.getdoc(found) or "").partition("\n")[0]


def _settings(name: str) -> str:
    """The fields of a recipe, in a line."""
    sections = recipe(name)
    fields = (field for section in ("sampling", "training") for field in sections.get(section, {}).items())
    return ", ".join(f"{field.replace('_', ' ')} {value}" for field, value in fields)
