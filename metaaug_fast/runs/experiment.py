"""A whole run: train as configured, test on new classes, leave a checkpoint and a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..data import Episodes
from ..data.division import PARTS
from ..errors import CheckpointError
from ..learners.attacks import PGD
from ..learners.base import Learner
from . import checkpoint as checkpoints
from .build import (
    check_train_ways,
    fitted,
    make_episodes,
    make_learner,
    make_sources,
    target_shape_of,
    vocabulary_of,
)
from .config import SECTIONS, Config
from .evaluation import Evaluation, evaluate
from .fields import FROM_DATA
from .history import EARLY, TIME, History, ValidationPoint
from .load import interrupted
from .registry import find_data
from .training import train


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    config: with everything filled in. learner: as it was tested. evaluation: on new classes; None: a signal stopped
    the run before it.
    """

    config: Config
    learner: Learner
    history: History
    evaluation: Evaluation | None


def run(
    config: Config,
    out: str | Path,
    *,
    resume: str | Path | None = None,
    device: torch.device | str = "cpu",
    download: bool = False,
    allow: Collection[str] | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train and test as configured.

    Args:
        config: from `configure`.
        out: the checkpoint; a report lies beside it, `NAME.json`.
        resume: a checkpoint to go on from, of the same configuration but for `MAY_CHANGE`.
        download: fetch what the data set lacks.
        allow: modules whose code may be imported, or names of such code; None: any.
        progress: a bar.
        say: gets a few lines of text.

    Raises:
        ValueError, OSError: a part cannot be made, the data cannot be read, or `out` cannot be written, before any
            work. Others: as `train`.
    """
    before = None if resume is None else interrupted(resume, allow)
    if before is not None:
        check_goes_on(before.config, config)
    data = find_data(config.data.name, allow)
    if hasattr(data, "target_shape"):  # before they are read
        check_train_ways(config, data.target_shape, allow)
    out = Path(out)
    with files.claimed(out):
        report = beside(out, ".json")
        files.try_writing(report)
        sources = make_sources(config.data, download=download, device=device, allow=allow)
        source = sources["train"]
        config = fitted(config, source.sample_shape, target_shape_of(source), vocabulary_of(source), allow=allow)
        torch.manual_seed(config.training.seed)  # of every device, for what is random in training
        learner = make_learner(config, device, allow)
        check_test_steps(config, learner)
        training, validation, test = (make_episodes(config, split, sources[split]) for split in PARTS)
        settings = config.training
        if before is not None:  # of a run that has gone further than asked, the truth
            config = replace(config, training=replace(settings, steps=max(settings.steps, before.step)))
        runs_on = learner.runs_on(source.sample_shape, ids=getattr(source, "ids", False))
        say(f"{config.in_words(target_shape_of(source) is not None)}; {runs_on}, {where(device)}")
        tenth = math.ceil(settings.steps / 10)
        history = train(
            learner,
            learner.prepare(training, resumed=before is not None),
            settings.steps,
            meta_lr=settings.meta_lr,
            schedule=settings.schedule,
            clip_norm=settings.clip_norm,
            validate=lambda: evaluate(
                learner, validation, settings.validation_episodes, steps=config.evaluation.test_steps
            ),
            validate_every=settings.validate_every or tenth,
            patience=settings.patience,
            minutes=settings.minutes,
            keep_best=settings.keep_best,
            checkpoint=out,
            checkpoint_every=settings.checkpoint_every or min(500, tenth),
            resume=None if before is None else before.path,
            config=config.as_dict(),
            progress=progress,
        )
        say(f"checkpoint: {out}")
        if history.stopped_by not in (None, EARLY, TIME):
            return Outcome(config, learner, history, None)
        if history.stopped_by == TIME:
            say(f"stopped after {settings.minutes:g} minutes: {history.training[-1].step} meta-steps")
        if history.stopped_by == EARLY:
            say(f"stopped early: {settings.patience} validations without a better one")
        if settings.keep_best and history.best is not None:
            _take_best(learner, history.best, [out] if resume is None else [out, resume], say)
        evaluation = judge(config, learner, test, say)
        write_report(report, config, device, evaluation, history)
        say(f"report: {report}")
    return Outcome(config, learner, history, evaluation)


MAY_CHANGE = {
    "data.root", "data.cache_dir", "training.steps", "training.validate_every", "training.validation_episodes",
    "training.patience", "training.minutes", "training.keep_best", "training.checkpoint_every", "evaluation.episodes",
}  # fmt: skip
"""What a run may have in another way when it goes on: nothing that its meta-steps depend on but how many there are."""


def check_goes_on(before: Config, after: Config) -> None:
    """ValueError unless the run `before` can go on as `after`; a model may leave open what was filled in."""
    old, new = before.as_dict(), after.as_dict()
    for section in SECTIONS:
        was, now = old.get(section, {}), new.get(section, {})
        for field in {**was, **now}:
            key, value = f"{section}.{field}", now.get(field)
            filled_in = field in FROM_DATA.get(section, {}) and value is None
            if was.get(field) != value and key not in MAY_CHANGE and not filled_in:
                raise ValueError(f"{key} must be that of the checkpoint, {was.get(field)} (got {value})")


def check_test_steps(config: Config, learner: Learner) -> None:
    """ValueError where test steps are given and there is no inner loop to take them."""
    steps = config.evaluation.test_steps
    if steps is not None and learner.inner_steps is None:
        raise ValueError(f"test_steps must be null for {config.learner.name}, which has no inner loop (got {steps})")


def _take_best(learner: Learner, best: ValidationPoint, runs: Sequence[str | Path], say: Callable[[str], None]) -> None:
    """Put the state after the best validation into the learner: the one kept beside one of these checkpoints."""
    for path in map(files.best_of, runs):
        try:
            state = checkpoints.load(path)
            found = History.from_dict(state["history"]).validation[-1:] == [best]
        except (FileNotFoundError, CheckpointError, KeyError, TypeError, ValueError):
            continue
        if found:
            learner.load_state_dict(state["learner"])
            say(f"best after {best.step} meta-steps: {path}")
            return
    say(f"the best state, after {best.step} meta-steps, was not kept: the last one is tested")


def judge(
    config: Config,
    learner: Learner,
    episodes: Episodes,
    say: Callable[[str], None] = print,
    attack: PGD | None = None,
) -> Evaluation:
    """The learner on test episodes; of regression, after each step, too, unless there is an attack."""
    regression = target_shape_of(episodes.dataset) is not None
    by_step = regression and learner.inner_steps is not None and attack is None
    options = config.evaluation
    result = evaluate(learner, episodes, options.episodes, steps=options.test_steps, by_step=by_step, attack=attack)
    say(f"new {'tasks' if regression else 'classes'}: {result}")
    if by_step:
        say("  after 0, 1, ... steps: " + ", ".join(f"{value:.4f}" for value in result.by_step))
    return result


def write_report(
    path: Path,
    config: Config,
    device: torch.device | str,
    result: Evaluation,
    history: History | None = None,
    attacked: Evaluation | None = None,
) -> None:
    """A JSON file with all that a figure depends on."""
    content: dict[str, Any] = {
        "versions": {"metaaug_fast": version("metaaug_fast"), "torch": torch.__version__},
        "device": str(device),
        "threads": torch.get_num_threads(),
        "config": config.as_dict(),
        "evaluation": result.as_dict(),
    }
    if attacked is not None:
        content["attacked"] = attacked.as_dict()
    if history is not None:
        content["history"] = history.as_dict()
    files.write_json(path, content)


def beside(path: Path, suffix: str) -> Path:
    """Where a report lies; never at `path` itself, and another one for `lr0.1` than for `lr0.2`."""
    return path.with_suffix(suffix) if path.suffix == ".safetensors" else path.with_name(path.name + suffix)


def where(device: torch.device | str) -> str:
    """What the run is computed by."""
    threads = f"{torch.get_num_threads()} threads"
    return threads if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device)
