"""Checkpoints of versions 1 and 2 told of their run in one flat table; as a configuration it reads so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LEARNER = ("inner_lr", "inner_steps", "first_order", "inner_batch")
_ONLY = {"first_order": "maml", "inner_batch": "reptile"}
_SAMPLING = ("ways", "shots", "queries", "tasks", "train_shots", "split_styles")


def is_legacy(content: Any) -> bool:
    """Whether a checkpoint's configuration is such a table."""
    return isinstance(content, Mapping) and isinstance(content.get("learner"), str)


def configuration(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that say the same as `settings`; KeyError where something is missing.

    >>> old = {"learner": "maml", "data": "sinusoid", "model": "mlp", "steps": 9, "inner_lr": 0.1, "inner_steps": 1,
    ...        "meta_lr": 0.01, "tasks": 4}
    >>> configuration(old)["learner"]
    {'name': 'maml', 'inner_lr': 0.1, 'inner_steps': 1}
    """
    learner, data = settings["learner"], settings["data"]
    fields = {name: settings[name] for name in _LEARNER if name in settings and _ONLY.get(name, learner) == learner}
    return {
        "learner": {"name": learner, **fields},
        "model": {"name": settings["model"]},
        "data": {"name": data, **({"root": settings["root"]} if data == "omniglot" else {})},
        "sampling": {name: settings[name] for name in _SAMPLING if name in settings},
        "training": {
            "steps": settings["steps"],
            "meta_lr": settings["meta_lr"],
            "schedule": "linear" if learner == "reptile" else "constant",
            "seed": settings.get("seed", 0),
        },
        "evaluation": {"test_steps": settings.get("test_steps")},
    }


def shapes(settings: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Of an input, and of a target where there are no classes: the run did not say, for there were three data sets."""
    return ((1,), (1,)) if settings["data"] == "sinusoid" else ((1, 28, 28), None)
