"""One typed configuration makes a run: learner, model, data, sampling, training, evaluation.

As YAML, and as the options of `metaaug-fast train`:

    learner:    {name: maml, inner_lr: 0.4, inner_steps: 1}      fields of the learner's constructor
    model:      {name: conv4, hidden: 32}                        of the model's, `ways` and `sample_shape` from the data
    data:       {name: omniglot, root: DIR}                      of the data set's
    sampling:   {ways: 5, shots: 1, queries: 5, tasks: 32}       see `Sampling`
    training:   {steps: 4000, meta_lr: 0.001}                    see `Training`
    evaluation: {episodes: 600}                                  see `Judging`

What is not given is the recipe's for this pair of learner and data set (`recipes/LEARNER-DATA.yaml`), else the
constructor's default.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml

from ..checks import check_choice, check_count, check_integer, check_number
from .fields import REQUIRED, UNSET, Field, fields_of, parameters_of, read_options, shown
from .registry import find_data, find_function, find_learner, find_model, nearest
from .training import SCHEDULES

SECTIONS = ("learner", "model", "data", "sampling", "training", "evaluation")
_NAMED = ("learner", "model", "data")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Sampling:
    """What one task consists of, and how many come at a time; see `Episodes`."""

    ways: int = _option(5, "classes a task")
    shots: int = _option(1, "support samples a class, or points of a regression task")
    queries: int = _option(5, "query samples a class")
    tasks: int = _option(16, "a batch")
    train_ways: int | None = _option(None, "classes a task in training, where they differ")
    train_shots: int | None = _option(None, "shots in training, where they differ")
    train_queries: int | None = _option(None, "queries in training, where they differ")
    split_styles: bool = _option(False, "queries in other styles than the support set (glyphs: typefaces)")

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.type in ("int", "int | None") and value is not None:
                check_count(each.name, value, low=1)


@dataclass(frozen=True)
class Training:
    """How the learner is trained; see `train`."""

    steps: int = _option(1000, "meta-steps, those before a resumption included")
    meta_lr: float | None = _option(None, "meta-learning rate; the learner's own without it")
    schedule: str = _option("constant", f"of that rate: {', '.join(SCHEDULES)}")
    clip_norm: float | None = _option(None, "length to which gradients are cut")
    validate_every: int | None = _option(None, "meta-steps; a tenth of all without it")
    validation_episodes: int = _option(200, "to validate on")
    patience: int | None = _option(None, "validations without a better one, after which training stops")
    minutes: float | None = _option(None, "of meta-steps, after which training stops")
    keep_best: bool = _option(False, "keep the best state by validation, and test that")
    checkpoint_every: int | None = _option(None, "meta-steps")
    seed: int = _option(0, "of weights and training episodes; validation and test episodes are always the same")

    def __post_init__(self) -> None:
        for name in ("steps", "validate_every", "patience", "checkpoint_every"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), low=1)
        check_count("validation_episodes", self.validation_episodes, low=2)
        for name in ("clip_norm", "minutes"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name))
        if self.meta_lr is not None and not 0 < self.meta_lr <= torch.finfo(torch.float32).max:
            raise ValueError(f"meta_lr must be > 0 and finite in float32 (got {self.meta_lr})")
        check_choice("schedule", self.schedule, SCHEDULES)
        check_integer("seed", self.seed, low=0)
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63 (got {self.seed})")


@dataclass(frozen=True)
class Judging:
    """How the learner is judged; see `evaluate`."""

    episodes: int = _option(600, "of new classes, to evaluate on")
    test_steps: int | None = _option(None, "inner steps in evaluation, where they differ")

    def __post_init__(self) -> None:
        check_count("episodes", self.episodes, low=2)
        if self.test_steps is not None:
            check_count("test_steps", self.test_steps)


@dataclass(frozen=True)
class Part:
    """Something by its registered name, or `module:attribute`, with the fields of its constructor."""

    name: str
    fields: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, **self.fields}


@dataclass(frozen=True)
class Config:
    """A whole run. `configure` makes one; `as_dict` is what a checkpoint and a YAML file hold.

    model: None for a learner that takes none.
    """

    learner: Part
    model: Part | None
    data: Part
    sampling: Sampling
    training: Training
    evaluation: Judging

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers: the inverse of `configure(content)`."""
        return {
            section: part.as_dict() if isinstance(part, Part) else asdict(part)
            for section, part in vars(self).items()
            if part is not None
        }

    def as_yaml(self) -> str:
        """For a file that `--config` takes."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False)

    def in_words(self, regression: bool) -> str:
        """In a line; of a regression family, whose tasks have no classes, in its words."""
        sampling, training = self.sampling, self.training
        tasks = f"{sampling.shots} points" if regression else f"{sampling.ways}-way {sampling.shots}-shot"
        parts = [] if self.model is None else [self.model.name]
        parts += [f"{sampling.tasks} tasks", *_in_words(self.learner.fields)]
        if training.meta_lr is not None:
            parts.append(f"meta lr {training.meta_lr:g}")
        return f"{self.learner.name} on {self.data.name}, {tasks}: {', '.join(parts)}, {training.steps} steps"


def configure(
    content: Mapping[str, Any],
    options: Sequence[str] = (),
    *,
    allow: Collection[str] | None = None,
    sections: Sequence[str] = SECTIONS,
    others: Collection[str] = (),
) -> Config:
    """The configuration that `content` describes, each field checked against its type.

    Args:
        content: sections with their fields, as in a YAML file. `learner.name` and `data.name` must be there.
        options: further fields as on the command line, `["--inner-lr", "0.1", "--model.hidden", "32"]`.
        allow: see `Registry.find`.
        sections: those that `options` may speak of.
        others: options that the caller reads itself; no field goes by such a short name.

    Raises:
        ValueError: a name, a section or a field is unknown (the nearest known one is named), or has a wrong value; or
            a function that a field names, `module:attribute`, is not there, or not allowed.

    >>> content = {"learner": {"name": "maml"}, "data": {"name": "sinusoid"}}
    >>> configure(content, ["--inner-steps", "5"]).learner.fields["inner_steps"]
    5
    """
    content = with_model(checked_content(content), allow)
    known = fields_of_run(content, allow)
    values = {each.key: each.default for each in known}
    for section, given in content.items():
        names = {each.name: each for each in known if each.section == section}
        for name, value in given.items():
            if name in names:
                values[names[name].key] = names[name].of_file(value)
            elif name != "name" or section not in _NAMED:
                has = f"it has {', '.join(names)}" if names else "it has none"
                raise ValueError(f"{section} has no field {name!r}{nearest(name, names)} ({has})")
    chosen = read_options(known, options, sections, others)
    for each in known:
        if each.names_function(value := chosen.get(each.key, values[each.key])):
            find_function(each.key, value, None if each.key in chosen else allow)
    values |= chosen
    parts: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for each in known:
        value = values[each.key]
        if value is REQUIRED:
            raise ValueError(
                f"{each.key} must be given: {content[each.section]['name']} has no default for it (got none)"
            )
        if value is not UNSET:
            parts[each.section][each.name] = value
    learner, model, data = (
        Part(content[section]["name"], parts[section]) if section in content else None for section in _NAMED
    )
    assert learner is not None
    assert data is not None
    return Config(
        learner,
        model,
        data,
        Sampling(**parts["sampling"]),
        Training(**parts["training"]),
        Judging(**parts["evaluation"]),
    )


def fields_of_run(content: Mapping[str, Mapping[str, Any]], allow: Collection[str] | None = None) -> list[Field]:
    """All fields of a run with these names; ValueError where one is unknown."""
    found: list[Field] = []
    data = find_data(content["data"]["name"], allow)
    for section, find in (("learner", find_learner), ("model", find_model), ("data", find_data)):
        if section in content:
            name = content[section]["name"]
            found += fields_of(section, find(name, allow), name)
    if getattr(data, "target_shape", None) is not None:  # the constructors' own loss is for classes
        found = [
            replace(each, default="mse") if (each.key, each.default) == ("learner.loss", "cross_entropy") else each
            for each in found
        ]
    for section, options in (("sampling", Sampling), ("training", Training), ("evaluation", Judging)):
        hints = typing.get_type_hints(options)
        found += [
            Field(section, each.name, hints[each.name], each.default, each.metadata["help"])
            for each in dataclasses.fields(options)
        ]
    return found


def named_functions(config: Config) -> list[str]:
    """The functions of the user's own among the values of fields, as `module:attribute`."""
    content = config.as_dict()
    values = ((each, content[each.section].get(each.name)) for each in fields_of_run(content))
    return [value for each, value in values if each.names_function(value)]


def with_model(content: dict[str, dict[str, Any]], allow: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """The content with a model, where the learner takes one: if none is named, the one that suits the data."""
    learner, data, model = content["learner"]["name"], content["data"]["name"], content.get("model", {})
    if "model" not in parameters_of(find_learner(learner, allow)):
        if model:
            raise ValueError(f"model must not be given: {learner} takes none (got {model.get('name', model)})")
        return {section: fields for section, fields in content.items() if section != "model"}
    if "name" in model:
        return content
    default = getattr(find_data(data, allow), "default_model", None)
    if not isinstance(default, str):
        raise ValueError(f"model must be given: data {data} names none that suits it (got none)")
    return {**content, "model": {"name": default, **model}}


def recipes() -> list[str]:
    """Names of the recipes there are: one for each learner and data set, and variants of them.

    >>> "maml-omniglot" in recipes()
    True
    """
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def recipe(name: str) -> dict[str, Any]:
    """The content of a recipe; ValueError if there is none of that name."""
    if name not in recipes():
        raise ValueError(f"recipe must be one of {', '.join(recipes())} (got {name!r}{nearest(name, recipes())})")
    return read_yaml(_folder() / f"{name}.yaml")


def read_yaml(path: Any) -> dict[str, dict[str, Any]]:
    """The sections in a YAML file.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is no YAML, or holds something else.
    """
    path = Path(path) if isinstance(path, str) else path
    if not path.is_file():
        raise FileNotFoundError(f"config must be a file (there is none at {path})")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())})") from None
    try:
        return checked_content(content, whole=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def merged(*contents: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sections with the fields of all, later ones before earlier ones; where a name changes, its old fields go."""
    result: dict[str, dict[str, Any]] = {}
    for content in contents:
        for section, fields in content.items():
            before = result.get(section, {})
            renamed = "name" in fields and "name" in before and fields["name"] != before["name"]
            result[section] = {**({} if renamed else before), **fields}
    return result


def checked_content(content: Any, whole: bool = True) -> dict[str, dict[str, Any]]:
    """`content` as sections of fields; ValueError unless it is that, and `whole`, names its learner and data set."""
    if not isinstance(content, Mapping):
        raise ValueError(f"a configuration must have the sections {', '.join(SECTIONS)} (got {shown(content)})")
    for section, fields in content.items():
        if section not in SECTIONS:
            raise ValueError(
                f"a section must be one of {', '.join(SECTIONS)} (got {section!r}{nearest(str(section), SECTIONS)})"
            )
        if not isinstance(fields, Mapping):
            raise ValueError(f"{section} must be a mapping from fields to values (got {shown(fields)})")
        for name in fields:
            if not isinstance(name, str):
                raise ValueError(f"{section} must be a mapping from fields to values (got a field {name!r})")
        if section in _NAMED and not isinstance(fields.get("name", ""), str):
            raise ValueError(f"{section}.name must be a name (got {shown(fields['name'])})")
    result = {section: dict(fields) for section, fields in content.items()}
    if whole:
        for section in ("learner", "data"):
            if "name" not in result.get(section, {}):
                raise ValueError(f"{section}.name must be given (got none)")
    return result


class _Loader(yaml.SafeLoader):
    """Refuses a field that is given twice, of which YAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _folder() -> Any:
    return resources.files(__package__) / "recipes"


def _in_words(fields: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that are not 0, and flags that are set.

    >>> list(_in_words({"inner_lr": 0.4, "momentum": 0.0, "first_order": True, "loss": "mse"}))
    ['inner lr 0.4', 'first order']
    """
    for name, value in fields.items():
        words = name.replace("_", " ")
        if isinstance(value, (int, float)) and value:
            yield words if value is True else f"{words} {value:g}"
