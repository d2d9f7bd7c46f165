"""Runs by name: which learner on which data, with the papers' settings unless told otherwise or noted here."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .. import models
from ..data import ClassImages, Episodes, Glyphs, Omniglot, Sinusoids
from ..errors import in_one_line
from ..learners.maml import MAML
from ..learners.reptile import Reptile

LEARNERS = ("maml", "reptile")
DATA = ("glyphs", "omniglot", "sinusoid")
SPLITS = ("train", "validation", "test")
MODELS: Mapping[str, Callable[[int], nn.Module]] = {
    "mlp": lambda ways: models.mlp([1, 40, 40, 1]),
    "omniglot_mlp": lambda ways: models.omniglot_mlp(ways),
    "conv4": lambda ways: models.conv4(ways),
    "strided_conv4": lambda ways: models.strided_conv4(ways),
}


@dataclass(frozen=True)
class Settings:
    """All that a run depends on; what a checkpoint keeps to rebuild its learner.

    learner: one of LEARNERS. data: one of DATA. root: Omniglot's folder. model: one of MODELS, or `module:attribute`.
    ways, shots, queries, tasks, split_styles: see `Episodes`. train_shots: shots in training, where they differ.
    steps: meta-steps. inner_lr, inner_steps, inner_batch, first_order: see the learner. test_steps: inner steps in
    evaluation, where they differ. meta_lr: of Adam (MAML), or of Reptile's move, which falls linearly to 0.
    seed: of weights and training episodes; validation and test episodes are always the same.
    """

    learner: str
    data: str
    model: str
    steps: int
    tasks: int
    inner_lr: float
    inner_steps: int
    meta_lr: float
    ways: int = 5
    shots: int = 1
    queries: int = 5
    train_shots: int | None = None
    test_steps: int | None = None
    inner_batch: int | None = None
    first_order: bool = False
    split_styles: bool = False
    root: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kinds = getattr(self, field.name), _KINDS[str(field.type)]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ValueError(f"{field.name} must be {field.type} (got {value!r})")
        for name, value, known in (("learner", self.learner, LEARNERS), ("data", self.data, DATA)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)} (got {value!r})")
        if self.data == "omniglot" and self.root is None:
            raise ValueError("root must be the folder of Omniglot's archives (got none)")
        for field in fields(self):
            only = _ONLY.get(field.name)
            if only and only not in (self.learner, self.data) and getattr(self, field.name) != field.default:
                raise ValueError(f"{field.name} is for {only} only (got a run of {self.learner} on {self.data})")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0 (got {self.seed})")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be < 2**63 (got {self.seed})")
        for name in ("steps", "tasks", "ways", "shots", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1 (got {getattr(self, name)})")
        if not 0 < self.meta_lr <= torch.finfo(torch.float32).max:
            raise ValueError(f"meta_lr must be > 0 and finite in float32 (got {self.meta_lr})")

    def as_dict(self) -> dict[str, Any]:
        """The inverse of `Settings(**content)`."""
        return asdict(self)

    def __str__(self) -> str:
        tasks = f"{self.shots} points" if self.data == "sinusoid" else f"{self.ways}-way {self.shots}-shot"
        order = ", first order" if self.first_order else ""
        return (
            f"{self.learner} on {self.data}, {tasks}: {self.model}, {self.tasks} tasks, "
            f"inner lr {self.inner_lr:g} x {self.inner_steps}{order}, meta lr {self.meta_lr:g}, {self.steps} steps"
        )


_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "int | None": (int, type(None)),
    "float": (int, float),
    "bool": (bool,),
}
_ONLY = {
    "first_order": "maml",
    "inner_batch": "reptile",
    "train_shots": "reptile",
    "split_styles": "glyphs",
    "root": "omniglot",
}
_MAML_IMAGES = {"model": "strided_conv4", "inner_lr": 0.4, "inner_steps": 1, "meta_lr": 1e-3}
_REPTILE_IMAGES = {
    "model": "strided_conv4", "tasks": 10, "train_shots": 15, "inner_lr": 1e-3, "inner_steps": 3, "inner_batch": 25,
    "test_steps": 5, "meta_lr": 1.0,
}  # fmt: skip
_DEFAULTS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("maml", "glyphs"): {**_MAML_IMAGES, "tasks": 16, "steps": 500},
    # The paper goes on to 40,000 meta-steps and more; a tenth of that stays below a quarter of an hour on two cores.
    ("maml", "omniglot"): {**_MAML_IMAGES, "queries": 1, "tasks": 32, "steps": 4_000},
    ("maml", "sinusoid"): {
        "model": "mlp", "shots": 10, "queries": 10, "tasks": 25, "inner_lr": 0.01, "inner_steps": 1, "meta_lr": 1e-3,
        "steps": 70_000,
    },
    ("reptile", "glyphs"): {**_REPTILE_IMAGES, "train_shots": 7, "steps": 2_000},
    ("reptile", "omniglot"): {**_REPTILE_IMAGES, "steps": 100_000},
    ("reptile", "sinusoid"): {
        "model": "mlp", "shots": 10, "train_shots": 50, "queries": 10, "tasks": 5, "inner_lr": 0.01, "inner_steps": 10,
        "inner_batch": 10, "meta_lr": 1.0, "steps": 30_000,
    },
}  # fmt: skip


def settings(learner: str, data: str, **given: Any) -> Settings:
    """The papers' settings of a learner on a data set, with those in `given` replaced.

    Raises:
        ValueError: a name is unknown, a number out of range, or an option has no meaning here.

    >>> settings("maml", "sinusoid", inner_steps=5).inner_lr
    0.01
    """
    return Settings(
        learner=learner, data=data, **{**_DEFAULTS.get((learner, data), _DEFAULTS["maml", "glyphs"]), **given}
    )


def settings_from_file(content: Mapping[str, Any], model: str | None = None) -> Settings:
    """The settings that a checkpoint keeps. A file names code by names in `MODELS` only: it may come from anywhere.

    Args:
        model: a `module:attribute` that the user names too, and so may be imported if the file names it.

    Raises:
        ValueError, TypeError: they are no settings, or the model is one that the user has not named.
    """
    run = Settings(**content)
    if model is not None and model != run.model:
        raise ValueError(f"--model must be that of the checkpoint, {run.model} (got {model})")
    if model is None and run.model not in MODELS:
        raise ValueError(f"its model is code outside this package, which only you can name: give --model {run.model}")
    return run


def make_model(name: str, ways: int = 5) -> nn.Module:
    """A network by its name in `MODELS`, or the module (or what the function makes) at `module:attribute`.

    Raises:
        ValueError: there is no such model, or its code raises; the cause is attached.

    >>> make_model("mlp").head
    Linear(in_features=40, out_features=1, bias=True)
    """
    if name in MODELS:
        return MODELS[name](ways)
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, or module:attribute (got {name!r})")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    # The module is the user's: it may raise anything, and a SystemExit would end the program without a word.
    try:
        model = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
        raise ValueError(f"model {name!r} cannot be imported ({in_one_line(error, name=True)})") from error
    if callable(model) and not isinstance(model, nn.Module):
        try:
            model = model()
        except (Exception, SystemExit) as error:
            raise ValueError(f"model {name!r} cannot be made ({in_one_line(error, name=True)})") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} must be an nn.Module or make one (got {type(model).__name__})")
    return model


def make_learner(run: Settings, device: torch.device | str = "cpu") -> MAML | Reptile:
    """The learner with fresh weights, given by the seed."""
    torch.manual_seed(run.seed)
    model = make_model(run.model, run.ways).to(device)
    loss = "mse" if run.data == "sinusoid" else "cross_entropy"
    if run.learner == "maml":
        return MAML(model, run.inner_lr, run.inner_steps, run.first_order, loss=loss)
    return Reptile(
        model,
        run.inner_lr,
        run.inner_steps,
        meta_lr=run.meta_lr,
        inner_batch=run.inner_batch,
        loss=loss,
        seed=run.seed,
    )


def make_episodes(run: Settings, split: str, download: bool = False, device: torch.device | str = "cpu") -> Episodes:
    """Episodes of a split: `"train"`, `"validation"` or `"test"`, of disjoint classes; images are drawn on the device.

    Raises:
        ValueError, OSError: the data set cannot be read, or is too small for such tasks.
    """
    if run.data == "glyphs":
        dataset: ClassImages | Sinusoids = Glyphs(split=split)
    elif run.data == "omniglot":
        dataset = Omniglot(str(run.root), split=split, download=download)
    else:
        dataset = Sinusoids()
    if isinstance(dataset, ClassImages) and torch.device(device).type != "cpu":
        dataset = dataset.to(device)
    training = split == "train"
    return Episodes(
        dataset,
        ways=run.ways,
        shots=run.train_shots or run.shots if training else run.shots,
        queries=run.queries,
        tasks=run.tasks,
        seed=run.seed if training else -SPLITS.index(split),
        split_styles=run.split_styles,
    )


def make_optimizer(run: Settings, learner: nn.Module) -> Optimizer | None:
    """Adam, or nothing for a learner that moves itself."""
    return None if run.learner == "reptile" else torch.optim.Adam(learner.parameters(), run.meta_lr, fused=True)


def make_schedule(run: Settings, learner: MAML | Reptile) -> Callable[[int], None] | None:
    """What to set before each meta-step: Reptile's step size, falling linearly to 0."""
    if not isinstance(learner, Reptile):
        return None

    def anneal(done: int) -> None:
        learner.meta_lr = run.meta_lr * (1 - done / run.steps)

    return anneal
