"""`metaaug-fast evaluate`: a checkpoint's learner on new classes."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backend_bases import FigureCanvasBase
from torch import Tensor

from .. import files
from ..learners.attacks import FGSM, PGD
from ..learners.base import Learner
from ..report.plots import plot_episode, plot_sinusoid
from ..runs import checkpoint as checkpoints
from ..runs.build import check_ways, make_episodes, make_sources, target_shape_of, vocabulary_of
from ..runs.config import Config, configure
from ..runs.evaluation import device_of
from ..runs.experiment import beside, check_test_steps, judge, write_report
from ..runs.load import configuration, load
from ..runs.registry import find_data
from .options import Parser, add_machine_options, count, finite, options_of, rate, use_machine


def run(arguments: Sequence[str]) -> int:
    """Evaluate, and write a report and, if asked, a picture."""
    parser = _parser()
    first = list(arguments[:1])
    if first and first[0].startswith("-") and not {"-h", "--help"}.intersection(arguments):
        raise ValueError(f"the checkpoint must come first: {parser.usage} (got {first[0]})")
    options, fields = parser.parse_known_args(arguments)
    path, allow = options.checkpoint, tuple(options.allow)
    attack = _attack_of(options)
    use_machine(options)
    before = configuration(path, checkpoints.load(path), allow)
    content = before.as_dict()
    if options.data is not None and options.data != before.data.name:
        content["data"] = {"name": options.data}
        allow = (*allow, options.data.partition(":")[0])
    config = configure(
        content, fields, allow=allow, sections=("data", "sampling", "evaluation"), others=options_of(parser)
    )
    report = options.report or beside(path, ".evaluation.json")
    for target in filter(None, (report, options.plot)):
        if os.path.realpath(target) == os.path.realpath(path):
            raise ValueError(f"--report and --plot must be other files than the checkpoint (got {target})")
        files.try_writing(target)
    if options.plot is not None:
        _check_format(options.plot)
    learner = load(path, allow=allow, device=options.device)
    check_test_steps(config, learner)
    # What the file names has been allowed by now; the rest stands on the command line.
    source = make_sources(config.data, ["test"], download=options.download, device=options.device)["test"]
    regression = target_shape_of(source) is not None
    _check_shapes(before, config, source)
    check_ways(config, target_shape_of(source), allow)
    if options.plot is not None:
        _check_drawable(source.sample_shape, target_shape_of(source))
    episodes = make_episodes(config, "test", source)
    print(f"{path}: {config.in_words(regression)}")
    result = judge(config, learner, episodes)
    attacked = None if attack is None else judge(config, learner, episodes, attack=attack)
    if options.plot is not None:
        _plot(config, learner, source, result.steps, options.plot)
    write_report(report, config, options.device, result, attacked=attacked)
    print(f"report: {report}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="metaaug-fast evaluate",
        usage="metaaug-fast evaluate CHECKPOINT [options] [--any.field VALUE ...]",
        description="How good a checkpoint's learner is on new classes. The fields of its data, sampling and "
        "evaluation may be given as for train: --root, --ways, --shots, --queries, --tasks, --episodes, "
        "--test-steps, ...",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file of metaaug-fast train")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="MODULE",
        help="of your own, whose learner, model, data set or function the checkpoint names: its code may run",
    )
    parser.add_argument("--data", metavar="NAME", help="another data set than the one trained on")
    parser.add_argument("--report", type=Path, metavar="FILE", help="JSON report (CHECKPOINT.evaluation.json)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of the first episode, or of three curves")
    parser.add_argument("--download", action="store_true", help="fetch what the data set lacks")
    attack = parser.add_argument_group("attack", "judge on attacked queries, too, and report both figures")
    attack.add_argument("--attack", choices=("pgd", "fgsm"), help="several steps on the gradient's sign, or one")
    attack.add_argument("--radius", type=rate, metavar="X", help="how far an element of a query may move")
    attack.add_argument("--attack-steps", type=count, metavar="N", help="of pgd (20)")
    attack.add_argument("--attack-step", type=rate, metavar="X", help="of an element (2.5 radius / steps)")
    attack.add_argument(
        "--attack-low", type=finite, metavar="X", help="no element goes below: 0 of pictures (no limit)"
    )
    attack.add_argument("--attack-high", type=finite, metavar="X", help="nor above: 1 of pictures (no limit)")
    add_machine_options(parser)
    return parser


def _attack_of(options: Namespace) -> PGD | None:
    """The attack that is asked for; ValueError where its options do not fit together."""
    given = {
        "--radius": options.radius,
        "--attack-steps": options.attack_steps,
        "--attack-step": options.attack_step,
        "--attack-low": options.attack_low,
        "--attack-high": options.attack_high,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if options.attack is None:
        for name, value in given.items():
            raise ValueError(f"{name} needs an --attack, pgd or fgsm (got {value:g} alone)")
        return None
    if options.radius is None:
        raise ValueError(f"--radius must be given, how far {options.attack} may move an element of a query (got none)")
    low, high = options.attack_low, options.attack_high
    if low is not None and high is not None and low >= high:
        raise ValueError(f"--attack-low must be below --attack-high, {high:g} (got {low:g})")
    if options.attack == "pgd":
        return PGD(options.radius, options.attack_steps or 20, options.attack_step, low=low, high=high)
    for name in ("--attack-steps", "--attack-step"):
        if name in given:
            raise ValueError(f"{name} must be left out with fgsm, one step of the whole radius (got {given[name]:g})")
    return FGSM(options.radius, low=low, high=high)


def _check_shapes(before: Config, after: Config, source: Any) -> None:
    """ValueError unless the data have samples and targets of the kind that the learner was trained on."""
    _check_ids(before, after, source)
    if after.data.name == before.data.name:
        return
    made_for = None if before.model is None else before.model.fields.get("sample_shape")
    if made_for is not None and list(source.sample_shape) != list(made_for):
        raise ValueError(
            f"--data must have samples of the shape that the model was made for, {list(made_for)} "
            f"(got {after.data.name} with {list(source.sample_shape)})"
        )
    trained_on = getattr(find_data(before.data.name, None), "target_shape", None)
    if target_shape_of(source) != trained_on:
        kinds = ["classes" if shape is None else "numbers" for shape in (trained_on, target_shape_of(source))]
        raise ValueError(f"--data must have {kinds[0]} for targets, as {before.data.name} (got {kinds[1]})")


def _check_ids(before: Config, after: Config, source: Any) -> None:
    """ValueError where words have other ids than those that the learner was trained on."""
    model = {} if before.model is None else before.model.fields
    was = {"vocabulary": model.get("vocabulary"), **before.data.fields}
    now = {"vocabulary": vocabulary_of(source), **after.data.fields}
    for name in ("vocabulary", "tokenizer"):
        one, other = was.get(name), now.get(name)
        if one is not None and other not in (None, one):
            raise ValueError(f"data.{name} must be what the learner was trained with, {one} (got {other})")


def _check_format(path: Path) -> None:
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in ("", *known):
        raise ValueError(f"--plot must be a file of a format such as .png, .svg or .pdf (got {path})")


def _check_drawable(sample_shape: Sequence[int], target_shape: Sequence[int] | None) -> None:
    curve = target_shape is not None and math.prod(sample_shape) == math.prod(target_shape) == 1
    image = target_shape is None and len(sample_shape) == 3 and sample_shape[0] in (1, 3)
    if not (curve or image):
        raise ValueError(f"--plot needs images, or curves over one number (got samples of shape {tuple(sample_shape)})")


@torch.no_grad()
def _plot(config: Config, learner: Learner, source: Any, steps: int | None, path: Path) -> None:
    """The first episode, or the first curves before adaptation, after one step and after all of them."""
    regression = target_shape_of(source) is not None
    if regression:
        config = replace(config, sampling=replace(config.sampling, queries=200))
    tasks = make_episodes(config, "test", source).batch(0)
    there = tasks.to(device_of(learner))
    wanted = sorted({0, 1, steps}) if regression and steps is not None else [steps]
    curves: dict[int | None, Tensor] = {}
    for number in wanted:
        given = {} if number is None else {"steps": number}
        curves[number] = learner.adapt(there.support_x, there.support_y, **given)(there.query_x).cpu()
    if regression:
        plot_sinusoid(tasks, curves, path)
    else:
        plot_episode(tasks, curves[steps], path)
    print(f"picture: {path}")
