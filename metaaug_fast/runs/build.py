"""From a configuration to what it names: data, model, learner."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..data import ClassSamples, Episodes, TaskSource
from ..data.division import PARTS, SHARES
from ..learners.base import Learner
from .config import Config, Part
from .fields import FROM_DATA, as_declared, parameters_of
from .registry import DATA, LEARNERS, MODELS, find_data, find_learner, find_model, is_data


def make_sources(
    part: Part,
    splits: Sequence[str] = PARTS,
    *,
    download: bool = False,
    device: torch.device | str = "cpu",
    allow: Collection[str] | None = None,
) -> dict[str, TaskSource]:
    """The data of each split, on a device where they are samples.

    A data set that takes no `split` is made once and cut by its classes, 64 : 16 : 20; a family of functions is whole.
    The split "all" is all classes.

    Raises:
        ValueError, OSError: the data set cannot be made, read or cut, or `download` is asked of one that fetches none.
    """
    found = find_data(part.name, allow)
    takes = {} if is_data(found) else parameters_of(found)
    if download and "download" not in takes:
        raise ValueError(f"download must not be given: data {part.name} fetches nothing")

    def made(**split: str) -> TaskSource:
        source = found
        if not is_data(found):
            given = {**as_declared(found, part.fields, allow), **split, **({"download": True} if download else {})}
            source = DATA.tried(part.name, lambda: found(**given), "made")
        if not is_data(source):
            raise ValueError(
                f"data {part.name!r} must be, or make, a TaskSource or a data set with labels "
                f"(got {type(source).__name__})"
            )
        if not isinstance(source, TaskSource):
            source = DATA.tried(part.name, lambda: ClassSamples.from_dataset(source), "read")
        if isinstance(source, ClassSamples) and torch.device(device).type != "cpu":
            source = source.to(device)
        return source

    if "split" in takes:
        return {split: made(split=split) for split in splits}
    source = made()
    if isinstance(source, ClassSamples):
        parts = {**source.split_shares(SHARES), "all": source}
        return {split: parts[split] for split in splits}
    if target_shape_of(source) is None:
        raise ValueError(
            f"data {part.name!r} must take split ('train', 'validation', 'test'), for its classes cannot be divided"
        )
    return dict.fromkeys(splits, source)


def make_episodes(config: Config, split: str, source: TaskSource) -> Episodes:
    """Batches of tasks of a split; those of validation and test are the same whatever the run's seed.

    Raises:
        ValueError: the split has too few classes, samples or styles.
    """
    training, sampling = split == "train", config.sampling
    try:
        return Episodes(
            source,
            ways=(training and sampling.train_ways) or sampling.ways,
            shots=(training and sampling.train_shots) or sampling.shots,
            queries=(training and sampling.train_queries) or sampling.queries,
            tasks=sampling.tasks,
            seed=config.training.seed if training else -PARTS.index(split),
            split_styles=sampling.split_styles,
        )
    except ValueError as error:
        raise ValueError(f"{error}, in split {split}") from error


def target_shape_of(source: Any) -> tuple[int, ...] | None:
    """Of a sample's target; None: targets are classes."""
    return getattr(source, "target_shape", None)


def vocabulary_of(source: Any) -> int | None:
    """What its token ids are below; None: it does not say."""
    found = getattr(source, "vocabulary", None)
    return found if isinstance(found, int) else None


def fitted(
    config: Config,
    sample_shape: Sequence[int],
    target_shape: Sequence[int] | None,
    vocabulary: int | None = None,
    *,
    allow: Collection[str] | None = None,
) -> Config:
    """The configuration whose learner and model fit such data: what is `FROM_DATA` is no longer open.

    Args:
        target_shape: None: targets are classes.
        vocabulary: None: the data do not say what their token ids are below.

    Raises:
        ValueError: the model needs a vocabulary and has none, or has a smaller one; or as `check_train_ways` and
            `check_ways`.
    """
    check_train_ways(config, target_shape, allow)
    numbers = None if target_shape is None else math.prod(target_shape)
    own = {"ways": config.sampling.ways, "shots": config.sampling.shots, "outputs": numbers}
    config = replace(config, learner=_filled(config.learner, own, "learner"))
    if config.model is None:
        return config
    encoder = find_learner(config.learner.name, allow).encoder
    outputs = None if encoder else config.sampling.ways if numbers is None else numbers
    given = {"ways": outputs, "sample_shape": list(sample_shape), "vocabulary": vocabulary}
    model = _filled(config.model, given, "model")
    if "vocabulary" in model.fields:
        _check_vocabulary(model.fields["vocabulary"], vocabulary, config.data.name)
    config = replace(config, model=model)
    check_ways(config, target_shape, allow)
    return config


def _filled(part: Part, given: Mapping[str, Any], section: str) -> Part:
    """The part with what it leaves open, of what `FROM_DATA` lists, as it is given."""
    open_ = {name for name in FROM_DATA[section] if name in part.fields and part.fields[name] is None}
    return replace(part, fields={**part.fields, **{name: given[name] for name in open_}})


def _check_vocabulary(models: int | None, datas: int | None, data: str) -> None:
    if models is None:
        raise ValueError(f"model.vocabulary must be given: data {data} do not say what their ids are below (got none)")
    if datas is not None and models < datas:
        raise ValueError(f"model.vocabulary must be at least that of the data, {datas} (got {models})")


def check_train_ways(config: Config, target_shape: Sequence[int] | None, allow: Collection[str] | None) -> None:
    """ValueError where training has other ways than testing, and the learner or its model an output for each class."""
    ways, train_ways = config.sampling.ways, config.sampling.train_ways
    if target_shape is not None or config.model is None or train_ways in (None, ways):
        return
    own = "ways" in config.learner.fields
    if own or not find_learner(config.learner.name, allow).encoder:
        whose = "which" if own else "whose model"
        raise ValueError(
            f"train_ways must be ways, {ways}, for {config.learner.name}, {whose} has an output for each class "
            f"(got {train_ways})"
        )


def check_ways(config: Config, target_shape: Sequence[int] | None, allow: Collection[str] | None) -> None:
    """ValueError where tasks have more classes than the learner, or its model, has outputs."""
    if target_shape is not None or config.model is None:
        return
    encoder = find_learner(config.learner.name, allow).encoder
    section = "learner" if encoder else "model"
    outputs = (config.learner if encoder else config.model).fields.get("ways")
    if outputs is not None and config.sampling.ways > outputs:
        raise ValueError(f"ways must be at most {section}.ways, {outputs} (got {config.sampling.ways})")


def make_model(part: Part, allow: Collection[str] | None = None) -> nn.Module:
    """The network of a `fitted` configuration; of a ready module, a copy.

    Raises:
        ValueError: there is no such model, or its code raises; the cause is attached.

    >>> make_model(Part("mlp", {"ways": 1, "sample_shape": [1]})).head
    Linear(in_features=40, out_features=1, bias=True)
    """
    found = find_model(part.name, allow)
    if isinstance(found, nn.Module):
        return MODELS.tried(part.name, lambda: copy.deepcopy(found), "copied")
    fields = as_declared(found, part.fields, allow)
    model = MODELS.tried(part.name, lambda: found(**fields), "made")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {part.name!r} must be an nn.Module or make one (got {type(model).__name__})")
    return model


def make_learner(config: Config, device: torch.device | str = "cpu", allow: Collection[str] | None = None) -> Learner:
    """The learner of a `fitted` configuration with fresh weights, drawn on the CPU as the seed gives them.

    Raises:
        TypeError, ValueError: an argument is out of range, or does not fit the model.
    """
    torch.default_generator.manual_seed(config.training.seed)
    found = find_learner(config.learner.name, allow)
    given = dict(config.learner.fields)
    for name, value in (("seed", config.training.seed), ("meta_lr", config.training.meta_lr)):
        if name in parameters_of(found) and value is not None:
            given[name] = value
    if config.model is not None:
        given["model"] = make_model(config.model, allow).to(device)
    given = as_declared(found, given, allow)
    learner: Learner = LEARNERS.tried(config.learner.name, lambda: found(**given), "made")
    return learner.to(device)
