"""A learner out of a checkpoint, as its run configured it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, in_one_line
from ..learners.base import Learner
from . import checkpoint as checkpoints
from . import legacy
from .build import fitted, make_learner
from .config import Config, configure
from .resume import check_state, check_stored_count


def load(
    path: str | Path,
    learner: Learner | None = None,
    *,
    allow: Collection[str] = (),
    device: torch.device | str = "cpu",
) -> Learner:
    """The learner that a checkpoint holds, made from the run's configuration; no code out of the file is executed.

    Args:
        path: a file of `metaaug-fast train`, `mf.runs.run` or `mf.train`.
        learner: the learner to put the weights into, which is needed where the file has no configuration, for
            `mf.train` was called without one.
        allow: modules whose code may be imported, where the configuration names a learner, a model, data or a function
            of the user's own as `module:attribute`; or such names themselves.
        device: where the learner is to be.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, has no configuration, names a class that is not registered, or does not fit; a
            `learner` that was given is as it was.

    >>> import tempfile, metaaug_fast as mf
    >>> path = f"{tempfile.mkdtemp()}/maml.safetensors"
    >>> config = mf.runs.configure(mf.runs.recipe("maml-sinusoid"), ["--steps", "1"])
    >>> _ = mf.runs.run(config, path, progress=False, say=lambda text: None)
    >>> mf.load(path).inner_steps
    1
    """
    state = checkpoints.load(path)
    if learner is None:
        config = configuration(path, state, allow)
        try:
            with torch.random.fork_rng(devices=()):  # weights are drawn, which is to change nobody else's numbers
                learner = make_learner(config, device, allow)
        except (ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be used ({in_one_line(error)})") from error
    try:
        check_state(learner, state["learner"])
        learner.load_state_dict(state["learner"])
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit the learner ({in_one_line(error)})") from error
    return learner


def configuration(path: str | Path, state: Mapping[str, Any], allow: Collection[str] | None = ()) -> Config:
    """The configuration in a checkpoint's state; CheckpointError if there is none that can be used."""
    content = state.get("config")
    if not content:
        raise CheckpointError(
            f"{path} has no configuration, for no run of metaaug-fast wrote it; "
            "mf.load(path, learner) takes the learner that it is of"
        )
    try:
        old = content if legacy.is_legacy(content) else None
        if old is not None:
            content = legacy.configuration(old)
        config = configure(content, allow=allow)
        if config.model is not None and "name" not in content.get("model", {}):
            raise ValueError("model.name must be given (got none)")
        return config if old is None else fitted(config, *legacy.shapes(old))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has no configuration of a run ({in_one_line(error, name=True)})") from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


@dataclass(frozen=True)
class Interrupted:
    """A run that can go on: the file to resume, its configuration, and the meta-steps that are done."""

    path: Path
    config: Config
    step: int


def interrupted(path: str | Path, allow: Collection[str] | None = ()) -> Interrupted:
    """The run that wrote a checkpoint; where the file is damaged, as it was in the one before, with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: both are damaged, an older version wrote it, or as `configuration`.
    """
    state, source = checkpoints.load_or_previous(path)
    if legacy.is_legacy(state.get("config")):
        raise CheckpointError(
            f"{source} is of an older metaaug_fast: it can be evaluated and loaded, but its run cannot go on"
        )
    config = configuration(source, state, allow)
    try:
        check_stored_count("step", state["step"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{source} was not written by a run ({in_one_line(error, name=True)})") from error
    return Interrupted(source, config, int(state["step"]))
